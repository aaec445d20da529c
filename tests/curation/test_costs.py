"""Rates to hours and dollars."""

from __future__ import annotations

import pytest

from emu_ray.curation.costs import NodeKind, Prices, plan, plan_table, stage_costs
from emu_ray.errors import InputError

STAGES = {
    "decode": {"rows": 1000, "seconds": 10.0, "cpus": 1.0, "gpus": 0.0},
    "clip": {"rows": 1000, "seconds": 5.0, "cpus": 1.0, "gpus": 0.1},
    "ocr": {"rows": 1000, "seconds": 0.0, "cpus": 1.0, "gpus": 0.2},
}
NODE = NodeKind(name="box", cpus=10, gpus=1, dollars_per_hour=3.6)


def test_a_stage_costs_its_share_of_core_and_gpu() -> None:
    decode, clip = stage_costs(STAGES, Prices(cpu_core_hour=0.36, gpu_hour=3.6))
    assert (decode.stage, decode.images_per_s, decode.gpu_seconds_per_million) == ("decode", 100, 0)
    assert decode.dollars_per_million == pytest.approx(10_000 * 0.36 / 3600)
    assert clip.gpu_seconds_per_million == pytest.approx(500)
    assert clip.dollars_per_million == pytest.approx(5000 / 3600 * 0.36 + 500 * 0.001)


def test_the_scarcer_resource_decides_and_twice_the_nodes_take_half_as_long() -> None:
    costs = stage_costs(STAGES, Prices())
    one, two = (plan(costs, 1_000_000, n, NODE, efficiency=0.5) for n in (1, 2))
    assert one.bottleneck == "cpus"
    assert one.hours == pytest.approx(15_000 / 10 / 0.5 / 3600) and two.hours == pytest.approx(one.hours / 2)
    assert one.dollars == pytest.approx(one.hours * 3.6) and two.dollars == pytest.approx(one.dollars)
    many_cores = NodeKind(name="wide", cpus=1000, gpus=1, dollars_per_hour=1)
    assert plan(costs, 1_000_000, 1, many_cores).bottleneck == "gpus"
    table = plan_table([one, two])
    assert "1,000,000" in table and "It rests on:" in table and "50%" in table


def test_gpus_on_a_node_without_any_and_nothing_measured_are_one_sentence() -> None:
    with pytest.raises(InputError, match="a box has none"):
        plan(stage_costs(STAGES, Prices()), 1, 1, NodeKind(name="box", cpus=4, gpus=0))
    with pytest.raises(InputError, match="score a sample of the pool first"):
        plan([], 1, 1, NODE)

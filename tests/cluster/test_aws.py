"""`cluster/aws.yaml` as Ray's launcher reads it, and the facts about the machines that it claims."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.accelerators import accelerators

CLUSTER = Path(__file__).parents[2] / "cluster"
# AWS's instance tables, read 2026-11: vCPU, GPUs, kind of GPU
MACHINES = {
    "m7i.2xlarge": (8, 0, None),
    "m7i.4xlarge": (16, 0, None),
    "g6e.2xlarge": (8, 1, "L40S"),
    "p5.48xlarge": (192, 8, "H100"),
}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "aws.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(copy.deepcopy(config))


def test_the_launchers_schema_accepts_it_before_and_after_its_defaults(
    config: dict[str, Any], prepared: dict[str, Any]
) -> None:
    validate_config(copy.deepcopy(config))
    validate_config(prepared)


def test_the_launchers_schema_would_notice_a_wrong_key(config: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**copy.deepcopy(config), "idle_timeout": 3})


def test_no_field_is_left_to_the_launchers_defaults(config: dict[str, Any], prepared: dict[str, Any]) -> None:
    assert prepared.keys() - config.keys() == set()


def test_each_machine_claims_what_its_instance_type_has(config: dict[str, Any]) -> None:
    for name, node in config["available_node_types"].items():
        cpus, gpus, kind = MACHINES[node["node_config"]["InstanceType"]]
        expected_cpus = 0 if name == config["head_node_type"] else cpus
        assert (node["resources"]["CPU"], node["resources"].get("GPU", 0)) == (expected_cpus, gpus), name
        assert node["labels"].get("ray.io/accelerator-type") == kind, name
        validate_node_label_syntax(node["labels"])


def test_kinds_of_gpu_are_spelled_as_ray_detects_them(config: dict[str, Any]) -> None:
    labels = [node["labels"].get("ray.io/accelerator-type") for node in config["available_node_types"].values()]
    known = {getattr(accelerators, name) for name in dir(accelerators) if name.startswith("NVIDIA_")}
    assert {label for label in labels if label} <= known


def test_gpu_machines_are_spot_labelled_spot_and_start_from_none(config: dict[str, Any]) -> None:
    gpu_nodes = [node for node in config["available_node_types"].values() if node["resources"].get("GPU")]
    assert len(gpu_nodes) == 2
    for node in gpu_nodes:
        assert node["min_workers"] == 0
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert node["labels"]["ray.io/market-type"] == "spot"


def test_no_node_type_may_outgrow_the_cluster(prepared: dict[str, Any]) -> None:
    workers = [n for name, n in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    assert all(0 <= node["min_workers"] <= node["max_workers"] <= prepared["max_workers"] for node in workers)


def test_dashboard_is_not_open_to_the_network(config: dict[str, Any]) -> None:
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "~/ray_bootstrap_config.yaml" in start


def test_image_is_named_by_a_version_everywhere_alike(config: dict[str, Any]) -> None:
    image = config["docker"]["image"]
    assert re.search(r":\d+\.\d+\.\d+$", image)
    assert image in (CLUSTER / "Dockerfile").read_text()
    assert image in (CLUSTER / "README.md").read_text()


def test_dockerfile_brings_the_ray_that_is_installed_here() -> None:
    import ray

    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu" in (CLUSTER / "Dockerfile").read_text()

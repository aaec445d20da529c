"""The sweep's table and plot."""

from __future__ import annotations

import io

import pytest
from matplotlib import pyplot as plt
from PIL import Image

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import Preference, from_outcomes
from emu_ray.sweeps.plot import plot_png
from emu_ray.sweeps.table import SweepRow, in_order, markdown_table

HALF: Preference = from_outcomes([1, 1, 0, -1], [0, 1, 2, 3])


def _row(set_size: int, steps: int) -> SweepRow:
    return SweepRow(set_size=set_size, steps=steps, appeal=HALF, faithfulness=HALF)


def test_rows_are_sorted_by_images_then_steps() -> None:
    rows = in_order([_row(300, 50), _row(0, 100), _row(0, 50)])
    assert [(r.set_size, r.steps) for r in rows] == [(0, 50), (0, 100), (300, 50)]


def test_markdown_table_is_rectangular_and_holds_the_figures() -> None:
    lines = markdown_table([_row(1000, 50), _row(30, 50)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 30 | 50 | 50.0 | 0.0 to 100.0 | 50.0 | 25.0 | 25.0 |")
    assert lines[3].startswith("| 1,000 |")


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="twice"):
        in_order([_row(30, 50), _row(30, 50)])


def test_plot_is_a_png_and_its_figure_is_closed() -> None:
    image = Image.open(io.BytesIO(plot_png([_row(s, t) for s in (0, 30, 300) for t in (50, 100)])))
    assert (image.format, image.size) == ("PNG", (1600, 720))
    assert plt.get_fignums() == []


def test_plot_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one row"):
        plot_png([])

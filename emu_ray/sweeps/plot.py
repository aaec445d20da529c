"""Appeal and faithfulness against the number of tuning images, one line per step count: the sweep at a glance."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes

from emu_ray.errors import InputError
from emu_ray.evaluation.charts import LINE_COLOURS, drawn_figure
from emu_ray.evaluation.preference import Preference
from emu_ray.sweeps.table import SweepRow, in_order

QUESTIONS = ("appeal", "faithfulness")


def plot_png(rows: Sequence[SweepRow]) -> bytes:
    """A PNG (1600 x 720 px, white ground): wins minus losses against the base with 95 % intervals. InputError when there is no row.

    Set sizes are spaced by their rank: 0, 30 and 300 would not fit one linear or logarithmic axis.
    """
    ordered = in_order(rows)
    if not ordered:
        raise InputError("a sweep plot needs at least one row, got none")
    with drawn_figure(10.0, 4.5, columns=len(QUESTIONS)) as (figure, panels):
        for axes, question in zip(panels, QUESTIONS, strict=True):
            _draw(axes, question, ordered)
        panels[0].legend(frameon=False, loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, question: str, ordered: Sequence[SweepRow]) -> None:
    sizes = sorted({row.set_size for row in ordered})
    step_counts = sorted({row.steps for row in ordered})
    for i, steps in enumerate(step_counts):
        line = [row for row in ordered if row.steps == steps]
        shift = 0.06 * (i - (len(step_counts) - 1) / 2)  # whiskers beside, not over, each other
        found: list[Preference] = [getattr(row, question) for row in line]
        axes.errorbar(
            [sizes.index(row.set_size) + shift for row in line],
            [p.win_minus_lose for p in found],
            yerr=[
                [max(0.0, p.win_minus_lose - p.win_minus_lose_ci95[0]) for p in found],
                [max(0.0, p.win_minus_lose_ci95[1] - p.win_minus_lose) for p in found],
            ],
            label=f"{steps:,} steps" if steps else "the base itself",
            color=LINE_COLOURS[i % len(LINE_COLOURS)],
            marker="o",
            capsize=3,
            linewidth=1.8,
        )
    axes.axhline(0, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlabel("images tuned on")
    axes.set_ylabel(f"{question}: wins minus losses, points")
    axes.set_ylim(-100, 100)

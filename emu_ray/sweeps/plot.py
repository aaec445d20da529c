"""Appeal against the number of tuning images, one line per step count: the sweep at a glance."""

from __future__ import annotations

import io
from collections.abc import Sequence

from emu_ray.errors import InputError
from emu_ray.evaluation.charts import LINE_COLOURS, drawn_figure
from emu_ray.sweeps.table import SweepRow, in_order


def plot_png(rows: Sequence[SweepRow]) -> bytes:
    """A PNG (1280 x 720 px, white ground) with 95 % intervals of the win share. InputError when there is no row.

    Set sizes are spaced by their rank: 0, 30 and 300 would not fit one linear or logarithmic axis.
    """
    ordered = in_order(rows)
    if not ordered:
        raise InputError("a sweep plot needs at least one row, got none")
    sizes = sorted({row.set_size for row in ordered})
    step_counts = sorted({row.steps for row in ordered})
    with drawn_figure(8.0, 4.5) as (figure, axes):
        for i, steps in enumerate(step_counts):
            line = [row for row in ordered if row.steps == steps]
            shift = 0.06 * (i - (len(step_counts) - 1) / 2)  # whiskers beside, not over, each other
            wins = [row.appeal.win for row in line]
            axes.errorbar(
                [sizes.index(row.set_size) + shift for row in line],
                wins,
                yerr=[
                    [max(0.0, row.appeal.win - row.appeal.ci95[0]) for row in line],
                    [max(0.0, row.appeal.ci95[1] - row.appeal.win) for row in line],
                ],
                label=f"{steps:,} steps",
                color=LINE_COLOURS[i % len(LINE_COLOURS)],
                marker="o",
                capsize=3,
                linewidth=1.8,
            )
        axes.axhline(50, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set_xlabel("images tuned on")
        axes.set_ylabel("appeal: tuned wins, %")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()

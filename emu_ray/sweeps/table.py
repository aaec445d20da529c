"""The sweep's results, one row a setting, and the table a reader gets. Running the trials is `on_ray`'s part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import Preference

COLUMNS = ("images", "steps", "appeal win %", "95 % interval", "faithful win %", "tie %", "lose %")


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One setting, compared with the pretrained model: `set_size` images tuned on for `steps` optimizer updates."""

    set_size: int
    steps: int
    appeal: Preference
    faithfulness: Preference

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        low, high = self.appeal.ci95
        faithful = self.faithfulness
        return (
            f"{self.set_size:,}",
            f"{self.steps:,}",
            f"{self.appeal.win:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{faithful.win:.1f}",
            f"{faithful.tie:.1f}",
            f"{faithful.lose:.1f}",
        )


def in_order(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Rows by set size, then steps. InputError when a setting occurs twice."""
    seen = [(row.set_size, row.steps) for row in rows]
    twice = sorted({setting for setting in seen if seen.count(setting) > 1})
    if twice:
        raise InputError(f"each sweep setting may occur once; found twice (images, steps): {twice}")
    return sorted(rows, key=lambda row: (row.set_size, row.steps))


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """The sweep as a GitHub table, figures right-aligned, ending in a newline."""
    lines = [COLUMNS, ("---:",) * len(COLUMNS), *(row.cells() for row in in_order(rows))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

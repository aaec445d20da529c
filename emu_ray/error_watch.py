"""Stops a run whose error rate jumps: a dead network, a broken model or a dying disk must not reject a million rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emu_ray.errors import StationError

JUDGED_FROM_ROWS = 500  # an error rate means little before


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The rows that tell of a fault, and the words for them."""

    counts: tuple[str, ...]  # the names under which a manifest counts them
    said: str  # of the rows
    look_at: str


@dataclass(frozen=True, kw_only=True)
class ErrorWatch:
    """Bounds of the share of rows that may fail."""

    share_before: float | None  # of all waves before, 0 to 1; None: this is the first
    max_share: float
    max_jump: float
    faults: Faults

    @classmethod
    def before(cls, counts: Mapping[str, int], max_share: float, max_jump: float, faults: Faults) -> ErrorWatch:
        """The watch of the next wave, where `counts` are those of all waves before."""
        rows = counts.get("rows", 0)
        share = _failed(counts, faults) / rows if rows >= JUDGED_FROM_ROWS else None
        return cls(share_before=share, max_share=max_share, max_jump=max_jump, faults=faults)

    def check_counts(self, counts: Mapping[str, int], where: str) -> None:
        """`check` of what `counts` say."""
        self.check(_failed(counts, self.faults), counts.get("rows", 0), where)

    def check(self, errors: int, rows: int, where: str) -> None:
        """StationError when `errors` of `rows` rows are too many."""
        if rows < JUDGED_FROM_ROWS:
            return
        share = errors / rows
        then = f"look at {self.faults.look_at}; the wave was not committed, the same command does it again"
        if share > self.max_share:
            raise StationError(
                f"{where}: {errors} of {rows} rows {self.faults.said}, at most {self.max_share:.0%} "
                f"are allowed (--max-error-share): {then}"
            )
        if self.share_before is not None and share > self.share_before + self.max_jump:
            raise StationError(
                f"{where}: the share of rows that {self.faults.said} jumped from {self.share_before:.1%} to "
                f"{share:.1%} (--max-error-jump {self.max_jump}): {then}"
            )


def _failed(counts: Mapping[str, int], faults: Faults) -> int:
    return sum(counts.get(name, 0) for name in faults.counts)

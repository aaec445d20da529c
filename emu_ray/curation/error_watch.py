"""Stops a run whose error rate jumps: a broken model or a dying disk must not reject a million images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emu_ray.errors import StationError

ERRORS = ("undecodable", "crashed_decoder", "scorer_failed")  # gates that tell of a fault, not of taste
JUDGED_FROM_ROWS = 500  # a wave's error rate means little before


@dataclass(frozen=True, kw_only=True)
class ErrorWatch:
    """Bounds of the share of a wave's rows that may fail."""

    share_before: float | None  # of all waves before, 0 to 1; None: this is the first
    max_share: float
    max_jump: float

    @classmethod
    def before(cls, counts: Mapping[str, int], max_share: float, max_jump: float) -> ErrorWatch:
        """The watch of the next wave, where `counts` are those of all waves before."""
        rows = counts.get("rows", 0)
        failed = sum(counts.get(f"gate_{name}", 0) for name in ERRORS)
        share = failed / rows if rows >= JUDGED_FROM_ROWS else None
        return cls(share_before=share, max_share=max_share, max_jump=max_jump)

    def check(self, errors: int, rows: int, where: str) -> None:
        """StationError when `errors` of the first `rows` rows of a wave are too many."""
        if rows < JUDGED_FROM_ROWS:
            return
        share = errors / rows
        if share > self.max_share:
            raise StationError(
                f"{where}: {errors} of the first {rows} rows can't be decoded or measured, at most {self.max_share:.0%} "
                "are allowed (--max-error-share): look at decode_error, the disk and the weights; the wave was not written"
            )
        if self.share_before is not None and share > self.share_before + self.max_jump:
            raise StationError(
                f"{where}: the share of rows that can't be decoded or measured jumped from {self.share_before:.1%} to "
                f"{share:.1%} (--max-error-jump {self.max_jump}): look at the disk and the weights; the wave was not written"
            )

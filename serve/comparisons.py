"""Blind pairs: one prompt and one seed on two models, the sides drawn by lot, and what people said of them.

A vote is a small file of JSON below a folder, local or on s3://, never written twice; `emu_ray.evaluation.votes` reads them all.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from emu_ray.stations import Station
from serve.catalogue import ServedModel
from serve.painter import PaintJob
from serve.schemas import ApiError

KEPT_S = 3600.0  # for a vote
KEPT_PAIRS = 1000
Choice = Literal["left", "right", "tie"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair that waits for its vote."""

    id: str
    job: PaintJob
    left: ServedModel
    right: ServedModel
    owner: str | None
    made: float  # by time.monotonic


class Comparisons:
    """The pairs of this process."""

    def __init__(self, models: dict[str, ServedModel], votes: str) -> None:
        self._models, self._votes = models, Station(votes)
        self._pairs: dict[str, Pair] = {}
        self._lot = random.SystemRandom()

    def pair_of(self, models: list[str] | None) -> tuple[ServedModel, ServedModel]:
        """Left and right, by lot; the first two models where none are named. ApiError for others than two that are served."""
        named = list(self._models)[:2] if models is None else models
        if len(set(named)) != 2 or not set(named) <= self._models.keys():
            told = f"models: expected two of {', '.join(self._models)}, got {', '.join(named)[:80] or 'none'}"
            raise ApiError(400, told, param="models", code="invalid_value")
        first, second = (self._models[name] for name in named)
        if first.size_px != second.size_px:
            told = (
                f"models: {first.name} draws {first.size_px} px, {second.name} {second.size_px}: name two of one size"
            )
            raise ApiError(400, told, param="models", code="invalid_value")
        return (first, second) if self._lot.random() < 0.5 else (second, first)

    def jobs(self, job: PaintJob, sides: tuple[ServedModel, ServedModel]) -> list[PaintJob]:
        """The same picture by both, without a word of who drew it."""
        return [replace(job, model=model.name, n=1, is_named=False) for model in sides]

    def keep(self, job: PaintJob, sides: tuple[ServedModel, ServedModel], owner: str | None) -> Pair:
        """Once both pictures are there."""
        pair = Pair(
            id=f"cmp-{secrets.token_hex(12)}",
            job=job,
            left=sides[0],
            right=sides[1],
            owner=owner,
            made=time.monotonic(),
        )
        self._pairs[pair.id] = pair
        for old in list(self._pairs.values()):
            if time.monotonic() > old.made + KEPT_S or len(self._pairs) > KEPT_PAIRS:
                del self._pairs[old.id]
        return pair

    async def vote(self, id: str, choice: Choice, owner: str | None) -> dict[str, Any]:
        """Writes what was said of a pair, and tells who drew which side; ApiError 404 for a pair that is gone, or was voted on."""
        pair = self._pairs.get(id)
        if pair is None or pair.owner != owner:
            raise ApiError(
                404, f"there is no pair {id[:80]!r} that waits for a vote", param="id", code="comparison_not_found"
            )
        del self._pairs[id]
        try:
            content = json.dumps(_row(pair, choice)).encode()
            await asyncio.to_thread(self._votes.put_file, f"{id}.json", content)
        except Exception:
            self._pairs[id] = pair  # so that it can be given again
            raise
        return {
            "id": id, "object": "image.comparison.vote", "choice": choice, "left_model": pair.left.name, "right_model": pair.right.name,
        }  # fmt: skip


def _row(pair: Pair, choice: Choice) -> dict[str, Any]:
    job = pair.job
    return {
        "id": pair.id, "time": time.time(), "voter": pair.owner, "choice": choice,
        "left_model": pair.left.name, "right_model": pair.right.name,
        "left_fingerprint": _fingerprint(pair.left), "right_fingerprint": _fingerprint(pair.right),
        "prompt": job.prompt, "negative_prompt": job.negative_prompt, "seed": job.seed, "steps": job.steps, "guidance": job.guidance,
        "scheduler": job.solver, "width_px": job.width_px, "height_px": job.height_px,
    }  # fmt: skip


def _fingerprint(model: ServedModel) -> str | None:
    return None if model.lineage is None else str(model.lineage["fingerprint"])

"""A haystack as a pool of encoded pictures: mostly ordinary, some photogenic, some planted defects, each row with its ground truth.

The rows of a chunk depend on (seed, chunk) alone, so chunks can be made in any order, on any worker.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emu_ray.config import require_at_least
from emu_ray.haystack import defects
from emu_ray.haystack.render import render
from emu_ray.haystack.world import CRITERIA, SceneBatch, captions, draw_scenes, join, reserved
from emu_ray.ingest.pairs import Caps, Pair, pool_tables

JPEG_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class PlantedShares:
    """Share of a pool's rows that carry each defect; a row carries one at most. Our choice."""

    overlaid_text: float = 0.07
    mismatched_caption: float = 0.07
    offensive: float = 0.05
    too_small: float = 0.04
    extreme_aspect: float = 0.04
    exact_duplicate: float = 0.03
    near_duplicate: float = 0.03
    undecodable: float = 0.03


@dataclass(frozen=True, kw_only=True)
class HaystackSource:
    """An embedded pool of `rows` pictures of `side_px`, cut into chunks."""

    rows: int = 4500
    side_px: int = 96
    seed: int = 501
    rows_per_chunk: int = 250
    planted: PlantedShares = PlantedShares()
    photogenic_share: float | None = None  # None: the ordinary mix, about 1 in 10
    with_reserved: bool = False  # whether the contents that evaluation asks for may occur

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rows", "rows_per_chunk")
        require_at_least(self, 8, "side_px")

    def chunks(self) -> list[HaystackChunk]:
        """Every chunk, in order."""
        starts = range(0, self.rows, self.rows_per_chunk)
        return [HaystackChunk(self, i, min(self.rows_per_chunk, self.rows - s)) for i, s in enumerate(starts)]


@dataclass(frozen=True)
class HaystackChunk:
    """Rows of one chunk of a source."""

    source: HaystackSource
    index: int
    rows: int


def chunk_table(chunk: HaystackChunk) -> pa.Table:
    """The chunk as a `pool` table with the extra column `truth`: JSON of defect, criteria, photogenic, picture, copy_of.

    `picture` names the drawn picture; a duplicate has the `copy_of` of another row of its chunk or of the chunk before.
    """
    scenes, planned, rng = _plan(chunk)
    lines, pictures = captions(scenes), render(scenes, chunk.source.side_px)
    met = scenes.criteria
    pairs, truths = [], []
    for i in range(chunk.rows):
        copied = _original(chunk, i, planned, rng) if "duplicate" in planned[i] else None
        picture, caption, truth = pictures[i], lines[i], _truth(chunk, i, met[i], planned[i])
        if copied is not None:
            picture, caption, truth = copied
            truth = {**truth, "defect": planned[i], "picture": f"{chunk.index}/{i}", "copy_of": truth["picture"]}
        elif planned[i] == "mismatched_caption":
            caption, truth["defect"] = _other_caption(lines, i, rng)
        picture = _damage(picture, planned[i], rng)
        encoded = defects.encode_jpeg(
            picture, JPEG_QUALITY if planned[i] != "near_duplicate" else int(rng.integers(80, 90))
        )
        if planned[i] == "undecodable":
            encoded = defects.undecodable(encoded, rng)
        likes = int(rng.poisson(np.exp(1.0 + 0.9 * sum(truth["criteria"].values()) + rng.normal(0, 0.8))))
        pairs.append(Pair(image=encoded, caption=caption, address=f"haystack/{chunk.index:05d}/{i:05d}", likes=likes))
        truths.append(json.dumps(truth))
    table = pa.concat_tables(list(pool_tables(pairs, Caps())))
    return table.append_column("truth", pa.array(truths, pa.string()))


def _plan(chunk: HaystackChunk) -> tuple[SceneBatch, list[str], np.random.Generator]:
    """The chunk's scenes, the defect of each row ("" = none), and the generator for the rest."""
    rng = np.random.default_rng([chunk.source.seed, chunk.index])
    scenes = _draw(rng, chunk)
    shares = vars(chunk.source.planted)
    names = ["", *shares]
    probabilities = [1 - sum(shares.values()), *shares.values()]
    return scenes, [str(n) for n in rng.choice(names, chunk.rows, p=probabilities)], rng


def _draw(rng: np.random.Generator, chunk: HaystackChunk) -> SceneBatch:
    share, rows = chunk.source.photogenic_share, chunk.rows
    if share is None:
        return _draw_allowed(rng, chunk, rows, None)
    beautiful = round(share * rows)
    both = join([_draw_allowed(rng, chunk, beautiful, True), _draw_allowed(rng, chunk, rows - beautiful, False)])
    return both.take(rng.permutation(rows))


def _draw_allowed(rng: np.random.Generator, chunk: HaystackChunk, count: int, photogenic: bool | None) -> SceneBatch:
    scenes = draw_scenes(rng, count, photogenic=photogenic)
    while not chunk.source.with_reserved and (bad := np.flatnonzero(reserved(scenes))).size:
        again = draw_scenes(rng, len(bad), photogenic=photogenic)
        scenes = join([scenes.take(np.setdiff1d(np.arange(count), bad)), again])
    return scenes


def _original(
    chunk: HaystackChunk, row: int, planned: list[str], rng: np.random.Generator
) -> tuple[np.ndarray, str, dict] | None:
    """(picture, caption, truth) of a clean row to copy: half of them from the chunk before, where there is one."""
    source = chunk
    if chunk.index > 0 and rng.random() < 0.5:
        source = HaystackChunk(chunk.source, chunk.index - 1, chunk.source.rows_per_chunk)
    scenes, plan, _ = _plan(source)
    clean = [i for i, defect in enumerate(plan) if defect == "" and (source is not chunk or i != row)]
    if not clean:
        return None
    i = clean[int(rng.integers(len(clean)))]
    one = scenes.take(np.array([i]))
    return render(one, chunk.source.side_px)[0], captions(one)[0], _truth(source, i, one.criteria[0], "")


def _truth(chunk: HaystackChunk, row: int, met: np.ndarray, defect: str) -> dict:
    return {
        "defect": defect,
        "criteria": dict(zip(CRITERIA, met.tolist(), strict=True)),
        "photogenic": bool(met.all()),
        "picture": f"{chunk.index}/{row}",
        "copy_of": "",
    }


def _other_caption(lines: list[str], row: int, rng: np.random.Generator) -> tuple[str, str]:
    """A caption of another content and the defect that it makes; the own one and none where a chunk has no other."""
    others = [k for k in range(len(lines)) if lines[k].split(" ", 3)[-1] != lines[row].split(" ", 3)[-1]]
    return (lines[others[int(rng.integers(len(others)))]], "mismatched_caption") if others else (lines[row], "")


def _damage(picture: np.ndarray, defect: str, rng: np.random.Generator) -> np.ndarray:
    change = {
        "overlaid_text": defects.overlay_text,
        "offensive": defects.offensive_badge,
        "too_small": defects.too_small,
        "extreme_aspect": defects.extreme_aspect,
        "near_duplicate": defects.near_copy,
    }.get(defect)
    return picture if change is None else change(picture, rng)

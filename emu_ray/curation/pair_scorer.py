"""The classes that Ray Data runs in actors: cheap gates with CLIP, then a classifier and OCR on what survived.

Encoded bytes travel between them and pixels never do: decoding twice costs far less than moving decoded pictures. A
broken row gets a reason in a column; no row is dropped and none raises.
"""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import torch

from emu_ray.config import require_at_least
from emu_ray.curation.classifier_scorer import Classifier, ClassifierScorer
from emu_ray.curation.clip_scorer import ClipMeasures, ClipModel, ClipScorer
from emu_ray.curation.ocr_scorer import OcrScorer, OcrSettings
from emu_ray.curation.perceptual_hash import perceptual_hash
from emu_ray.curation.photography import SUBSCORES, photography
from emu_ray.errors import RecipeError
from emu_ray.pictures.decode import DecodeCaps, decode
from emu_ray.pictures.isolated import CRASHED, TOO_LONG, Decode
from emu_ray.records import SCHEMAS

SCORES = SCHEMAS["scores"]
EXTRA = pa.schema(
    [
        ("has_caption", pa.bool_()),
        ("image_digest", pa.string()),  # 16 hex digits of the encoded bytes: equal for exact copies
        ("likes", pa.int64()),
        ("watermark", pa.float32()),  # 0 to 1
        ("photography", pa.float32()),  # 0 to 1, the mean of the next ones
        *((f"photo_{name}", pa.float32()) for name in SUBSCORES),
    ]
)
SECONDS = ("seconds_decode", "seconds_clip", "seconds_classifier", "seconds_ocr")  # a row's share of its batch's time


@dataclass(frozen=True, kw_only=True)
class HardFloors:
    """What is so surely useless that dearer scorers never see it; the row says which floor in `gate_reason`.

    The first group is checked before decoding, the second after CLIP and spares OCR alone. None: no floor.
    """

    min_short_side_px: int | None = None
    max_aspect: float | None = None  # long side over short side
    needs_caption: bool = True
    caps: DecodeCaps = DecodeCaps()

    max_offensive: float | None = None
    min_aesthetic: float | None = None
    min_clip_similarity: float | None = None

    def before_decoding(self, width_px: int | None, height_px: int | None, caption: str) -> str:
        """The reason why a pair isn't decoded, or ""; sizes are of the header, None where it can't be read."""
        if self.needs_caption and not caption.strip():
            return "empty_caption"
        if not width_px or not height_px:
            return ""  # decoding will say what is wrong
        if self.min_short_side_px is not None and min(width_px, height_px) < self.min_short_side_px:
            return "too_small"
        if self.max_aspect is not None and max(width_px, height_px) > self.max_aspect * min(width_px, height_px):
            return "extreme_aspect"
        return ""

    def before_ocr(self, offensive: float | None, aesthetic: float | None, similarity: float | None) -> str:
        """The reason why a measured pair isn't searched for text, or ""; a score that is None stops nothing."""
        if self.max_offensive is not None and offensive is not None and offensive > self.max_offensive:
            return "offensive"
        if self.min_clip_similarity is not None and similarity is not None and similarity < self.min_clip_similarity:
            return "low_clip_similarity"
        if self.min_aesthetic is not None and aesthetic is not None and aesthetic < self.min_aesthetic:
            return "low_aesthetic"
        return ""


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many actors of a class run, and what each takes of the cluster."""

    actors: int = 1  # with max_actors: at least
    max_actors: int | None = None  # the pool grows up to it while work waits
    cpus: float = 1.0  # of each actor
    gpus: float = 0.0  # of each actor; a fraction shares a GPU, 0 runs on the CPU
    batch_size: int = 64  # pairs a pass of the model

    def __post_init__(self) -> None:
        require_at_least(self, 1, "actors", "batch_size")
        if self.max_actors is not None and self.max_actors < self.actors:
            raise RecipeError(f"expected max_actors of at least {self.actors} (actors), found {self.max_actors}")

    @property
    def device(self) -> str:
        """torch's name of the device an actor computes on."""
        return "cuda" if self.gpus > 0 else "cpu"


class PairScorer:
    """Reads key, image, caption, width_px, height_px (likes, fetch_error); adds all of `scores` but text, and EXTRA.

    A row behind a gate has nulls in what was not measured; an undecodable row has its error and the gate "undecodable",
    one that ended the process that decoded it "crashed_decoder", one for which CLIP or a head gave no finite number
    "scorer_failed". `side_px`: pictures at least twice as long are shrunk while decoded.
    """

    def __init__(self, floors: HardFloors, clip: ClipModel, device: str = "cpu", side_px: int | None = None) -> None:
        _one_thread(device)
        self.floors = floors
        self.decode: Decode = functools.partial(decode, caps=floors.caps, side_px=side_px)
        self.clip = ClipScorer(clip, device)

    def __call__(self, pairs: pa.Table, decode: Decode | None = None) -> pa.Table:
        """The measured rows; `decode` stands in for the usual one where a picture has ended a process before."""
        started = time.perf_counter()
        rows = [_empty_row(pair) for pair in pairs.to_pylist()]
        pictures: list[np.ndarray] = []
        decoded: list[dict[str, object]] = []
        for row in rows:
            picture = self._decode(row, decode or self.decode)
            if picture is not None:
                pictures.append(picture)
                decoded.append(row)
        between = time.perf_counter()
        if decoded:
            self._write(decoded, self.clip.measure(pictures, [str(r["caption"]) for r in decoded]))
        ended = time.perf_counter()
        for row in rows:
            row["seconds_decode"] = (between - started) / len(rows)
            row["seconds_clip"] = (ended - between) / len(rows)
        schema = pa.schema([*SCORES, *EXTRA, *((name, pa.float32()) for name in SECONDS), ("image", pa.binary())])
        return pa.table({f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schema})

    def _decode(self, row: dict[str, object], decode: Decode) -> np.ndarray | None:
        """Fill in what the bytes alone tell; the pixels when the row goes on."""
        gate = "not_fetched" if row.get("fetch_error") else ""
        row["decode_error"] = row.get("fetch_error") or ""
        gate = gate or self.floors.before_decoding(row["width_px"], row["height_px"], str(row["caption"]))  # type: ignore[arg-type]
        if gate:
            row["gate_reason"] = gate
            return None
        found = decode(row["image"])  # type: ignore[arg-type]
        if found.pixels is None:
            crashed = found.error.startswith((CRASHED, TOO_LONG))
            row["gate_reason"], row["decode_error"] = "crashed_decoder" if crashed else "undecodable", found.error
            return None
        row["phash"] = perceptual_hash(found.pixels)
        looks = photography(found.pixels)
        row["photography"] = looks.overall
        row.update((f"photo_{name}", getattr(looks, name)) for name in SUBSCORES)
        return found.pixels

    def _write(self, rows: list[dict[str, object]], measured: ClipMeasures) -> None:
        scores = {name: getattr(measured, name) for name in ("aesthetic", "offensive", "watermark")}
        every = [measured.similarity, *(values for values in scores.values() if values is not None)]
        finite = np.isfinite(np.column_stack([measured.embedding, *every])).all(axis=1)
        for i, row in enumerate(rows):
            if not finite[i]:
                row["gate_reason"] = "scorer_failed"
                continue
            row["embedding"] = measured.embedding[i]
            row["clip_similarity"] = float(measured.similarity[i]) if row["has_caption"] else None
            row["concept"] = measured.concept[i]
            for name, values in scores.items():
                row[name] = None if values is None else float(values[i])
            row["gate_reason"] = self.floors.before_ocr(row["offensive"], row["aesthetic"], row["clip_similarity"])  # type: ignore[arg-type]


class LabelScorer:
    """Reads image and gate_reason; fills the column `column` ("offensive" or "watermark") where gate_reason is "".

    A score over the floor of offensive content becomes the row's gate; "scorer_failed" that of a row whose score is
    not finite, or whose picture can't be decoded again.
    """

    def __init__(self, classifier: Classifier, column: str, pool: ActorPool, floors: HardFloors, side_px: int) -> None:
        _one_thread(pool.device)
        self.column, self.floors, self.side_px, self.batch_size = column, floors, side_px, pool.batch_size
        self.classifier = ClassifierScorer(classifier, pool.device)

    def __call__(self, scored: pa.Table) -> pa.Table:
        started = time.perf_counter()
        values: list[float | None] = [None] * len(scored)
        gates = scored["gate_reason"].to_pylist()
        for batch in _batches(scored, self.batch_size):
            seen = _decoded(scored, batch, gates, self.floors.caps, self.side_px)
            if seen:
                for (i, _), value in zip(seen, self.classifier.measure([p for _, p in seen]), strict=True):
                    values[i] = float(value)
                    if not np.isfinite(value):
                        values[i], gates[i] = None, "scorer_failed"
                    elif self.column == "offensive":
                        gates[i] = self.floors.before_ocr(values[i], None, None)
        schema = pa.schema([*SCORES, *EXTRA])
        filled = _filled(scored, self.column, values, schema.field(self.column).type)
        return _timed(_filled(filled, "gate_reason", gates, pa.string()), "seconds_classifier", started)


class TextScorer:
    """Reads image and gate_reason; fills text_words and text_area where gate_reason is ""; drops `image`. A picture that can't be
    decoded again gets the gate "scorer_failed".

    Takes the rows of one slice a call, so that the pictures that share a pass of the detector are always the same ones.
    """

    def __init__(self, ocr: OcrSettings, pool: ActorPool, floors: HardFloors, side_px: int) -> None:
        _one_thread(pool.device)
        self.caps, self.side_px, self.batch_size = floors.caps, side_px, pool.batch_size
        self.ocr = OcrScorer(ocr, pool.device)

    def __call__(self, scored: pa.Table) -> pa.Table:
        started = time.perf_counter()
        words: list[int | None] = [None] * len(scored)
        areas: list[float | None] = [None] * len(scored)
        gates = scored["gate_reason"].to_pylist()
        for batch in _batches(scored, self.batch_size):
            seen = _decoded(scored, batch, gates, self.caps, self.side_px)
            for (i, _), text in zip(seen, self.ocr.measure([pixels for _, pixels in seen]), strict=True):
                words[i], areas[i] = text.words, text.area
        scored = _filled(scored, "text_words", words, pa.int32())
        scored = _filled(scored, "text_area", areas, pa.float32())
        scored = _filled(scored, "gate_reason", gates, pa.string())
        return _timed(scored, "seconds_ocr", started).drop_columns(["image"])


def _batches(scored: pa.Table, size: int) -> list[list[int]]:
    """Row numbers that no gate stopped, in batches: pixels of one batch at a time lie in memory."""
    rows = [i for i, gate in enumerate(scored["gate_reason"].to_pylist()) if gate == ""]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _decoded(
    scored: pa.Table, rows: list[int], gates: list[str], caps: DecodeCaps, side_px: int
) -> list[tuple[int, np.ndarray]]:
    """(row, pixels) of these rows; one that was decoded before and now can't be gets its gate in `gates`."""
    seen = []
    for i in rows:
        pixels = decode(scored["image"][i].as_py(), caps, side_px).pixels
        if pixels is None:
            gates[i] = "scorer_failed"
        else:
            seen.append((i, pixels))
    return seen


def _filled(table: pa.Table, name: str, values: list, type: pa.DataType) -> pa.Table:  # type: ignore[type-arg]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, type))


def _timed(table: pa.Table, name: str, started: float) -> pa.Table:
    """With each row's share of the time since `started`, beside what stood there."""
    seconds = (time.perf_counter() - started) / max(1, len(table))
    return _filled(table, name, [(before or 0.0) + seconds for before in table[name].to_pylist()], pa.float32())


def _empty_row(pair: dict[str, object]) -> dict[str, object]:
    image = pair["image"] or b""
    digest = hashlib.blake2b(image, digest_size=8).hexdigest()  # type: ignore[arg-type]
    caption = pair["caption"] or ""
    return {
        **pair,
        "image": image,
        "caption": caption,
        "decode_error": "",
        "gate_reason": "",
        "has_caption": bool(str(caption).strip()),
        "image_digest": digest if image else None,
    }


def _one_thread(device: str) -> None:
    """Two actors with two threads each would spin against each other on a busy CPU."""
    cv2.setNumThreads(1)
    if device == "cpu":
        torch.set_num_threads(1)

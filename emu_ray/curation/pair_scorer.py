"""The two classes that Ray Data runs in actors: cheap gates with CLIP, then OCR on what survived.

Encoded bytes travel between them and pixels never do: decoding twice costs far less than moving decoded pictures. A
broken row gets a reason in a column; no row is dropped and none raises.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from emu_ray.curation.clip_scorer import ClipMeasures, ClipModel, ClipScorer
from emu_ray.curation.ocr_scorer import OcrScorer, OcrSettings
from emu_ray.curation.perceptual_hash import perceptual_hash
from emu_ray.pictures.decode import DecodeCaps, decode
from emu_ray.records import SCHEMAS

SCORES = SCHEMAS["scores"]
EXTRA = pa.schema(
    [
        ("has_caption", pa.bool_()),
        ("image_digest", pa.string()),  # 16 hex digits of the encoded bytes: equal for exact copies
        ("likes", pa.int64()),
    ]
)


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


class PairScorer:
    """Reads key, image, caption, width_px, height_px (likes); adds all of `scores` but text, and EXTRA.

    A row behind a gate has nulls in what was not measured; an undecodable row has its error and the gate "undecodable".
    """

    def __init__(self, floors: HardFloors, clip: ClipModel, device: str = "cpu") -> None:
        _one_thread(device)
        self.floors = floors
        self.clip = ClipScorer(clip, device)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        rows = [_empty_row(pair) for pair in pairs.to_pylist()]
        pictures: list[np.ndarray] = []
        decoded: list[dict[str, object]] = []
        for row in rows:
            picture = self._decode(row)
            if picture is not None:
                pictures.append(picture)
                decoded.append(row)
        if decoded:
            self._write(decoded, self.clip.measure(pictures, [str(r["caption"]) for r in decoded]))
        schema = pa.schema([*SCORES, *EXTRA, ("image", pa.binary())])
        return pa.table({f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schema})

    def _decode(self, row: dict[str, object]) -> np.ndarray | None:
        """Fill in what the bytes alone tell; the pixels when the row goes on."""
        gate = self.floors.before_decoding(row["width_px"], row["height_px"], str(row["caption"]))  # type: ignore[arg-type]
        if gate:
            row["gate_reason"] = gate
            return None
        found = decode(row["image"], self.floors.caps)  # type: ignore[arg-type]
        if found.pixels is None:
            row["gate_reason"], row["decode_error"] = "undecodable", found.error
            return None
        row["phash"] = perceptual_hash(found.pixels)
        return found.pixels

    def _write(self, rows: list[dict[str, object]], measured: ClipMeasures) -> None:
        for i, row in enumerate(rows):
            row["embedding"] = measured.embedding[i]
            row["clip_similarity"] = float(measured.similarity[i]) if row["has_caption"] else None
            row["concept"] = measured.concept[i]
            row["aesthetic"] = None if measured.aesthetic is None else float(measured.aesthetic[i])
            row["offensive"] = None if measured.offensive is None else float(measured.offensive[i])
            row["gate_reason"] = self.floors.before_ocr(row["offensive"], row["aesthetic"], row["clip_similarity"])  # type: ignore[arg-type]


class TextScorer:
    """Reads image and gate_reason; fills text_words and text_area where gate_reason is ""; drops `image`."""

    def __init__(self, ocr: OcrSettings, caps: DecodeCaps, device: str = "cpu") -> None:
        _one_thread(device)
        self.caps = caps
        self.ocr = OcrScorer(ocr, device)

    def __call__(self, scored: pa.Table) -> pa.Table:
        words: list[int | None] = [None] * len(scored)
        areas: list[float | None] = [None] * len(scored)
        rows = [i for i, gate in enumerate(scored["gate_reason"].to_pylist()) if gate == ""]
        decoded = [(i, decode(scored["image"][i].as_py(), self.caps).pixels) for i in rows]
        seen = [(i, pixels) for i, pixels in decoded if pixels is not None]
        for (i, _), text in zip(seen, self.ocr.measure([pixels for _, pixels in seen]), strict=True):
            words[i], areas[i] = text.words, text.area
        for name, values in (("text_words", words), ("text_area", areas)):
            at = scored.schema.get_field_index(name)
            scored = scored.set_column(at, SCORES.field(name), pa.array(values, SCORES.field(name).type))
        return scored.drop_columns(["image"])


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
    if device == "cpu":
        torch.set_num_threads(1)

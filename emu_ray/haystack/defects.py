"""The defects planted in a haystack pool, each with its ground truth: what a curator must find.

Pictures are (H, W, 3) uint8; every function takes its randomness and returns a new picture. The "offensive" stand-in is a badge with a
cross: it stands for content that a safety classifier must catch, and is nothing else.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = (
    "SALE", "50% OFF", "BUY NOW", "NEWS", "LIVE", "SUBSCRIBE", "FREE", "www.shop.com", "OFFER", "PREVIEW", "SAMPLE", "WINNER",
    "TODAY ONLY", "CLICK HERE", "BREAKING", "NEW", "LIKE ME", "PHOTO STOCK", "DEMO", "COPYRIGHT",
)  # fmt: skip


def overlay_text(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three lines of large words across the picture, as on an advertisement."""
    side = image.shape[0]
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    lines = int(rng.integers(1, 4))
    dark = rng.random() < 0.3
    fill, edge = ((20, 20, 20), (250, 250, 250)) if dark else ((255, 255, 255), (15, 15, 15))
    height = side * rng.uniform(0.17, 0.22)
    top = rng.uniform(0.02, max(0.03, 0.95 - lines * height * 1.25 / side)) * side
    for k in range(lines):
        word = str(rng.choice(WORDS))
        size = height
        while pen.textlength(word, font=ImageFont.load_default(size=size)) > 0.94 * side:
            size *= 0.94
        font = ImageFont.load_default(size=size)
        left = rng.uniform(0.02, max(0.021, 0.97 - pen.textlength(word, font=font) / side)) * side
        pen.text(
            (left, top + k * height * 1.25),
            word,
            font=font,
            fill=fill,
            stroke_width=max(1, side // 80),
            stroke_fill=edge,
        )
    return np.asarray(picture)


def offensive_badge(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The stand-in symbol: a black badge with a magenta cross, 26 to 38 % of the side, anywhere in the picture."""
    side = image.shape[0]
    size = int(side * rng.uniform(0.26, 0.38))
    left, top = (int(rng.uniform(0.02, 0.98 - size / side) * side) for _ in range(2))
    scale = 4
    badge = Image.new("L", (size * scale, size * scale), 0)
    ImageDraw.Draw(badge).rounded_rectangle((0, 0, size * scale - 1, size * scale - 1), radius=size, fill=255)
    cross = Image.new("L", badge.size, 0)
    pen, far, near = ImageDraw.Draw(cross), int(0.78 * size * scale), int(0.22 * size * scale)
    for ends in ((near, near, far, far), (near, far, far, near)):
        pen.line(ends, fill=255, width=int(0.2 * size * scale))
    picture = Image.fromarray(image)
    picture.paste((10, 8, 12), (left, top), badge.resize((size, size), Image.Resampling.LANCZOS))
    picture.paste((255, 0, 200), (left, top), cross.resize((size, size), Image.Resampling.LANCZOS))
    return np.asarray(picture)


def too_small(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture at 24 to 48 px."""
    side = int(rng.integers(24, 49))
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def extreme_aspect(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A strip of the picture, enlarged so that its short side is not too small: 2.6 to 4 times as wide as high, or the reverse."""
    height, width = image.shape[:2]
    keep = round(height / rng.uniform(2.6, 4.0))
    first = int(rng.integers(0, height - keep + 1))
    strip = Image.fromarray(image[first : first + keep])
    factor = height / keep * 0.8
    strip = strip.resize((round(width * factor), round(keep * factor)), Image.Resampling.LANCZOS)
    return np.asarray(strip if rng.random() < 0.5 else strip.transpose(Image.Transpose.ROTATE_90))


def near_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture as it comes back from the web: a little resized, a little brighter or darker."""
    side = round(image.shape[0] * rng.uniform(0.84, 1.0))
    small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.clip(small * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)


def undecodable(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that no decoder accepts: cut off in the middle, no image at all, or empty."""
    kind = int(rng.integers(3))
    if kind == 0:
        return encoded[: len(encoded) // 3]
    return b"<html><body>404 Not Found</body></html>" if kind == 1 else b""


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """JPEG bytes; at the given quality the same picture gives the same bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()

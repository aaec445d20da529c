"""A judge of photographic appeal by formulas: no training, no text, no network.

It measures what Emu's specialists judged by (arXiv 2309.15807, section 3.2), exposure, lighting, colour and contrast, composition, and
subject against background, each as a part in 0..1, and takes their weighted geometric mean, so that one clear fault can't be outweighed.
Formulas come from the literature; the bounds between bad (0) and good (1) were set on a draw of the haystack that no other stage sees
(seeds `judge_check`). Pictures are judged at 64 px: finer detail is neither rewarded nor needed. It is a stand-in for people, not their equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE_PX = 64
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # Rec. 601
_FLOOR = 0.03  # of a part, so that a failed one leaves an order among pictures
_CHUNK = 128

WEIGHTS = {
    "exposure": 1.0,
    "contrast": 0.5,
    "colour": 1.0,
    "noise": 1.0,
    "clutter": 1.0,
    "lighting": 1.0,
    "composition": 1.0,
}


@dataclass(frozen=True)
class Subject:
    """What stands out of N pictures: `mask` (N, 64, 64) bool of at most two regions, and their shape in shares of the side."""

    mask: np.ndarray
    inner: np.ndarray  # (N, 64, 64) bool, the mask without its rim
    extent: np.ndarray  # (N,) mean of width and height of the larger region, 0 when nothing stands out
    centre: np.ndarray  # (N, 2) x and y of all regions together
    margin: np.ndarray  # (N,) smallest distance of a region's box to the frame
    regions: np.ndarray  # (N,) how many regions stand out, of any size
    saliency: np.ndarray  # (N,) mean over the mask


def judge_appeal(images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Appeal (N,) in 0..1 of pictures (N, H, W, 3) uint8, and its parts by name, each (N,) in 0..1."""
    found = [_judge(_working_size(images[i : i + _CHUNK])) for i in range(0, len(images), _CHUNK)]
    parts = {name: np.concatenate([f[name] for f in found]) if found else np.zeros(0) for name in WEIGHTS}
    total = sum(WEIGHTS.values())
    logs = [weight * np.log(np.maximum(parts[name], _FLOOR)) for name, weight in WEIGHTS.items()]
    return np.exp(np.sum(logs, axis=0) / total), parts


def _working_size(images: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) float32 in 0..1."""
    if images.shape[1:3] != (SIDE_PX, SIDE_PX):
        size = (SIDE_PX, SIDE_PX)
        images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])
    return images.astype(np.float32) / 255


def _judge(images: np.ndarray) -> dict[str, np.ndarray]:
    subject = find_subject(images)
    return {
        "exposure": exposure(images, subject),
        "contrast": contrast(images),
        "colour": colour(images, subject),
        "noise": noise(images),
        "clutter": clutter(images, subject),
        "lighting": lighting(images, subject),
        "composition": composition(images, subject),
    }


def _rise(values: np.ndarray, bad: float, good: float) -> np.ndarray:
    """0 at `bad` and beyond, 1 at `good` and beyond, a smooth step between; `bad` may be the larger."""
    t = np.clip((values - bad) / (good - bad), 0, 1)
    return t * t * (3 - 2 * t)


# The subject ----------------------------------------------------------------------------------------------------------


def border_distance(images: np.ndarray, passes: int = 3) -> np.ndarray:
    """(N, H, W) minimum barrier distance to the frame's border, summed over three channels.

    The barrier of a path is its brightest less its darkest value; what can be reached from the border without crossing an edge is
    background. Raster scans after Zhang et al., "Minimum Barrier Salient Object Detection at 80 FPS", ICCV 2015, algorithm 1.
    """
    light = np.ascontiguousarray(np.moveaxis(images, 0, -2)).reshape(images.shape[1], images.shape[2], -1)
    height, width, _ = light.shape
    distance = np.full_like(light, np.inf)
    distance[[0, -1]] = 0
    distance[:, [0, -1]] = 0
    high, low = light.copy(), light.copy()
    for turn in range(passes):
        step = 1 if turn % 2 == 0 else -1
        rows = range(1, height - 1)[::step]
        columns = range(1, width - 1)[::step]
        for r in rows:
            for c in columns:
                here = light[r, c]
                for near in ((r - step, c), (r, c - step)):
                    top, bottom = np.maximum(high[near], here), np.minimum(low[near], here)
                    shorter = top - bottom < distance[r, c]
                    np.copyto(distance[r, c], top - bottom, where=shorter)
                    np.copyto(high[r, c], top, where=shorter)
                    np.copyto(low[r, c], bottom, where=shorter)
    per_channel = distance.reshape(height, width, len(images), 3)
    return np.moveaxis(per_channel.sum(-1), -1, 0)


def find_subject(images: np.ndarray) -> Subject:
    """The regions that stand out most, by their barrier distance to the border."""
    soft = ndimage.gaussian_filter(images, (0, 0.6, 0.6, 0), mode="nearest")
    saliency = border_distance(soft)
    count, side = len(images), images.shape[1]
    masks, inner = np.zeros((2, count, side, side), bool)
    extent, regions, margin, centre = np.zeros(count), np.zeros(count), np.zeros(count), np.full((count, 2), 0.5)
    for i in range(count):
        bound = max(0.12, 0.42 * float(np.percentile(saliency[i], 98)))
        filled = ndimage.binary_fill_holes(ndimage.binary_opening(saliency[i] > bound, iterations=1))
        labels, found = ndimage.label(filled)
        areas = np.bincount(labels.ravel(), minlength=found + 1)[1:]
        regions[i] = (areas >= 0.004 * side**2).sum()
        if not found:
            continue
        order = np.argsort(-areas)[:2]
        kept = [k for k in order if areas[k] >= 0.35 * areas[order[0]]]
        boxes = ndimage.find_objects(labels)
        rows, columns = boxes[kept[0]]
        extent[i] = (rows.stop - rows.start + columns.stop - columns.start) / (2 * side)
        edges = [e for k in kept for s in boxes[k] for e in (s.start, side - s.stop)]
        margin[i] = min(edges) / side
        masks[i] = np.isin(labels, np.array(kept) + 1)
        inner[i] = ndimage.binary_erosion(masks[i], iterations=2)
        ys, xs = np.nonzero(masks[i])
        centre[i] = (xs.mean() + 0.5) / side, (ys.mean() + 0.5) / side
    share = masks.sum((1, 2))
    mean_saliency = np.where(share > 0, (saliency * masks).sum((1, 2)) / np.maximum(share, 1), 0.0)
    return Subject(masks, inner, extent, centre, margin, regions, mean_saliency)


def _within(values: np.ndarray, mask: np.ndarray, percent: float) -> np.ndarray:
    """(N,) percentile of (N, H, W) values over each mask; over the whole picture where the mask is nearly empty."""
    return np.array([np.percentile(v[m] if m.sum() >= 12 else v, percent) for v, m in zip(values, mask, strict=True)])


# The parts ------------------------------------------------------------------------------------------------------------


def exposure(images: np.ndarray, subject: Subject) -> np.ndarray:
    """Whether highlights are used and shadows are deep, without large blown areas.

    "Too dark" is asked of the subject's lightest parts (value of HSV, 95th percentile), not of the frame's mean: a night scene whose
    subject is lit is well exposed. "Too light" is a large blown area, or a raised black point together with much clipping: a snow
    scene alone has a high black point, a sunset alone has clipped reds.
    """
    value, luma = images.max(-1), images @ _LUMA
    lit = _rise(_within(value, subject.mask, 95), 0.45, 0.68)
    blown = _rise((luma > 0.97).mean((1, 2)), 0.04, 0.20)
    raised = _rise(np.percentile(luma, 2, axis=(1, 2)), 0.26, 0.34)
    clipped = _rise((value > 0.985).mean((1, 2)), 0.20, 0.50)
    return lit * (1 - np.maximum(blown, raised * clipped))


def contrast(images: np.ndarray) -> np.ndarray:
    """The tonal range: 98th less 2nd percentile of luma (Peli 1990 calls it simple contrast; percentiles resist single pixels)."""
    low, high = np.percentile(images @ _LUMA, (2, 98), axis=(1, 2))
    return _rise(high - low, 0.25, 0.50)


def colourfulness(images: np.ndarray) -> np.ndarray:
    """(N,) M3 of Hasler & Suesstrunk, "Measuring colourfulness in natural images", 2003, on 0..255: 15 slight, 33 moderate, 59 quite, 82 high."""
    red, green, blue = np.moveaxis(images * 255, -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.hypot(rg.std((1, 2)), yb.std((1, 2)))
    return spread + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2)))


def colour(images: np.ndarray, subject: Subject) -> np.ndarray:
    """Vivid as a whole (colourfulness) or in its subject (80th percentile of chroma, max less min of RGB)."""
    chroma = images.max(-1) - images.min(-1)
    return np.maximum(_rise(colourfulness(images), 22, 50), _rise(_within(chroma, subject.mask, 80), 0.28, 0.55))


def noise_level(images: np.ndarray) -> np.ndarray:
    """(N,) standard deviation of the noise on 0..255, by Immerkaer's Laplacian difference ("Fast noise variance estimation", 1996).

    His mean of absolute responses is replaced by their median (as 0.6745 sigma), which edges do not move.
    """
    kernel = np.array(((1, -2, 1), (-2, 4, -2), (1, -2, 1)), np.float32)
    responses = ndimage.convolve(images @ _LUMA, kernel[None], mode="nearest")[:, 1:-1, 1:-1]
    return 255 * np.median(np.abs(responses), axis=(1, 2)) / (0.6745 * 6)


def noise(images: np.ndarray) -> np.ndarray:
    """Little noise, at full and at half resolution; the latter is what a blur leaves of it."""
    count, side = len(images), images.shape[1]
    half = images.reshape(count, side // 2, 2, side // 2, 2, 3).mean((2, 4))
    return _rise(np.maximum(0.6 * noise_level(images), noise_level(half)), 1.0, 0.45)


def clutter(images: np.ndarray, subject: Subject) -> np.ndarray:
    """A quiet background: few strong edges outside the subject (after Ke et al., CVPR 2006, who use the spread of edges) and few regions."""
    soft = ndimage.gaussian_filter(images, (0, 0.8, 0.8, 0), mode="nearest")
    strength = np.maximum(*(np.abs(np.gradient(soft, axis=a)).max(-1) for a in (1, 2)))
    outside = ~ndimage.binary_dilation(subject.mask, np.ones((1, 5, 5), bool))
    density = ((strength > 0.06) & outside).sum((1, 2)) / np.maximum(outside.sum((1, 2)), 1)
    return _rise(density, 0.19, 0.11) * _rise(subject.regions, 9, 4)


def lighting(images: np.ndarray, subject: Subject) -> np.ndarray:
    """Light that models the subject: the range of luma within each region (95th less 5th percentile, over the 95th), by area."""
    luma, ranges = images @ _LUMA, np.zeros(len(images))
    for i, inner in enumerate(subject.inner):
        labels, found = ndimage.label(inner)
        areas = np.bincount(labels.ravel(), minlength=found + 1)
        large = [k for k in range(1, found + 1) if areas[k] >= 12]
        spans = [np.percentile(luma[i][labels == k], (5, 95)) for k in large]
        if large:
            ranges[i] = np.average([(high - low) / max(high, 0.1) for low, high in spans], weights=areas[large])
    return _rise(ranges, 0.15, 0.42)


def intrusion(images: np.ndarray) -> np.ndarray:
    """(N,) 0 to 1: how clearly something is cut by the left, right or lower edge.

    Along the lower edge it shows as a sharp change; at the sides as rows whose two ends differ, where a horizon would make them alike.
    """
    soft = ndimage.gaussian_filter(images, (0, 0.8, 0.8, 0), mode="nearest")
    below = np.abs(np.diff(soft[:, -3:].mean(1), axis=1)).max((1, 2))
    unlike = np.abs(soft[:, :, :3].mean(2) - soft[:, :, -3:].mean(2)).max(-1)
    return np.maximum(_rise(below, 0.05, 0.10), _rise((unlike > 0.2).mean(1), 0.14, 0.30))


def composition(images: np.ndarray, subject: Subject) -> np.ndarray:
    """The subject large enough, on a vertical thirds line or in the middle; it and all else whole in the frame."""
    lines = np.array((1 / 3, 1 / 2, 2 / 3))
    off = np.abs(subject.centre[:, :1] - lines).min(1)
    whole = _rise(subject.margin, 0.0, 0.06) * (1 - intrusion(images))
    return _rise(subject.extent, 0.24, 0.40) * whole * _rise(off, 0.25, 0.08)

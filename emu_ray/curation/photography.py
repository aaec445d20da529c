"""How well a picture is photographed, computed without a network: the criterion that readers of the Emu paper asked for.

The five criteria that the paper's specialists judged by (arXiv 2309.15807, section 3.2: composition, lighting, colour
and contrast, subject and background, and a subjective rest that nobody can compute) become eight numbers from 0 to 1
and their weighted mean. The formulas and weights are ours; what they are worth is in EXPERIMENTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np

SIDE_PX = 384  # longer side that everything is measured at: sharpness of pictures of any size is then comparable
TILES = 8  # the picture is cut into TILES x TILES for sharpness
SHARP_TILES = 3  # a sharp subject need not be larger
SALIENCY_PX = 64
WEIGHTS = {
    "exposure": 2.0,
    "dynamic_range": 1.0,
    "colourfulness": 1.0,
    "contrast": 1.0,
    "sharpness": 2.0,
    "subject_depth": 1.0,
    "thirds": 1.0,
    "balance": 1.0,
}


@dataclass(frozen=True)
class Photography:
    """Each 0 to 1, larger is better."""

    exposure: float  # 1: middle brightness and nothing clipped to black or white
    dynamic_range: float  # brightness between the 2nd and the 98th percentile, 1 from 85 % of the scale
    colourfulness: float  # Hasler and Suesstrunk 2003, 1 from M = 80
    contrast: float  # standard deviation of brightness, 1 from a quarter of the scale
    sharpness: float  # root mean square Laplacian of the sharpest tiles, 1 from 45 grey levels
    subject_depth: float  # how much sharper the salient part is than the rest; 0.5: equally sharp
    thirds: float  # nearness of the salient part's centre to a crossing of the thirds
    balance: float  # 1: the salient part's centre is the picture's, 0: it lies on the edge

    @property
    def overall(self) -> float:
        """Weighted mean of the eight, 0 to 1."""
        return sum(w * getattr(self, name) for name, w in WEIGHTS.items()) / sum(WEIGHTS.values())


SUBSCORES = tuple(field.name for field in fields(Photography))


def photography(pixels: np.ndarray) -> Photography:
    """Measure a picture, (H, W, 3) uint8 of any size."""
    small = _shrunk(pixels)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    brightness = np.bincount(grey.ravel(), minlength=256) / grey.size
    levels = np.arange(256)
    mean = float(brightness @ levels)
    deviation = max(0.0, float(brightness @ levels**2) - mean**2) ** 0.5
    low, high = np.searchsorted(np.cumsum(brightness), [0.02, 0.98])
    clipped = float(brightness[:3].sum() + brightness[253:].sum())
    energy = _tile_energy(grey)
    salience = saliency(grey)
    return Photography(
        exposure=_unit(1 - clipped / 0.25) * _unit(1 - (abs(mean - 118) - 45) / 70),
        dynamic_range=_unit(float(high - low) / 255 / 0.85),
        colourfulness=_unit(_colourfulness(small) / 80),
        contrast=_unit(deviation / 64),
        sharpness=_unit(float(np.sort(energy.ravel())[-SHARP_TILES:].mean()) ** 0.5 / 45),
        subject_depth=_subject_depth(energy, salience),
        **_composition(salience),
    )


def saliency(grey: np.ndarray) -> np.ndarray:
    """(SALIENCY_PX, SALIENCY_PX) float32 >= 0 that sums to 1: the spectral residual of Hou and Zhang 2007."""
    spectrum = np.fft.fft2(
        cv2.resize(grey, (SALIENCY_PX, SALIENCY_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    )
    magnitude = np.abs(spectrum)
    logarithm = np.log(magnitude + 1e-3 * magnitude.max() + 1e-9).astype(np.float32)
    residual = logarithm - cv2.blur(logarithm, (3, 3), borderType=cv2.BORDER_REFLECT)
    back = np.abs(np.fft.ifft2(np.exp(residual) * spectrum / np.maximum(magnitude, 1e-9))) ** 2
    found = cv2.GaussianBlur(back.astype(np.float32), (0, 0), 2.5, borderType=cv2.BORDER_REFLECT)
    found = np.maximum(found - np.median(found), 0)
    total = float(found.sum())
    return found / total if total > 0 else np.full_like(found, 1 / found.size)


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = SIDE_PX / max(height, width)
    if scale >= 1:
        return pixels
    return cv2.resize(
        pixels, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )


def _colourfulness(rgb: np.ndarray) -> float:
    red, green, blue = (rgb[..., i].astype(np.float32) for i in range(3))
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def _tile_energy(grey: np.ndarray) -> np.ndarray:
    """(TILES, TILES): mean squared Laplacian of each tile."""
    laplacian = cv2.Laplacian(grey, cv2.CV_32F, ksize=1, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(np.square(laplacian), (TILES, TILES), interpolation=cv2.INTER_AREA)


def _subject_depth(energy: np.ndarray, salience: np.ndarray) -> float:
    weight = cv2.resize(salience, (TILES, TILES), interpolation=cv2.INTER_AREA)
    weight = weight / weight.sum()
    rest = weight.max() - weight
    subject = float((energy * weight).sum())
    background = float((energy * rest).sum() / rest.sum()) if rest.sum() > 0 else subject
    return subject / (subject + background) if subject + background > 0 else 0.5


def _composition(salience: np.ndarray) -> dict[str, float]:
    across, down = salience.sum(0), salience.sum(1)
    places = (np.arange(SALIENCY_PX) + 0.5) / SALIENCY_PX
    x, y = float(across @ places), float(down @ places)
    distance = min(np.hypot(x - u, y - v) for u in (1 / 3, 2 / 3) for v in (1 / 3, 2 / 3))
    return {
        "thirds": _unit(1 - float(distance) / np.hypot(1 / 3, 1 / 3)),
        "balance": _unit(1 - 2 * max(abs(x - 0.5), abs(y - 0.5))),
    }


def _unit(value: float) -> float:
    return float(min(1.0, max(0.0, value)))

"""Pixels from the numbers of `world`: vectorised numpy, no files, no fonts, the same bytes on every machine.

Legend of array names: N pictures, H = W = side in px, 3 colour channels; light is linear-looking sRGB in 0..1.
"""

from __future__ import annotations

import numpy as np

from emu_ray.haystack.world import SceneBatch

_PAINT = np.array(
    [
        (0.86, 0.07, 0.10), (0.98, 0.47, 0.04), (0.99, 0.85, 0.10), (0.10, 0.66, 0.20),
        (0.10, 0.27, 0.90), (0.50, 0.13, 0.78), (1.00, 0.45, 0.70), (0.95, 0.95, 0.96),
    ],
    dtype=np.float32,
)  # fmt: skip
_KEY_LIGHT = np.array((-0.52, -0.62, 0.59), dtype=np.float32)  # from the upper left, towards the viewer
_CHUNK = 64  # pictures rendered at once: bounds memory to some 20 MB at 128 px


def render(scenes: SceneBatch, side_px: int) -> np.ndarray:
    """(N, side_px, side_px, 3) uint8 pictures."""
    if side_px < 8:
        raise ValueError(f"side_px must be at least 8, got {side_px}")
    parts = [
        _render(scenes.take(np.arange(i, min(i + _CHUNK, len(scenes)))), side_px) for i in range(0, len(scenes), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, side_px, side_px, 3), np.uint8)


def _render(scenes: SceneBatch, side: int) -> np.ndarray:
    rngs = [np.random.default_rng(int(s)) for s in scenes.seed]
    detail = np.stack([r.random(96) for r in rngs]).astype(np.float32)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = grid[None, None, :], grid[None, :, None]
    image = _backgrounds(scenes, detail, x, y, side)
    _clutter(image, scenes, detail, x, y)
    for k in (0, 1):
        _shadow(image, scenes, k, x, y)
    for k in (0, 1):
        _object(image, scenes, k, x, y, 1.0 / side)
    image = _develop(image, scenes, detail, x, y)
    noisy = np.flatnonzero(scenes.backdrop == 2)
    for i in noisy:
        image[i] += rngs[i].normal(0, 0.03 + 0.04 * detail[i, 95], image[i].shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# The scenes -----------------------------------------------------------------------------------------------------------


def _rgb(*colour: float) -> np.ndarray:
    return np.array(colour, dtype=np.float32)


def _blend(t: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """From `first` (t = 0) to `second` (t = 1); t is (N, H, W), colours are (3,)."""
    t = np.clip(t, 0, 1)[..., None]
    return first + (second - first) * t


def _cover(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return image + (colour - image) * np.clip(alpha, 0, 1)[..., None]


def _backgrounds(scenes: SceneBatch, detail: np.ndarray, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    image = np.empty((len(scenes), side, side, 3), np.float32)
    painters = (_meadow, _desert, _beach, _snow, _night, _sunset, _forest, _studio)
    for kind, painter in enumerate(painters):
        rows = np.flatnonzero(scenes.scene == kind)
        if len(rows):
            d = detail[rows][:, :, None, None]
            image[rows] = painter(
                d, np.broadcast_to(x, (len(rows), side, side)), np.broadcast_to(y, (len(rows), side, side)), 1.5 / side
            )
    return image


def _ridge(d: np.ndarray, x: np.ndarray, first: int, level: float, height: float, waves: float) -> np.ndarray:
    """A hilly skyline y(x) around `level`, from the detail numbers first .. first + 3."""
    phase = 6.28 * d[:, first]
    bump = np.sin(waves * x * (0.8 + 0.5 * d[:, first + 1]) + phase) + 0.5 * np.sin(
        2.3 * waves * x + 6.28 * d[:, first + 2]
    )
    return level + height * (bump / 1.5) * (0.6 + 0.4 * d[:, first + 3])


def _below(y: np.ndarray, line: np.ndarray | float, soft: float) -> np.ndarray:
    return np.clip((y - line) / soft + 0.5, 0, 1)


def _disk(
    x: np.ndarray, y: np.ndarray, cx: np.ndarray, cy: np.ndarray, radius: np.ndarray | float, soft: float
) -> np.ndarray:
    return np.clip((radius - np.hypot(x - cx, y - cy)) / soft + 0.5, 0, 1)


def _meadow(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.58, _rgb(0.22, 0.52, 0.93), _rgb(0.78, 0.91, 1.0))
    for k in (0, 1, 2):
        cx, cy = d[:, 4 + 2 * k] * 1.1 - 0.05, 0.12 + 0.2 * d[:, 5 + 2 * k]
        cloud = np.exp(-(((x - cx) / 0.16) ** 2) - ((y - cy) / 0.045) ** 2)
        image = _cover(image, 0.85 * cloud, _rgb(1, 1, 1))
    image = _cover(image, _below(y, _ridge(d, x, 10, 0.52, 0.05, 5), soft), _rgb(0.42, 0.66, 0.42))
    grass = _blend((y - 0.58) / 0.42, _rgb(0.52, 0.80, 0.28), _rgb(0.17, 0.48, 0.12))
    return _cover(image, _below(y, _ridge(d, x, 14, 0.60, 0.03, 4), soft), grass)


def _desert(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.55, _rgb(0.30, 0.62, 0.86), _rgb(1.0, 0.90, 0.70))
    image = _cover(
        image, _disk(x, y, 0.15 + 0.7 * d[:, 4], 0.16 + 0.1 * d[:, 5], 0.055, 3 * soft), _rgb(1.0, 0.98, 0.85)
    )
    for k, (level, dark) in enumerate(((0.50, 0.80), (0.58, 0.90), (0.68, 1.0))):
        line = _ridge(d, x, 6 + 4 * k, level, 0.05, 5)
        slope = np.sin(6 * x + 6.28 * d[:, 6 + 4 * k])
        sand = (
            _blend((y - line) / 0.45, _rgb(0.98, 0.78, 0.45), _rgb(0.80, 0.50, 0.22))
            * (dark * (0.96 + 0.06 * slope))[..., None]
        )
        image = _cover(image, _below(y, line, soft), sand)
    return image


def _beach(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    horizon = 0.46 + 0.04 * d[:, 4]
    image = _blend(y / 0.48, _rgb(0.20, 0.60, 0.95), _rgb(0.80, 0.94, 1.0))
    sea = _blend((y - horizon) / 0.22, _rgb(0.05, 0.42, 0.68), _rgb(0.25, 0.82, 0.80))
    image = _cover(image, _below(y, horizon, soft), sea)
    shore = _ridge(d, x, 6, 0.67, 0.025, 4)
    image = _cover(image, np.exp(-(((y - shore) / 0.018) ** 2)), _rgb(1, 1, 1))
    sand = _blend((y - 0.66) / 0.34, _rgb(0.98, 0.90, 0.70), _rgb(0.90, 0.76, 0.50))
    return _cover(image, _below(y, shore + 0.012, soft), sand)


def _snow(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.6, _rgb(0.45, 0.66, 0.90), _rgb(0.86, 0.92, 0.98))
    for k in (0, 1, 2):
        peak, height, width = 0.05 + 0.45 * k + 0.12 * d[:, 4 + k], 0.30 + 0.10 * d[:, 8 + k], 0.30 + 0.1 * d[:, 12 + k]
        line = 0.62 - height * np.clip(1 - np.abs(x - peak) / width, 0, 1)
        rock = (
            _blend((y - line) / 0.10, _rgb(0.97, 0.98, 1.0), _rgb(0.42, 0.50, 0.66))
            * np.where(x < peak, 1.0, 0.86)[..., None]
        )
        image = _cover(image, _below(y, line, soft), rock)
    ground = _blend((y - 0.6) / 0.4, _rgb(0.98, 0.99, 1.0), _rgb(0.78, 0.86, 0.96))
    return _cover(image, _below(y, _ridge(d, x, 16, 0.60, 0.02, 4), soft), ground)


def _night(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.62, _rgb(0.02, 0.03, 0.14), _rgb(0.12, 0.20, 0.46))
    for k in range(16):
        star = _disk(x, y, d[:, 30 + k], 0.52 * d[:, 50 + k], 0.006, 0.02)
        image = _cover(image, 2.2 * star, _rgb(1, 1, 0.92))
    cx, cy = 0.15 + 0.7 * d[:, 4], 0.13 + 0.1 * d[:, 5]
    image = image + 0.28 * np.exp(-np.hypot(x - cx, y - cy) / 0.10)[..., None] * _rgb(0.7, 0.8, 1.0)
    moon = _disk(x, y, cx, cy, 0.07, soft) * (1 - _disk(x, y, cx + 0.035, cy - 0.02, 0.06, soft))
    image = _cover(image, moon, _rgb(1.0, 0.98, 0.85))
    ground = _blend((y - 0.6) / 0.4, _rgb(0.13, 0.17, 0.34), _rgb(0.05, 0.06, 0.16))
    return _cover(image, _below(y, _ridge(d, x, 8, 0.60, 0.04, 5), soft), ground)


def _sunset(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.35, _rgb(0.28, 0.14, 0.46), _rgb(0.90, 0.32, 0.34))
    image = np.where(
        (y > 0.35)[..., None], _blend((y - 0.35) / 0.25, _rgb(0.90, 0.32, 0.34), _rgb(1.0, 0.78, 0.30)), image
    )
    cx = 0.15 + 0.7 * d[:, 4]
    image = image + 0.5 * np.exp(-np.hypot(x - cx, (y - 0.54)) / 0.12)[..., None] * _rgb(1.0, 0.7, 0.2)
    image = _cover(image, _disk(x, y, cx, np.full_like(cx, 0.54), 0.11, soft), _rgb(1.0, 0.95, 0.62))
    sea = _blend((y - 0.6) / 0.4, _rgb(0.62, 0.26, 0.36), _rgb(0.16, 0.08, 0.26))
    glitter = np.exp(-(((x - cx) / (0.05 + 0.2 * (y - 0.6))) ** 2)) * (0.6 + 0.4 * np.sin(90 * y))
    sea = _cover(sea, 0.75 * glitter, _rgb(1.0, 0.75, 0.35))
    return _cover(image, _below(y, 0.6, soft), sea)


def _forest(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    image = _blend(y / 0.62, _rgb(0.05, 0.26, 0.12), _rgb(0.56, 0.76, 0.36))
    for depth, (count, tone) in enumerate(((6, 0.55), (5, 0.25))):
        for k in range(count):
            i = 10 + 8 * depth + k
            centre, width = (k + 0.2 + 0.6 * d[:, i]) / count, (0.014 + 0.014 * d[:, i + 20]) * (1 + depth)
            trunk = np.clip((width - np.abs(x - centre)) / soft + 0.5, 0, 1) * (y < 0.66 + 0.04 * depth)
            image = _cover(
                image, trunk * 0.9, _rgb(0.36, 0.30, 0.16) * tone + _rgb(0.22, 0.36, 0.16) * (1 - tone) * 0.7
            )
    ground = _blend((y - 0.62) / 0.38, _rgb(0.36, 0.46, 0.18), _rgb(0.20, 0.17, 0.07))
    return _cover(image, _below(y, _ridge(d, x, 26, 0.64, 0.02, 5), 2 * soft), ground)


def _studio(d: np.ndarray, x: np.ndarray, y: np.ndarray, soft: float) -> np.ndarray:
    glow = np.hypot((x - 0.5) / 1.0, (y - 0.42) / 0.8)
    image = _blend(glow / 0.8, _rgb(0.80, 0.78, 0.76), _rgb(0.34, 0.33, 0.36))
    floor = _blend((y - 0.66) / 0.34, _rgb(0.86, 0.84, 0.82), _rgb(0.56, 0.54, 0.54))
    return _cover(image, _below(y, 0.68, 0.10), floor)


# What stands in them --------------------------------------------------------------------------------------------------


def _clutter(image: np.ndarray, scenes: SceneBatch, detail: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    rows = np.flatnonzero(scenes.backdrop == 1)
    if not len(rows):
        return
    d, part = detail[rows][:, :, None, None], image[rows]
    for k in range(14):
        cx, cy, size = d[:, 10 + k], 0.12 + 0.84 * d[:, 26 + k], 0.025 + 0.05 * d[:, 42 + k]
        box = np.maximum(np.abs(x - cx) * (0.6 + d[:, 58 + k]), np.abs(y - cy)) < size
        shade = detail[rows][:, [60 + k, 70 + k, 80 + k]][:, None, None, :]
        part = np.where(box[..., None], 0.05 + 0.9 * shade, part)
    image[rows] = part


def _shadow(image: np.ndarray, scenes: SceneBatch, k: int, x: np.ndarray, y: np.ndarray) -> None:
    rows = np.flatnonzero((scenes.objects > k) & (scenes.lighting != 1))
    if not len(rows):
        return
    r = scenes.radius[rows, k][:, None, None]
    dx = (x - (scenes.x[rows, k][:, None, None] + 0.35 * r)) / (1.15 * r)
    dy = (y - (scenes.y[rows, k][:, None, None] + 0.97 * r)) / (0.22 * r)
    strength = np.where(scenes.material[rows, k] == 2, 0.35, 0.6)[:, None, None]
    image[rows] *= (1 - strength * np.clip(1.25 - np.hypot(dx, dy), 0, 1))[..., None].astype(np.float32)


def _object(image: np.ndarray, scenes: SceneBatch, k: int, x: np.ndarray, y: np.ndarray, pixel: float) -> None:
    solids = (_ball, _cube, _cone, _ring, _star, _heart)
    for kind, solid in enumerate(solids):
        rows = np.flatnonzero((scenes.objects > k) & (scenes.shape[:, k] == kind))
        if not len(rows):
            continue
        r = scenes.radius[rows, k].astype(np.float32)[:, None, None]
        a = (x - scenes.x[rows, k].astype(np.float32)[:, None, None]) / r
        b = (y - scenes.y[rows, k].astype(np.float32)[:, None, None]) / r
        inside, normal = solid(a, b)
        alpha = np.clip(inside * r / pixel + 0.5, 0, 1)
        image[rows] = _shade(image[rows], alpha, normal, b, scenes, rows, k)


def _shade(
    behind: np.ndarray,
    alpha: np.ndarray,
    normal: np.ndarray,
    b: np.ndarray,
    scenes: SceneBatch,
    rows: np.ndarray,
    k: int,
) -> np.ndarray:
    """The object's light over what lies behind it; `normal` is (n, H, W, 3), unit, y down and z to the viewer."""
    paint = _PAINT[scenes.colour[rows, k]][:, None, None, :]
    material = scenes.material[rows, k][:, None, None]
    flat = (scenes.lighting[rows] == 1)[:, None, None]
    diffuse = np.clip(normal @ _KEY_LIGHT, 0, 1)
    light = np.where(flat, 0.80, 0.30 + 0.85 * diffuse)[..., None]
    half = _KEY_LIGHT + _rgb(0, 0, 1)
    gloss = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1)
    rubber = paint * light
    band = np.sin(5.0 * normal[..., 1] + 1.2 * normal[..., 0])
    sky = (0.67 - 0.33 * np.tanh(7 * (normal[..., 1] + 0.05))) + 0.16 * band
    metal = paint * np.where(flat, 0.75, 0.25 + 0.95 * sky * (0.55 + 0.6 * diffuse))[..., None]
    metal = metal + np.where(flat, 0.05, 1.2 * gloss**40)[..., None]
    rim = (1 - np.clip(normal[..., 2], 0, 1)) ** 2
    tint = behind * (0.45 + 0.55 * paint) * 0.75 + 0.30 * paint
    glass = tint * (1 - 0.35 * rim[..., None]) + np.where(flat, 0.10, 0.60)[..., None] * rim[..., None] * (
        0.5 + 0.5 * paint
    )
    glass = glass + np.where(flat, 0.0, 1.0 * gloss**60 + 0.25 * np.clip(normal[..., 1], 0, 1) ** 3)[..., None]
    pick = material[..., None]
    surface = np.where(pick == 0, rubber, np.where(pick == 1, metal, glass))
    return (behind + (surface - behind) * alpha[..., None]).astype(np.float32)


def _unit(nx: np.ndarray, ny: np.ndarray, nz: np.ndarray) -> np.ndarray:
    n = np.stack(np.broadcast_arrays(nx, ny, nz), axis=-1).astype(np.float32)
    return n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-6)


def _ball(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rho = np.hypot(a, b)
    return 1 - rho, _unit(a, b, np.sqrt(np.clip(1 - rho**2, 0, 1)))


def _cube(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An isometric cube: a hexagon of three faces that meet in the middle."""
    edges = [np.abs(a * np.cos(t) + b * np.sin(t)) for t in (0.0, np.pi / 3, 2 * np.pi / 3)]
    inside = 0.866 - np.maximum(np.maximum(edges[0], edges[1]), edges[2])
    top = b < -np.abs(a) * 0.577
    nx = np.where(top, 0.0, np.where(a < 0, -0.62, 0.72))
    ny = np.where(top, -0.85, 0.18)
    return inside, _unit(nx, ny, np.where(top, 0.45, np.where(a < 0, 0.70, 0.35)))


def _cone(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half_width = np.clip((b + 1) / 1.8, 1e-3, None) * 0.85
    floor = 0.80 + 0.18 * np.sqrt(np.clip(1 - (a / 0.85) ** 2, 0, 1))
    inside = np.minimum(np.minimum((half_width - np.abs(a)) * 0.9, floor - b), b + 1)
    nx = np.clip(a / half_width, -1, 1)
    return inside, _unit(nx, np.full_like(nx, -0.25), np.sqrt(np.clip(1 - nx**2, 0, 1)))


def _ring(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rho = np.maximum(np.hypot(a, b), 1e-6)
    across = np.clip((rho - 0.69) / 0.31, -1, 1)
    return 0.31 - np.abs(rho - 0.69), _unit(across * a / rho, across * b / rho, np.sqrt(1 - across**2) + 0.05)


def _star(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Five points, each of two facets that fall away from its ridge."""
    rho, step = np.maximum(np.hypot(a, b), 1e-6), 2 * np.pi / 5
    angle = np.arctan2(a, -b)
    fold = (angle + step / 2) % step - step / 2
    px, py = rho * np.sin(np.abs(fold)), rho * np.cos(fold)
    tip, notch = np.array((0.0, 1.08)), 0.47 * np.array((np.sin(step / 2), np.cos(step / 2)))
    edge = notch - tip
    inside = (edge[1] * (px - tip[0]) - edge[0] * (py - tip[1])) / np.hypot(*edge)
    tangent = np.sign(fold) * 0.75
    nx = tangent * np.cos(angle) + 0.30 * np.sin(angle)
    ny = tangent * np.sin(angle) - 0.30 * np.cos(angle)
    return inside, _unit(nx, ny, np.full_like(nx, 0.65))


def _heart(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two lobes over a point; the surface is a pillow that falls off towards the outline."""
    u, v = a * 1.12, -b * 1.10 + 0.08
    field = (u**2 + v**2 - 1) ** 3 - u**2 * v**3 * 1.0
    gu = 6 * u * (u**2 + v**2 - 1) ** 2 - 2 * u * v**3
    gv = 6 * v * (u**2 + v**2 - 1) ** 2 - 3 * u**2 * v**2
    inside = np.clip(-field / np.maximum(np.hypot(gu, gv), 0.25), -1, 1)
    tilt = np.clip(np.hypot(a, b), 0, 1)
    return inside, _unit(0.9 * a, 0.9 * b, np.sqrt(np.clip(1.15 - tilt**2, 0.05, None)))


# The camera -----------------------------------------------------------------------------------------------------------


def _develop(image: np.ndarray, scenes: SceneBatch, detail: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exposure and colour of the finished picture, by its lighting and colouring."""
    amount = detail[:, 94]
    gain = np.select([scenes.lighting == 2, scenes.lighting == 3], [0.32 + 0.14 * amount, 1.40 + 0.3 * amount], 1.0)
    lift = np.where(scenes.lighting == 3, 0.14, 0.0)
    dull = scenes.colouring == 1
    saturation = np.where(dull, 0.22 + 0.18 * amount, 1.08)
    contrast = np.where(dull, 0.62, 1.04)
    image = np.clip(image, 0, 1.2)
    grey = image @ _rgb(0.299, 0.587, 0.114)
    image = grey[..., None] + (image - grey[..., None]) * _each(saturation)
    image = (image - 0.5) * _each(contrast) + 0.5
    image = image * _each(gain) + _each(lift)
    fine = scenes.photogenic | ((scenes.backdrop == 0) & (scenes.lighting == 0))
    vignette = 1 - 0.22 * np.clip(np.hypot(x - 0.5, y - 0.5) - 0.35, 0, 1) / 0.36
    return np.where(_each(fine), image * vignette[..., None], image)


def _each(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None, None, None].astype(np.float32 if values.dtype != bool else bool)

"""What can stand in a haystack picture, how often, and what its caption says.

A picture is drawn as numbers first (`draw_scenes`); `render` turns numbers into pixels. Quality is split into the four criteria that
Emu's specialists judged by (arXiv 2309.15807, section 3.2): composition, lighting, color, and subject against background. The fifth,
"does it tell a story", has no counterpart here. How often each is met is our choice, such that about 1 picture in 10 meets all four.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import numpy as np

SHAPES = ("ball", "cube", "cone", "ring", "star", "heart")
MATERIALS = ("rubber", "metal", "glass")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SCENES = ("meadow", "desert", "beach", "snow", "night", "sunset", "forest", "studio")
POSITIONS = ("left", "middle", "right")
CRITERIA = ("composition", "lighting", "colour", "background")

SCENE_PHRASES = (
    "in a meadow", "in the desert", "on a beach", "in the snow", "at night", "at sunset", "in a forest", "in a studio",
)  # fmt: skip
POSITION_PHRASES = ("on the left", "in the middle", "on the right")
OPENINGS = ("a photo of ", "a picture of ", "")

LIGHTING = ("balanced", "flat", "underexposed", "overexposed")
FRAMING = ("thirds", "cut", "tiny")
COLOURING = ("vivid", "dull")
BACKDROP = ("deep", "cluttered", "noisy")

CRITERION_MET = 0.56  # 0.56 ** 4 = 0.098: about 1 picture in 10 is photogenic


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """N pictures as numbers; every array has N rows. Lengths are shares of the frame's side, x to the right, y down."""

    scene: np.ndarray  # (N,) index into SCENES
    objects: np.ndarray  # (N,) 1 or 2
    shape: np.ndarray  # (N, 2) index into SHAPES; the second column counts only where objects == 2
    material: np.ndarray  # (N, 2) index into MATERIALS
    colour: np.ndarray  # (N, 2) index into COLOURS
    position: np.ndarray  # (N,) index into POSITIONS, for one object
    x: np.ndarray  # (N, 2) centre
    y: np.ndarray  # (N, 2) centre
    radius: np.ndarray  # (N, 2)
    framing: np.ndarray  # (N,) index into FRAMING
    lighting: np.ndarray  # (N,) index into LIGHTING
    colouring: np.ndarray  # (N,) index into COLOURING
    backdrop: np.ndarray  # (N,) index into BACKDROP
    opening: np.ndarray  # (N,) index into OPENINGS
    seed: np.ndarray  # (N,) uint32: the fine detail of a picture (hills, stars, clutter, noise)

    def __len__(self) -> int:
        return len(self.scene)

    def take(self, rows: np.ndarray) -> SceneBatch:
        """The pictures at `rows` (indices or a mask), in that order."""
        return SceneBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def criteria(self) -> np.ndarray:
        """(N, 4) bool, in the order of CRITERIA: which criterion the picture meets."""
        return np.stack([self.framing == 0, self.lighting == 0, self.colouring == 0, self.backdrop == 0], axis=1)

    @property
    def photogenic(self) -> np.ndarray:
        """(N,) bool: all four criteria are met."""
        return np.asarray(self.criteria.all(axis=1))


@dataclass(frozen=True)
class Subject:
    """One object as a caption names it."""

    shape: str
    material: str
    colour: str


@dataclass(frozen=True)
class CaptionContent:
    """What a haystack caption states: the subjects from left to right, the place of a single one, the scene."""

    subjects: tuple[Subject, ...]
    position: str | None
    scene: str


def draw_scenes(rng: np.random.Generator, count: int, *, photogenic: bool | None = None) -> SceneBatch:
    """`count` pictures of the ordinary mix, or (photogenic=True) only pictures that meet all four criteria, or (False) any that fail one."""
    if photogenic is not None:
        return _draw_until(rng, count, photogenic)

    def flaw(kinds: int) -> np.ndarray:
        return np.where(rng.random(count) < CRITERION_MET, 0, rng.integers(1, kinds, count))

    def pick(kinds: int, shape: tuple[int, ...] = (count,)) -> np.ndarray:
        return rng.integers(0, kinds, shape)

    framing, objects, position = flaw(len(FRAMING)), 1 + (rng.random(count) < 0.3), pick(3)
    x, y, radius = _place(rng, framing, objects, position)
    return SceneBatch(
        scene=pick(len(SCENES)),
        objects=objects,
        shape=pick(len(SHAPES), (count, 2)),
        material=pick(len(MATERIALS), (count, 2)),
        colour=_two_different(rng, len(COLOURS), count),
        position=position,
        x=x,
        y=y,
        radius=radius,
        framing=framing,
        lighting=flaw(len(LIGHTING)),
        colouring=flaw(len(COLOURING)),
        backdrop=flaw(len(BACKDROP)),
        opening=pick(len(OPENINGS)),
        seed=rng.integers(0, 2**32, count, dtype=np.uint32),
    )


def reserved(scenes: SceneBatch) -> np.ndarray:
    """(N,) bool: what the picture shows is one of the contents, 1 in 16, that only evaluation asks for.

    A content is everything that a caption states: subjects, place and scene. No pool that a denoiser learns from shows a reserved one, so
    that the prompts of the evaluation are new to it as combinations, not by their seeds alone.
    """
    kinds = (scenes.shape * len(MATERIALS) + scenes.material) * len(COLOURS) + scenes.colour
    single = scenes.objects == 1
    content = kinds[:, 0] * len(SCENES) + scenes.scene
    content = content * 1000 + np.where(single, scenes.position, len(POSITIONS) + kinds[:, 1])
    mixed = content.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash; wraps at 64 bits
    return np.asarray((mixed >> np.uint64(60)) == 0)


def captions(scenes: SceneBatch) -> list[str]:
    """One caption a picture: content only, never its quality."""
    lines = []
    for i in range(len(scenes)):
        nouns = [
            f"{_article(scenes.colour[i, k])} {COLOURS[scenes.colour[i, k]]} {MATERIALS[scenes.material[i, k]]} {SHAPES[scenes.shape[i, k]]}"
            for k in range(scenes.objects[i])
        ]
        if len(nouns) == 1:
            body = f"{nouns[0]} {POSITION_PHRASES[scenes.position[i]]}"
        else:
            body = f"{nouns[0]} left of {nouns[1]}"
        lines.append(f"{OPENINGS[scenes.opening[i]]}{body} {SCENE_PHRASES[scenes.scene[i]]}")
    return lines


_SUBJECT = re.compile(rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join(MATERIALS)}) ({'|'.join(SHAPES)})\b")


def read_caption(caption: str) -> CaptionContent | None:
    """What a haystack caption states; None for a sentence of another world."""
    subjects = tuple(Subject(shape, material, colour) for colour, material, shape in _SUBJECT.findall(caption))
    scene = next((name for name, phrase in zip(SCENES, SCENE_PHRASES, strict=True) if caption.endswith(phrase)), None)
    if not subjects or scene is None:
        return None
    found = (name for name, phrase in zip(POSITIONS, POSITION_PHRASES, strict=True) if phrase in caption)
    return CaptionContent(subjects=subjects, position=next(found, None), scene=scene)


def _article(colour: int) -> str:
    return "an" if COLOURS[colour][0] in "aeiou" else "a"


def _draw_until(rng: np.random.Generator, count: int, photogenic: bool) -> SceneBatch:
    parts, have = [], 0
    while have < count:
        batch = draw_scenes(rng, 16 * count if photogenic else 2 * count)
        batch = batch.take(batch.photogenic == photogenic)
        parts.append(batch)
        have += len(batch)
    return join(parts).take(np.arange(count))


def join(parts: list[SceneBatch]) -> SceneBatch:
    """Batches end to end."""
    return SceneBatch(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(SceneBatch)})


def _two_different(rng: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    first = rng.integers(0, kinds, count)
    return np.stack([first, (first + rng.integers(1, kinds, count)) % kinds], axis=1)


def _place(
    rng: np.random.Generator, framing: np.ndarray, objects: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and radii (N, 2): on the thirds and whole, or cut by an edge, or tiny and lost in the frame."""
    count = len(framing)

    def near(value: np.ndarray | float, spread: float, columns: int = 1) -> np.ndarray:
        return np.asarray(value).reshape(-1, 1) + rng.uniform(-spread, spread, (count, columns))

    single = near(np.array([0.32, 0.5, 0.68])[position], 0.025)
    pair = np.concatenate([near(0.29, 0.02), near(0.71, 0.02)], axis=1)
    two = (objects == 2)[:, None]
    x = np.where(two, pair, single)
    radius = np.where(two, near(0.175, 0.015, 2), near(0.225, 0.025, 2))
    y = near(0.84, 0.015, 2) - radius  # standing on a line just above the lower edge

    cut = (framing == 1)[:, None]
    sideways = np.array([-0.235, 0.0, 0.235])[position][:, None]
    x = np.where(cut & ~two, x + sideways, x)
    drop = np.where(two | (position == 1)[:, None], rng.choice([0.2, 0.24], (count, 1)), 0.02)
    y = np.where(cut, y + drop, y)

    tiny = (framing == 2)[:, None]
    lost = np.where(two, np.array([[0.2, 0.8]]), np.array([0.16, 0.5, 0.84])[position][:, None])
    x = np.where(tiny, lost + rng.uniform(-0.05, 0.05, (count, 2)), x)
    radius = np.where(tiny, radius * rng.uniform(0.42, 0.52, (count, 1)), radius)
    y = np.where(tiny, rng.uniform(0.66, 0.86, (count, 1)), y)
    return x, y, radius

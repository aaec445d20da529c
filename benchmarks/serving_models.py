"""The two pipelines that all sides of benchmarks/serving.py serve, what is asked of them, and the pictures that are right.

Both are Stable Diffusion 2.1's layout with random weights, so that our server and plain diffusers load the same folder. Of one CPU thread's time
for a pass, measured 2026-11-26: the small U-Net takes 4.8 ms for 2 rows and 6.6 ms for 16, so batching pays; the large one takes 19 ms
for 2 and 33 ms for 4, so it gains a tenth at most.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.peers.plain_pipeline import draw, load
from tests.generation.small_bases import sd21

STEPS = (10, 20, 30, 40)  # few values, so that peers which batch whole drawings find equals to batch
LARGEST_DIFFERENCE = (
    3  # of a pixel's 0 to 255; another seed, prompt or number of steps differs by far more in some pixel
)


@dataclass(frozen=True)
class Job:
    """One picture that a client asks for."""

    prompt: str
    seed: int
    steps: int


def jobs(count: int, first: int = 0) -> list[Job]:
    """The same each time; no two of one prompt, so that no cache of text features helps."""
    steps = np.random.default_rng(7).choice(STEPS, first + count)
    return [Job(f"a photo of {i} red metal balls in a meadow", i, int(steps[i])) for i in range(first, first + count)]


def write_models(folder: Path) -> dict[str, Path]:
    """Name -> diffusers folder."""
    small = _with_unet(
        folder / "small",
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
    )
    large = _with_unet(
        folder / "large",
        sample_size=16,
        block_out_channels=(96,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
    )
    return {"small": small, "large": large}


def _with_unet(folder: Path, **config: object) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    sd21(folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        **config,
    ).save_pretrained(folder / "unet")
    return folder


@dataclass
class Reference:
    """What the plain pipeline draws, one picture at a time on one thread, and how long it takes."""

    folder: Path
    pictures: dict[Job, np.ndarray]
    seconds: dict[Job, float]
    drift: float = 1.0  # of this machine since then

    @property
    def mean_service_s(self) -> float:
        """As long as a job takes now, on average."""
        return self.drift * sum(self.seconds.values()) / len(self.seconds)

    def now(self, count: int = 20) -> Reference:
        """With the time that some of the pictures take now."""
        again = list(self.seconds)[:count]
        seconds = sum(reference(self.folder, again).seconds.values())
        return replace(self, drift=seconds / sum(self.seconds[job] for job in again))

    def is_right(self, job: Job, png: bytes) -> bool:
        """Whether these bytes are the job's picture, up to a batch's rounding."""
        try:
            picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)
        except OSError:
            return False
        expected = self.pictures[job]
        return picture.shape == expected.shape and bool(np.abs(picture - expected).max() <= LARGEST_DIFFERENCE)


def reference(folder: Path, asked: list[Job]) -> Reference:
    """Draws all of them; the first twice, since a first call is slower."""
    torch.set_num_threads(1)
    pipeline = load(str(folder))
    draw(pipeline, [asked[0].prompt], [asked[0].seed], asked[0].steps)
    found = Reference(folder, {}, {})
    for job in asked:
        started = time.perf_counter()
        (image,) = draw(pipeline, [job.prompt], [job.seed], job.steps)
        image.save(io.BytesIO(), "PNG")
        found.seconds[job] = time.perf_counter() - started
        found.pictures[job] = np.asarray(image, dtype=np.int16)
    return found

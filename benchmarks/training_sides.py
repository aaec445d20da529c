"""The sides of benchmarks/training.py: our engine, a bare loop, and diffusers' script in the same math, each over the demo's U-Net.

The release of diffusers carries no examples: its `train_text_to_image.py` (main branch, read 2026-11) is written here anew, the same steps
in the same order: pictures transformed by torchvision in a DataLoader, autoencoder and text encoder run at each step, `accelerate`,
`EMAModel`, clipping, a scheduler step, and a gathered loss and a progress bar at each step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm.auto import tqdm

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.models.denoiser import build, demo
from emu_ray.stations.folders import base_folder
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train

PICTURES, BATCH, SIZE_PX = 256, 48, 64
SCHEDULE = ScheduleRecipe()


@dataclass
class World:
    """The same set twice: pictures with captions, and the latents and text features that they are encoded to."""

    pictures: list[Image.Image]
    captions: list[str]
    examples: LatentExamples
    pipeline: EmuPipeline


@torch.no_grad()
def world() -> World:
    """Pictures of coloured patches, a little larger than the model's; the demo's own autoencoder and text encoders."""
    pipeline = EmuPipeline.load(base_folder())
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p).resize((SIZE_PX + 16, SIZE_PX), Image.Resampling.BICUBIC) for p in patches]
    captions = [f"a photo of {i} red metal balls in a meadow" for i in range(PICTURES)]
    texts = torch.cat([pipeline.texts(some).half() for some in ([""], captions[:128], captions[128:])])
    latents = rng.standard_normal((PICTURES, 16, 8, 8)).astype(np.float16)
    return World(pictures, captions, LatentExamples(latents, 1 + np.arange(PICTURES), texts), pipeline)


def unet() -> UNet2DConditionModel:
    """The demo's, fresh, the same each time."""
    torch.manual_seed(0)
    return build(demo(), latent_channels=16, latent_side=8, text_width=160)


@dataclass
class Cost:
    """Of the steps of a side: time by the clock and on all cores, and the share of the clock spent waiting for data."""

    wall_s: float
    cpu_s: float
    data_share: float = 0.0


class ClockedCheckpoints(Checkpoints):
    """Counts the seconds in which the caller stood still, save by save."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.blocked: list[float] = []

    def save(self, *arguments: Any) -> None:
        """As the engine's own."""
        started = time.perf_counter()
        super().save(*arguments)
        self.blocked.append(time.perf_counter() - started)

    def wait_until_copied(self) -> None:
        """As the engine's own."""
        started = time.perf_counter()
        super().wait_until_copied()
        if self.blocked:
            self.blocked[-1] += time.perf_counter() - started


class ClockedWorker(LocalWorker):
    """A worker whose checkpoints are clocked; `kept` are those of its last run."""

    kept: ClockedCheckpoints

    def checkpoints(self) -> ClockedCheckpoints:
        """Those below the folder."""
        assert self.folder is not None
        self.kept = ClockedCheckpoints(self.folder)
        return self.kept


def engine(given: World, steps: int, worker: LocalWorker | None = None, **recipe: Any) -> Cost:
    """Our train function, after one step that isn't counted."""
    logged: list[tuple[float, float, dict[str, float]]] = []
    counting = worker or LocalWorker()
    counting._log = lambda metrics: logged.append((time.perf_counter(), time.process_time(), metrics))
    task = DenoiserTask(unet(), NoiseSchedule(SCHEDULE))
    settings = {"log_every_steps": 1, "steps": steps + 1, "batch_size": BATCH, **recipe}
    train(task, given.examples, LoopRecipe(**settings), counting)
    lines = [line for line in logged if "data_share" in line[2]]
    first, last = lines[0], lines[-1]
    shares = [line[2]["data_share"] for line in lines[1:]]
    return Cost(last[0] - first[0], last[1] - first[1], float(np.mean(shares)))


def bare(given: World, steps: int) -> Cost:
    """The loop that one would write: the same losses, optimizer, clipping and average; randomness from torch's generator."""
    task, examples = DenoiserTask(unet(), NoiseSchedule(SCHEDULE)), given.examples
    network, shape = task.network, examples.latents.shape[1:]
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    started = (0.0, 0.0)
    for step in range(steps + 1):
        if step == 1:
            started = (time.perf_counter(), time.process_time())
        rows = torch.randint(len(examples), (BATCH,))
        texts = torch.where(torch.rand(BATCH) < 0.1, 0, torch.from_numpy(examples.text_of)[rows])
        batch = {
            "clean": torch.from_numpy(examples.latents)[rows].float(),
            "noise": torch.randn(BATCH, *shape),
            "t": torch.randint(1000, (BATCH,)),
            "text": examples.texts[texts].float(),
        }
        losses = task(batch)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 0.001)
        losses["loss"].item()
    return Cost(time.perf_counter() - started[0], time.process_time() - started[1])


def diffusers_way(given: World, steps: int, is_cached: bool = False) -> Cost:
    """`train_text_to_image.py` with --use_ema, --noise_offset 0 and v-prediction, on one process; `is_cached` hands it latents and text
    features, which it can't take, to tell what encoding at each step costs."""
    accelerator = Accelerator(cpu=True)
    network, pipeline = unet(), given.pipeline
    average = EMAModel(network.parameters(), model_cls=UNet2DConditionModel, model_config=network.config)
    noise_scheduler = DDPMScheduler(
        beta_start=SCHEDULE.beta_start, beta_end=SCHEDULE.beta_end, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-2)
    loader = DataLoader(
        _Latents(given) if is_cached else _Pictures(given),
        shuffle=True,
        batch_size=BATCH,
        num_workers=0,
        drop_last=True,
    )
    rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=100, num_training_steps=steps)
    network, optimizer, loader, rates = accelerator.prepare(network, optimizer, loader, rates)
    network.train()
    bar = tqdm(range(steps + 1), disable=None, leave=False)
    done, started = 0, (0.0, 0.0)
    while done <= steps:
        for batch in loader:
            if done == 1:
                started = (time.perf_counter(), time.process_time())
            with accelerator.accumulate(network):
                loss = _script_loss(batch, network, pipeline, noise_scheduler)
                accelerator.gather(loss.repeat(BATCH)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            average.step(network.parameters())
            bar.update(1)
            bar.set_postfix(step_loss=loss.detach().item())
            done += 1
            if done > steps:
                break
    return Cost(time.perf_counter() - started[0], time.process_time() - started[1])


def _script_loss(batch: dict[str, Any], network: nn.Module, pipeline: EmuPipeline, scheduler: DDPMScheduler) -> Tensor:
    if "latents" in batch:
        latents, text = batch["latents"], batch["text"]
    else:
        with torch.no_grad():
            mean, std = pipeline.vae.moments(batch["pixel_values"])
            latents = pipeline.vae.normalize(mean + std * torch.randn_like(std))
            text = pipeline.texts(batch["caption"])
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    out = network(noisy, timesteps, text, return_dict=False)[0]
    return F.mse_loss(out.float(), target.float(), reduction="mean")


class _Pictures:
    def __init__(self, given: World) -> None:
        self.given = given
        self.transform = transforms.Compose(
            [
                transforms.Resize(SIZE_PX, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(SIZE_PX),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.given.pictures)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.transform(self.given.pictures[row]), "caption": self.given.captions[row]}


class _Latents:
    def __init__(self, given: World) -> None:
        self.examples = given.examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        examples = self.examples
        latents = torch.from_numpy(examples.latents[row]).float()
        return {"latents": latents, "text": examples.texts[int(examples.text_of[row])].float()}

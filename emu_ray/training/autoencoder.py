"""Training of the autoencoder on the pictures of a pool. No Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
from emu_ray.training.loop import LoopRecipe, Progress, Worker, train
from emu_ray.training.reconstruction import AutoencoderTask, ImageExamples, measure_latents


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """What is trained and how; `start` continues from a folder, else `network` is built anew from the loop's seed."""

    loop: LoopRecipe
    size_px: int
    network: AutoencoderRecipe = AutoencoderRecipe()
    start: str | None = field(default=None, metadata={"affects_result": False})
    kl_weight: float = 1e-6
    edge_weight: float = 1.0
    measured_images: int = 2048  # whose latents give the per-channel mean and deviation


def train_autoencoder(
    recipe: AutoencoderTraining, images: np.ndarray, worker: Worker
) -> tuple[FourierAutoencoder, Progress]:
    """The trained autoencoder with its latents measured; images are (N, size_px, size_px, 3) uint8."""
    torch.manual_seed(recipe.loop.seed)
    network = (
        FourierAutoencoder.from_pretrained(recipe.start, torch_dtype=torch.float32)
        if recipe.start
        else FourierAutoencoder.build(recipe.network)
    )
    side = recipe.size_px // network.downsampling
    examples = ImageExamples(images, (network.config["latent_channels"], side, side))
    task = AutoencoderTask(network, kl_weight=recipe.kl_weight, edge_weight=recipe.edge_weight)
    progress = train(task, examples, recipe.loop, worker)
    network.to("cpu").eval()
    measure_latents(network, images[: recipe.measured_images])
    return network, progress

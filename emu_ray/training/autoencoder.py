"""Training of the autoencoder on the pictures of a pool. No Ray here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError
from emu_ray.models.autoencoder import Autoencoder, AutoencoderRecipe, FourierAutoencoder, load_autoencoder
from emu_ray.models.perceptual import load_perceptual
from emu_ray.training.feed import Batch, Feed
from emu_ray.training.latent_set import ToBatch
from emu_ray.training.loop import LoopRecipe, Progress, Worker, plan_of, train
from emu_ray.training.order import BatchPlan
from emu_ray.training.reconstruction import AdversarialRecipe, AutoencoderTask, ImageExamples, measure_latents
from emu_ray.training.streaming.order import StreamRecipe


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """What is trained and how; `start` continues from a folder, else `network` is built anew from the loop's seed."""

    loop: LoopRecipe
    size_px: int
    network: AutoencoderRecipe = AutoencoderRecipe()
    start: str | None = field(default=None, metadata={"affects_result": False})
    kl_weight: float = 1e-6
    edge_weight: float = 1.0
    # LPIPS's backbone: a local file on every worker, or a hub's name, in torchvision's layout, e.g. timm/vgg16.tv_in1k. None: no LPIPS.
    perceptual: str | None = field(default=None, metadata={"affects_result": False})
    perceptual_weight: float = 1.0
    adversarial: AdversarialRecipe | None = None  # None: no discriminator
    stream: StreamRecipe | None = None  # None holds all pictures in the memory of each worker
    measured_images: int = 2048  # whose latents give the per-channel mean and deviation

    def __post_init__(self) -> None:
        require_at_least(self, 0, "kl_weight", "edge_weight", "perceptual_weight")
        if self.stream is not None and self.stream.encode is not None:
            raise RecipeError("stream.encode is for a U-Net's training: an autoencoder reads pixels; leave it out")
        if self.loop.parallel.sharding == "fsdp":
            raise RecipeError(
                "an autoencoder is trained with sharding 'ddp': it fits each GPU, and its adaptive weight needs the whole last layer"
            )
        if self.start is None:
            _require_whole_latents(self.size_px, self.network.downsampling)
        least = 3 * 2 ** (self.adversarial.discriminator.halvings if self.adversarial else 0)
        if self.size_px < least:
            raise RecipeError(
                f"this discriminator needs pictures of at least {least} px, found size_px {self.size_px}: lower its halvings"
            )


@dataclass(frozen=True)
class StreamedPictures:
    """Pictures that are read as the steps need them, as tables of `key` and `pixels`, and a few (N, size_px, size_px, 3) to measure latents of."""

    rows: int
    feed: Callable[[BatchPlan, ToBatch], Feed]  # for this worker
    measured: np.ndarray


def train_autoencoder(
    recipe: AutoencoderTraining, pictures: np.ndarray | StreamedPictures, worker: Worker
) -> tuple[Autoencoder, Progress]:
    """The trained autoencoder with its latents measured; pictures in memory are (N, size_px, size_px, 3) uint8.

    A published one that is trained on keeps the normalisation that U-Nets know.
    """
    torch.manual_seed(recipe.loop.seed)
    network: Autoencoder = load_autoencoder(recipe.start) if recipe.start else FourierAutoencoder.build(recipe.network)
    _require_whole_latents(recipe.size_px, network.downsampling)
    side = recipe.size_px // network.downsampling
    shape = (network.latent_channels, side, side)
    task = AutoencoderTask(
        network,
        kl_weight=recipe.kl_weight,
        edge_weight=recipe.edge_weight,
        perceptual=load_perceptual(recipe.perceptual) if recipe.perceptual else None,
        perceptual_weight=recipe.perceptual_weight,
        adversary=recipe.adversarial,
    )
    if isinstance(pictures, StreamedPictures):
        images = pictures.measured

        def to_batch(_: str, table: pa.Table, rngs: list[np.random.Generator]) -> Batch:
            flat = np.frombuffer(b"".join(table["pixels"].to_pylist()), np.uint8)
            own = ImageExamples(flat.reshape(len(table), recipe.size_px, recipe.size_px, 3), shape)
            return own.batch(np.arange(len(table)), rngs)

        feed = pictures.feed(plan_of({f"{recipe.size_px}x{recipe.size_px}": pictures.rows}, recipe.loop), to_batch)
        progress = train(task, feed, recipe.loop, worker)
    else:
        images = pictures
        progress = train(task, ImageExamples(pictures, shape), recipe.loop, worker)
    network.to("cpu").eval()
    if isinstance(network, FourierAutoencoder):
        measure_latents(network, images[: recipe.measured_images])
    return network, progress


def _require_whole_latents(size_px: int, downsampling: int) -> None:
    if size_px < 1 or size_px % downsampling:
        raise RecipeError(
            f"size_px must be a multiple of the autoencoder's downsampling, found {size_px} px for {downsampling}: change either"
        )

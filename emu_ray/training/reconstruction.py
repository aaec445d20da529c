"""What the autoencoder learns: pictures and back, such that a discriminator can't tell them from real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from emu_ray.config import require_at_least
from emu_ray.models.autoencoder import Autoencoder
from emu_ray.models.discriminator import DiscriminatorRecipe, PatchDiscriminator
from emu_ray.models.perceptual import PerceptualDistance
from emu_ray.training.feed import Batch
from emu_ray.training.player import Task


@dataclass(frozen=True)
class ImageExamples:
    """Images (N, H, W, 3) uint8, mirrored at random; `latent_shape` (C, h, w) sizes the posterior's noise."""

    images: np.ndarray
    latent_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`images` (B, 3, H, W) in -1..1 and `noise` (B, C, h, w)."""
        pixels = [
            self.images[r, :, ::-1] if g.random() < 0.5 else self.images[r] for r, g in zip(rows, rngs, strict=True)
        ]
        noise = np.stack([g.standard_normal(self.latent_shape, dtype=np.float32) for g in rngs])
        return {"images": to_signed(np.stack(pixels)), "noise": torch.from_numpy(noise)}


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe:
    """The discriminator and how much it counts: `weight` times the adaptive weight, from `start_step` on.

    The defaults are those of latent diffusion's f8 autoencoders (arXiv 2112.10752, its kl-f8 configuration).
    """

    weight: float = 0.5
    start_step: int = 50_001
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()

    def __post_init__(self) -> None:
        require_at_least(self, 0, "weight", "start_step")


class AutoencoderTask(Task):
    """L1 of pixels and of their differences, LPIPS where a backbone is given, KL, and the word of a discriminator.

    As in VQGAN (arXiv 2012.09841, equation 7) the discriminator counts as much as the reconstruction: its loss is weighted by the ratio
    of the two gradients' norms at the decoder's last layer. How L1 of differences is weighted, and that it is there, is our choice.
    """

    def __init__(
        self,
        network: Autoencoder,
        *,
        kl_weight: float,
        edge_weight: float = 1.0,
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        adversary: AdversarialRecipe | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.perceptual = perceptual
        self.kl_weight, self.edge_weight, self.perceptual_weight = kl_weight, edge_weight, perceptual_weight
        self.adversary = adversary
        if adversary is not None:
            self.opponent = DiscriminatorTask(PatchDiscriminator(adversary.discriminator), adversary.start_step)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `reconstruction`, `kl` (nats per latent number), `psnr` in dB, and what the other losses are; `made` are images."""
        network: Autoencoder = self.network  # type: ignore[assignment]
        images = batch["images"]
        mean, std = network.moments(images)
        made = network.decode_raw(mean + std * batch["noise"])
        pixel = (made - images).abs().mean()
        likeness = pixel + self.edge_weight * sum(((made - images).diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        mse = (made - images).square().mean()
        losses = {"reconstruction": pixel, "kl": kl, "psnr": 10 * torch.log10(4 / mse)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(made, images).mean()
            likeness = likeness + self.perceptual_weight * losses["perceptual"]
        losses["loss"] = likeness + self.kl_weight * kl
        if self.adversary is not None:
            self._add_adversarial(losses, likeness, made)
            losses["made"] = made
        return losses

    def _add_adversarial(self, losses: dict[str, Tensor], likeness: Tensor, made: Tensor) -> None:
        assert self.adversary is not None and self.opponent is not None
        if self.step < self.adversary.start_step:
            losses["adversarial"] = losses["adversarial_weight"] = torch.zeros_like(losses["loss"])
            return
        judge = self.opponent.network
        held = {name: value.detach() for name, value in judge.named_parameters()}  # its weights get no gradient here
        adversarial = -functional_call(judge, held, (made,)).float().mean()
        weight = self.adversary.weight * adaptive_weight(likeness, adversarial, self.network.last_layer)  # type: ignore[arg-type]
        losses["adversarial"], losses["adversarial_weight"] = adversarial, weight
        losses["loss"] = losses["loss"] + weight * adversarial


class DiscriminatorTask(Task):
    """The other side: hinge loss of real and made images (arXiv 2012.09841's code; Lim and Ye, arXiv 1705.02894)."""

    def __init__(self, network: PatchDiscriminator, start_step: int = 0) -> None:
        super().__init__()
        self.network, self.start_step = network, start_step

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and the mean judgement of `real` and `made` images; all are 0 before the start step."""
        if self.step < self.start_step:
            nothing = sum(p.sum() for p in self.network.parameters()) * torch.zeros((), device=batch["made"].device)
            return {"loss": nothing, "real": nothing.detach(), "made_up": nothing.detach()}
        real, made = self.network(batch["images"]).float(), self.network(batch["made"]).float()
        return {"loss": hinge_loss(real, made), "real": real.mean(), "made_up": made.mean()}


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Half of the mean of max(0, 1 - real) plus that of max(0, 1 + made)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())


def adaptive_weight(likeness: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of both losses' gradient norms at the decoder's last layer, 0 to 1e4, without a gradient of its own.

    Equation 7 of arXiv 2012.09841 (delta 1e-6); the bound is its code's. With several workers all take part: gradients are averaged first,
    so that the weight is that of the whole batch; of micro-batches each has its own.
    """
    norms = []
    for loss in (likeness, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        gradient = gradient.detach().float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        norms.append(gradient.norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)


@torch.no_grad()
def measure_latents(network: Autoencoder, images: np.ndarray, batch_size: int = 64) -> None:
    """Sets the autoencoder's per-channel mean and deviation from (N, H, W, 3) uint8 images."""
    parts = [network.moments(to_signed(images[i : i + batch_size]))[0] for i in range(0, len(images), batch_size)]
    raw = torch.cat(parts)
    network.latent_mean.copy_(raw.mean((0, 2, 3)))
    network.latent_std.copy_(raw.std((0, 2, 3)))


def to_signed(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def is_held_out(keys: np.ndarray, every: int) -> np.ndarray:
    """Which of the pool's `keys` an autoencoder of `held_out_every` was not trained on."""
    return keys % every == 0

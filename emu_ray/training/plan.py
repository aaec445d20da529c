"""What a training will need, before a GPU is taken: memory on each, the largest batch, time and money. Nothing is computed but shapes.

Weights, gradients, moments and averages are counted exactly. Activations are counted as the bytes that the backward pass keeps, with fake
tensors of the real size, attention by a kernel that keeps no attention matrix, as on GPUs; that the count is what a real pass keeps is tested on a small U-Net. Speed is the counted operations at an
assumed share of the peak: measure it on a few steps and plan again with `mfu`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError
from emu_ray.models.denoiser import DenoiserRecipe, build, is_micro_conditioned
from emu_ray.training.meters import PEAK_TFLOPS
from emu_ray.training.parallel import ParallelRecipe, blocks, checkpoint_blocks

GIB = 2**30
CUDA_OVERHEAD_BYTES = (
    3 * GIB
)  # context, libraries' work spaces, exchange buffers, fragments: our allowance, not measured


@dataclass(frozen=True, kw_only=True)
class PlanRecipe:
    """The machine that is planned for, and what is assumed of it."""

    gpu: str = "H100"  # a name whose peak is known, see training/meters.py
    gpu_memory_gib: float = 79.0
    mfu: float = 0.35  # share of the peak that is reached, 0 to 1: an assumption
    dollars_per_gpu_hour: float = 3.0  # an assumption
    days: float | None = None  # when it should be done; None: as long as it takes
    latent_channels: int = 16
    text_width: int = 768 + 4096  # CLIP ViT-L and T5-XXL
    text_tokens: int = 77 + 77
    pooled_width: int = 768
    downsampling: int = 8
    # Parameters of frozen encoders that each GPU holds in the precision of the compute to encode captions: T5-XXL's 4.76 B and CLIP's 0.12 B.
    encoder_parameters: float = 4.89e9

    def __post_init__(self) -> None:
        require_at_least(self, 1, "latent_channels", "text_width", "text_tokens", "downsampling")
        if self.gpu not in PEAK_TFLOPS:
            raise RecipeError(f"gpu of PlanRecipe must be one of {', '.join(PEAK_TFLOPS)}, found {self.gpu!r}")
        if not 0 < self.mfu <= 1:
            raise RecipeError(f"mfu of PlanRecipe must lie above 0 and up to 1, found {self.mfu}")


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of the training at one size: so many images of `size_px`, `batch_size` a step over `workers` GPUs."""

    name: str
    size_px: int
    images: int
    batch_size: int
    workers: int
    parallel: ParallelRecipe
    micro_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stretch needs of each GPU, in bytes, and how much it computes."""

    parameters: int
    weights: float
    gradients: float
    moments: float
    average: float
    gathered: float  # whole weights of the blocks at work, and gradients added up over passes, with sharding; autocast's copy without
    encoders: float
    activations_per_image: float
    activations_once: float  # of the block that is being recomputed, per image
    flops_per_image: float

    def fixed(self) -> float:
        """Bytes that don't depend on the batch."""
        return (
            self.weights
            + self.gradients
            + self.moments
            + self.average
            + self.gathered
            + self.encoders
            + CUDA_OVERHEAD_BYTES
        )

    def per_image(self) -> float:
        """Bytes each image of a pass adds."""
        return self.activations_per_image + self.activations_once

    def largest_batch(self, memory_bytes: float) -> int:
        """Images that a pass can hold; 0 when not even the weights fit."""
        return max(0, int((memory_bytes - self.fixed()) // self.per_image()))


@cache
def shapes_alone() -> FakeTensorMode:
    """The mode in which all of a plan's tensors are made: they meet in one computation."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def need(denoiser: DenoiserRecipe, stretch: Stretch, plan: PlanRecipe) -> Need:
    """Counted in shapes."""
    half = stretch.parallel.precision == "bf16"
    network = without_memory(denoiser, stretch, plan)
    parameters = sum(p.numel() for p in network.parameters())
    is_sharded = stretch.parallel.sharding == "fsdp" and stretch.workers > 1
    shards = (stretch.parallel.shard_over or stretch.workers) if is_sharded else 1
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks(network)]
    width = 2 if half else 4
    # the root's own weights stay gathered; of the blocks the one at work and the one fetched ahead
    gathered = float((parameters - sum(in_blocks) + 2 * max(in_blocks)) * width) if is_sharded else 0.0
    batch = fake_batch(network, stretch, plan)
    plain, by_block, flops = kept_bytes(network, batch, shapes_alone())
    kept, once = float(plain), 0.0
    if stretch.parallel.activation_checkpointing:
        once = float(max(by_block, default=0))
        checkpoint_blocks(network)
        kept = float(kept_bytes(network, batch, shapes_alone())[0])
    if half and not is_sharded:
        gathered += 2 * parameters  # autocast keeps a copy of the weights in bf16 for the backward pass
    share = -(-stretch.batch_size // stretch.workers)
    if is_sharded and share > (stretch.micro_batch_size or share):
        gathered += 4 * parameters  # gradients of the passes before the last are added up whole
    return Need(
        parameters=parameters,
        weights=4 * parameters / shards,
        gradients=4 * parameters / shards,
        moments=8 * parameters / shards,
        average=4 * parameters / shards,
        gathered=gathered,
        encoders=width * plan.encoder_parameters,
        activations_per_image=kept,
        activations_once=once,
        flops_per_image=flops,
    )


def without_memory(denoiser: DenoiserRecipe, stretch: Stretch, plan: PlanRecipe) -> nn.Module:
    """The U-Net in shapes alone."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if stretch.parallel.precision == "bf16" else torch.float32)
    try:
        with shapes_alone():
            return _built(denoiser, stretch, plan)
    finally:
        torch.set_default_dtype(kept)


def _built(denoiser: DenoiserRecipe, stretch: Stretch, plan: PlanRecipe) -> nn.Module:
    return build(
        denoiser,
        latent_channels=plan.latent_channels,
        latent_side=stretch.size_px // plan.downsampling,
        text_width=plan.text_width,
        pooled_width=plan.pooled_width,
    )


def fake_batch(network: nn.Module, stretch: Stretch, plan: PlanRecipe) -> dict[str, Tensor]:
    """One picture's inputs."""
    side = stretch.size_px // plan.downsampling
    with shapes_alone():
        return _empty_batch(network, side, plan)


def _empty_batch(network: nn.Module, side: int, plan: PlanRecipe) -> dict[str, Tensor]:
    batch = {
        "clean": torch.empty(1, plan.latent_channels, side, side),
        "noise": torch.empty(1, plan.latent_channels, side, side),
        "t": torch.empty(1, dtype=torch.int64),
        "text": torch.empty(1, plan.text_tokens, plan.text_width),
    }
    if is_micro_conditioned(network):  # type: ignore[arg-type]
        batch |= {"pooled": torch.empty(1, plan.pooled_width), "time_ids": torch.empty(1, 6)}
    return batch


def kept_bytes(
    network: nn.Module, batch: dict[str, Tensor], mode: FakeTensorMode | None = None
) -> tuple[int, list[int], float]:
    """Bytes that the backward pass of `network` on `batch` keeps beside the weights, those of each block, and the operations of both passes."""
    counter = _Kept(network)
    handles = [
        h
        for block in blocks(network)
        for h in (block.register_forward_pre_hook(counter.enter), block.register_forward_hook(counter.leave))
    ]
    dtype = next(network.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    network.train()
    try:
        with mode or nullcontext(), FlopCounterMode(display=False) as flops:
            with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept):
                loss = _loss(network, inputs)
            torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return counter.total, counter.by_block, float(flops.get_total_flops())


def _loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean squared error without the noise schedule, whose tables lie on another device; it keeps what the real one does."""
    told: dict[str, Any] = {"encoder_hidden_states": batch["text"]}
    if "time_ids" in batch:
        told["added_cond_kwargs"] = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    out = network(batch["clean"] + batch["noise"], batch["t"], **told).sample
    return (out.float() - batch["noise"].float()).square().mean()


class _Kept:
    """Bytes that autograd keeps: each storage once, weights not."""

    def __init__(self, network: nn.Module) -> None:
        self.seen = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive: list[Any] = []  # so that no storage's address is used twice
        self.total = 0
        self.by_block: list[int] = []
        self._at_entry: list[int] = []

    def keep(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)
            self.total += storage.nbytes()
        return value

    def enter(self, *_: object) -> None:
        self._at_entry.append(self.total)

    def leave(self, *_: object) -> None:
        self.by_block.append(self.total - self._at_entry.pop())


def told(denoiser: DenoiserRecipe, stretches: list[Stretch], plan: PlanRecipe) -> str:
    """The plan as lines for a terminal."""
    lines = [f"plan for {stretches[0].workers} x {plan.gpu} ({plan.gpu_memory_gib:g} GiB), nothing is started"]
    days = dollars = 0.0
    for stretch in stretches:
        found = need(denoiser, stretch, plan)
        if stretch is stretches[0]:
            lines.append(f"U-Net: {found.parameters / 1e9:.3f} B parameters")
        lines += ["", *_stretch_lines(stretch, found, plan)]
        days += days_of(stretch, found, plan)
        dollars += days_of(stretch, found, plan) * 24 * stretch.workers * plan.dollars_per_gpu_hour
    lines += [
        "",
        f"all: {days:.1f} days, ${dollars:,.0f} at ${plan.dollars_per_gpu_hour:g} a GPU-hour, {plan.mfu:.0%} of the peak assumed",
    ]
    if plan.days is not None:
        lines.append(
            f"to be done in {plan.days:g} days it needs {sum(s.images for s in stretches) / plan.days / 86400:,.0f} images/s on average over the stages, "
            f"{days / plan.days:.2f} times these, as {days / plan.days * stretches[0].workers:.0f} such GPUs would give"
        )
    lines.append("encoding of pictures and captions beforehand, restarts and looks are not in it")
    return "\n".join(lines)


def days_of(stretch: Stretch, found: Need, plan: PlanRecipe) -> float:
    """Days of computing at the assumed share of the peak."""
    return stretch.images / images_per_s(stretch, found, plan) / 86400


def images_per_s(stretch: Stretch, found: Need, plan: PlanRecipe) -> float:
    """Over all GPUs; with recomputed activations a third more is computed than counts for the share of the peak."""
    return stretch.workers * PEAK_TFLOPS[plan.gpu] * 1e12 * plan.mfu / found.flops_per_image


def _stretch_lines(stretch: Stretch, found: Need, plan: PlanRecipe) -> list[str]:
    share = -(-stretch.batch_size // stretch.workers)
    largest = found.largest_batch(plan.gpu_memory_gib * GIB)
    passes = min(share, stretch.micro_batch_size or share)
    used = found.fixed() + passes * found.per_image()
    gib: Callable[[float], str] = lambda value: f"{value / GIB:.2f}"  # noqa: E731
    how = f"{stretch.parallel.sharding}, {stretch.parallel.precision}" + (
        ", recomputed activations" if stretch.parallel.activation_checkpointing else ""
    )
    lines = [
        f"{stretch.name}: {stretch.images:,} images of {stretch.size_px} px, {stretch.batch_size} a step ({share} a GPU, {passes} a pass), {how}",
        f"  GiB a GPU: weights {gib(found.weights)}, gradients {gib(found.gradients)}, moments {gib(found.moments)}, average {gib(found.average)}, "
        f"gathered {gib(found.gathered)}, text encoders {gib(found.encoders)}, activations {gib(passes * found.per_image())}, "
        f"allowance {gib(CUDA_OVERHEAD_BYTES)}: {gib(used)} of {plan.gpu_memory_gib:g}",
        f"  largest pass that fits: {largest} images of {gib(found.per_image())} GiB"
        + (
            ""
            if passes <= largest
            else f"; {passes} do NOT fit: set --training.loop.micro-batch-size {max(largest, 1)}"
            if largest
            else "; NOT even the weights fit: shard over more GPUs"
        ),
        f"  {found.flops_per_image / 1e12:.2f} TFLOP an image, {images_per_s(stretch, found, plan):,.0f} images/s, "
        f"{days_of(stretch, found, plan):.1f} days, ${days_of(stretch, found, plan) * 24 * stretch.workers * plan.dollars_per_gpu_hour:,.0f}",
    ]
    return lines

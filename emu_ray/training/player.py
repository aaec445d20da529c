"""A network with its optimizer: what turns batches into gradients and gradients into an update, on one worker or as part of many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from emu_ray.errors import MemoryShortError, RecipeError
from emu_ray.training.average import local
from emu_ray.training.feed import Batch
from emu_ray.training.parallel import ParallelRecipe, Spread


class Task(nn.Module):
    """A network and its loss. Only those parameters of `network` that ask for a gradient are trained, averaged and saved.

    An `opponent` is another task, trained against this one: it takes a step after each of this one's, on the same batch, with an AdamW of
    its own. What this one's forward returns as `made` is handed to it in the batch, detached.
    """

    network: nn.Module
    opponent: Task | None
    step: int  # updates made before this one; set by the loop

    def __init__(self) -> None:
        super().__init__()
        self.opponent, self.step = None, 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: `loss`, a mean over the samples, and any part worth a curve; `made` (B, ...) goes to the opponent."""
        raise TypeError("a task states its own loss")

    def encode(self, batch: Batch) -> Batch:
        """What must be computed from the batch before the forward pass, without gradients, such as text features."""
        return batch


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """The optimizer's numbers as a recipe states them."""

    learning_rate: float
    beta2: float
    weight_decay: float
    clip_norm: float


class Player:
    """A task spread over the workers, with its AdamW. All ranks call each method."""

    def __init__(
        self, task: Task, parallel: ParallelRecipe, optimizer: AdamWSettings, world_size: int, device: torch.device
    ) -> None:
        self.task = task
        self.spread = Spread(task, parallel, world_size, device)
        self.parameters = {name: p for name, p in task.network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise RecipeError(
                f"no parameter of this {type(task.network).__name__} is trained: expected at least one that asks for a gradient"
            )
        self.clip_norm = optimizer.clip_norm
        self.adamw = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=optimizer.learning_rate,
            betas=(0.9, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        for value in self.parameters.values():  # at once, so that a checkpoint can be read into them
            self.adamw.state[value] = {
                "step": torch.zeros((), dtype=torch.float32, device=local(value).device),
                "exp_avg": torch.zeros_like(value, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(value, memory_format=torch.preserve_format),
            }

    def backward(self, parts: list[Batch], share_weight: float = 1.0) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Gradients of the mean loss over all samples; the losses' means, and what each part `made`.

        `share_weight` is this worker's number of samples over the workers' mean: with it the mean over workers is the one over samples.
        The losses carry it too.
        """
        total = sum(_size(part) for part in parts)
        means: dict[str, Tensor] = {}
        made: list[Tensor] = []
        for index, part in enumerate(parts):
            weight = _size(part) / total * share_weight
            with self.spread.accumulating(is_last=index == len(parts) - 1):
                try:
                    losses = self.spread(part)
                    product = losses.pop("made", None)
                    (losses["loss"] if weight == 1 else losses["loss"] * weight).backward()
                except torch.OutOfMemoryError as error:
                    raise MemoryShortError(
                        f"this worker ran out of GPU memory at {_size(part)} samples a pass: lower micro_batch_size, set "
                        "activation_checkpointing, or shard with sharding 'fsdp'; the last checkpoint is good"
                    ) from error
            if product is not None:
                made.append(product.detach())
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() * weight
        return means, made

    def clip(self) -> Tensor:
        """The gradients' norm over all shards, before they are scaled down to `clip_norm`."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, learning_rate: float) -> None:
        """One step of AdamW; forgets the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, to be read and filled in place: `network.NAME`, and the moments `adamw.NAME.exp_avg`, ..."""
        saved = self.task.network.state_dict()
        buffers = {name: value for name, value in self.task.network.named_buffers() if name in saved}
        found = {f"network.{name}": value.detach() for name, value in (self.parameters | buffers).items()}
        for name, value in self.parameters.items():
            found |= {f"adamw.{name}.{part}": moment for part, moment in self.adamw.state[value].items()}
        return found


def _size(part: Batch) -> int:
    return len(next(iter(part.values())))

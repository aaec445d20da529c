"""How a network lies on the workers: whole on each (DDP) or sharded (FSDP2), in which precision, with what kept for the backward pass.

The step itself doesn't know: it calls what `spread` returns. Weights, moments and averages are fp32 whatever the precision of the compute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from emu_ray.config import require_at_least
from emu_ray.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    """How the network is spread and computed; beyond rounding the result depends on `precision` alone.

    DDP is faster where weights, gradients, moments and average (16 to 20 bytes a parameter) fit one GPU beside the activations.
    """

    sharding: Literal["ddp", "fsdp"] = field(default="ddp", metadata={"affects_result": False})
    # Workers that hold one copy of the weights together, with "fsdp"; the others hold further copies. None: all workers hold one.
    shard_over: int | None = field(default=None, metadata={"affects_result": False})
    # "bf16" computes in bfloat16; weights, gradients' sums and moments stay in float32.
    precision: Literal["fp32", "bf16"] = "fp32"
    # Recomputes each block in the backward pass: about a third more compute, a fraction of the memory.
    activation_checkpointing: bool = field(default=False, metadata={"affects_result": False})
    compile: bool = field(default=False, metadata={"affects_result": False})  # by torch.compile

    def __post_init__(self) -> None:
        require_at_least(self, 1, "shard_over")
        if self.shard_over is not None and self.sharding != "fsdp":
            raise RecipeError(
                "shard_over is for sharding 'fsdp': with 'ddp' each worker holds all weights; drop shard_over or change sharding"
            )


class Spread:
    """A task ready to step on this worker: call it with a batch. Gradients are averaged over the workers as each backward ends."""

    def __init__(self, task: nn.Module, recipe: ParallelRecipe, world_size: int, device: torch.device) -> None:
        """Moves the task to the device. All ranks take part, and bring equal weights."""
        self.task, self.recipe, self.device = task, recipe, device
        network: nn.Module = task.network  # type: ignore[assignment]
        self.is_sharded = recipe.sharding == "fsdp" and world_size > 1
        if recipe.activation_checkpointing:
            checkpoint_blocks(network)
        self._skeleton: nn.Module | None = None
        if self.is_sharded:
            self._skeleton = skeleton_of(network)
            shard(network, mesh_of(recipe, world_size, device.type), recipe)
        task.to(device)
        if recipe.compile:
            for part in blocks(network) if self.is_sharded else [network]:
                part.compile()
        own = _Own(task)
        self._call: nn.Module = (
            nn.parallel.DistributedDataParallel(own, gradient_as_bucket_view=True)
            if world_size > 1 and not self.is_sharded
            else own
        )

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The task's losses."""
        with self.computing():
            losses: dict[str, Tensor] = self._call(batch)
        return losses

    def computing(self) -> Any:
        """The precision of the recipe; sharded modules cast by themselves."""
        if self.recipe.precision == "bf16" and not self.is_sharded:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """One micro-batch of several: gradients are exchanged after the last alone."""
        if self.is_sharded:
            self.task.network.set_requires_gradient_sync(is_last)  # type: ignore[union-attr, operator]
            yield
        elif not is_last and isinstance(self._call, nn.parallel.DistributedDataParallel):
            with self._call.no_sync():
                yield
        else:
            yield

    def rest(self) -> None:
        """After passes without a backward: sharded modules give the gathered weights back."""
        if self.is_sharded:
            for module in self.task.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def gathered(self, rank: int) -> nn.Module:
        """The network unsharded, on the CPU where it was sharded: with its weights on rank 0, without (on meta) elsewhere. All ranks take part."""
        network: nn.Module = self.task.network  # type: ignore[assignment]
        if self._skeleton is None:
            return network
        self.rest()
        whole: dict[str, Tensor] = {}
        for name, value in network.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if rank == 0:
                whole[name] = full.detach().cpu()
        if rank == 0:
            self._skeleton.load_state_dict(whole, assign=True)
        return self._skeleton


class _Own(nn.Module):
    """A task of which DDP sees its own network only: an opponent's parameters get no gradient here, and DDP would wait for them."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.network = task.network
        self._task = (task,)  # in a tuple, so that it isn't registered

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self._task[0](batch)
        return losses


def require_copies(recipe: ParallelRecipe, workers: int) -> None:
    """RecipeError unless the workers hold whole copies of the weights; for the driver, of the number that is asked for."""
    if recipe.shard_over is not None and workers % recipe.shard_over:
        raise RecipeError(
            f"shard_over must divide the number of workers, found {recipe.shard_over} for {workers} workers: change either"
        )


def mesh_of(recipe: ParallelRecipe, world_size: int, device_type: str) -> DeviceMesh:
    """The workers as copies x shards; all of them as one copy where `shard_over` doesn't divide their number, as while an elastic run has few."""
    shards = recipe.shard_over or world_size
    if world_size % shards or shards == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(network: nn.Module, mesh: DeviceMesh, recipe: ParallelRecipe) -> None:
    """FSDP2 in place: each block gathers its weights when it runs, the rest of the network together. The weights keep their names."""
    half = torch.bfloat16 if recipe.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    outer = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, output_dtype=torch.float32 if half else None
    )
    fully_shard(network, mesh=mesh, mp_policy=outer)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that are sharded, recomputed and compiled by themselves: what diffusers and transformers name as not to be split, innermost."""
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    named = [module for module in network.modules() if type(module).__name__ in names]
    outer = {
        id(part) for part in named for inner in part.modules() if inner is not part and type(inner).__name__ in names
    }
    innermost = [part for part in named if id(part) not in outer]
    if innermost:
        return innermost
    return [
        part
        for holder in network.modules()
        if isinstance(holder, (nn.ModuleList, nn.Sequential))
        for part in holder
        if any(True for _ in part.parameters())
    ]


def checkpoint_blocks(network: nn.Module) -> None:
    """Switches on activation checkpointing, as diffusers places it; RecipeError for a network without."""
    able = [
        m
        for m in network.modules()
        if getattr(m, "_supports_gradient_checkpointing", False) and hasattr(m, "enable_gradient_checkpointing")
    ]
    if not able:
        raise RecipeError(
            f"activation_checkpointing: a {type(network).__name__} has no blocks that can be recomputed; set it to False"
        )
    for module in able:
        module.enable_gradient_checkpointing()  # type: ignore[operator]


def skeleton_of(network: nn.Module) -> nn.Module:
    """A copy of the network whose parameters and buffers lie on the meta device: structure without memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in network.buffers()}
    return copy.deepcopy(network, memo)

"""The exponential moving average of a network's weights, sharded as the network is. diffusers' EMAModel and torch's AveragedModel fail on sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average:
    """Averages of a network's trained parameters and floating buffers; decay None keeps the last weights. Each rank averages its own shards."""

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self._values = averaged(network)
        self.shadow = {name: value.detach().clone() for name, value in self._values.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the network; the first steps move faster, so that the random start is forgotten."""
        decay = 0.0 if self.decay is None else min(self.decay, (1 + step) / (10 + step))
        shadows = [local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(shadows, [local(value) for value in self._values.values()], 1 - decay)

    @torch.no_grad()
    def copy_to_network(self) -> None:
        """Puts the averaged weights into the network."""
        for name, value in self._values.items():
            local(value).copy_(local(self.shadow[name]))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network with averaged weights, put back bit for bit afterwards, whatever happens between; needs no third copy."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._values.items():
            inside, outside = local(value), local(self.shadow[name])
            kept = inside.clone()
            inside.copy_(outside)
            outside.copy_(kept)


def averaged(network: nn.Module) -> dict[str, Tensor]:
    """By name: the parameters that are trained, and the floating buffers that are saved with them."""
    saved = network.state_dict()
    buffers = {name: value for name, value in network.named_buffers() if name in saved and value.is_floating_point()}
    return {name: value for name, value in network.named_parameters() if value.requires_grad} | buffers


@torch.no_grad()
def put(values: dict[str, Tensor], network: nn.Module) -> None:
    """Copies `values`, sharded as the network is, into its parameters and buffers of these names."""
    targets = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, value in values.items():
        local(targets[name]).copy_(local(value))


def local(value: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; the whole of a tensor that isn't sharded."""
    return value.to_local() if isinstance(value, DTensor) else value.detach()

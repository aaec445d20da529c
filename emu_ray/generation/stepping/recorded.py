"""Passes of a U-Net as CUDA graphs. A pass is a thousand kernels; to launch them one by one takes longer than a GPU needs for few rows.

A size of batch that comes again is recorded once and replayed from then on: what the processor does in a pass is one launch.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
USES = 1  # of a size, before the one that records it
MOST = 64  # sizes that are kept; least used first out
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs  # the graph reads these
    output: Tensor  # and writes this


class RecordedPasses:
    """Calls a U-Net on a GPU, without gradients; for one thread."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self._uses: Counter[Hashable] = Counter()
        self._kept: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool: Any = torch.cuda.graph_pool_handle()  # of one memory for all, since they are never replayed at once
        self._stream = torch.cuda.Stream()
        self._is_off = False

    def __call__(self, variant: Hashable, x: Tensor, t: Tensor, text: dict[str, Any]) -> Tensor:
        """What the U-Net says; valid until the next call. `variant` names what else it depends on, such as an adapter that is switched on."""
        inputs = {
            "x": x,
            "t": t,
            "encoder_hidden_states": text["encoder_hidden_states"],
            **text.get("added_cond_kwargs", {}),
        }
        size = (variant, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        if size in self._kept:
            self._kept.move_to_end(size)
            return _replayed(self._kept[size], inputs)
        self._uses[size] += 1
        if self._is_off or self._uses[size] <= USES:
            return self._eager(inputs)
        try:
            recording = self._record(inputs)
        except torch.OutOfMemoryError:
            self._uses[size] = -1000  # too large to be kept beside the others: later, perhaps
            return self._eager(inputs)
        except RuntimeError as error:  # an operation that can't be recorded
            logger.warning(
                "passes are launched kernel by kernel, since they can't be recorded as a CUDA graph: %s", error
            )
            self._is_off = True
            return self._eager(inputs)
        self._kept[size] = recording
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return _replayed(recording, inputs)

    def _eager(self, inputs: Inputs) -> Tensor:
        named = dict(inputs)
        x, t, tokens = (named.pop(name) for name in ("x", "t", "encoder_hidden_states"))
        told = {"added_cond_kwargs": named} if named else {}
        out: Tensor = self.unet(x, t, encoder_hidden_states=tokens, **told).sample
        return out

    def _record(self, inputs: Inputs) -> _Recording:
        own = {name: value.clone() for name, value in inputs.items()}
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._eager(own)  # what libraries prepare at a stream's first use can't be recorded
        graph = torch.cuda.CUDAGraph()
        # other threads, such as the decoder's, may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self._eager(own)
        here.wait_stream(self._stream)
        return _Recording(graph, own, output)


def _replayed(recording: _Recording, inputs: Inputs) -> Tensor:
    for name, value in inputs.items():
        recording.inputs[name].copy_(value)
    recording.graph.replay()
    return recording.output

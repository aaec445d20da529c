"""Passes of a U-Net as CUDA graphs. A pass is a thousand kernels; to launch them one by one takes longer than a GPU needs for few rows.

A size of batch that comes again is recorded once and replayed from then on: what the processor does in a pass is one launch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
MOST_RECORDINGS = 64  # least recently used first out
MOST_SEEN = 1000  # sizes that came once, or couldn't be recorded
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs  # the graph reads these
    output: Tensor  # and writes this


class RecordedPasses:
    """Calls a U-Net on a GPU, without gradients; for one thread at a time, which has the device's turn."""

    def __init__(self, unet: nn.Module, device: torch.device) -> None:
        self.unet, self.device = unet, device
        self.was_first = False  # whether the last call cost more than the next one of its size will
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it may be recorded
        self._is_off = False
        self._stream = torch.cuda.Stream(device)
        self._pool = self._fresh_pool()

    def __call__(self, variant: Hashable, x: Tensor, t: Tensor, text: dict[str, Any]) -> Tensor:
        """What the U-Net says; valid until the next call. `variant` names what else it depends on, such as an adapter that is switched on."""
        inputs = {"x": x, "t": t, "encoder_hidden_states": text["encoder_hidden_states"], **text.get("added_cond_kwargs", {})}  # fmt: skip
        size = (variant, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        with torch.cuda.device(self.device):
            if (recording := self._recordings.get(size)) is None:
                recording = self._recorded(size, inputs)
            else:
                self.was_first = False
                self._recordings.move_to_end(size)
            return self._eager(inputs) if recording is None else _replayed(recording, inputs)

    def _recorded(self, size: Hashable, inputs: Inputs) -> _Recording | None:
        """A new recording, of a size that came before; None where there is to be none."""
        may_be_recorded = self._seen.get(size)
        self.was_first = not self._is_off and may_be_recorded is not False
        if may_be_recorded is None:
            self._seen[size] = True
            while len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
        if self._is_off or not may_be_recorded:
            return None
        try:
            self._recordings[size] = self._record(inputs)
        except RuntimeError as error:
            # torch's, the driver's, or torch's behind that of the capture which it broke
            told = (error, error.__context__)
            is_memory = any(isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e) for e in told)
            if not is_memory:
                logger.warning("passes are launched kernel by kernel, since they can't be recorded as CUDA graphs: %s", error)  # fmt: skip
                self._is_off = True
        else:
            while len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
            return self._recordings[size]
        # Here, since the error held what the pass had taken; what the others hold may be what is missing.
        refused = [other for other, may_be in self._seen.items() if not may_be]
        self.release()
        self._seen.update(dict.fromkeys([*refused, size], False))  # two of them would else undo all others in turns
        self._end_capture()
        return None

    def release(self) -> None:
        """Gives the memory of all recordings back; what comes twice from now on is recorded again."""
        self._recordings.clear()
        self._seen.clear()
        self._pool = self._fresh_pool()
        torch.cuda.empty_cache()

    def _fresh_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()  # one memory for all recordings, since they are never replayed at once

    def _end_capture(self) -> None:
        """After a recording that failed, torch holds the device's random numbers for recorded ones, until a recording succeeds."""
        here = torch.cuda.current_stream()
        try:
            number = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
                number.add_(1)
        except RuntimeError as error:
            logger.warning("not even an addition can be recorded as a CUDA graph: %s", error)
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own one set

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
        try:
            with torch.cuda.stream(self._stream):
                self._eager(own)  # what libraries prepare at a stream's first use can't be recorded
            graph = torch.cuda.CUDAGraph()
            # other threads, such as the decoder's, may go on meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = self._eager(own)
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own one set
            here.wait_stream(self._stream)
        return _Recording(graph, own, output)


def _replayed(recording: _Recording, inputs: Inputs) -> Tensor:
    for name, value in inputs.items():
        recording.inputs[name].copy_(value)
    recording.graph.replay()
    return recording.output

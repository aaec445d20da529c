"""Where the time of the steps goes, and how much of the hardware is used."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 TFLOP/s by the makers' data sheets; the first name that the device's contains counts.
PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "GH200": 989.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A10": 125.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip


class Meter:
    """Seconds by part of the step since the last reading, and over the run."""

    def __init__(
        self, device: torch.device, world_size: int, seconds_before: float = 0.0, began: float | None = None
    ) -> None:
        """`seconds_before` is what committed steps of earlier processes took; `began` the Unix time of the run's first start."""
        self.device, self.world_size = device, world_size
        self.began = time.time() if began is None else began
        self.useful_s = seconds_before  # spent on steps that count: what a kill undid isn't in it
        self.flops_per_image: float | None = None
        self.communication_share: float | None = None
        self._spent: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()
        self._images = 0
        self._steps, self._pace = 0, 0.0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the block's time to `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - started

    def seconds_a_step(self) -> float:
        """Mean over the steps since the last reading; of the last reading's where there was none since."""
        if self._steps:
            self._pace = (time.perf_counter() - self._since) / self._steps
        return self._pace

    def count(self, images: int) -> None:
        """A step of so many images, over all workers, has ended."""
        self._images += images
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block's time out: it is spent on something else than steps."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last reading: images/s, shares of the time by part, TFLOP/s a worker, MFU, goodput, GPU memory."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        self.useful_s += elapsed
        found = {"images_per_s": self._images / elapsed}
        found |= {f"{part}_share": spent / elapsed for part, spent in sorted(self._spent.items())}
        if self.communication_share is not None:
            found["communication_share"] = self.communication_share
        if self.flops_per_image is not None:
            tflops = self.flops_per_image * found["images_per_s"] / self.world_size / 1e12
            found["tflops_a_worker"] = tflops
            peak = peak_tflops(self.device)
            if peak is not None:
                found["mfu"] = tflops / peak
        found["goodput"] = min(1.0, self.useful_s / max(time.time() - self.began, 1e-9))
        if self.device.type == "cuda":
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._spent.clear()
        self.seconds_a_step()
        self._since, self._images, self._steps = now, 0, 0
        return found


def peak_tflops(device: torch.device) -> float | None:
    """Dense bfloat16 TFLOP/s of a known GPU; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def flops_per_image(task: nn.Module, skeleton: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float:
    """Floating-point operations of forward and backward, 2 a multiply-add, counted without computing anything.

    `skeleton` stands in for the task's network, which may be sharded. Counting a real step was tried: the counter takes attention apart,
    which rounds otherwise, and a resumed run then differed from an undisturbed one.
    """
    network, mode = task.network, FakeTensorMode(allow_non_fake_inputs=True)
    step = task.step
    task.step = -1  # type: ignore[assignment]  # before any opponent joins: its weight asks the other workers, who aren't there
    with mode, FlopCounterMode(display=False) as counter:
        task.network = skeleton.to_empty(device=device)
        try:
            loss = task({name: mode.from_tensor(value) for name, value in batch.items()})["loss"]
            torch.autograd.grad(loss, [p for p in skeleton.parameters() if p.requires_grad])
        finally:
            task.network, task.step = network, step
    return float(counter.get_total_flops()) / len(next(iter(batch.values())))


def communication_share(step: Callable[[], None], device: torch.device) -> float:
    """Runs a step under torch's profiler: the time in collective operations over the step's, 0 to 1; overlapped time counts as well."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
    collectives = [e for e in profiler.key_averages() if e.key.startswith(("nccl:", "gloo:"))]
    micros = sum(e.device_time_total if device.type == "cuda" else e.cpu_time_total for e in collectives)
    return min(1.0, micros / 1e6 / elapsed)

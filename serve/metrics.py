"""What the service counts, for Prometheus by Ray's own exporter: names begin with `ray_emu_ray_serving_` there."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from emu_ray.generation.stepping.tickets import Watcher

ROWS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


class EngineMetrics(Watcher):
    """Rows and seconds of each pass, and how drawings ended: `rate` of the drawn ones is images/s."""

    def __init__(self, model: str) -> None:
        tags, self._model = ("model", "how"), {"model": model}
        self._rows = Histogram("emu_ray_serving_pass_rows", "Rows of a pass of the U-Net", ROWS, tags[:1])
        self._seconds = Histogram("emu_ray_serving_step_seconds", "Seconds of a pass", SECONDS, tags[:1])
        self._images = Counter("emu_ray_serving_images", "Drawings that ended: drawn, cancelled or failed", tags)

    def passed(self, rows: int, seconds: float) -> None:
        """After each pass."""
        self._rows.observe(rows, self._model)
        self._seconds.observe(seconds, self._model)

    def ended(self, how: str) -> None:
        """After each drawing."""
        self._images.inc(1, {**self._model, "how": how})


class DeskMetrics:
    """Requests that were taken and aren't answered, of each model."""

    def __init__(self) -> None:
        self._requests = Gauge("emu_ray_serving_requests", "Requests that are drawn or wait for it", ("model",))

    def has(self, model: str, requests: int) -> None:
        """So many now."""
        self._requests.set(requests, {"model": model})

"""The logbook on Ray Train's controller, which starts the sooner the less this file imports: torch comes with the first report."""

from __future__ import annotations

import re
from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback

from emu_ray.errors import first_line
from emu_ray.stations import Store
from emu_ray.training.logbook.loggers import Logbook, LogbookRecipe

SHEET = re.compile(r"images-(\d+)\.png")


class LogbookKeeper(UserCallback):
    """Writes what the workers report, on Ray Train's controller."""

    def __init__(self, recipe: LogbookRecipe, storage: str, settings: dict[str, Any]) -> None:
        self.recipe, self.storage, self.settings = recipe, storage, settings
        self._book: Logbook | None = None
        self._points: list[dict[str, float]] = []  # which no logger took yet
        self._pictures: set[str] = set()
        self._troubles: set[str] = set()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """The points that each curve gets, and the sheets of pictures that are new. What can't be written waits for the next report:
        an error raised here would end the training."""
        self._points += metrics[0]["points"]
        try:
            if self._book is None:
                name = run_context.run_config.name
                self._book = Logbook(self.recipe, f"{self.storage}/tensorboard", name, self.settings)
            while self._points:
                self._book.write(self._points[0])
                del self._points[0]
            self._sheets(self._book)
            self._book.flush(is_last=bool(metrics[0]["is_last"]))
        except Exception as error:
            trouble = first_line(error)
            if trouble not in self._troubles:
                print(f"the curves can't be written now, training goes on: {trouble}", flush=True)
            self._troubles.add(trouble)

    def _sheets(self, book: Logbook) -> None:
        samples = Store(f"{self.storage}/samples")
        for name in sorted(set(samples.sizes()) - self._pictures):
            if found := SHEET.fullmatch(name):  # another is being written, or its writer was killed
                book.picture(samples.get(name) or b"", int(found[1]))
                self._pictures.add(name)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """A line for the log: Ray Train's own, which would say it, are too many."""
        rank, error = min(worker_exceptions.items(), key=lambda item: death(item[1]) is None)
        print(
            f"worker {rank} failed, the run goes on from its last checkpoint if it may: {first_line(death(error) or error)}",
            flush=True,
        )


def death(error: BaseException) -> RayError | None:
    """What Ray says of a worker that died; Ray Train wraps it in an error of a failed health check."""
    cause = getattr(error, "health_check_failure", error)
    return cause if isinstance(cause, RayError) else None

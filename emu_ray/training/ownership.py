"""Who may write a run's checkpoints and its result: the driver that started it last, and of its groups of workers the last.

A killed driver may leave workers that go on for a while, and the same command may be given in two places. Without this the old group
would remove, as a killed writer's, what the new one is writing. No lock: an owner is replaced, never waited for.
"""

from __future__ import annotations

import json
import os

from emu_ray.errors import StationConflictError
from emu_ray.stations import Store

FILE = "owner.json"


class Ownership:
    """One driver's right to write below `uri`; its groups of workers `take` it in turn."""

    def __init__(self, uri: str | os.PathLike[str], driver: str) -> None:
        self.store, self.driver, self.group = Store(uri), driver, ""

    def begin(self) -> None:
        """For the driver, before its first worker: whoever owned it before loses it."""
        self._put()

    def take(self) -> None:
        """For rank 0 of a new group; StationConflictError when another driver began since."""
        if self._found()[0] != self.driver:
            raise StationConflictError(self.loss)
        self.group = os.urandom(4).hex()
        self._put()

    def is_lost(self) -> bool:
        """Whether another driver or another group has taken it since; a folder that was removed is nobody's."""
        return self._found() not in ([self.driver, self.group], ["", ""])

    @property
    def loss(self) -> str:
        """What to say of it."""
        return f"{self.store.uri}: the same run was started again meanwhile and goes on there: this one ends, and nothing is lost"

    def _found(self) -> list[str]:
        held = self.store.get(FILE)
        return ["", ""] if held is None else list(json.loads(held))

    def _put(self) -> None:
        self.store.put(FILE, json.dumps([self.driver, self.group]).encode())

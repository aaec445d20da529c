"""The exceptions a user can meet, as one tree.

Every message says what was expected, what was found, where, and what to do.

    EmuRayError                     exit code 2 on the command line
    ├── RecipeError                 unknown recipe or field, a value of the wrong type
    ├── InputError                  the user's own files: missing, unreadable, of an unknown layout
    ├── SchemaError                 a table's columns or types differ from emu_ray.records
    ├── StationError                a station can't be read or written (full disk, vanished bucket, lost part)
    │   ├── StationMissingError     nothing lies there
    │   ├── StationHalfWrittenError it was begun and never finished
    │   └── StationConflictError    written by another recipe, other inputs or, at this moment, another run
    ├── ResourceError               the machine lacks something
    │   ├── PortInUseError
    │   └── MemoryShortError
    ├── NumericsError               a loss or a gradient is not finite
    ├── CheckpointError             a training checkpoint is damaged, or another network's
    └── JobFailedError              exit code 1: a job or trial crashed; not the user's mistake

Each takes exactly one argument, the message, so that it survives pickling on its way back from a Ray worker.
"""

from __future__ import annotations

import re


class EmuRayError(Exception):
    """Base of all: a sentence for the user, no traceback needed."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)


class RecipeError(EmuRayError):
    """An unknown recipe or field, or a value of the wrong type."""


class InputError(EmuRayError):
    """The user's files are missing, unreadable or of an unknown layout."""


class SchemaError(EmuRayError):
    """A table's columns or types are not those of its station."""


class StationError(EmuRayError):
    """A station can't be read or written."""


class StationMissingError(StationError):
    """Nothing lies where a station is expected."""


class StationHalfWrittenError(StationError):
    """A station was begun and not finished; it is never read."""


class StationConflictError(StationError):
    """A station belongs to another recipe, other inputs or another running driver."""


class ResourceError(EmuRayError):
    """The machine lacks what the job needs."""


class PortInUseError(ResourceError):
    """Another process listens on the port."""


class MemoryShortError(ResourceError):
    """Too little memory or too little shared memory."""


class NumericsError(EmuRayError):
    """A loss or a gradient is not finite."""


class DivergedError(NumericsError):
    """The gradient of a training is not finite: all of its workers raise this at the same step."""


class CheckpointError(EmuRayError):
    """A training checkpoint is damaged, or belongs to another network."""


class JobFailedError(EmuRayError):
    """A job, a process or a trial that we started crashed; its log says why."""

    exit_code = 1


def find_in_chain(error: BaseException) -> EmuRayError | None:
    """The EmuRayError behind `error`, or None.

    Walks `__cause__` and the attributes under which Ray keeps what failed remotely: `cause` (RayTaskError),
    `worker_failures` and `controller_failure` (Train); not `__context__`, since an error raised while one of ours was
    being handled is a fault of the handler. Ray also builds an exception that inherits from
    both RayTaskError and the user's class and whose text is a remote traceback; the plain one inside it is preferred.
    Ray Data's UserCodeException loses its cause when pickled (Ray 2.60), so as a last resort the remote traceback is
    read.
    """
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    fallback: EmuRayError | None = None
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, EmuRayError):
            if not isinstance(getattr(current, "cause", None), BaseException):
                return current
            fallback = fallback or current
        fallback = fallback or _in_remote_traceback(str(current))
        failures = getattr(current, "worker_failures", None)
        behind = [
            getattr(current, "cause", None),
            getattr(current, "controller_failure", None),
            *(failures.values() if isinstance(failures, dict) else ()),
            current.__cause__,
        ]
        waiting.extend(e for e in behind if isinstance(e, BaseException))
    return fallback


_RAISED = re.compile(r"^emu_ray\.errors\.(\w+): (.+)$", re.MULTILINE)


def _in_remote_traceback(text: str) -> EmuRayError | None:
    """The last of our errors that a traceback in `text` ends a line with: the one nearest to the driver."""
    found = _RAISED.findall(text)
    raised = globals().get(found[-1][0]) if found else None
    return raised(found[-1][1]) if isinstance(raised, type) and issubclass(raised, EmuRayError) else None


def first_line(error: BaseException) -> str:
    """What it says up to the first line's end, for a sentence of ours; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""What a finished station says about itself, and what an unfinished one says about who began it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from emu_ray.errors import StationError

MANIFEST_FILE = "_manifest.json"
STARTED_FILE = "_started.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The last file written into a station; without it the station is never read."""

    station: str  # the URI it was written at; it may have been moved since
    schema: str  # a name in emu_ray.records.SCHEMAS, or what else it holds, e.g. "checkpoint"
    rows: int | None  # None when it is no table
    files: dict[str, int] = field(default_factory=dict)  # relative name -> bytes, waves included
    counts: dict[str, int] = field(default_factory=dict)  # what the job wants to report
    recipe_fingerprint: str
    recipe: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # station or source -> its fingerprint
    seconds: float = 0.0  # from begin to finish, of the last attempt
    finished_at: str = ""  # UTC, ISO 8601
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the content by its recipe and inputs; the next station records them as its input."""
        return identity(self.schema, self.recipe_fingerprint, self.inputs)

    def to_json(self) -> str:
        """The manifest as it lies on disk."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes | str, where: str) -> Manifest:
        """The manifest in `text`; StationError naming `where` when it isn't one."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise StationError(
                f"{where}: expected a manifest of emu_ray, found something else ({error}); remove the station"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Started:
    """Who began a station: read again when it finishes."""

    attempt: str  # random, of one begin()
    schema: str
    recipe_fingerprint: str
    recipe_json: str
    inputs: dict[str, str]
    started_at: float  # seconds since the epoch

    @property
    def identity(self) -> str:
        """Equal to the fingerprint of the manifest that this attempt would write."""
        return identity(self.schema, self.recipe_fingerprint, self.inputs)


def identity(schema: str, recipe_fingerprint: str, inputs: dict[str, str]) -> str:
    """16 hex digits of a station's content, known before it is written."""
    plain = json.dumps([schema, recipe_fingerprint, sorted(inputs.items())])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def difference(finished: Manifest, schema: str, recipe_json: str, inputs: dict[str, str]) -> str:
    """A clause that says in what a finished station differs from what is asked for now."""
    changed = [
        f"input {name!r} was {finished.inputs.get(name, 'absent')} and is {inputs.get(name, 'absent')}"
        for name in sorted({*finished.inputs, *inputs})
        if finished.inputs.get(name) != inputs.get(name)
    ]
    before, after = _flat(finished.recipe), _flat(json.loads(recipe_json))
    changed += [
        f"{name} was {before.get(name, 'absent')!r} and is {after.get(name, 'absent')!r}"
        for name in sorted({*before, *after} - {"root"})
        if before.get(name, "absent") != after.get(name, "absent")
    ]
    if finished.schema != schema:
        changed.append(f"schema was {finished.schema!r} and is {schema!r}")
    return "; ".join(changed[:4]) or "another kind of recipe"


def _flat(plain: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {prefix: plain}
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat.update(_flat(value, f"{prefix}.{name}" if prefix else name))
    return flat

"""The concepts that CLIP tells apart without training: a YAML file that users edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emu_ray.errors import InputError, first_line

SHIPPED = Path(__file__).with_name("concepts.yaml")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A name and the phrases that describe it."""

    name: str
    phrases: tuple[str, ...]


def read_concepts(path: str | Path) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """The concepts and the prompt templates of a YAML file shaped like `concepts.yaml`; InputError says what is wrong."""
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"can't read the concepts {path}: {first_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("concepts"), dict) or not found["concepts"]:
        raise InputError(f"{path}: expected a mapping `concepts` of names to lists of phrases, found {_kind(found)}")
    templates = found.get("templates", ["a photo of {}"])
    if not isinstance(templates, list) or not all(isinstance(t, str) and is_template(t) for t in templates):
        raise InputError(
            f"{path}: expected `templates`, a list of texts that each hold one {{}} and no other brace, found {templates!r}"
        )
    return tuple(_concept(name, phrases, path) for name, phrases in found["concepts"].items()), tuple(templates)


def is_template(text: str) -> bool:
    """Whether `text` holds one {}, where a phrase goes, and no other brace."""
    return text.count("{}") == 1 and not set("{}") & set(text.replace("{}", ""))


def _concept(name: object, phrases: object, path: str | Path) -> Concept:
    phrases = [name] if phrases is None else phrases
    if not isinstance(name, str) or not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise InputError(
            f"{path}: expected the concept {name!r} to be a name with a list of phrases, found {phrases!r}"
        )
    return Concept(name=name, phrases=tuple(phrases) or (name,))


def _kind(found: object) -> str:
    return f"the keys {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__

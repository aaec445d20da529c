"""Recipes: frozen typed dataclasses that go to the command line, to JSON and to a fingerprint.

A recipe lies beside the code that obeys it; here is only what all share. Each recipe has `root`, the directory or
`s3://bucket/prefix` in which the stations lie. A field declared with `field(metadata={"affects_result": False})` may
change without making a station another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from emu_ray.errors import RecipeError, find_in_chain

Recipe = TypeVar("Recipe")

SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job manager around the entrypoint


def command_line(
    job: str,
    description: str,
    recipes: Mapping[str, Recipe],
    run: Callable[[Recipe], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Run `python -m jobs.JOB RECIPE --field value ...`; `--help` works after the job and after the recipe.

    A user's mistake, also one raised on a Ray worker, prints `error: SENTENCE` to stderr and exits with its code (2).
    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        recipe = parse(job, description, recipes, sys.argv[1:] if argv is None else argv)
        run(recipe)
    except Exception as error:
        for_user = find_in_chain(error)
        if for_user is None:
            raise
        print(f"error: {for_user}", file=sys.stderr, flush=True)
        raise SystemExit(for_user.exit_code) from None


def parse(job: str, description: str, recipes: Mapping[str, Recipe], argv: Sequence[str]) -> Recipe:
    """The recipe that `argv` names, with its overrides and an absolute `root`; RecipeError for anything unknown."""
    program = f"python -m jobs.{job}"
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {program} RECIPE [--field value ...]\n\n{description.strip()}\n\nrecipes:")
        print("\n".join(f"  {name}" for name in recipes))
        print(f"\n{program} RECIPE --help lists the fields of a recipe.")
        raise SystemExit(0)
    known = ", ".join(recipes)
    if not argv or argv[0].startswith("-"):
        raise RecipeError(f"{program} needs a recipe as its first argument: one of {known}")
    if argv[0] not in recipes:
        raise RecipeError(f"unknown recipe {argv[0]!r} of jobs.{job}: expected one of {known}")
    default = recipes[argv[0]]
    recipe = _override(default, argv[1:], f"{program} {argv[0]}", description)
    root = getattr(recipe, "root", None)
    return recipe if root is None else dataclasses.replace(recipe, root=absolute(root, "--root"))  # type: ignore[type-var]


def _override(default: Recipe, argv: Sequence[str], program: str, description: str) -> Recipe:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            recipe, unknown = tyro.cli(
                type(default),
                args=list(argv),
                default=default,
                prog=program,
                description=description.strip(),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise RecipeError(f"{_first_sentence(complaint.getvalue())} (see {program} --help)") from None
    if unknown:
        raise RecipeError(f"unknown field {unknown[0]!r}: {program} --help lists the fields of this recipe")
    return recipe


def _first_sentence(boxed: str) -> str:
    """What tyro wants to say, out of the box it draws: under the title, down to the next rule."""
    said: list[str] = []
    for line in (line.strip("│| ") for line in boxed.strip().splitlines()[1:]):
        is_rule = set(line) <= set("─-╰╯")
        if said and is_rule:
            break
        if not is_rule:
            said.append(line)
    return " ".join(said) or "the arguments can't be parsed"


def absolute(path: str, field: str = "--root") -> str:
    """`path` made absolute against the working directory; a URI stays as it is.

    Inside a submitted Ray job the working directory is a temporary copy, in which written stations would vanish:
    RecipeError; the same for an empty path, such as a shell variable that isn't set.
    """
    if not path:
        raise RecipeError(f"{field} is empty: expected a directory or an s3:// address")
    if "://" in path or os.path.isabs(path):
        return path
    if os.environ.get(SUBMITTED_JOB_VARIABLE):
        raise RecipeError(
            f"{field} {path!r} is relative, and a submitted Ray job runs in a temporary copy of the code: "
            f"give {field} an absolute path or an s3:// address"
        )
    return os.path.abspath(os.path.expanduser(path))


def require_at_least(recipe: object, least: float, *fields: str) -> None:
    """RecipeError for the first of these fields that is below `least`; None passes. For a recipe's `__post_init__`."""
    for name in fields:
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise RecipeError(f"{name} of {type(recipe).__name__} must be at least {least:g}, found {value}")


def to_json(recipe: object) -> str:
    """`recipe` as indented JSON; a class is written as "module:name"."""
    return json.dumps(_plain(recipe), indent=2, ensure_ascii=False)


def from_json(cls: type[Recipe], text: str) -> Recipe:
    """The `cls` that `to_json` wrote; RecipeError for unknown fields and values of another type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"expected the JSON of a {cls.__name__}, found text that is not JSON: {error}") from error
    return typing.cast(Recipe, _typed(cls, value, cls.__name__))


def fingerprint(recipe: object) -> str:
    """16 hex digits, equal exactly when two recipes ask for the same result.

    `root` and fields marked as not affecting the result don't count.
    """
    plain = {"recipe": type(recipe).__qualname__, "fields": _plain(recipe, only_result=True)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any, only_result: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        if only_result:
            fields = tuple(f for f in fields if f.name != "root" and f.metadata.get("affects_result", True))
        return {f.name: _plain(getattr(value, f.name), only_result) for f in fields}
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, Mapping):
        return {str(k): _plain(v, only_result) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, only_result) for v in value]
    if isinstance(value, Path):
        return str(value)
    if only_result and isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 in a field of floats ask for the same result
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(
        f"a recipe can't hold a {type(value).__name__}: only numbers, text, classes, lists and dataclasses go to JSON"
    )


def _typed(expected: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _typed_dataclass(expected, value, where)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(arguments, value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        every = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(every) == len(value):
            return tuple(_typed(t, v, f"{where}[{i}]") for i, (t, v) in enumerate(zip(every, value, strict=True)))
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if (expected is type or origin is type) and isinstance(value, str):
        return _class_named(value, where)
    if expected is Path and isinstance(value, str):
        return Path(value)
    if expected is type(None) and value is None:
        return None
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if expected in (bool, int, str) and type(value) is expected:
        return value
    raise RecipeError(f"{where}: expected {getattr(expected, '__name__', expected)}, found {value!r}")


def _typed_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected the fields of a {cls.__name__}, found {value!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(value) - set(known)):
        raise RecipeError(f"{where}: unknown field {unknown[0]!r}: {cls.__name__} has {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{name: _typed(hints[name], v, f"{where}.{name}") for name, v in value.items()})
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _typed_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    reasons = []
    for argument in arguments:
        try:
            return _typed(argument, value, where)
        except RecipeError as error:
            reasons += [error] if dataclasses.is_dataclass(argument) else []
    if isinstance(value, dict) and len(reasons) == 1:  # it can only be that one, and something in it is wrong
        raise reasons[0]
    raise RecipeError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r}")


def _class_named(address: str, where: str) -> type:
    """The class behind "emu_ray.module:Name"; only our own modules are imported on the word of a file."""
    module, _, name = address.partition(":")
    if module.split(".")[0] == "emu_ray":
        with contextlib.suppress(ImportError, AttributeError):
            found = getattr(importlib.import_module(module), name)
            if isinstance(found, type):
                return found
    raise RecipeError(f"{where}: expected a class of emu_ray as 'module:Name', found {address!r}")

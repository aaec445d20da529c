"""Prompts from a user's file."""

from __future__ import annotations

import csv
from pathlib import Path

from emu_ray.errors import InputError


def file_prompts(path: str) -> tuple[str, ...]:
    """Prompts of a text file, one a line, or of a TSV with a column `Prompt` such as PartiPrompts; InputError for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file of prompts in UTF-8, found {error}") from error
    if path.endswith(".tsv"):
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
        if not rows or "Prompt" not in rows[0]:
            raise InputError(f"{path}: expected a column 'Prompt', found {', '.join(rows[0]) if rows else 'no rows'}")
        lines = [row["Prompt"] for row in rows]
    else:
        lines = text.splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt, found none")
    return tuple(prompts)

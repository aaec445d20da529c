"""Model folders as others wrote them: a path or a name that the Hugging Face hub knows, and the JSON files in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emu_ray.errors import InputError, first_line


def is_hub_name(address: str) -> bool:
    """Whether `address` reads as OWNER/NAME and nothing of that name lies here."""
    return address.count("/") == 1 and not address.startswith((".", "/", "~")) and not Path(address).exists()


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file; InputError when there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: expected JSON, found something else ({first_line(error)}); fetch or write it anew"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(found).__name__}; fetch or write it anew")
    return found

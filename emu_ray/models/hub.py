"""What a place in a recipe is: a path, or a name that the Hugging Face hub knows."""

from __future__ import annotations

from pathlib import Path


def is_hub_name(address: str) -> bool:
    """Whether `address` reads as OWNER/NAME and nothing of that name lies here."""
    return address.count("/") == 1 and not address.startswith((".", "/", "~")) and not Path(address).exists()

"""Makes an API key for the service: prints it once, and writes its hash into the file that `ServeArgs.keys_file` names.

reads    the file, where it exists
writes   a line of the file
command  python -m jobs.api_key add --file keys.jsonl --name alice
cost     nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from emu_ray.config import command_line, require_at_least
from serve.access import add_key


@dataclass(frozen=True, kw_only=True)
class ApiKeyRecipe:
    """Whose key, and what it allows."""

    file: str
    name: str
    images_per_minute: int = 60
    together: int = 4  # requests at once

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images_per_minute", "together")


RECIPES = {"add": ApiKeyRecipe(file="keys.jsonl", name="me")}


def run(recipe: ApiKeyRecipe) -> None:
    """Make and print."""
    print(add_key(recipe.file, recipe.name, recipe.images_per_minute, recipe.together))


if __name__ == "__main__":
    command_line("api_key", __doc__ or "", RECIPES, run)

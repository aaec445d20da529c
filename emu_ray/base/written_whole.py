"""Files and folders that appear whole or not at all, since what is there counts as made when the base is made in several goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder at: it becomes `target` when the block ends, and not when it raises."""
    half = target.with_name(f"{target.name}.part")
    half.parent.mkdir(parents=True, exist_ok=True)
    _remove(half)
    yield half
    _remove(target)
    half.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

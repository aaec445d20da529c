"""Prompts from a user's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu_ray.errors import InputError
from emu_ray.generation.prompts import file_prompts

PARTI = Path(__file__).resolve().parents[3] / "shared" / "data" / "PartiPrompts.tsv"


def test_a_line_is_a_prompt_and_empty_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert file_prompts(str(tmp_path / "p.txt")) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\n \n", "expected at least one prompt"),
        ("p.txt", b"\xff\xfe\x00", "in UTF-8"),
        ("p.tsv", b"Text\tCategory\na\tb\n", "expected a column 'Prompt', found Text, Category"),
        ("p.tsv", b"", "found no rows"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        file_prompts(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.txt"):
        file_prompts(str(tmp_path / "nowhere.txt"))


@pytest.mark.skipif(not PARTI.exists(), reason="PartiPrompts is not beside this checkout")
def test_parti_prompts_are_read_whole() -> None:
    prompts = file_prompts(str(PARTI))
    assert len(prompts) == 1632 and all(p.strip() for p in prompts)

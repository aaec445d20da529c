"""Keys: hashed in their file, and each with its own bounds."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path

import pytest

from emu_ray.config import command_line
from emu_ray.errors import InputError
from serve.access import Access, add_key, read_keys
from serve.schemas import ApiError


def _refused(access: Access, authorization: str | None, images: int = 1) -> ApiError:
    async def enter() -> None:
        async with access.entered(access.known(authorization), images):
            pass

    with pytest.raises(ApiError) as caught:
        asyncio.run(enter())
    return caught.value


def _entered(access: Access, secret: str, images: int = 1) -> None:
    async def enter() -> None:
        async with access.entered(access.known(f"Bearer {secret}"), images):
            pass

    asyncio.run(enter())


def test_a_key_is_printed_once_and_its_file_holds_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job, file = importlib.import_module("jobs.api_key"), tmp_path / "keys.jsonl"
    command_line("api_key", job.__doc__, job.RECIPES, job.run, ["add", "--file", str(file), "--name", "alice"])
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("emu-") and secret not in file.read_text()
    _entered(Access(read_keys(file)), secret)
    with pytest.raises(InputError, match="alice has a key already"):
        add_key(file, "alice", 1, 1)


def test_without_a_file_everybody_may_ask_and_with_one_nobody_without_its_key(tmp_path: Path) -> None:
    _entered(Access(None), "anything")
    file = tmp_path / "keys.jsonl"
    secret = add_key(file, "alice", 10, 1)
    access = Access(read_keys(file))
    for wrong in (None, "", "Bearer", "Bearer nonsense", f"Basic {secret}"):
        error = _refused(access, wrong)
        assert (error.status, error.code) == (401, "invalid_api_key")
    _entered(access, secret)


def test_images_a_minute_and_requests_at_once_are_counted_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice, bob = add_key(file, "alice", 3, 1), add_key(file, "bob", 3, 1)
    access = Access(read_keys(file))
    _entered(access, alice, images=2)
    refused = _refused(access, f"Bearer {alice}", images=2)
    assert refused.status == 429 and 50 < refused.retry_after_s <= 60  # when the first images are a minute old
    _entered(access, alice, images=1)
    assert "3 images a minute" in str(_refused(access, f"Bearer {alice}"))
    _entered(access, bob, images=3)

    async def two_at_once() -> None:
        async with fresh.entered(fresh.known(f"Bearer {alice}"), 1):
            async with fresh.entered(fresh.known(f"Bearer {alice}"), 1):
                pass

    fresh = Access(read_keys(file))
    with pytest.raises(ApiError, match="1 requests at once"):
        asyncio.run(two_at_once())
    _entered(fresh, alice)  # the first one left, though the second was refused


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"name": "x"}'])
def test_a_file_that_is_no_file_of_keys_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys.jsonl"
    add_key(file, "alice", 1, 1)
    with open(file, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match="keys.jsonl, line 2: expected a key"):
        read_keys(file)
    with pytest.raises(InputError, match="expected a file of API keys"):
        read_keys(tmp_path / "none")

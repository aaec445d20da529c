"""A picture that ends the process that decodes it costs that picture."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from emu_ray.pictures.decode import Decoded, decode
from emu_ray.pictures.isolated import CRASHED, TOO_LONG, IsolatedDecoder

POISON = b"poison"


def fragile_decode(encoded: bytes) -> Decoded:
    """As the usual decoder, but it crashes the process, as a native decoder may, or hangs."""
    if encoded.startswith(POISON):
        os.kill(os.getpid(), signal.SIGSEGV)
    if encoded.startswith(b"slow"):
        time.sleep(60)
    return decode(encoded)


def killed_once(mark: str, encoded: bytes) -> Decoded:
    """As the usual decoder, but the first process is killed as a machine out of memory does."""
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(encoded)


def test_pictures_before_and_after_a_crash_are_decoded_as_usual(noise_picture: Callable[..., bytes]) -> None:
    pictures = [noise_picture(1), POISON, noise_picture(2), b"", POISON, noise_picture(3)]
    with IsolatedDecoder(fragile_decode) as isolated:
        found = [isolated(p) for p in pictures]
    assert [f.error.startswith(CRASHED) for f in found] == [False, True, False, False, True, False]
    for picture, one in zip(pictures, found, strict=True):
        if picture != POISON:
            usual = decode(picture)
            assert one.error == usual.error
            assert np.array_equal(one.pixels, usual.pixels) if usual.pixels is not None else one.pixels is None


def test_a_decoder_that_hangs_is_ended(noise_picture: Callable[..., bytes]) -> None:
    with IsolatedDecoder(fragile_decode, timeout_s=2) as isolated:
        assert isolated(b"slow").error.startswith(TOO_LONG)
        assert isolated(noise_picture(1)).error == ""


def test_a_child_killed_from_outside_costs_no_picture(noise_picture: Callable[..., bytes], tmp_path: Path) -> None:
    with IsolatedDecoder(functools.partial(killed_once, str(tmp_path / "killed"))) as isolated:
        assert isolated(noise_picture(1)).error == ""
    assert (tmp_path / "killed").exists()

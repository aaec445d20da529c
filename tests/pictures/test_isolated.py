"""A picture that ends the process that decodes it costs that picture."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

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


def test_pictures_before_and_after_a_crash_are_decoded_as_usual(noise_picture: Callable[..., bytes]) -> None:
    pictures = [noise_picture(1), POISON, noise_picture(2), b"", POISON, noise_picture(3)]
    with IsolatedDecoder(fragile_decode) as isolated:
        found = [isolated(p) for p in pictures]
    assert [f.error.startswith(CRASHED) for f in found] == [False, True, False, False, True, False]
    for picture, one in zip(pictures, found, strict=True):
        if not one.error:
            usual = decode(picture).pixels
            assert usual is not None and one.pixels is not None and (one.pixels == usual).all()
    assert found[3].error


def test_a_decoder_that_hangs_is_ended(noise_picture: Callable[..., bytes]) -> None:
    with IsolatedDecoder(fragile_decode, timeout_s=4) as isolated:
        assert isolated(b"slow").error.startswith(TOO_LONG)
        assert isolated(noise_picture(1)).error == ""

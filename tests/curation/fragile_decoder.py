"""A decoder that ends its process at a poisoned picture, as a native one may; in a module that workers can import."""

from __future__ import annotations

import os
import signal

from emu_ray.pictures.decode import Decoded, decode

POISON = b"poison"


def fragile_decode(encoded: bytes) -> Decoded:
    """As the usual decoder, but POISON costs the process."""
    if encoded.startswith(POISON):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(encoded)

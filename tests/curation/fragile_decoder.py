"""A decoder that ends its process at a poisoned picture, as a native one may; in a module that workers can import."""

from __future__ import annotations

import os
import signal
import time

from emu_ray.pictures.decode import Decoded, decode

POISON, ENDLESS = b"poison", b"endless"


def fragile_decode(encoded: bytes) -> Decoded:
    """As the usual decoder, but POISON costs the process, and ENDLESS never comes back."""
    if encoded.startswith(ENDLESS):
        time.sleep(1e6)
    if encoded.startswith(POISON):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(encoded)

"""Every kind of the corpus gets its reason, none raises, and none costs memory that its header did not admit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFile

from emu_ray.ingest.pairs import header_size
from emu_ray.pictures.decode import decode
from tests.pictures.bad_pictures import LOSSLESS, corpus, encoded, picture

CORPUS = corpus()


def test_the_corpus_has_many_kinds() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("name", CORPUS)
def test_a_bad_picture_has_a_reason_and_a_good_one_pixels(name: str) -> None:
    raw, pattern = CORPUS[name]
    found = decode(raw)
    assert (found.pixels is None) == bool(found.error) == bool(pattern), found.error
    assert re.search(pattern, found.error), found.error
    assert found.error == decode(bytes(bytearray(raw))).error, "a reason is the same in each run"
    shrunk = decode(raw, side_px=32)
    assert (shrunk.pixels is None) == bool(pattern), shrunk.error
    header_size(raw, 64_000_000)
    if found.pixels is not None:
        assert found.pixels.dtype == np.uint8 and found.pixels.shape[2] == 3


def test_truncated_pictures_are_refused_also_when_a_library_has_allowed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert decode(CORPUS["JPEG cut near its end"][0]).error
    assert decode(CORPUS["PNG cut near its end"][0]).error


@pytest.mark.parametrize("format", LOSSLESS)
def test_the_first_frame_of_an_animation_is_taken(format: str) -> None:
    frames = [picture(mode="L", seed=n) for n in range(3)]
    found = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:])).pixels
    assert found is not None and np.array_equal(found[..., 0], np.asarray(frames[0]))


def test_sixteen_bits_become_eight_without_clipping() -> None:
    found = decode(CORPUS["PNG of 16 bits"][0]).pixels
    assert found is not None and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255
    assert abs(float(found.mean()) - 127.5) < 1


def test_cmyk_looks_as_it_did_in_rgb() -> None:
    found = decode(CORPUS["TIFF in CMYK"][0]).pixels
    assert found is not None
    assert np.abs(found.astype(int) - np.asarray(picture()).astype(int)).mean() < 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_large_picture_is_shrunk_while_decoded_to_at_least_the_side(format: str) -> None:
    raw = encoded(picture(2000, 1500), format)
    small = decode(raw, side_px=400).pixels
    whole = decode(raw).pixels
    assert small is not None and whole is not None and whole.shape[:2] == (1500, 2000)
    assert 400 <= max(small.shape) < 800 and abs(small.shape[1] / small.shape[0] - 4 / 3) < 0.02
    from PIL import Image

    same = np.asarray(Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(small.astype(int) - same).mean() < 3


@pytest.mark.slow
def test_the_bomb_of_100_megapixels_costs_under_300_mb() -> None:
    code = (
        "import resource, sys\n"
        "from emu_ray.pictures.decode import decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = decode(open(sys.argv[1], 'rb').read())\n"
        "assert 'at most' in found.error, found.error\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(CORPUS["PNG of 100 megapixels in 300 KB"][0])
        file.flush()
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code, file.name], capture_output=True, text=True, cwd=root, check=True
        )
    assert int(done.stdout) < 300_000

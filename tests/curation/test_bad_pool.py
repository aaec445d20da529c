"""The whole corpus of bad pictures and texts, from a tar through ingest and scoring: each row its reason, none lost."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from emu_ray.curation import on_ray
from emu_ray.curation.on_ray import score
from emu_ray.errors import StationError
from emu_ray.ingest.on_ray import IngestRecipe, ingest
from emu_ray.stations import Station, store
from tests.curation.outage import Door
from tests.curation.score_process import end_all, start_scoring, wait_for
from tests.curation.small_pool import pairs_of, small_recipe, write_pool
from tests.pictures.bad_pictures import corpus, encoded, picture
from tests.s3_server import S3Server

CORPUS = corpus()
BAD_CAPTIONS = {
    "not UTF-8": b"caf\xe9",
    "only a byte order mark": b"\xef\xbb\xbf",
    "white space": b" \n\t ",
    "over the cap on text": b"x" * (1 << 21),
    "half a surrogate pair in UTF-16": b"\xff\xfe\x00\xd8",
}
WITHOUT_BYTES = {"over the cap on bytes": "too_large", "empty": "no_image"}
LENIENT = {"side_px": 128, "rows_per_block": 16, "files_per_wave": 1, "max_error_share": 1.0}
COPIES = 3  # of one picture under one name, as a tar that was appended to has them


def bad_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for number, (image, _) in enumerate(CORPUS.values()):
            add(f"picture/{number:04d}.jpg", image)
            add(f"picture/{number:04d}.txt", b"a picture")
        for number, text in enumerate(BAD_CAPTIONS.values()):
            add(f"text/{number:04d}.png", encoded(picture(seed=number), "PNG"))
            add(f"text/{number:04d}.txt", text)
        for _ in range(COPIES):
            add("copy/0000.png", encoded(picture(seed=99), "PNG"))
            add("copy/0000.txt", b"the same")
        add("alone/0000.txt", b"a caption without a picture")
        add("alone/0001.json", b"{}")
    return path


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_every_bad_kind_gets_its_reason_and_the_counts_are_conserved(tmp_path: Path, untrained: Path) -> None:
    pool = ingest(IngestRecipe(root=str(tmp_path), source=str(bad_tar(tmp_path / "bad.tar")), rows_per_file=40))
    rows = len(CORPUS) + len(BAD_CAPTIONS) + COPIES
    assert pool.rows == rows
    manifest = score(small_recipe(tmp_path, untrained, **LENIENT))
    gates = {name: n for name, n in manifest.counts.items() if name.startswith("gate_")}
    assert manifest.rows == rows == manifest.counts["measured"] + sum(gates.values())
    assert gates["gate_not_fetched"] == len(WITHOUT_BYTES) and gates["gate_empty_caption"] == len(BAD_CAPTIONS)

    said = {row["key"]: row for row in Station(tmp_path / "scores").read_table().to_pylist()}
    assert len(said) == rows
    seen: Counter[str] = Counter()
    for pair in Station(tmp_path / "pool").read_table(["key", "source"]).to_pylist():
        kind, number = pair["source"].removeprefix("bad.tar/").split("/")
        row = said[pair["key"]]
        seen[kind] += 1
        if kind != "picture":
            assert row["gate_reason"] == ("empty_caption" if kind == "text" else "")
            continue
        name, (_, pattern) = list(CORPUS.items())[int(number)]
        if name in WITHOUT_BYTES:
            assert (row["gate_reason"], row["decode_error"]) == ("not_fetched", WITHOUT_BYTES[name])
            continue
        assert row["gate_reason"] == ("undecodable" if pattern else ""), name
        assert re.search(pattern, row["decode_error"]), name
        assert (row["embedding"] is None) == (row["text_words"] is None) == bool(pattern), name
    assert seen == {"picture": len(CORPUS), "text": len(BAD_CAPTIONS), "copy": COPIES}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_scoring_on_s3_survives_an_outage_of_the_bucket_and_the_same_command_ends_the_work(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes], s3: S3Server
) -> None:
    """The server vanishes for the driver and the workers alike, then comes back."""
    door = Door(int(s3.environment["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    door.open()
    beside = {**s3.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}"}
    root, log = f"{s3.uri}/{tmp_path.name}", tmp_path / "log"
    pairs = pairs_of([noise_picture(n, 48, 48) for n in range(160)])
    for place in (tmp_path / "calm", root):
        write_pool(place, pairs, files=10)
    recipe = small_recipe(root, untrained, **LENIENT)

    def start() -> subprocess.Popen[bytes]:
        started.append(start_scoring(recipe, tmp_path, log, environment=beside))
        return started[-1]

    started: list[subprocess.Popen[bytes]] = []
    try:
        broken = start()
        wait_for(" of 10 written", log, broken)
        door.shut()
        assert broken.wait(200) != 0
        assert re.search(rf"StationError: cannot \w+ .*{tmp_path.name}/", log.read_text()), log.read_text()[-3000:]
        assert not Station(f"{root}/scores").is_finished()
        door.open()
        assert start().wait(200) == 0, log.read_text()[-3000:]
    finally:
        for process in started:
            end_all(process)
    score(dataclasses.replace(recipe, root=str(tmp_path / "calm")))
    on_s3, on_disk = (Station(f"{place}/scores").read_table().sort_by("key") for place in (root, tmp_path / "calm"))
    assert on_s3.to_pylist() == on_disk.to_pylist()


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_full_disk_while_scoring_is_one_sentence_and_the_same_command_ends_the_work(
    tmp_path: Path, untrained: Path, noise_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second wave's scores are written to a device that the kernel says is full; a pipeline takes one wave."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    pairs = pairs_of([noise_picture(n, 48, 48) for n in range(24)])
    write_pool(tmp_path, pairs, files=2)
    recipe = small_recipe(tmp_path, untrained, **LENIENT)
    monkeypatch.setattr(on_ray, "FILES_AT_ONCE", 1)
    partial_path = store._partial_path

    def on_a_full_device(path: str) -> str:
        there = partial_path(path)
        if "wave-00001/part" in path:
            os.symlink("/dev/full", there)
        return there

    with monkeypatch.context() as patched:
        patched.setattr(store, "_partial_path", on_a_full_device)
        with pytest.raises(StationError, match=r"cannot write .*wave-00001.*No space left on device") as raised:
            score(recipe)
    assert "\n" not in str(raised.value)
    assert [Station(tmp_path / "scores").wave(n).is_finished() for n in range(2)] == [True, False]
    assert score(recipe).counts == {"rows": 24, "measured": 24}

"""Several models on one replica: a LoRA beside its base, a pipeline of another kind, one that can't be loaded, texts encoded elsewhere; and
how replicas come and go."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from PIL import Image
from ray import serve as ray_serve

from emu_ray.curation.heads import LinearHead
from emu_ray.stations.folders import base_folder
from serve.args import LoraArgs, SafetyArgs, ServeArgs
from serve.deploy import deploy
from tests.generation.other_pipelines import small_pixart
from tests.generation.small_bases import lora_of, sd15
from tests.serve.client import IMAGES, draw, events, free_port, left_open, pixels, send, stream

pytestmark = pytest.mark.slow


@contextmanager
def _served(args: ServeArgs) -> Iterator[str]:
    ray_serve.shutdown()  # of another test's, whose proxy has another port
    try:
        yield deploy(args, port=free_port())
    finally:
        ray_serve.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models, by name; `torn` has weights that end in zeros, and whose headers are right."""
    root = tmp_path_factory.mktemp("models")
    base = sd15(root / "photos")
    lora_of(base, root / "stamps")
    shutil.copytree(base, root / "torn")
    (root / "torn" / "vae" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [7, 7]})
    )
    (root / "bad lora").mkdir()
    (root / "bad lora" / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    small_pixart(root / "pixart")
    return {name: str(root / name) for name in ("photos", "stamps", "torn", "pixart", "bad lora")}


def _whole(folders: dict[str, str], *names: str) -> dict[str, str]:
    return {name: folders[name] for name in names}


@pytest.fixture(scope="module")
def address(ray_local: None, folders: dict[str, str]) -> Iterator[str]:
    loras = {name: LoraArgs(base="photos", checkpoint=folders[name]) for name in ("stamps", "bad lora")}
    args = ServeArgs(models=_whole(folders, "photos", "torn", "pixart"), loras=loras, encoder_replicas=1, num_cpus=0.2)
    with _served(args) as address:
        yield address


def test_one_that_can_not_be_loaded_is_told_and_the_others_are_served_on(address: str) -> None:
    status, ready = send(address + "/readyz")
    assert (status, ready["status"]) == (200, "degraded")
    states = {"photos": "loaded", "stamps": "loaded", "pixart": "loaded", "torn": "failed", "bad lora": "failed"}
    assert ready["models"] == states
    assert draw(address, model="bad lora")[1]["error"]["code"] == "model_failed"
    assert {card["id"]: card["status"] for card in send(address + "/v1/models")[1]["data"]}["torn"] == "failed"
    status, body = draw(address, model="torn")
    assert (status, body["error"]["code"], body["error"]["param"]) == (503, "model_failed", "model")
    assert draw(address, model="photos")[0] == 200


def test_a_lora_is_served_beside_its_base(address: str) -> None:
    first, lora, again = (
        pixels(draw(address, seed=3, steps=4, model=name)[1]["data"][0]) for name in ("photos", "stamps", "photos")
    )
    assert np.abs(first - again).max() <= 1 and np.abs(first - lora).max() > 3
    cards = {card["id"]: card["lora_of"] for card in send(address + "/v1/models")[1]["data"]}
    assert (cards["stamps"], cards["photos"]) == ("photos", None)


def test_requests_for_all_of_them_at_once_are_answered(address: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        asked = [(name, seed) for seed in range(3) for name in ("photos", "stamps", "pixart")]
        answers = list(pool.map(lambda one: draw(address, model=one[0], seed=one[1], steps=8, guidance=2.0), asked))
    assert [status for status, _ in answers] == [200] * 9
    for (name, seed), (_, body) in zip(asked, answers, strict=True):
        alone = draw(address, model=name, seed=seed, steps=8, guidance=2.0)[1]["data"][0]
        assert np.abs(pixels(alone) - pixels(body["data"][0])).max() <= 1, name


def test_a_prompt_is_measured_by_the_model_that_reads_it(address: str) -> None:
    status, body = draw(address, model="photos", prompt="ball " * 300)
    assert status == 400 and "reads 77 tokens of a prompt" in body["error"]["message"]
    status, body = draw(address, model="photos", steps=200, n=1, size="auto", prompt="a ball", scheduler="heun")
    assert status == 400
    assert draw(address, model="pixart", scheduler="euler")[0] == 400


def test_pictures_say_which_model_drew_them(address: str) -> None:
    body: dict[str, Any] = draw(address, model="stamps", seed=4)[1]
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert json.loads(image.text["parameters"])["model"] == "stamps"  # type: ignore[attr-defined]


def test_a_model_leaves_the_memory_when_its_drawings_are_finished_and_not_before(
    ray_local: None, folders: dict[str, str]
) -> None:
    """Room for one: a long drawing of the first holds up the second, which is drawn then, and the first once more after it."""
    with _served(ServeArgs(models=_whole(folders, "photos", "pixart"), models_each=1, num_cpus=0.2)) as address:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            long = pool.submit(draw, address, model="photos", steps=150, n=4)
            time.sleep(1)
            other = pool.submit(draw, address, model="pixart", steps=2)
            assert long.result()[0] == other.result()[0] == 200
        assert draw(address, model="photos")[0] == 200
        assert send(address + "/readyz")[1]["models"] == {"photos": "loaded", "pixart": "not loaded"}


def test_a_client_that_leaves_while_its_model_is_loaded_leaves_no_half_loaded_one(
    ray_local: None, folders: dict[str, str]
) -> None:
    """Room for one: it is loaded to its end, draws for the next client, and leaves the memory for another model."""
    with _served(ServeArgs(models=_whole(folders, "photos", "pixart"), models_each=1, num_cpus=0.2)) as address:

        def states() -> dict[str, str]:
            told: dict[str, str] = send(address + "/readyz")[1]["models"]
            return told

        def until(state: str) -> None:
            deadline = time.monotonic() + 60
            while states() != {"photos": "not loaded", "pixart": state}:
                assert time.monotonic() < deadline, states()
                time.sleep(0.02)

        client = left_open(address, model="pixart", steps=200)
        until("loading")  # that takes seconds: diffusers is imported first
        client.close()
        until("loaded")
        assert draw(address, model="pixart")[0] == draw(address, model="photos")[0] == 200
        assert states() == {"photos": "loaded", "pixart": "not loaded"}


def test_a_replica_that_is_replaced_finishes_what_it_draws(ray_local: None, folders: dict[str, str]) -> None:
    args = ServeArgs(models=_whole(folders, "photos"), num_cpus=0.2)
    with _served(args) as address:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            long = pool.submit(draw, address, steps=200, n=8, seed=5)
            time.sleep(1)
            before = _replica_ids()
            assert not long.done()
            again = args.model_copy(update={"max_together": 32, "dtype": "bfloat16"})
            from serve.app import app

            ray_serve.run(app(again), name="emu_ray", route_prefix="/")
            status, body = long.result(120)
        assert status == 200 and len(body["data"]) == 8
        assert _replica_ids() != before and draw(address)[0] == 200


def _replica_ids() -> set[int]:
    """Process ids of replicas that draw, which are ours."""
    found = psutil.Process().children(recursive=True)
    return {process.pid for process in found if "ServeReplica:emu_ray:painter" in " ".join(process.cmdline())}


def test_while_no_replica_runs_a_client_is_told_to_come_again_and_one_is_woken(
    ray_local: None, folders: dict[str, str]
) -> None:
    args = ServeArgs(
        models=_whole(folders, "photos"), num_cpus=0.2, min_replicas=0, max_replicas=1, cold_start="refuse", upscale_delay_s=0, downscale_delay_s=60
    )  # fmt: skip
    with _served(args) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ok", "models": {"photos": "not asked"}}
        assert client.get("/v1/models").json()["data"][0]["size_px"] == 64  # known without waking it
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [{"prompt": "a ball", "steps": 2, "stream": stream} for stream in (False, True, False)]
            cold = list(pool.map(lambda fields: client.post(IMAGES, json=fields), asked))
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in cold} == {(503, "cold_start")}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in cold)
        deadline = time.monotonic() + 90
        while (answer := client.post(IMAGES, json={"prompt": "a ball", "steps": 2})).status_code != 200:
            assert answer.json()["error"]["code"] == "cold_start" and time.monotonic() < deadline
            time.sleep(0.5)


def test_a_picture_that_the_safety_check_holds_back_is_refused(
    ray_local: None, folders: dict[str, str], tmp_path: Path
) -> None:
    """By curation's scorer on the shipped CLIP, with a head that rates everything as offensive."""
    clip = base_folder() / "clip"
    head = LinearHead(96, "probability")
    head.bias.data.fill_(5.0)
    head.save(tmp_path / "strict.safetensors")
    safety = SafetyArgs(clip="emu-demo", clip_folder=str(clip), offensive_head=str(tmp_path / "strict.safetensors"))
    with _served(ServeArgs(models=_whole(folders, "photos"), num_cpus=0.2, safety=safety)) as address:
        status, body = draw(address)
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "moderation_blocked", "prompt")
        with stream(address, steps=6, partial_images=2) as answer:
            (only,) = list(events(answer))
        assert (only["type"], only["error"]["code"]) == ("error", "moderation_blocked")


@pytest.fixture(scope="module")
def slow_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The smallest pipeline at 256 px: a step takes far longer than news of it."""
    folder = tmp_path_factory.mktemp("slow") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 64}))
    return str(folder)


def test_after_a_client_left_at_most_one_more_step_is_made_as_the_metrics_tell(
    ray_local: None, slow_model: str
) -> None:
    with _served(ServeArgs(models={"slow": slow_model}, num_cpus=0.2)) as address:
        assert draw(address, steps=2, n=4)[0] == 200  # and it was profiled
        before = _at_rest('images_total{.*how="drawn"', 4)
        with stream(address, steps=100, n=4, progress=True) as answer:
            reached = next(event["step"] for event in events(answer) if event.get("step", 0) >= 3)
        after = _at_rest('images_total{.*how="cancelled"', 4)
        steps = _sum(after, "step_seconds_count") - _sum(before, "step_seconds_count")
        assert reached <= steps <= reached + 1
        assert _sum(after, 'images_total{.*how="drawn"') == 4
        assert _sum(after, "pass_rows_sum") > 0
        assert any(line.startswith("ray_emu_ray_serving_requests{") for line in after)


def _metrics_port() -> int:
    return int(ray.nodes()[0]["MetricsExportPort"])


def _sum(lines: list[str], pattern: str) -> float:
    """Of a metric's rows."""
    rows = [line for line in lines if re.match(f"ray_emu_ray_serving_{pattern}", line) and 'model="slow"' in line]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


def _at_rest(pattern: str, wanted: float) -> list[str]:
    """The metrics once a sum has come to what is wanted, as Prometheus would read them from Ray's exporter."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{_metrics_port()}/metrics", timeout=30) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        if _sum(lines, pattern) == wanted:
            return lines
        assert time.monotonic() < deadline, [line for line in lines if "emu_ray_serving" in line]
        time.sleep(1)

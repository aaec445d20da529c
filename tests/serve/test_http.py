"""The images API over a real local Ray Serve: what it draws, and how it refuses."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from ray import serve as ray_serve

from emu_ray.errors import PortInUseError, RecipeError
from serve.args import ServeArgs
from serve.deploy import deploy
from serve.errors import as_api_error
from serve.page import MEDIA_TYPES, PAGES
from tests.serve.client import IMAGES, draw, events, pixels, send, stream


def test_an_answer_holds_a_png_of_the_models_size(address: str) -> None:
    status, body = draw(address)
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert (status, image.format, image.size, body["model"]) == (200, "PNG", (64, 64), "tuned")
    assert isinstance(body["created"], int)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(address: str) -> None:
    first, again, other = (draw(address, seed=s)[1]["data"][0]["b64_json"] for s in (5, 5, 6))
    assert first == again != other


def test_the_answers_own_seed_draws_the_picture_again(address: str) -> None:
    item = draw(address)[1]["data"][0]
    assert draw(address, seed=item["seed"])[1]["data"][0] == item


def test_n_images_come_from_consecutive_seeds(address: str) -> None:
    pair = draw(address, seed=10, n=2)[1]["data"]
    alone = [draw(address, seed=s)[1]["data"][0] for s in (10, 11)]
    assert [item["seed"] for item in pair] == [10, 11]
    for together, single in zip(pair, alone, strict=True):
        assert np.abs(pixels(together) - pixels(single)).max() <= 1  # a batch rounds differently


def test_every_setting_reaches_the_generator(address: str) -> None:
    plain = draw(address, seed=3)[1]["data"][0]["b64_json"]
    for change in ({"prompt": "a blue cube"}, {"steps": 3}, {"negative_prompt": "blur"}):
        assert draw(address, **{"seed": 3, **change})[1]["data"][0]["b64_json"] != plain, change
    assert pixels(draw(address, size="96x32")[1]["data"][0]).shape == (32, 96, 3)


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_output_format_is_obeyed(address: str, encoding: str) -> None:
    status, body = draw(address, output_format=encoding, output_compression=80)
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert (status, image.format, body["output_format"]) == (200, encoding.upper(), encoding)


def test_openais_own_client_draws_and_lists_models(address: str) -> None:
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            prompt="a red ball",
            model="base",
            n=2,
            size="64x64",
            quality="low",
            extra_body={"seed": 1, "steps": 2},  # type: ignore[arg-type]
        )
        assert answer.data is not None
        assert [Image.open(io.BytesIO(base64.b64decode(i.b64_json or ""))).size for i in answer.data] == [(64, 64)] * 2
        assert [model.id for model in client.models.list()] == ["tuned", "base"]
        with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3' here") as refused:
            client.images.generate(prompt="a red ball", model="dall-e-3")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="b64_json"):
            client.images.generate(prompt="a red ball", response_format="url")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": " \n"}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "x" * 4001}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"n": 0}, 400, "n"),
        ({"n": 9}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"size": "big"}, 400, "size"),
        ({"size": "64x"}, 400, "size"),
        ({"size": "65x64"}, 400, "size"),
        ({"size": "99999x99999"}, 400, "size"),
        ({"size": "128x128"}, 400, "size"),
        ({"model": "sdxl"}, 404, "model"),
        ({"guidance": float("nan")}, 400, None),
        ({"guidance": -1}, 400, "guidance"),
        ({"steps": 0}, 400, "steps"),
        ({"steps": "25"}, 400, "steps"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**53}, 400, "seed"),
        ({"seed": 2**53 - 1, "n": 2}, 400, None),
        ({"quality": "best"}, 400, "quality"),
        ({"response_format": "url"}, 400, "response_format"),
        ({"output_format": "gif"}, 400, "output_format"),
        ({"output_format": "png", "output_compression": 50}, 400, None),
        ({"colour": "red"}, 400, "colour"),
        ({"scheduler": "heun"}, 400, "scheduler"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images"),
        ({"partial_images": 1}, 400, None),
        ({"prompt": "x" * 10_000_000}, 413, None),
    ],
)
def test_a_bad_request_is_refused_with_openais_error_body(
    address: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    got, body = draw(address, **fields)
    assert (got, body["error"]["param"]) == (status, param), body
    assert body["error"]["type"] == "invalid_request_error"
    assert 10 < len(body["error"]["message"]) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"1" * 9999 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(address: str, body: bytes) -> None:
    status, answer = send(address + IMAGES, body, "POST")
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_unknown_route_and_method_get_the_error_body(address: str) -> None:
    assert send(address + "/v1/images/edits", b"{}")[0] == 404
    status, body = send(address + IMAGES, method="GET")
    assert (status, body["error"]["type"]) == (405, "invalid_request_error")


def test_what_a_model_can_not_draw_is_a_400_and_an_inner_error_a_500_without_its_words() -> None:
    refused = as_api_error(RecipeError("steps must be 1 to 1000, found 0"))
    assert (refused.status, refused.message) == (400, "steps must be 1 to 1000, found 0")
    broken = as_api_error(ValueError("secret"))
    assert (broken.status, broken.code) == (500, "internal_error") and "secret" not in broken.message


def test_requests_at_once_give_what_each_gives_alone(address: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda s: draw(address, seed=s, steps=4 + s), [1, 2, 3, 1, 2, 3]))
    assert [status for status, _ in answers] == [200] * 6
    pictures = [pixels(body["data"][0]) for _, body in answers]
    for seed, picture in zip([1, 2, 3, 1, 2, 3], pictures, strict=True):
        alone = pixels(draw(address, seed=seed, steps=4 + seed)[1]["data"][0])
        assert np.abs(picture - alone).max() <= 1


def test_openais_own_client_streams_partial_images_and_the_picture(address: str) -> None:
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        stream = client.images.generate(
            prompt="a red ball", model="tuned", stream=True, partial_images=2, extra_body={"seed": 4, "steps": 6}
        )
        events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image", "image_generation.partial_image", "image_generation.completed",
    ]  # fmt: skip
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert all(pixels({"b64_json": event.b64_json}).shape == (64, 64, 3) for event in events)
    straight = draw(address, seed=4, steps=6, model="tuned")[1]["data"][0]
    assert np.abs(pixels({"b64_json": events[-1].b64_json}) - pixels(straight)).max() <= 1


def test_each_step_is_told_where_it_was_asked_for(address: str) -> None:
    with stream(address, steps=5, n=2, progress=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        told = list(events(answer))
    for image in (0, 1):
        own = [event for event in told if event.get("image") == image]
        assert [event["step"] for event in own] == [1, 2, 3, 4, 5]
        assert own[-1]["type"] == "image_generation.completed"


def test_a_client_that_leaves_stops_the_drawing_soon(address: str) -> None:
    """A drawing of 200 steps is left after a few; what waits for its model then is next to nothing."""
    with stream(address, steps=200, n=8, progress=True) as answer:
        next(events(answer))
        assert _waiting_s() > 0
    until = time.monotonic() + 20
    while _waiting_s() > 0:
        assert time.monotonic() < until, "the drawing goes on though nobody waits for it"
        time.sleep(0.1)


def _kill_painter() -> None:
    """The process of the tuned model's replica, which is ours."""
    (replica,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica:emu_ray:painter" in " ".join(process.cmdline())
    ]
    replica.kill()


@pytest.mark.slow
def test_a_killed_replica_costs_time_and_no_picture(address: str) -> None:
    """Asked for plainly and as a stream; another replica draws the same pictures."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        plain = pool.submit(draw, address, seed=21, steps=150, n=2)
        with stream(address, seed=21, steps=150, n=2, progress=True) as answer:
            told = events(answer)
            assert next(event for event in told if "step" in event)["step"] >= 1
            _kill_painter()
            last = list(told)[-1]
    status, body = plain.result(120)
    assert (status, last["type"]) == (200, "image_generation.completed")
    assert len(body["data"]) == 2
    again = draw(address, seed=21, steps=150, n=2)[1]["data"]
    assert np.abs(pixels(body["data"][0]) - pixels(again[0])).max() <= 1
    assert np.abs(pixels(last) - pixels(again[last["image"]])).max() <= 1


def _waiting_s() -> float:
    waiting: float = ray_serve.get_deployment_handle("painter", "emu_ray").waiting_s.remote().result(timeout_s=30)
    return waiting


def test_health_and_page(address: str) -> None:
    assert send(address + "/healthz") == (200, {"status": "ok", "models": ["tuned", "base"]})
    assert send(address + "/readyz") == (200, {"status": "ok", "models": {"tuned": "loaded", "base": "loaded"}})


@pytest.mark.parametrize("file", sorted(PAGES.iterdir()), ids=lambda file: file.name)
def test_a_file_of_the_page_names_nothing_but_its_neighbours(address: str, file: Path) -> None:
    route = "/" if file.name == "index.html" else f"/pages/{file.name}"
    with urllib.request.urlopen(address + route, timeout=30) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith(MEDIA_TYPES[file.suffix])
        assert "'unsafe-inline'" not in answer.headers["Content-Security-Policy"]
    named = re.findall(r'(?:src|href|action)="(?!data:)([^"]+)', text) + re.findall(r'from "([^"]+)"', text)
    assert {name.removeprefix("pages/").removeprefix("./") for name in named} <= {path.name for path in PAGES.iterdir()}
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.parametrize("name", ["app.py", "..%2fapp.py", "%2e%2e%2fapp.py"])
def test_no_other_file_is_sent(address: str, name: str) -> None:
    assert send(f"{address}/pages/{name}")[0] == 404


def test_a_port_in_use_is_named_before_anything_starts(ray_local: None, model: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1 is in use"):
            deploy(ServeArgs(checkpoint=model), port=port)

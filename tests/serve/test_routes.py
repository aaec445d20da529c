"""Jobs, blind comparisons, the description of the API, and clients that misbehave, over a real local Ray Serve."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from ray import serve as ray_serve

from emu_ray.evaluation.votes import preferences, read_votes
from tests.serve.client import IMAGES, draw, events, pixels, send, stream

JOBS, PAIRS = "/v1/images/jobs", "/v1/images/comparisons"


def _post(address: str, route: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    return send(address + route, json.dumps(fields).encode(), "POST")


def _until(address: str, id: str, *statuses: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (job := send(f"{address}{JOBS}/{id}")[1])["status"] not in statuses:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def test_a_job_is_begun_looked_at_and_fetched(address: str) -> None:
    status, begun = _post(address, JOBS, prompt="a red ball", steps=6, n=2, seed=3)
    assert (status, begun["object"], begun["status"]) == (202, "image.job", "queued")
    job = _until(address, begun["id"], "completed")
    assert [(image["seed"], image["step"], image["steps"]) for image in job["images"]] == [(3, 6, 6), (4, 6, 6)]
    straight = draw(address, steps=6, n=2, seed=3)[1]
    for one, other in zip(job["result"]["data"], straight["data"], strict=True):
        assert one["seed"] == other["seed"] and abs(pixels(one) - pixels(other)).max() <= 1
    assert job["result"]["model"] == "tuned"
    (listed,) = [other for other in send(address + JOBS)[1]["data"] if other["id"] == begun["id"]]
    assert "result" not in listed
    assert send(f"{address}{JOBS}/{begun['id']}", method="DELETE")[1]["status"] == "completed"


def test_a_job_tells_its_steps_and_is_cancelled_at_once(address: str) -> None:
    id = _post(address, JOBS, prompt="a red ball", steps=200, n=8)[1]["id"]
    assert sum(image["step"] for image in _until(address, id, "in_progress")["images"]) > 0
    status, job = send(f"{address}{JOBS}/{id}", method="DELETE")
    assert (status, job["status"]) == (200, "cancelled")
    steps = [image["step"] for image in job["images"]]
    deadline = time.monotonic() + 10
    while _waiting_s() > 0:
        assert time.monotonic() < deadline, "the drawing goes on though it was cancelled"
        time.sleep(0.05)
    assert max(steps) < 200


def test_who_waits_is_told_how_many_are_before(address: str) -> None:
    """Of nine requests at once a replica takes eight; the last one is begun after one of them is finished."""
    ids = [_post(address, JOBS, prompt="a red ball", steps=60, n=8)[1]["id"] for _ in range(8)]
    with stream(address, steps=2, progress=True) as answer:
        first = next(events(answer))
        assert first["type"] == "image_generation.queued" and 1 <= first["position"] <= 8
    waiting = _post(address, JOBS, prompt="a red ball", steps=2)[1]
    assert 1 <= waiting["position"] <= 9
    for id in ids:
        send(f"{address}{JOBS}/{id}", method="DELETE")
    assert _until(address, waiting["id"], "completed")["position"] is None


def test_a_job_that_is_not_there_and_a_stream_of_a_job_are_refused(address: str) -> None:
    for method in ("GET", "DELETE"):
        status, body = send(f"{address}{JOBS}/img-0", method=method)
        assert (status, body["error"]["code"]) == (404, "job_not_found")
    assert _post(address, JOBS, prompt="a ball", stream=True)[0] == 400


def test_a_blind_pair_is_voted_on_and_the_votes_say_who_is_preferred(address: str, votes: Path) -> None:
    sides = set()
    for seed in range(6):
        status, pair = _post(address, PAIRS, prompt=f"a ball {seed % 3}", seed=seed, steps=2)
        assert (status, pair["seed"]) == (200, seed)
        pictures = [base64.b64decode(pair[side]["b64_json"]) for side in ("left", "right")]
        assert all(Image.open(io.BytesIO(picture)).size == (64, 64) for picture in pictures)
        assert not any(b"tuned" in picture or b"base" in picture for picture in pictures)
        assert "tuned" not in json.dumps(pair) and "base" not in json.dumps(
            {k: v for k, v in pair.items() if k not in ("left", "right")}
        )
        status, told = _post(address, f"{PAIRS}/{pair['id']}/vote", choice="left")
        assert status == 200 and {told["left_model"], told["right_model"]} == {"tuned", "base"}
        sides.add(told["left_model"])
        assert _post(address, f"{PAIRS}/{pair['id']}/vote", choice="left")[0] == 404  # a second time
    found = read_votes(str(votes))
    assert [vote["seed"] for vote in found] == list(range(6)) and {vote["choice"] for vote in found} == {"left"}
    ((pair_of, preference),) = preferences(found).items()
    assert pair_of == ("base", "tuned") and preference.n_pairs == 6 and preference.n_prompts == 3
    wins = sum(vote["left_model"] == "base" for vote in found)
    assert preference.win == pytest.approx(100 * wins / 6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"models": ["tuned"]}, "models"), ({"models": ["tuned", "tuned"]}, "models"), ({"models": ["tuned", "sdxl"]}, "models"), ({"n": 2}, "n"), ({"model": "tuned"}, "model")],
)  # fmt: skip
def test_a_pair_of_others_than_two_models_is_refused(address: str, fields: dict[str, Any], param: str) -> None:
    status, body = _post(address, PAIRS, prompt="a ball", steps=2, **fields)
    assert (status, body["error"]["param"]) == (400, param)
    assert _post(address, f"{PAIRS}/cmp-0/vote", choice="left")[1]["error"]["code"] == "comparison_not_found"
    assert _post(address, f"{PAIRS}/cmp-0/vote", choice="both")[1]["error"]["param"] == "choice"


def test_models_tell_what_is_known_of_them(address: str) -> None:
    body = send(address + "/v1/models")[1]
    assert body["comparisons"] is True
    for card in body["data"]:
        assert (card["size_px"], card["most_steps"], card["status"], card["lora_of"]) == (64, 1000, "loaded", None)


def test_no_other_origin_is_let_in(address: str) -> None:
    """Neither by a preflight nor by a plain request."""
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    with httpx.Client(base_url=address) as client:
        answers = [client.options(IMAGES, headers=headers), client.get("/v1/models", headers=headers)]
        # a page elsewhere may send this without asking first, and needs no answer to fill the queue
        body, plain = json.dumps({"prompt": "a ball", "steps": 2}), {"Content-Type": "text/plain"}
        foreign = client.post(JOBS, content=body, headers={"Origin": "https://elsewhere.example", **plain})
        own = client.post(JOBS, content=body, headers={"Origin": address, **plain})
    assert not any(name.startswith("access-control") for answer in [*answers, foreign] for name in answer.headers)
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "permission_error")
    assert own.status_code == 202


def test_every_request_has_an_id_and_a_job_its_address(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        first, second = (client.post(IMAGES, json={"prompt": "a ball", "steps": 2}) for _ in range(2))
        assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
        job = client.post(JOBS, json={"prompt": "a ball", "steps": 2})
        assert client.get(job.headers["Location"]).json()["id"] == job.json()["id"]


def test_a_service_that_has_all_that_it_can_draw_is_ready_all_the_same(address: str) -> None:
    ids = [_post(address, JOBS, prompt="a red ball", steps=200, n=8)[1]["id"] for _ in range(12)]
    started = time.monotonic()
    assert send(address + "/readyz")[0] == send(address + "/v1/models")[0] == 200
    assert time.monotonic() < started + 8
    for id in ids:
        send(f"{address}{JOBS}/{id}", method="DELETE")


def test_too_many_at_once_are_told_when_to_come_again(address: str) -> None:
    """Room for 8 that are drawn and 400 that wait; all are freed again."""

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            return await asyncio.gather(
                *(client.post(JOBS, json={"prompt": "a ball", "steps": 200}) for _ in range(430))
            )

    answers = asyncio.run(flood())
    for answer in answers:
        if answer.status_code == 202:
            send(f"{address}{JOBS}/{answer.json()['id']}", method="DELETE")
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(refused) <= 430 - 408 and all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert draw(address)[0] == 200


def test_five_hundred_clients_that_vanish_leave_nothing_behind(address: str) -> None:
    """Some before they sent everything, some while they wait, some while they are drawn for."""
    body = json.dumps({"prompt": "a ball", "steps": 200, "stream": True, "progress": True}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        IMAGES.encode(),
        len(body),
    )
    host, port = address.removeprefix("http://").split(":")

    async def vanish(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write((head + body)[: len(head) + (len(body) if number % 3 else number % len(body))])
        await writer.drain()
        if number % 3 == 1:
            await asyncio.wait_for(reader.read(64), 120)
        writer.transport.abort()

    async def all_of_them() -> None:
        for start in range(0, 500, 100):
            await asyncio.gather(*(vanish(number) for number in range(start, start + 100)), return_exceptions=True)

    asyncio.run(all_of_them())
    deadline = time.monotonic() + 90
    while _waiting_s() > 0:
        assert time.monotonic() < deadline, "drawings go on though nobody waits for them"
        time.sleep(0.1)
    assert draw(address)[0] == 200
    assert _post(address, JOBS, prompt="a ball", steps=2)[1]["position"] == 0
    ids = [_post(address, JOBS, prompt="a ball", steps=200, n=8)[1]["id"] for _ in range(8)]
    for id in ids:  # all that a replica may draw at once are free again
        _until(address, id, "in_progress")
    for id in ids:
        send(f"{address}{JOBS}/{id}", method="DELETE")


def test_a_client_that_leaves_without_events_stops_its_drawing_too(address: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + IMAGES, json={"prompt": "a ball", "steps": 200, "n": 8}, timeout=1.0)
    deadline = time.monotonic() + 10
    while _waiting_s() > 0:
        assert time.monotonic() < deadline, "the drawing goes on though nobody waits for it"
        time.sleep(0.05)


@pytest.mark.slow
def test_whatever_the_description_of_the_api_allows_or_forbids_is_answered_as_it_says(
    address: str, tmp_path: Path
) -> None:
    """By schemathesis: no 5xx, and only statuses, types and shapes that are documented."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "schemathesis"), "run", f"{address}/openapi.json", "--checks", checks, "--max-examples", "12",
         "--seed", "7", "--request-timeout", "60", "--no-color", "--suppress-health-check", "all"],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


def test_pictures_of_one_request_in_any_way_are_the_same(address: str) -> None:
    straight = draw(address, seed=9, steps=4)[1]["data"][0]
    with stream(address, seed=9, steps=4) as answer:
        streamed = list(events(answer))[-1]
    job = _until(address, _post(address, JOBS, prompt="a red ball", seed=9, steps=4)[1]["id"], "completed")
    for other in (streamed, job["result"]["data"][0]):
        assert abs(pixels(straight) - pixels(other)).max() <= 1


def _waiting_s() -> float:
    waiting: float = ray_serve.get_deployment_handle("painter", "emu_ray").waiting_s.remote().result(timeout_s=30)
    return waiting

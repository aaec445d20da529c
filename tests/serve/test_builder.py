"""What the builder refuses before Ray is asked for anything, and the config for `serve deploy`."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from emu_ray.errors import InputError, StationHalfWrittenError
from emu_ray.stations import Station
from emu_ray.stations.folders import base_folder
from serve.app import app
from serve.args import LoraArgs, SafetyArgs, ServeArgs
from serve.catalogue import read_catalogue
from tests.serve.client import draw, free_port, send

CONFIGS = Path(__file__).parents[2] / "serve" / "config"


def _folder(path: Path) -> str:
    path.mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    return str(path)


def test_missing_checkpoint_is_named_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/none"):
        app(ServeArgs(checkpoint=str(tmp_path / "none")))


def test_a_checkpoint_in_a_bucket_is_looked_for_there(s3: Any, tmp_path: Path) -> None:
    address = f"{s3.uri}/serve/{tmp_path.name}"
    with pytest.raises(InputError, match="model_index.json at s3://"):
        app(ServeArgs(checkpoint=address))
    Station(address).put_file("model_index.json", b"{}")
    assert isinstance(app(ServeArgs(checkpoint=address)), ray_serve.Application)


def test_a_checkpoint_whose_training_was_killed_while_it_was_written_is_not_served(tmp_path: Path) -> None:
    station = Station(tmp_path)
    station.begin("recipe", "{}", "checkpoint", {})
    station.put_file("model_index.json", b"{}")
    with pytest.raises(StationHalfWrittenError, match="begun and not finished"):
        app(ServeArgs(checkpoint=str(tmp_path)))
    station.finish()
    assert isinstance(app(ServeArgs(checkpoint=str(tmp_path))), ray_serve.Application)


def test_arguments_come_as_text_from_the_command_line(tmp_path: Path) -> None:
    args = ServeArgs.model_validate({"checkpoint": _folder(tmp_path / "m"), "num_gpus": "1", "max_replicas": "3"})
    assert (args.num_gpus, args.max_replicas) == (1.0, 3)
    assert isinstance(app(args), ray_serve.Application)


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="chekpoint"):
        ServeArgs.model_validate({"checkpoint": "/x", "chekpoint": "/y"})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(InputError, match="min_replicas"):
        app(ServeArgs(checkpoint="s3://b/m", min_replicas=3, max_replicas=2))


@pytest.mark.parametrize("name", ["demo", "gpu"])
def test_a_deploy_config_holds_only_keys_that_serve_and_the_builder_know(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    parsed = ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    (given,), (application,) = config["applications"], parsed.applications
    assert given.keys() <= type(application).model_fields.keys()
    assert application.import_path == "serve.app:app"
    ServeArgs.model_validate(given["args"]).checkpoints()


def test_the_demo_s_config_builds(tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "demo.yaml").read_text().replace("/path/to/emu_ray", str(tmp_path)))
    for name in ("tuned", "base"):
        _folder(tmp_path / "runs/demo/checkpoints" / name)
    assert isinstance(app(ServeArgs.model_validate(config["applications"][0]["args"])), ray_serve.Application)


@pytest.mark.slow
def test_serve_deploy_takes_the_demo_s_config(ray_local: None, model: str, tmp_path: Path) -> None:
    """By Ray's own command, at the dashboard of the Ray that runs."""
    checkpoints, port = tmp_path / "runs/demo/checkpoints", free_port()
    for name in ("tuned", "base"):
        shutil.copytree(model, checkpoints / name)
    content = (CONFIGS / "demo.yaml").read_text().replace("port: 8000", f"port: {port}")
    repository = str(CONFIGS.parents[1])
    config = yaml.safe_load(
        content.replace("/path/to/emu_ray/runs", f"{tmp_path}/runs").replace("/path/to/emu_ray", repository)
    )
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(config))
    dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]
    command = [
        str(Path(sys.executable).parent / "serve"),
        "deploy",
        str(tmp_path / "deploy.yaml"),
        "-a",
        f"http://{dashboard}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    try:
        deadline = time.monotonic() + 120
        while _status(f"http://127.0.0.1:{port}/readyz") != 200:
            assert time.monotonic() < deadline, ray_serve.status()
            time.sleep(0.5)
        assert draw(f"http://127.0.0.1:{port}")[0] == 200
    finally:
        ray_serve.shutdown()


def _status(url: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return send(url)[0]
    return 0


def test_the_catalogue_is_read_without_loading_a_model(checkpoint: Path, tmp_path: Path) -> None:
    """Sizes, steps, lineage of a checkpoint of ours, the win rate of its evaluation, and a LoRA as another name of its base."""
    tuned = Station(tmp_path / "tuned")
    tuned.begin("recipe", "{}", "checkpoint", {"latents/quality": "abc"})
    tuned.upload_folder(checkpoint)
    tuned.finish(extra={"steps": 120, "images_seen": 7680, "history": []})
    evaluation = Station(tmp_path / "evaluation")
    evaluation.begin("judged", json.dumps({"first": "base", "second": "tuned"}), "evaluation", {})
    shares = {
        "win": 82.91666666666667,
        "tie": 12.083333,
        "lose": 5.0,
        "ci95": [77.91666, 87.5],
        "n_pairs": 240,
        "sign_test_p": 0.0,
    }
    evaluation.finish(extra={"appeal": shares})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    args = ServeArgs(
        checkpoint=tuned.uri, base_checkpoint=str(checkpoint), evaluation=evaluation.uri, loras={"lora": LoraArgs(base="base", checkpoint=str(tmp_path / "lora"), scale=0.5)},
    )  # fmt: skip
    found = read_catalogue(args)
    assert list(found) == ["tuned", "base", "lora"]
    assert all(model.size_px == 16 and model.most_steps == 1000 for model in found.values())
    lineage, preference = found["tuned"].lineage or {}, found["tuned"].preference or {}
    assert (lineage["steps"], lineage["images_seen"], lineage["inputs"]) == (120, 7680, {"latents/quality": "abc"})
    assert (preference["against"], preference["win"], preference["n_pairs"]) == ("base", 82.9, 240)
    assert found["base"].lineage is None and found["base"].preference is None
    assert (found["lora"].whole, found["lora"].checkpoint, found["lora"].scale) == (
        "base",
        found["base"].checkpoint,
        0.5,
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "expected a model to serve, found none"),
        ({"checkpoint": "/a", "models": {"tuned": "/b"}}, "found 'tuned' twice"),
        (
            {"checkpoint": "/a", "loras": {"x": {"base": "sdxl", "checkpoint": "/b"}}},
            "the base 'sdxl', which isn't served",
        ),
    ],
)
def test_names_that_can_not_be_served_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        app(ServeArgs.model_validate(given))


def test_a_safety_check_without_a_judge_or_with_a_head_that_is_missing_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="either an offensive_head or safety_concepts"):
        SafetyArgs(clip="ViT-L-14")
    safety = SafetyArgs(clip="emu-demo", clip_folder=str(base_folder() / "clip"), offensive_head=str(tmp_path / "none"))
    with pytest.raises(InputError, match="offensive_head is missing"):
        app(ServeArgs(checkpoint=str(checkpoint), safety=safety))

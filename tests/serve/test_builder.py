"""What the builder refuses before Ray is asked for anything, and the config for `serve deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from emu_ray.errors import InputError, StationHalfWrittenError
from emu_ray.stations import Station
from serve.app import app
from serve.args import ServeArgs

CONFIG = Path(__file__).parents[2] / "serve" / "config" / "demo.yaml"


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


def test_deploy_config_holds_only_keys_that_serve_knows_and_builds(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text().replace("/path/to/emu_ray", str(tmp_path)))
    parsed = ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    (given,), (application,) = config["applications"], parsed.applications
    assert given.keys() <= type(application).model_fields.keys()
    assert application.import_path == "serve.app:app"
    for name in ("tuned", "base"):
        _folder(tmp_path / "runs/demo/checkpoints" / name)
    assert isinstance(app(ServeArgs.model_validate(given["args"])), ray_serve.Application)

"""Every job explains itself, and a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from emu_ray.config import fingerprint, from_json, to_json
from emu_ray.training.start import DenoiserTraining

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if p.stem != "__init__")
FLOW = [job for job in JOBS if job not in {"whole_way", "make_base", "ingest", "serve"}]


def main(job: str, *arguments: str) -> None:
    module = importlib.import_module(f"jobs.{job}")
    from emu_ray.config import command_line

    command_line(job, module.__doc__, module.RECIPES, module.run, arguments)


@pytest.mark.parametrize("job", JOBS)
def test_the_docstring_says_what_is_read_and_written_and_what_it_costs(job: str) -> None:
    text = importlib.import_module(f"jobs.{job}").__doc__ or ""
    for word in ("reads ", "writes ", "command ", "cost "):
        assert re.search(rf"^{word}", text, re.MULTILINE), f"jobs.{job} does not say {word!r}"


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_the_recipes(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(job, "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for name in importlib.import_module(f"jobs.{job}").RECIPES:
        assert name in said


@pytest.mark.parametrize("job", JOBS)
def test_an_unknown_recipe_is_one_sentence_and_exit_2(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(job, "nonsense")
    assert stopped.value.code == 2
    assert "unknown recipe 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS)
def test_every_recipe_survives_json(job: str) -> None:
    for name, recipe in importlib.import_module(f"jobs.{job}").RECIPES.items():
        again = from_json(type(recipe), to_json(recipe))
        assert again == recipe, name
        assert fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize("job", ["select", "choose", "evaluate"])
def test_a_missing_station_names_the_job_that_writes_it(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(job, "demo", "--root", str(tmp_path / "nothing"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "doesn't exist: run `python -m jobs." in error
    assert len(error.strip().splitlines()) == 1


def test_an_unknown_field_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main("select", "demo", "--nonsense", "1")
    assert stopped.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_a_half_written_station_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "part-0.parquet").write_bytes(b"half")
    with pytest.raises(SystemExit) as stopped:
        main("select", "demo", "--root", str(tmp_path))
    assert stopped.value.code == 2
    assert "was begun and not finished" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["emu", "sd15", "sd15-lora", "sdxl", "sdxl-lora"])
def test_the_paper_s_numbers_stand_in_the_real_recipes(name: str) -> None:
    from jobs.quality_tune import RECIPES

    tuning = RECIPES[name].training
    assert (tuning.loop.batch_size, tuning.noise_offset, tuning.loop.steps) == (64, 0.1, 15_000)
    assert json.loads(to_json(RECIPES[name]))["training"]["stopping"] is not None
    assert (tuning.lora is not None) == name.endswith("-lora")


def test_a_training_learns_latents_of_the_autoencoder_that_it_takes_for_its_pictures() -> None:
    """The recipes of one root, matched by the latents that one writes and the other reads."""
    from emu_ray.training.progressive import stages
    from jobs.encode import RECIPES as ENCODE
    from jobs.pretrain import RECIPES as PRETRAIN
    from jobs.quality_tune import RECIPES as TUNE

    runs = [stage for recipe in PRETRAIN.values() for stage in stages(recipe)] + list(TUNE.values())
    pretrained = {(run.root, f"ROOT/checkpoints/{run.run}"): run.training for run in runs}

    def vae(root: str, training: DenoiserTraining) -> str:
        earlier = pretrained.get((root, training.start))
        return training.vae if training.autoencoder or earlier is None else vae(root, earlier)

    encoded = {(recipe.root, recipe.use): recipe.autoencoder for recipe in ENCODE.values()}
    matched = {(run.root, run.latents): vae(run.root, run.training) for run in runs}
    # make_base hands the parts that it made to both by its own arguments
    found = {place: made_by for place, made_by in matched.items() if not place[0].startswith("runs/base/")}
    assert found == {place: encoded[place] for place in found} and len(found) >= 8

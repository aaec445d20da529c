"""The logbook on Ray Train's controller: trouble with curves never ends a training, and no point is lost to it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from emu_ray.training.logbook.loggers import Logbook, LogbookRecipe
from emu_ray.training.logbook.on_ray import LogbookKeeper

RUN = SimpleNamespace(run_config=SimpleNamespace(name="base-1"))


def _report(*images_seen: int, is_last: bool = False) -> list[dict[str, Any]]:
    points = [{"images_seen": n, "loss": 1.0 / n} for n in images_seen]
    return [{**points[-1], "points": points, "is_last": is_last}, {"points": [], "is_last": is_last}]


def _curves(folder: Path) -> tuple[list[int], list[int]]:
    """Where the loss has points, and where there are sheets."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    book = EventAccumulator(str(folder / "tensorboard"))
    book.Reload()
    images = book.Images("samples") if "samples" in book.Tags()["images"] else []
    return [event.step for event in book.Scalars("loss")], [event.step for event in images]


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    return stream.getvalue()


def test_points_of_a_report_and_whole_sheets_are_written(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "images-000000000016.png").write_bytes(_png())
    (tmp_path / "samples" / "._images-000000000032.png.a1.partial").write_bytes(b"half")  # of a killed writer
    keeper = LogbookKeeper(LogbookRecipe(), str(tmp_path), {})
    keeper.after_report(RUN, _report(4, 8, 16), None)
    keeper.after_report(RUN, _report(20, is_last=True), None)
    assert _curves(tmp_path) == ([4, 8, 16, 20], [16])


def test_what_can_not_be_written_is_told_once_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    keeper = LogbookKeeper(LogbookRecipe(), str(tmp_path), {})
    keeper.after_report(RUN, _report(4), None)
    with monkeypatch.context() as patch:

        def down(self: Logbook, metrics: dict[str, float]) -> None:
            raise OSError("the tracking server is down")

        patch.setattr(Logbook, "write", down)
        keeper.after_report(RUN, _report(8), None)
        keeper.after_report(RUN, _report(12, 16), None)
    assert capsys.readouterr().out.count("the tracking server is down") == 1
    keeper.after_report(RUN, _report(20, is_last=True), None)
    assert _curves(tmp_path)[0] == [4, 8, 12, 16, 20]


def test_a_place_that_can_not_be_made_does_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    keeper = LogbookKeeper(LogbookRecipe(), str(tmp_path), {})
    keeper.after_report(RUN, _report(4), None)
    assert "the curves can't be written now, training goes on" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # its own, of the database
def test_mlflow_gets_the_points_and_the_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):  # the same run goes on
        book = Logbook(LogbookRecipe(tensorboard=False, mlflow_uri=uri), str(tmp_path), "base-1", {"steps": 3})
        book.write({"images_seen": 4, "loss": 0.5})
    book.picture(_png(), 4)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("emu_ray").experiment_id])
    assert run.data.metrics == {"loss": 0.5} and run.data.params == {"steps": "3"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples-000000000004.png"]


def test_weights_and_biases_gets_the_points_and_the_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    book = Logbook(LogbookRecipe(tensorboard=False, wandb_project="emu_ray"), str(tmp_path), "base-1", {"steps": 3})
    book.write({"images_seen": 4, "loss": 0.5})
    book.picture(_png(), 4)
    book.flush(is_last=True)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-base-1.wandb")
    assert b"loss" in written.read_bytes()

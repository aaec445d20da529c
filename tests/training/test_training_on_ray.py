"""Training through the jobs' own functions on a real local Ray: streamed, in stages, sharded, elastic, and what a user reads when it fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import load_file

from emu_ray.config import command_line
from emu_ray.encoding.on_ray import EncodeRecipe, encode
from emu_ray.generation.generator import SamplingSettings
from emu_ray.records import SCHEMAS
from emu_ray.stations import Manifest, Station
from emu_ray.training import denoiser_run
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoiser_run import DenoiserRun, run_denoiser
from emu_ray.training.loop import LoopRecipe, _Run
from emu_ray.training.on_ray import RayWorker, WorkersRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.progressive import Pretraining, Stage, pretrain
from emu_ray.training.samples import SampleSheetRecipe
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.streaming.order import StreamRecipe
from jobs.pretrain import run as run_pretrain
from tests.training.small_latents import write_latents
from tests.training.train_process import watched_work

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow, pytest.mark.timeout(1800)]
LOOP = LoopRecipe(
    steps=8,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    ema_decay=0.9,
    log_every_steps=1,
    checkpoint_every_steps=3,
)
TWO = WorkersRecipe(count=2, cpus_each=0.5)
ONE = WorkersRecipe(count=1, cpus_each=0.5)


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> Pretraining:
    """One worker, latents of noise."""
    write_latents(tmp_path / "latents" / "pretrain")
    training = DenoiserTraining(start=str(checkpoint), loop=LOOP)
    return Pretraining(root=str(tmp_path), run="base", latents="pretrain", training=training, workers=ONE)


def weights(root: Path | str, run: str) -> dict[str, np.ndarray]:
    (file,) = (Path(root) / "checkpoints" / run / "unet").glob("*.safetensors")
    return load_file(file)


def reads(root: Path, run: str) -> dict[int, list[str]]:
    """The names that each step read, on all workers."""
    found: dict[int, list[str]] = {}
    for line in (root / f"reads-{run}.jsonl").read_text().splitlines():
        step, _, names = json.loads(line)
        found.setdefault(step, []).extend(names)
    return {step: sorted(names) for step, names in found.items()}


def crashing_work(recipe: DenoiserRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """`watched_work` whose last worker is killed as its sixth step begins, once."""
    step: Callable[..., None] = _Run._step

    def crashing(self: _Run, share: Any) -> None:
        crashed = Path(recipe.root) / "crashed"
        if self.progress.step == 5 and worker.rank == worker.world_size - 1 and not crashed.exists():
            self.checkpoints.wait()  # type: ignore[union-attr]
            crashed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, share)

    _Run._step = crashing  # type: ignore[method-assign]
    return watched_work(recipe, worker, folder)


def _pool(root: Path, noise_picture: Callable[..., bytes], count: int = 24) -> None:
    sizes = [(64, 16) if i % 3 == 0 else (32, 32) for i in range(count)]
    station = Station(root / "pool")
    station.begin("any", "{}", "pool", {})
    columns: dict[str, Any] = {
        "key": range(count),
        "image": [noise_picture(i, *size) for i, size in enumerate(sizes)],
        "caption": [f"ball {i}" for i in range(count)],
        "width_px": [width for width, _ in sizes],
        "height_px": [height for _, height in sizes],
        "likes": [0] * count,
        "source": ["test"] * count,
        "fetch_error": [""] * count,
        "extra": ["{}"] * count,
    }
    station.write_table(
        "part-000000.parquet", pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMAS["pool"]})
    )
    station.finish()


def test_a_streamed_set_of_two_shapes_gives_the_same_after_a_kill_to_the_last_bit_and_on_one_worker_nearly(
    tmp_path: Path, checkpoint: Path, noise_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pool(tmp_path, noise_picture)
    encode(
        EncodeRecipe(
            root=str(tmp_path), use="pretrain", source="pool", autoencoder=f"{checkpoint}/vae", size_px=16, keep_reasons=None,
            max_aspect=4, bucket_step_px=8, rows_per_part=6, actors=1, num_cpus=0.5,
        )
    )  # fmt: skip
    buckets = Station(tmp_path / "latents" / "pretrain").read_table(["bucket"])["bucket"].to_pylist()
    assert set(buckets) == {"16x16", "32x8"}
    training = DenoiserTraining(
        start=str(checkpoint), loop=LOOP, stream=StreamRecipe(lanes=2, window_groups=2, readers=1)
    )
    run = DenoiserRun(root=str(tmp_path), run="two", latents="pretrain", training=training, workers=TWO)
    for name, workers, work in (("killed", TWO, crashing_work), ("two", TWO, watched_work), ("one", ONE, watched_work)):
        monkeypatch.setattr(denoiser_run, "denoiser_work", work)
        run_denoiser(replace(run, run=name, workers=workers))
    assert (tmp_path / "crashed").exists()
    one, two, killed = (weights(tmp_path, name) for name in ("one", "two", "killed"))
    assert all(np.array_equal(killed[name], two[name]) for name in two)
    assert all(np.allclose(one[name], two[name], atol=1e-5) for name in two)
    assert any(not np.array_equal(one[name], value) for name, value in weights_of(checkpoint).items())
    assert reads(tmp_path, "one") == reads(tmp_path, "two")
    # the kill came as the sixth step began, the last checkpoint after the third: steps 3 and 4 were made twice
    again = {step: len(names) for step, names in reads(tmp_path, "killed").items()}
    assert {again[step] for step in (0, 1, 2, 6, 7)} == {4} and {again[step] for step in (3, 4)} == {8}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The U-Net's of a pipeline folder."""
    (file,) = (folder / "unet").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def staged(checkpoint: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    """An undisturbed run that asks for one or two workers, of which each wants one and a half of two CPUs, and its later stage."""
    root = tmp_path_factory.mktemp("staged")
    write_latents(root / "latents" / "pretrain")
    write_latents(root / "latents" / "larger", side_px=32)
    # so slow that the weights tell where they come from
    frozen = LoopRecipe(steps=1, batch_size=4, learning_rate=1e-12, warmup_steps=0)
    recipe = Pretraining(
        root=str(root),
        run="base",
        latents="pretrain",
        training=DenoiserTraining(start=str(checkpoint), loop=LOOP),
        workers=WorkersRecipe(count=2, least=1, cpus_each=1.5),
        later=(Stage(run="larger", latents="larger", size_px=32, noise_offset=0.02, loop=frozen),),
    )
    ended: list[tuple[str, float]] = []

    def note(manifest: Manifest, run: DenoiserRun) -> None:
        ended.append((run.run, run.training.noise_offset))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser_run, "denoiser_work", watched_work)
        pretrain(recipe, note)
    assert ended == [("base", 0.0), ("larger", 0.02)]
    return recipe


def test_a_later_stage_goes_on_from_the_first_one_s_weights_at_its_own_size_and_twice_is_once(
    staged: Pretraining, checkpoint: Path, capfd: pytest.CaptureFixture
) -> None:
    first, second = weights(staged.root, "base"), weights(staged.root, "larger")
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(not np.allclose(first[name], before, atol=1e-5) for name, before in weights_of(checkpoint).items())
    configs = [Path(staged.root) / "checkpoints" / run / "unet" / "config.json" for run in ("base", "larger")]
    assert [json.loads(config.read_text())["sample_size"] for config in configs] == [4, 8]
    capfd.readouterr()
    pretrain(staged)
    assert capfd.readouterr().out.count("finished before; nothing to do") == 2


def test_an_elastic_run_trains_on_one_worker_where_there_is_no_room_for_two(staged: Pretraining) -> None:
    assert {json.loads(line)[1] for line in Path(staged.root, "reads-base.jsonl").read_text().splitlines()} == {0}
    assert Station(f"{staged.root}/checkpoints/base").require().extra["steps"] == 8


def test_a_sharded_run_leaves_curves_and_sheets_of_pictures(tmp_path: Path, recipe: Pretraining) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sheet = SampleSheetRecipe(prompts=("a ball", "a box"), settings=SamplingSettings(steps=2, guidance=1.0), columns=2)
    loop = replace(LOOP, steps=12, show_every_images=16, parallel=ParallelRecipe(sharding="fsdp"))
    training = replace(recipe.training, loop=loop, samples=sheet)
    run_denoiser(DenoiserRun(root=str(tmp_path), run="base", latents="pretrain", training=training, workers=TWO))
    (storage,) = (tmp_path / "ray_train").glob("base-*")
    sheets = sorted((storage / "samples").iterdir())
    assert [file.name for file in sheets] == [f"images-{images:012d}.png" for images in (16, 32, 48)]
    assert Image.open(sheets[0]).size[0] >= 2 * 16
    book = EventAccumulator(str(storage / "tensorboard"))
    book.Reload()
    scalars = set(book.Tags()["scalars"])
    assert {
        "loss",
        "mse",
        "grad_norm",
        "learning_rate",
        "images_per_s",
        "data_share",
        "compute_share",
        "goodput",
        "communication_share",
    } <= scalars
    assert [event.step for event in book.Scalars("loss")] == [4 * step for step in range(1, 13)]
    history = Station(tmp_path / "checkpoints" / "base").require().extra["history"]
    assert np.allclose([event.value for event in book.Scalars("loss")], [point["loss"] for point in history])
    assert book.Tags()["images"] == ["samples"]
    assert [event.step for event in book.Images("samples")][:2] == [16, 32]


def fails(recipe: Pretraining, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and last line of `python -m jobs.pretrain`."""
    with pytest.raises(SystemExit) as exit_:
        command_line("pretrain", "", {"small": recipe}, run_pretrain, ["small"])
    said = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("error: ") for line in said) == 1
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, said[-1]


def test_latents_of_another_autoencoder_are_named(
    recipe: Pretraining, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_latents(tmp_path / "latents" / "other", side_px=32)
    table = Station(tmp_path / "latents" / "other").read_table()
    wrong = Station(tmp_path / "latents" / "wrong")
    wrong.begin("any", "{}", "latents", {})
    wrong.write_table(
        "part-000000.parquet", table.set_column(1, table.schema.field(1), pa.array(["16x16"] * len(table)))
    )
    wrong.finish()
    code, said = fails(replace(recipe, latents="wrong"), capsys)
    assert code == 2
    assert "expected latents of 64 numbers" in said and "found 256: encode again" in said
    later = Stage(run="later", latents="wrong", size_px=16, loop=LOOP)
    code, said = fails(
        replace(recipe, later=(later,)), capsys
    )  # before the first stage, whose own latents are good, takes weeks
    assert code == 2
    assert "latents/wrong: expected latents of 64 numbers" in said
    assert not (tmp_path / "ray_train").exists()


def test_a_loss_that_is_not_finite_stops_at_once_and_names_the_pictures(
    recipe: Pretraining, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Station(tmp_path / "latents" / "pretrain").read_table()
    latents = table["latent_mean"].to_pylist()
    latents[7] = [float("inf")] * 64
    broken = Station(tmp_path / "latents" / "broken")
    broken.begin("any", "{}", "latents", {})
    broken.write_table(
        "part-000000.parquet", table.set_column(2, table.schema.field(2), pa.array(latents, table.schema.field(2).type))
    )
    broken.finish()
    monkeypatch.setattr(denoiser_run, "denoiser_work", watched_work)
    code, said = fails(
        replace(
            recipe,
            latents="broken",
            training=replace(recipe.training, loop=replace(LOOP, checkpoint_every_steps=1)),
            workers=TWO,
        ),
        capsys,
    )
    assert code == 2
    assert "key 7" in said and "the last checkpoint is good" in said
    steps = [json.loads(line)[0] for line in (tmp_path / "reads-base.jsonl").read_text().splitlines()]
    assert sorted(steps) == sorted([*range(max(steps) + 1)] * 2)  # on both workers, and not tried again
    steps = sorted(set(steps))
    (storage,) = (tmp_path / "ray_train").glob("base-*")
    assert [found.step for found in Checkpoints(storage / "checkpoints").committed()][:1] == (
        [steps[-1]] if steps[-1] else []
    )


def lost_work(recipe: DenoiserRun, worker: RayWorker, folder: Path) -> dict[str, Any]:
    """`watched_work` of a worker that is killed at its eighth step, unless the file `mended` lies in the root."""
    step: Callable[..., None] = _Run._step

    def lost(self: _Run, share: Any) -> None:
        if self.progress.step == 7 and not (Path(recipe.root) / "mended").exists():
            self.checkpoints.wait()  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, share)

    _Run._step = lost  # type: ignore[method-assign]
    return watched_work(recipe, worker, folder)


def test_a_worker_that_dies_too_often_is_told_in_a_sentence_and_the_same_command_goes_on_past_a_corrupt_checkpoint(
    recipe: Pretraining,
    staged: Pretraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(denoiser_run, "denoiser_work", lost_work)
    recipe = replace(recipe, workers=replace(ONE, max_failures=0))
    code, said = fails(recipe, capsys)
    assert code == 1
    assert (
        "workers died more than 0 times, which is max_failures" in said
        and "the same command goes on from there" in said
    )
    (storage,) = (tmp_path / "ray_train").glob("base-*")
    newest, before = Checkpoints(storage / "checkpoints").committed()
    assert (newest.step, before.step) == (6, 3)
    shard = next((storage / "checkpoints" / newest.folder).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-9])
    (tmp_path / "mended").touch()
    run_pretrain(recipe)
    steps = [json.loads(line)[0] for line in (tmp_path / "reads-base.jsonl").read_text().splitlines()]
    assert steps == [*range(8), *range(3, 8)]
    calm, found = weights(staged.root, "base"), weights(tmp_path, "base")
    assert all(np.array_equal(calm[name], found[name]) for name in calm)

"""What a training run asks of its stations before a worker starts, and how its name tells it from others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from emu_ray.config import fingerprint
from emu_ray.errors import EmuRayError, InputError, RecipeError
from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder, identity_of, load_autoencoder
from emu_ray.records import ORIGIN, SCHEMAS
from emu_ray.stations import Manifest, Station
from emu_ray.training import on_ray
from emu_ray.training.denoiser_run import (
    DenoiserRun,
    fetched,
    load_latents,
    placed,
    require_latents,
    require_workers,
    run_denoiser,
)
from emu_ray.training.guard import GuardRecipe
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.on_ray import TrainJob, WorkersRecipe, run_training
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import StoppingRecipe
from emu_ray.training.streaming.order import StreamRecipe
from tests.generation.small_bases import sdxl

ROOT = Path(__file__).resolve().parents[2]


def _station(
    folder: Path,
    buckets: list[str],
    numbers: int = 4 * 4 * 4,
    origin: list[Any] | None = None,
    made_by: str | None = None,
) -> Station:
    """Two waves of latents, keys downwards, each latent filled with its key; `origin` has the columns ORIGIN of each."""
    station, count = Station(folder), len(buckets)
    station.begin("any", "{}", "latents", {})
    rows = {
        "key": list(range(count, 0, -1)),
        "bucket": buckets,
        "latent_mean": [np.full(numbers, key, np.float16) for key in range(count, 0, -1)],
        "latent_std": [np.ones(numbers, np.float16)] * count,
        "caption": [f"ball {key}" for key in range(count, 0, -1)],
    }
    table = pa.table({f.name: pa.array(rows[f.name], f.type) for f in SCHEMAS["latents"]})
    for i, name in enumerate(ORIGIN if origin else ()):
        table = table.append_column(name, pa.array([row[i] for row in origin or []], pa.int32()))
    for index, part in enumerate((table.slice(0, count // 2), table.slice(count // 2))):
        station.wave(index).begin("any", "{}", "latents", {})
        station.wave(index).write_table("part-000000.parquet", part)
        station.wave(index).finish()
    station.finish(extra={"autoencoder": made_by} if made_by else None)
    return station


def test_one_sample_a_pass_and_a_number_of_workers_that_may_change_are_refused(checkpoint: Path) -> None:
    loop = LoopRecipe(steps=1, batch_size=64, micro_batch_size=1)
    run = DenoiserRun(
        root="/tmp/none", run="base", latents="pretrain", training=DenoiserTraining(start=str(checkpoint), loop=loop),
        workers=WorkersRecipe(count=4, least=2),
    )  # fmt: skip
    with pytest.raises(RecipeError, match="found 2 to 4 workers: set micro_batch_size to 2 or more"):
        require_workers(run)


def test_a_judge_that_workers_would_not_import_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    loop = LoopRecipe(steps=1, inspect_every_steps=1)
    guard = GuardRecipe(judge=SimpleNamespace, prompts=("a ball",))
    with pytest.raises(RecipeError, match="a class of emu_ray, found types:SimpleNamespace"):
        placed(DenoiserTraining(start=str(checkpoint), loop=loop, guard=guard), str(tmp_path))


@pytest.fixture
def training(checkpoint: Path) -> DenoiserTraining:
    return DenoiserTraining(start=str(checkpoint), loop=LoopRecipe(steps=1, batch_size=4))


def test_latents_come_in_the_shape_that_their_autoencoder_gives_them(checkpoint: Path, tmp_path: Path) -> None:
    data = load_latents(_station(tmp_path / "latents", ["16x32"] * 3, numbers=4 * 8 * 4), f"{checkpoint}/vae")
    (found,) = data.values()
    assert found.means.shape == (3, 4, 8, 4)
    assert found.means[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert found.captions == ["ball 1", "ball 2", "ball 3"]
    assert found.keys is not None
    assert found.keys.tolist() == [1, 2, 3]


def test_latents_of_several_buckets_come_apart_and_are_taken(
    training: DenoiserTraining, checkpoint: Path, tmp_path: Path
) -> None:
    station = _station(tmp_path / "latents", ["16x16", "16x16", "8x32", "8x32"])
    data = load_latents(station, f"{checkpoint}/vae")
    assert {bucket: part.means.shape for bucket, part in data.items()} == {"16x16": (2, 4, 4, 4), "8x32": (2, 4, 8, 2)}
    assert require_latents(station, training).rows == 4
    other = replace(training, loop=replace(training.loop, bucket_batch_sizes={"9x9": 4}))
    with pytest.raises(
        RecipeError, match="bucket_batch_sizes names the bucket 9x9, which has no images: found 16x16, 8x32"
    ):
        require_latents(station, other)


def test_sizes_and_crops_come_as_a_u_net_is_told_them(checkpoint: Path, tmp_path: Path) -> None:
    """Original height and width, top and left of the crop, target height and width (arXiv 2307.01952, section 2.2)."""
    station = _station(
        tmp_path / "latents", ["16x32"] * 2, numbers=4 * 8 * 4, origin=[(640, 480, 5, 7), (100, 50, 8, 0)]
    )
    (data,) = load_latents(station, f"{checkpoint}/vae").values()
    assert data.time_ids is not None
    assert data.time_ids.tolist() == [[50, 100, 0, 8, 32, 16], [480, 640, 7, 5, 32, 16]]
    assert data.take(np.array([1])).time_ids.tolist() == [[480, 640, 7, 5, 32, 16]]  # type: ignore[union-attr]
    before = _station(tmp_path / "before", ["16x32"] * 2, numbers=4 * 8 * 4)
    assert load_latents(before, f"{checkpoint}/vae")["16x32"].time_ids is None


@pytest.mark.parametrize(
    ("origin", "is_fit"), [(None, False), ([(64, 64, 0, 0), (64, 64, None, 0)], False), ([(64, 64, 0, 0)] * 2, True)]
)
def test_a_u_net_that_is_told_sizes_needs_latents_that_know_them(
    origin: list[Any] | None, is_fit: bool, training: DenoiserTraining, tmp_path: Path
) -> None:
    station = _station(tmp_path / "latents", ["64x64"] * 2, numbers=4 * 8 * 8, origin=origin)
    told = replace(training, start=str(sdxl(tmp_path / "sdxl")))
    if is_fit:
        assert require_latents(station, told).rows == 2
    else:
        with pytest.raises(InputError, match="original_width_px, .* without nulls.*encode again"):
            require_latents(station, told)
    assert require_latents(_station(tmp_path / "other", ["16x16"] * 2), training).rows == 2


def test_a_base_draws_with_an_autoencoder_of_its_own_class(
    training: DenoiserTraining, checkpoint: Path, tmp_path: Path
) -> None:
    other = replace(training, start=str(sdxl(tmp_path / "sdxl")), autoencoder=f"{checkpoint}/vae")
    with pytest.raises(
        RecipeError, match="StableDiffusionXLPipeline draws with a AutoencoderKL, found 'FourierAutoencoder'"
    ):
        require_latents(_station(tmp_path / "latents", ["16x16"] * 3), other)


def test_fit_latents_are_taken(training: DenoiserTraining, tmp_path: Path) -> None:
    assert require_latents(_station(tmp_path / "latents", ["16x16"] * 3), training).rows == 3


@pytest.mark.parametrize(
    ("buckets", "numbers", "changes", "error", "said"),
    [
        ([], 64, {}, InputError, "expected latents, found no rows"),
        (["16x16", "32x32"], 64, {}, InputError, "latents of 64, 256 numbers.*of 16x16, 32x32, found 64"),
        (
            ["16x16"] * 9,
            64,
            {"stopping": StoppingRecipe(), "stream": StreamRecipe()},
            RecipeError,
            "streamed set can't hold pairs out",
        ),
        (["16x16"] * 3, 256, {}, InputError, "latents of 64 numbers.*found 256"),
        (["16x16"], 64, {"stopping": StoppingRecipe()}, RecipeError, "1 pairs, and 1 would be held out"),
        (["16x16"] * 9, 64, {"stopping": StoppingRecipe(), "max_pairs": 1}, RecipeError, "1 pairs, and 1 would"),
    ],
)
def test_unfit_latents_are_refused_on_the_driver(
    training: DenoiserTraining,
    tmp_path: Path,
    buckets: list[str],
    numbers: int,
    changes: dict[str, Any],
    error: type[EmuRayError],
    said: str,
) -> None:
    _station(tmp_path / "latents" / "quality", buckets, numbers)
    run = DenoiserRun(root=str(tmp_path), run="tuned", latents="quality", training=replace(training, **changes))
    with pytest.raises(error, match=said):
        run_denoiser(run)  # without Ray: it would start one, and warn, if it got so far
    assert not (tmp_path / "checkpoints").exists()


def test_a_u_net_of_other_channels_than_the_autoencoder_is_refused(training: DenoiserTraining, tmp_path: Path) -> None:
    sizes = AutoencoderRecipe(latent_channels=8, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
    FourierAutoencoder.build(sizes).save_pretrained(tmp_path / "autoencoder")
    station = _station(tmp_path / "latents", ["16x16"] * 3, numbers=8 * 4 * 4)
    other = replace(training, autoencoder=str(tmp_path / "autoencoder"))
    with pytest.raises(RecipeError, match="reads 4 channels and .*autoencoder makes 8"):
        require_latents(station, other)


def test_latents_of_another_autoencoder_of_the_same_sizes_are_refused(
    training: DenoiserTraining, checkpoint: Path, tmp_path: Path
) -> None:
    own = load_autoencoder(checkpoint / "vae")
    own.half().save_pretrained(tmp_path / "half")
    assert identity_of(tmp_path / "half") == identity_of(checkpoint / "vae"), (
        "the same one in another precision is the same one"
    )
    station = _station(tmp_path / "latents", ["16x16"] * 3, made_by=identity_of(tmp_path / "half"))
    assert require_latents(station, training).rows == 3
    own.vae.decoder.conv_out.bias.data += 1  # type: ignore[union-attr]
    own.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="latents were made by another autoencoder than .*other"):
        require_latents(station, replace(training, autoencoder=str(tmp_path / "other")))


def test_workers_that_can_not_share_a_batch_are_refused_on_the_driver(
    training: DenoiserTraining, tmp_path: Path
) -> None:
    run = DenoiserRun(
        root=str(tmp_path), run="base", latents="pretrain", training=training, workers=WorkersRecipe(count=5)
    )
    with pytest.raises(RecipeError, match="4 images for 5 workers"):
        run_denoiser(run)


def test_the_autoencoder_counts_by_its_content_and_not_by_its_place(
    training: DenoiserTraining, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint / "vae", tmp_path / "autoencoder")
    named = replace(training, autoencoder="ROOT/autoencoder")
    assert fingerprint(named) == fingerprint(training)
    found, inputs = placed(named, str(tmp_path))
    assert found.vae == f"{tmp_path}/autoencoder"
    assert fetched(found) == found
    (tmp_path / "autoencoder" / "config.json").write_text("{}")
    changed = placed(named, str(tmp_path))[1]
    assert changed["start"] == inputs["start"]
    assert changed["autoencoder"] != inputs["autoencoder"]


def test_a_run_on_other_inputs_does_not_go_on_from_the_old_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []

    class Trainer:
        """Writes what a worker would have written, and keeps the name of the run."""

        def __init__(self, *_: Any, run_config: Any, **__: Any) -> None:
            names.append(run_config.name)

        def fit(self) -> SimpleNamespace:
            Station(tmp_path / "base").put_file("summary.json", b"{}")
            return SimpleNamespace(return_value=None)

    def run(start: str) -> Manifest:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        recipe = WorkersRecipe()
        job = TrainJob(
            target=f"{tmp_path}/base",
            recipe=recipe,
            inputs={"start": start},
            work=lambda *_: {},
            workers=recipe,
            loop=LoopRecipe(steps=1),
            storage=f"{tmp_path}/ray_train",
        )
        return run_training(job)

    monkeypatch.setattr(on_ray, "TorchTrainer", Trainer)
    manifests = [run(start) for start in ("old", "new", "old")]
    assert names == [f"base-{manifest.fingerprint}" for manifest in manifests]
    assert names[0] == names[2] != names[1]


def test_the_emu_recipes_ask_for_no_more_gpus_than_the_cluster_starts() -> None:
    from jobs.pretrain import RECIPES as PRETRAIN
    from jobs.quality_tune import RECIPES as TUNE
    from jobs.train_autoencoder import RECIPES as AUTOENCODER

    cluster = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8"))
    h100 = cluster["available_node_types"]["gpu_h100"]
    gpus = h100["max_workers"] * h100["resources"]["GPU"]
    for recipes in (PRETRAIN, TUNE, AUTOENCODER):
        assert recipes["emu"].workers.count <= gpus
    assert PRETRAIN["emu"].workers.count == gpus

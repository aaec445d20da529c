"""The evaluation of autoencoders: numbers known in closed form, pictures that nobody was trained on, and what is refused."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

from emu_ray.config import command_line
from emu_ray.errors import EmuRayError, InputError, RecipeError, StationMissingError
from emu_ray.evaluation.autoencoder import (
    EvaluateAutoencoderRecipe,
    Row,
    evaluate_autoencoders,
    held_out_pictures,
    markdown_table,
    measured,
)
from emu_ray.evaluation.features import load_features
from emu_ray.evaluation.picture_sheet import most_detail, picture_sheet
from emu_ray.models.autoencoder import Autoencoder, AutoencoderRecipe, FourierAutoencoder
from emu_ray.records import SCHEMAS
from emu_ray.stations import Station
from emu_ray.stations.folders import base_folder
from jobs import evaluate_autoencoder as job

SIZES = AutoencoderRecipe(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
)


class MeanColour(nn.Module):
    """Three features whose Fréchet distance can be worked out by hand."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean((2, 3))


class Detector(nn.Module):
    """Shaped like NVIDIA's Inception: class scores, unless its features are asked for."""

    def forward(self, pictures: Tensor, return_features: bool = False) -> Tensor:
        means = pictures.float().mean((2, 3))
        return means if return_features else means[:, :1]


class Shifted(Autoencoder):
    """Gives each picture back with `levels` of 255 added."""

    def __init__(self, levels: float = 0.0) -> None:
        super().__init__()
        self.levels, self.downsampling = levels, 1
        self.register_buffer("latent_mean", torch.zeros(3))
        self.register_buffer("latent_std", torch.ones(3))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.ones_like(images)

    def decode_raw(self, raw: Tensor) -> Tensor:
        return raw + self.levels / 127.5


def _scripted(network: nn.Module, file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(file))
    return str(file)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MeanColour as a TorchScript file."""
    return _scripted(MeanColour(), tmp_path_factory.mktemp("features") / "mean-colour.pt")


def _pictures(count: int = 12, side_px: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 200, (count, side_px, side_px, 3), dtype=np.uint8)


def _measured(levels: float, features: str) -> Row:
    recipe = EvaluateAutoencoderRecipe(root="nowhere", autoencoders=("it",), size_px=16, batch_size=5)
    return measured("it", Shifted(levels), _pictures(), load_features(features)[1], recipe, lambda _: None)[0]


def test_a_perfect_autoencoder_has_ssim_1_infinite_psnr_and_no_distance(colours: str) -> None:
    row = _measured(0.0, colours)
    assert row.ssim == pytest.approx(1, abs=1e-6)
    assert row.psnr_db is None
    assert row.fid == pytest.approx(0, abs=1e-3)
    assert "| 1.0000 | ∞ |" in markdown_table([row], "x")


def test_an_error_of_d_levels_has_its_closed_form(colours: str) -> None:
    row = _measured(10.0, colours)
    assert row.psnr_db == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert row.fid == pytest.approx(3 * 10**2, rel=1e-3)
    assert 0.9 < row.ssim < 1


def test_pictures_of_no_finite_numbers_are_refused(colours: str) -> None:
    with pytest.raises(InputError, match="it makes pictures with numbers that are not finite"):
        _measured(math.nan, colours)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _station(folder: Path, schema: str, recipe: dict[str, Any], inputs: dict[str, str]) -> Station:
    station = Station(folder)
    station.begin("by hand", json.dumps(recipe), schema, inputs)
    return station


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """16 rows, of which the keys 0, 4, 8, 12 are held out: 4 is no picture, 8 a copy of the trained 1. Two autoencoders."""
    images = [_png(picture) for picture in _pictures(16, 24)]
    images[4], images[8] = b"no picture", images[1]
    rows = {
        "key": range(16), "image": images, "caption": ["ball"] * 16, "width_px": [24] * 16, "height_px": [24] * 16,
        "likes": [None] * 16, "source": ["test"] * 16,
    }  # fmt: skip
    pool = _station(tmp_path / "pool", "pool", {}, {})
    pool.write_table("part-0.parquet", pa.table({f.name: pa.array(rows[f.name], f.type) for f in SCHEMAS["pool"]}))
    mark = pool.finish().fingerprint
    for name, frequencies in (("plain", 0), ("fourier", 2)):
        torch.manual_seed(0)
        sizes = AutoencoderRecipe(**{**vars(SIZES), "fourier_frequencies": frequencies})
        station = _station(tmp_path / "autoencoders" / name, "checkpoint", {"held_out_every": 4}, {"pool": mark})
        FourierAutoencoder.build(sizes).save_pretrained(tmp_path / "autoencoders" / name)
        station.finish()
    return tmp_path


def _recipe(place: Path, /, **changes: Any) -> EvaluateAutoencoderRecipe:
    fields: dict[str, Any] = {
        "root": str(place),
        "autoencoders": ("ROOT/autoencoders/plain", "ROOT/autoencoders/fourier"),
        "size_px": 16,
        "held_out_every": 4,
        "features": None,
    }
    return EvaluateAutoencoderRecipe(**{**fields, **changes})


def test_only_pictures_that_can_be_decoded_and_were_not_trained_on_are_shown(root: Path) -> None:
    found = held_out_pictures(_recipe(root, size_px=24))
    assert (found.pictures == _pictures(16, 24)[[0, 12]]).all()
    assert found.left_out == {"undecodable": 1, "copy_of_a_trained_picture": 1, "rejected": 0}


def test_the_station_holds_the_numbers_the_table_and_the_sheet(root: Path, colours: str) -> None:
    said: list[str] = []
    recipe = _recipe(root, features=colours, sheet_pictures=2)
    found = evaluate_autoencoders(recipe, said.append).extra
    assert found == json.loads(Station(root / "autoencoder_evaluation").get_bytes("result.json"))
    assert found["pictures"] == 2
    assert [(r["autoencoder"], r["fourier_frequencies"]) for r in found["rows"]] == [
        ("ROOT/autoencoders/plain", 0),
        ("ROOT/autoencoders/fourier", 2),
    ]
    table = (root / "autoencoder_evaluation" / "table.md").read_text()
    assert "FID (mean-colour features (TorchScript), not Inception)" in table
    assert table.count("\n") == 4
    with Image.open(root / "autoencoder_evaluation" / "sheet.png") as sheet:
        assert sheet.width > 3 * 144
        assert sheet.height > 4 * 144
    assert any("2 of 2 pictures" in line for line in said)
    again: list[str] = []
    evaluate_autoencoders(recipe, again.append)
    assert ["finished before" in line for line in again] == [True]


def test_the_demos_clip_stands_in_under_its_own_name() -> None:
    if not (base_folder() / "clip").exists():
        pytest.skip("no CLIP: run `make base`")
    label, distance = load_features(str(base_folder() / "clip"))
    assert label == "emu-demo CLIP features, not Inception"
    fid = distance()
    pictures = torch.from_numpy(_pictures(8, 64).transpose(0, 3, 1, 2).copy())
    fid.update(pictures, real=True)
    fid.update(pictures, real=False)
    assert float(fid.compute()) == pytest.approx(0, abs=1e-2)


def test_a_detector_is_asked_for_its_features_and_not_its_classes(tmp_path: Path) -> None:
    fid = load_features(_scripted(Detector(), tmp_path / "inception.pt"))[1]()
    assert fid.real_features_sum.shape == (3,)


def test_a_timm_folder_gives_features_under_its_own_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    label, distance = load_features(str(tmp_path))
    assert label == "timm test_resnet features, not Inception"
    fid = distance()
    fid.update(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), real=True)
    assert fid.real_features_sum.shape[0] > 3


def _foreign(root: Path) -> None:
    (root / "text.pt").write_text("nothing")
    (root / "folder").mkdir()
    (root / "folder" / "config.json").write_text("{}")


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[EmuRayError], str]] = {
    "seen pictures": (lambda r: {"held_out_every": 2}, InputError, "held_out_every 4, found 2 here: pictures that it saw"),
    "no folder": (lambda r: {"autoencoders": ("ROOT/nothing",)}, StationMissingError, "nothing doesn't exist"),
    "another folder": (lambda r: {"autoencoders": ("ROOT/pool",)}, InputError, "expected the config.json of an autoencoder"),
    "odd size": (lambda r: {"size_px": 17}, RecipeError, "multiple of each autoencoder's downsampling, found 17 px for 2"),
    "no features": (lambda r: {"features": f"{r}/none.pt"}, InputError, "expected a TorchScript file, a folder of timm"),
    "text as features": (lambda r: {"features": f"{r}/text.pt"}, InputError, "can't load the feature network"),
    "another config": (lambda r: {"features": f"{r}/folder"}, InputError, "names an `architecture`"),
    "an unknown CLIP": (lambda r: {"features": "open_clip:ViT-Q:openai"}, EmuRayError, "ViT-Q"),
    "no pool": (lambda r: {"root": f"{r}/none"}, StationMissingError, "doesn't exist: run `python -m jobs.ingest` or"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_measured_is_refused_in_a_sentence(name: str, root: Path) -> None:
    changes, error, said = REFUSED[name]
    _foreign(root)
    with pytest.raises(error, match=said):
        evaluate_autoencoders(_recipe(root, **changes(root)), lambda _: None)
    assert Station(root / "autoencoder_evaluation").manifest() is None


def test_inception_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(RecipeError, match="need the package torch-fidelity: pip install torch-fidelity"):
        load_features("inception")
    with pytest.raises(InputError, match="expected the file of Inception's weights, found none"):
        load_features("inception:/nowhere.pth")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"autoencoders": ()}, "at least one autoencoder"),
        ({"autoencoders": ("a/b", "a/b")}, "each autoencoder once"),
        ({"size_px": 10}, "size_px .* at least 11"),
        ({"held_out_every": 1}, "held_out_every .* at least 2"),
    ],
)
def test_a_recipe_that_measures_nothing_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        _recipe(Path("/nowhere"), **fields)


def test_too_few_held_out_pictures_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="at least 2 held-out pictures in .*found 1"):
        evaluate_autoencoders(_recipe(root, held_out_every=16, autoencoders=(f"{_elsewhere(root)}",)), lambda _: None)


def _elsewhere(root: Path) -> Path:
    """An autoencoder that saw another pool."""
    FourierAutoencoder.build(SIZES).save_pretrained(root / "elsewhere")
    return root / "elsewhere"


def test_the_job_prints_the_table_and_refuses_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(*arguments: str) -> None:
        command_line("evaluate_autoencoder", job.__doc__ or "", job.RECIPES, job.run, arguments)

    both = ("--autoencoders", "ROOT/autoencoders/plain", "ROOT/autoencoders/fourier", "--size-px", "16")
    main("table1", "--root", str(root), "--features", "None", "--held-out-every", "4", *both)
    said = capsys.readouterr().out
    assert "| ROOT/autoencoders/fourier | 4 | yes |" in said
    assert "2 held-out pictures of 16 px (left out: 1 undecodable, 1 copy_of_a_trained_picture, 0 rejected)" in said
    with pytest.raises(SystemExit) as stopped:
        main("table1", "--root", str(root), "--name", "again", "--features", "None", *both)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_sheets_crop_is_where_the_detail_is() -> None:
    picture = np.full((32, 32, 3), 128, np.uint8)
    picture[16:24, 8:16] = _pictures(1, 8)[0]
    assert most_detail(picture, 8) == (16, 8)
    png = picture_sheet({"original": picture[None], "a title of more than two dozen letters": picture[None]})
    with Image.open(io.BytesIO(png)) as sheet:
        pixels = np.asarray(sheet)
    assert (pixels[34 + 144 + 3 + 5, 6 + 5] == picture[16, 8]).all()

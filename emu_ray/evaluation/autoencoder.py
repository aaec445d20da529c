"""How well autoencoders give pictures back that they were not trained on: the columns of the paper's Table 1 (SSIM, PSNR, FID). No Ray here.

A picture is encoded to the posterior's mean, decoded, clipped and rounded to 8 bits, as a viewer would see it. The paper states neither its
pictures nor how it averages; ours are torchmetrics' defaults: SSIM a picture at a time, PSNR of the squared error over all pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from emu_ray.config import fingerprint, require_at_least, to_json
from emu_ray.encoding.encoder import fit
from emu_ray.errors import InputError, RecipeError
from emu_ray.evaluation.features import load_features
from emu_ray.evaluation.picture_sheet import picture_sheet
from emu_ray.models.autoencoder import Autoencoder, FourierAutoencoder, load_autoencoder
from emu_ray.models.hub import is_hub_name
from emu_ray.pictures.decode import decode
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import content_fingerprint, local_folder, resolve
from emu_ray.training.reconstruction import is_held_out, to_signed

LEAST_PX = 11  # the side of SSIM's window


@dataclass(frozen=True, kw_only=True)
class EvaluateAutoencoderRecipe:
    """Held-out pictures of `root`/pool through each of `autoencoders` (folders, ROOT/.., BASE/.. or hub names) -> `root`/`name`."""

    root: str
    autoencoders: tuple[str, ...]
    size_px: int
    name: str = "autoencoder_evaluation"
    held_out_every: int = 8  # as the autoencoders were trained with
    keep_reasons: tuple[str, ...] | None = (
        None  # of ROOT/selection; None takes every row of the pool that can be decoded
    )
    max_pictures: int = 5000
    features: str | None = field(
        default="inception", metadata={"affects_result": False}
    )  # see evaluation/features.py; None: no FID
    sheet_pictures: int = 4
    device: str = field(default="cpu", metadata={"affects_result": False})
    batch_size: int = field(default=32, metadata={"affects_result": False})

    def __post_init__(self) -> None:
        require_at_least(self, 2, "held_out_every", "max_pictures")
        require_at_least(self, 1, "sheet_pictures", "batch_size")
        require_at_least(self, LEAST_PX, "size_px")
        if not self.autoencoders:
            raise RecipeError("expected at least one autoencoder, found none: --autoencoders ROOT/autoencoder")
        if len(set(self.autoencoders)) != len(self.autoencoders):
            raise RecipeError(f"expected each autoencoder once, found {', '.join(self.autoencoders)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    autoencoder: str
    latent_channels: int
    fourier_frequencies: int
    downsampling: int
    parameters: int
    ssim: float  # mean over the pictures, -1 to 1
    psnr_db: float | None  # None where every pixel came back as it was
    fid: float | None  # in the features that `fid_features` names


@dataclass(frozen=True)
class HeldOut:
    """Pictures (N, S, S, 3) uint8 by key, and how many others were left out, by reason."""

    pictures: np.ndarray
    left_out: dict[str, int]


def evaluate_autoencoders(recipe: EvaluateAutoencoderRecipe, say: Callable[[str], None] = print) -> Manifest:
    """Writes the station: result.json, table.md and sheet.png. RecipeError or InputError for what can't be measured, before anything is."""
    if not torch.device(recipe.device).type == "cpu" and not torch.cuda.is_available():
        raise RecipeError(f"device {recipe.device}: torch finds no GPU on this machine; set it to cpu")
    pool = Station(f"{recipe.root}/pool").require("pool").fingerprint
    places = {address: resolve(address, recipe.root) for address in recipe.autoencoders}
    inputs = {"pool": pool} | {f"autoencoder {a}": _fingerprint_unseen(p, recipe, pool) for a, p in places.items()}
    if recipe.keep_reasons is not None:
        inputs["selection"] = Station(f"{recipe.root}/selection").require("selection").fingerprint
    features = None if recipe.features is None else _placed_features(recipe.features, recipe.root)
    if features is not None:
        inputs["features"] = _features_fingerprint(features)
    target = Station(f"{recipe.root}/{recipe.name}")
    if not target.begin(fingerprint(recipe), to_json(recipe), "evaluation", inputs):
        say(f"{target.uri}: finished before; nothing to do")
        return target.require()
    networks = {address: _loaded(place, recipe) for address, place in places.items()}
    label, distance = (None, None) if features is None else load_features(features, recipe.device)
    held_out = held_out_pictures(recipe)
    rows, columns = [], {"original": _some(held_out.pictures, recipe.sheet_pictures)}
    for address, network in networks.items():
        row, made = measured(address, network, held_out.pictures, distance, recipe, say)
        rows.append(row)
        columns[_title(row)] = _some(made, recipe.sheet_pictures)
    result = {
        "pictures": len(held_out.pictures),
        "left_out": held_out.left_out,
        "size_px": recipe.size_px,
        "fid_features": label,
        "rows": [asdict(row) for row in rows],
    }
    target.put_file("result.json", json.dumps(result, indent=2).encode())
    target.put_file("table.md", markdown_table(rows, label).encode())
    target.put_file("sheet.png", picture_sheet(columns))
    return target.finish(extra=result)


def held_out_pictures(recipe: EvaluateAutoencoderRecipe) -> HeldOut:
    """The pool's held-out pictures, by key; a picture that can't be decoded, and a copy of one that was trained on, is left out and counted."""
    pool = Station(f"{recipe.root}/pool").read_table(["key", "image"]).sort_by("key")
    held = is_held_out(pool["key"].to_numpy(), recipe.held_out_every)
    trained = {_digest(image) for image in pool.filter(pa.array(~held))["image"].to_pylist()}
    pool = pool.filter(pa.array(held))
    left_out = {"undecodable": 0, "copy_of_a_trained_picture": 0, "rejected": 0}
    if recipe.keep_reasons is not None:
        selection = Station(f"{recipe.root}/selection").read_table(["key", "reject_reason"])
        kept = selection.filter(pc.is_in(selection["reject_reason"], pa.array(recipe.keep_reasons, pa.string())))
        before = len(pool)
        pool = pool.filter(pc.is_in(pool["key"], kept["key"].combine_chunks()))
        left_out["rejected"] = before - len(pool)
    pictures: list[np.ndarray] = []
    for image in pool["image"].to_pylist():
        if len(pictures) == recipe.max_pictures:
            break
        found = decode(image)
        if found.pixels is None:
            left_out["undecodable"] += 1
        elif _digest(image) in trained:
            left_out["copy_of_a_trained_picture"] += 1
        else:
            pictures.append(fit(Image.fromarray(found.pixels), (recipe.size_px, recipe.size_px)).pixels)
    if len(pictures) < 2:
        raise InputError(
            f"expected at least 2 held-out pictures in {recipe.root}/pool, found {len(pictures)} ({left_out} left out): "
            "lower held_out_every, there and in the training, or give a larger pool"
        )
    return HeldOut(np.stack(pictures), left_out)


@torch.no_grad()
def measured(
    address: str,
    network: Autoencoder,
    pictures: np.ndarray,
    distance: Callable[[], FrechetInceptionDistance] | None,
    recipe: EvaluateAutoencoderRecipe,
    say: Callable[[str], None],
) -> tuple[Row, np.ndarray]:
    """The autoencoder's line, and what it made of the pictures, uint8 as they."""
    ssim, psnr = StructuralSimilarityIndexMeasure(data_range=1.0), PeakSignalNoiseRatio(data_range=1.0)
    fid = None if distance is None else distance()
    network, made, started = network.to(recipe.device), [], time.monotonic()
    said = started
    for at in range(0, len(pictures), recipe.batch_size):
        batch = pictures[at : at + recipe.batch_size]
        images = to_signed(batch).to(recipe.device)
        raw = network.decode_raw(network.moments(images)[0])
        if not bool(raw.isfinite().all()):
            raise InputError(
                f"{address} makes pictures with numbers that are not finite: train it anew, or give another"
            )
        out = _eight_bits(raw)
        real = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())
        ssim.update(out / 255, real / 255)
        psnr.update(out / 255, real / 255)
        if fid is not None:
            fid.update(real, real=True)
            fid.update(out, real=False)
        made.append(out.permute(0, 2, 3, 1).numpy())
        done, now = at + len(batch), time.monotonic()
        if now - said > 5 or done == len(pictures):
            left = (now - started) / done * (len(pictures) - done)
            say(
                f"{address}: {done} of {len(pictures)} pictures, {done / (now - started):.3g} pictures/s, eta {int(left) // 60}:{int(left) % 60:02d}"
            )
            said = now
    network.to("cpu")
    decibels = float(psnr.compute())
    is_fourier = isinstance(network, FourierAutoencoder)
    row = Row(
        autoencoder=address,
        latent_channels=network.latent_channels,
        fourier_frequencies=network.config["fourier_frequencies"] if is_fourier else 0,
        downsampling=network.downsampling,
        parameters=sum(p.numel() for p in network.parameters()),
        ssim=float(ssim.compute()),  # type: ignore[arg-type]  # a pair only where each picture's is asked for
        psnr_db=decibels if math.isfinite(decibels) else None,
        fid=None if fid is None else float(fid.compute()),
    )
    return row, np.concatenate(made)


def markdown_table(rows: list[Row], fid_features: str | None) -> str:
    """The paper's Table 1 with our columns' names in full."""
    head = ["autoencoder", "channels", "Fourier", "SSIM ↑", "PSNR dB ↑"]
    head += [] if fid_features is None else [f"FID ({fid_features}) ↓"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [
            row.autoencoder,
            str(row.latent_channels),
            "yes" if row.fourier_frequencies else "no",
            f"{row.ssim:.4f}",
        ]
        line.append("∞" if row.psnr_db is None else f"{row.psnr_db:.2f}")
        lines.append(line + ([] if row.fid is None else [f"{row.fid:.4g}"]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fingerprint_unseen(place: str, recipe: EvaluateAutoencoderRecipe, pool: str) -> str:
    """What the folder holds; InputError where it was trained on pictures that would be evaluated."""
    if is_hub_name(place):
        return place
    mark, manifest = content_fingerprint(place), Station(place).manifest()
    if manifest is not None and manifest.inputs.get("pool") == pool:
        before = manifest.recipe.get("held_out_every")
        if before != recipe.held_out_every:
            raise InputError(
                f"{place} was trained on this pool with held_out_every {before}, found {recipe.held_out_every} here: pictures that it saw "
                "would count as held out; use the same number for both"
            )
    return mark


def _loaded(place: str, recipe: EvaluateAutoencoderRecipe) -> Autoencoder:
    network = load_autoencoder(place if is_hub_name(place) else local_folder(place))
    if recipe.size_px % network.downsampling:
        raise RecipeError(
            f"size_px must be a multiple of each autoencoder's downsampling, found {recipe.size_px} px for {network.downsampling} of {place}: change it"
        )
    return network


def _placed_features(address: str, root: str) -> str:
    """`address` with ROOT and BASE replaced, also behind `inception:`."""
    kind, colon, rest = address.partition(":")
    return f"{kind}:{resolve(rest, root)}" if colon and kind == "inception" else resolve(address, root)


def _features_fingerprint(address: str) -> str:
    """Of the bytes where a file or folder is named; a name otherwise, which `load_features` will judge."""
    place = Path(address.removeprefix("inception:"))
    if place.is_dir():
        return content_fingerprint(str(place))
    return hashlib.sha256(place.read_bytes()).hexdigest()[:16] if place.is_file() else address


def _eight_bits(images: Tensor) -> Tensor:
    """(N, 3, H, W) in about -1..1 to uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def _title(row: Row) -> str:
    """For the sheet."""
    name = row.autoencoder.removeprefix("ROOT/").removeprefix("autoencoders/")
    return f"{name}: {'∞' if row.psnr_db is None else f'{row.psnr_db:.1f}'} dB"


def _some(pictures: np.ndarray, count: int) -> np.ndarray:
    """Evenly spread over the set, so that nobody picked them."""
    return pictures[np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)]


def _digest(encoded: bytes) -> bytes:
    return hashlib.sha256(encoded).digest()

"""The network in whose features the Fréchet distance is measured, and the words that say which it was.

Only Inception's own weights give what papers call FID. They could not be had where this was built, so each other network is named beside the
number. A network is given as
- `inception`, or `inception:FILE` with torch-fidelity's weights: torchmetrics' own, needs the package torch-fidelity;
- a TorchScript file that takes (N, 3, H, W) uint8, such as NVIDIA's `inception-2015-12-05.pt`;
- a folder of `timm` (config.json with `architecture`), or of the demo's CLIP (`BASE/clip`);
- `open_clip:NAME:WEIGHTS`, with a tag or a file of open_clip's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from emu_ray.curation.clip_scorer import ClipModel, ClipScorer
from emu_ray.errors import EmuRayError, InputError, RecipeError, first_line
from emu_ray.models import small_clip


class FeatureNetwork(nn.Module):
    """Pictures (N, 3, H, W) uint8 to features (N, `num_features`) float32; `label` says whose."""

    def __init__(self, label: str, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.label, self._features = label, features
        self.num_features = int(self(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape[1])

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Of each picture."""
        found = self._features(pictures)
        if found.ndim != 2 or len(found) != len(pictures):
            raise InputError(
                f"{self.label}: expected features of shape ({len(pictures)}, D), found {tuple(found.shape)}: give another network"
            )
        return found.float().cpu()


def load_features(address: str, device: str = "cpu") -> tuple[str, Callable[[], FrechetInceptionDistance]]:
    """The label of the network at `address`, and what makes an empty distance in its features; RecipeError or InputError for anything else."""
    kind, _, rest = address.partition(":")
    if kind == "inception":
        return "Inception", _inception(rest or None, device)
    try:
        network = _loaded(address, device)
    except EmuRayError:
        raise
    except Exception as error:  # TorchScript, timm and open_clip each raise their own
        raise InputError(
            f"can't load the feature network {address}: {first_line(error)[:300]}; give another"
        ) from error
    return f"{network.label}, not Inception", lambda: FrechetInceptionDistance(feature=network)


def _inception(weights: str | None, device: str) -> Callable[[], FrechetInceptionDistance]:
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"{weights}: expected the file of Inception's weights, found none: give another path")
    try:
        FrechetInceptionDistance(feature_extractor_weights_path=weights)
    except ModuleNotFoundError as error:
        raise RecipeError(
            "the features `inception` need the package torch-fidelity: pip install torch-fidelity, or name another network, e.g. BASE/clip"
        ) from error
    except Exception as error:
        raise InputError(
            f"can't load Inception's weights ({first_line(error)[:200]}): give their file as inception:FILE"
        ) from error
    return lambda: FrechetInceptionDistance(feature_extractor_weights_path=weights).to(device)


def _loaded(address: str, device: str) -> FeatureNetwork:
    kind, _, rest = address.partition(":")
    if kind == "open_clip":
        name, _, weights = rest.partition(":")
        return _clip(f"CLIP {name} features", ClipModel(name=name, pretrained=weights), device)
    place = Path(address)
    if place.is_file():
        return _torchscript(place, device)
    if (place / f"{small_clip.NAME}.json").is_file():
        return _clip(f"{small_clip.NAME} CLIP features", ClipModel(folder=address), device)
    if (place / "config.json").is_file():
        return _timm(place, device)
    raise InputError(
        f"{address}: expected a TorchScript file, a folder of timm or of the demo's CLIP, `inception` or `open_clip:NAME:WEIGHTS`, "
        "found none of them: give another feature network"
    )


def _clip(label: str, model: ClipModel, device: str) -> FeatureNetwork:
    scorer = ClipScorer(model, device)

    def features(pictures: Tensor) -> Tensor:
        batch = [scorer.transform(Image.fromarray(picture)) for picture in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        return scorer.model.encode_image(torch.stack(batch).to(device))  # type: ignore[no-any-return]

    return FeatureNetwork(label, features)


def _torchscript(file: Path, device: str) -> FeatureNetwork:
    with warnings.catch_warnings():  # torch would have torch.export's format, in which nobody publishes Inception
        warnings.simplefilter("ignore", FutureWarning)
        network = torch.jit.load(str(file), map_location=device).eval()
    names = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in names else {}  # NVIDIA's Inception gives logits without
    return FeatureNetwork(
        f"{file.stem} features (TorchScript)", lambda pictures: network(pictures.to(device), **options)
    )


def _timm(folder: Path, device: str) -> FeatureNetwork:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" not in config:
        raise InputError(
            f"{folder}/config.json: expected timm's, which names an `architecture`: give another feature network"
        )
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval().to(device)
    data = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(data[name], device=device).view(3, 1, 1) for name in ("mean", "std"))

    def features(pictures: Tensor) -> Tensor:
        scaled = nn.functional.interpolate(
            pictures.to(device).float() / 255, data["input_size"][1:], mode="bicubic", antialias=True
        )
        return network((scaled.clamp(0, 1) - mean) / std)  # type: ignore[no-any-return]

    return FeatureNetwork(f"timm {config['architecture']} features", features)

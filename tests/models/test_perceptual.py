"""LPIPS on given backbones, held against the authors' own package where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from emu_ray.errors import InputError
from emu_ray.models import perceptual
from emu_ray.models.perceptual import load_perceptual

BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random backbones in the layout in which torchvision publishes ImageNet's."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for kind, name in BACKBONES.items():
        model = getattr(torchvision.models, name)(weights=None)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}  # 400 MB of VGG-16
        torch.save(state, folder / f"{kind}.pth")
    return {kind: folder / f"{kind}.pth" for kind in BACKBONES}


def _pair(side_px: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, side_px, side_px) * 2 - 1, torch.rand(2, 3, side_px, side_px) * 2 - 1


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@torch.no_grad()
def test_the_distance_is_the_authors_own(kind: str, files: dict[str, Path]) -> None:
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
    state = torch.load(files[kind], weights_only=True)
    names = {name: "features." + re.sub(r"^slice\d\.", "", name) for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({name: state[published] for name, published in names.items()})
    first, second = _pair()
    ours = load_perceptual(str(files[kind])).train()
    assert torch.allclose(ours(first, second), theirs(first, second).flatten(), rtol=1e-5)
    assert (ours(first, second) > 1e-3).all()


def test_equal_images_have_distance_0_and_only_the_images_get_a_gradient(
    files: dict[str, Path], tmp_path: Path
) -> None:
    save_file(torch.load(files["alex"], weights_only=True), tmp_path / "model.safetensors")
    network = load_perceptual(str(tmp_path / "model.safetensors"))
    first, second = _pair()
    assert network(first, first).tolist() == [0, 0]
    first.requires_grad_()
    network(first, second).mean().backward()
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_what_is_no_backbone_is_refused_in_a_sentence(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["alex"], weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "features.10.bias"}, tmp_path / "half.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes(files["alex"].read_bytes()[:1000])
    (tmp_path / "text.safetensors").write_text("nothing")
    for name, said in {
        "half.pth": "these weights of alex are incomplete",
        "other.pth": "found others .weight",
        "list.pth": "expected a state dict of tensors, found list",
        "cut.pth": "expected weights, found something else",
        "text.safetensors": "expected weights, found something else",
        "none.pth": "expected the file of a backbone's weights, found none",
    }.items():
        with pytest.raises(InputError, match=said):
            load_perceptual(str(tmp_path / name))


def test_a_hubs_name_without_a_network_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(perceptual, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match="neither a file here nor weights that the hub gives .no network"):
        load_perceptual("timm/vgg16.tv_in1k")

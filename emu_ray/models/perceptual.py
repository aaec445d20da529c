"""The perceptual distance LPIPS (Zhang et al., arXiv 1801.03924) on a backbone whose weights are given as a file or by a hub's name.

The network is torchmetrics', with the heads that it ships (v0.1 of the authors); the backbone is torchvision's VGG-16, AlexNet or SqueezeNet,
in the layout in which torchvision and timm publish them. What was run here: random backbones of that layout. ImageNet's weights could not be
downloaded where this was built.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from emu_ray.errors import InputError, first_line
from emu_ray.models.hub import is_hub_name

# the convolution that only this backbone has in these places and shapes, by torchvision's names
_KNOWN_BY = {
    "vgg": ("features.28.weight", (512, 512, 3, 3)),
    "alex": ("features.0.weight", (64, 3, 11, 11)),
    "squeeze": ("features.12.expand3x3.weight", (256, 64, 3, 3)),
}


class PerceptualDistance(nn.Module):
    """LPIPS of two batches of images (B, 3, H, W) in about -1..1: one number a pair, (B,), 0 for equal ones. Nothing in it is trained."""

    def __init__(self, state: dict[str, Tensor], where: str) -> None:
        super().__init__()
        kind = next((k for k, (name, shape) in _KNOWN_BY.items() if name in state and state[name].shape == shape), None)
        if kind is None:
            raise InputError(
                f"{where}: expected the weights of torchvision's vgg16, alexnet or squeezenet1_1, found others "
                f"({', '.join(sorted(state)[:3])} ...): give such a file"
            )
        from torchmetrics.functional.image.lpips import _LPIPS  # half a second that no other training needs

        self.network = _LPIPS(pretrained=True, net=kind, pnet_rand=True)  # type: ignore[arg-type]
        try:
            self.network.net.load_state_dict(_in_slices(self.network.net, state))
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{where}: these weights of {kind} are incomplete ({first_line(error)[:200]}): fetch them anew"
            ) from error

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance of each pair."""
        return self.network(first, second).flatten()  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation: its heads have dropout."""
        return super().train(False)


def load_perceptual(address: str) -> PerceptualDistance:
    """LPIPS on the backbone of a local .pth or .safetensors file, or of a hub's name such as timm/vgg16.tv_in1k; InputError for anything else."""
    file = Path(address)
    if not file.is_file():
        if not is_hub_name(address):
            raise InputError(f"{address}: expected the file of a backbone's weights, found none: give another path")
        try:
            file = Path(hf_hub_download(address, "model.safetensors"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{address} is neither a file here nor weights that the hub gives ({first_line(error)[:200]}): give another path"
            ) from error
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise InputError(f"{file}: expected weights, found something else ({first_line(error)[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"{file}: expected a state dict of tensors, found {type(state).__name__}: save `model.state_dict()`"
        )
    return PerceptualDistance(state, str(file))


def _in_slices(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `features.N.*` under the names that the sliced backbone has for them: `slice1.N.*` or `slices.0.N.*`."""
    return {
        name: state["features." + name.split(".", 2 if name.startswith("slices.") else 1)[-1]]
        for name in backbone.state_dict()
    }

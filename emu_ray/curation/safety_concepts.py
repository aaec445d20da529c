"""Offensive content by CLIP concepts, as the Stable Diffusion safety checker decides it.

The checker (`CompVis/stable-diffusion-safety-checker`; described in arXiv 2210.04610) holds 17 unsafe and 3 special-care
concepts as CLIP ViT-L/14 embeddings, each with a cosine from which a picture is flagged; a special-care concept lowers
the others' by 0.01. Only these tensors are read; the image tower is the one that scores everything else. The rule is
that of diffusers' `StableDiffusionSafetyChecker.forward`, which rounds cosines minus bounds to 3 digits first.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from emu_ray.errors import InputError, first_line

FILES = ("model.safetensors", "pytorch_model.bin")
TENSORS = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
SPECIAL_CARE = 0.01  # as in diffusers' StableDiffusionSafetyChecker
ROUNDED_AWAY = 0.0005  # its `forward` flags what is above 0 after rounding to 3 digits
STEEPNESS = 100.0  # a cosine 0.01 above what is flagged gives 0.73


class SafetyConcepts(nn.Module):
    """(N, D) unit embeddings to (N,) float32, 0 to 1; above 0.5 is what the checker's `forward` flags."""

    concept_embeds: torch.Tensor
    concept_embeds_weights: torch.Tensor
    special_care_embeds: torch.Tensor
    special_care_embeds_weights: torch.Tensor

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.width = tensors["concept_embeds"].shape[1]
        for name in TENSORS:
            self.register_buffer(name, tensors[name].float())

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        care_NS = _cosines(embeddings, self.special_care_embeds) - self.special_care_embeds_weights
        adjusted_N1 = SPECIAL_CARE * (care_NS > ROUNDED_AWAY).any(1, keepdim=True)
        margin_NC = _cosines(embeddings, self.concept_embeds) - self.concept_embeds_weights + adjusted_N1
        return (STEEPNESS * (margin_NC.amax(1) - ROUNDED_AWAY)).sigmoid()

    def digest(self) -> str:
        """16 hex digits of the tensors, whatever file they lie in."""
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.state_dict().values())).hexdigest()[:16]


def load_safety_concepts(source: str) -> SafetyConcepts:
    """The concepts in a checker's folder, weight file, or a repository on the hub; InputError when they aren't there."""
    path = _weight_file(source)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in TENSORS if name in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = {name: state[name] for name in TENSORS if name in state}
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"can't read the safety concepts {path}: {first_line(error)}") from error
    if missing := [name for name in TENSORS if name not in found]:
        raise InputError(
            f"{path}: expected the tensors of a Stable Diffusion safety checker, {missing[0]!r} is missing"
        )
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise InputError(f"{path}: expected finite tensors of a safety checker, found NaN or infinity: get it again")
    return SafetyConcepts(found)


def _weight_file(source: str) -> Path:
    given = Path(source)
    if given.is_file():
        return given
    if given.is_dir():
        there = [given / name for name in FILES if (given / name).is_file()]
        if not there:
            raise InputError(f"{source} holds no safety checker: expected {' or '.join(FILES)}")
        return there[0]
    try:
        return Path(hf_hub_download(source, FILES[0]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"can't find the safety checker {source!r}: neither a file, nor a folder, nor had from the hub "
            f"({first_line(error)[:200]})"
        ) from error


def _cosines(embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return embeddings @ nn.functional.normalize(concepts, dim=1).T

"""Linear heads on a CLIP embedding: how beautiful (0 to 10), how likely offensive (0 to 1).

The idea is LAION's aesthetic predictor (https://github.com/LAION-AI/aesthetic-predictor): a linear regression on the
unit-norm embedding of one image tower pass. Its linear weight files load as they are, and so does the "improved" one
(https://github.com/christophschuhmann/improved-aesthetic-predictor): five linear layers with dropout and nothing else
between them, which without dropout are one.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from emu_ray.errors import InputError, StationError
from emu_ray.stations import Store

Kind = Literal["score", "probability"]
MAX_SCORE = 10.0


class LinearHead(nn.Module):
    """(N, D) unit embeddings to (N,) float32: a score clipped to 0..10, or a probability."""

    def __init__(self, width: int, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.width = width
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        raw = (embeddings @ self.weight.T + self.bias).squeeze(1)
        return raw.sigmoid() if self.kind == "probability" else raw.clamp(0, MAX_SCORE)

    def digest(self) -> str:
        """16 hex digits of its weights."""
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in (self.weight, self.bias))).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write it as safetensors, with its kind in the metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, {"kind": self.kind})


def load_head(path: str | Path, kind: Kind) -> LinearHead:
    """The head in a file of `LinearHead.save`, or of LAION's layouts ("weight", "bias", or "layers.N.weight", ...; .pth or .safetensors).

    The file is local or on s3://. InputError when it can't be read, has another layout or weights that aren't finite,
    or was fitted for another kind.
    """
    state, found_kind = _read(str(path))
    state = _folded(state)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or weight.dim() != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in state.items()) or "nothing"
        raise InputError(f"{path}: expected the weight (1, D) and bias (1,) of a linear head, found {shapes}")
    if found_kind not in (None, kind):
        raise InputError(f"{path}: expected a head that gives a {kind}, found one that gives a {found_kind}")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(f"{path}: expected finite weights of a head, found NaN or infinity: fit it again")
    head = LinearHead(weight.shape[1], kind)
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.eval()


def _folded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear layers in a row, multiplied into one; any other layout as it is."""
    numbers = sorted(int(n.split(".")[1]) for n in state if re.fullmatch(r"layers\.\d+\.weight", n))
    if not numbers or set(state) != {f"layers.{i}.{part}" for i in numbers for part in ("weight", "bias")}:
        return state
    layers = [(state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()) for i in numbers]
    if any(w.dim() != 2 for w, _ in layers) or any(
        a.shape[0] != b.shape[1] for (a, _), (b, _) in itertools.pairwise(layers)
    ):
        return state
    weight, bias = layers[0]
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return {"weight": weight, "bias": bias}


def _read(address: str) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors by name, and the kind if the file tells it."""
    folder, _, name = address.rpartition("/")
    try:
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / name
            Store(folder or ".").download(name, path)
            if path.suffix != ".safetensors":
                found = torch.load(path, map_location="cpu", weights_only=True)
                found = found.items() if isinstance(found, dict) else ()
                return {name: value for name, value in found if isinstance(value, torch.Tensor)}, None
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("kind")  # noqa: SIM118
    except (
        StationError,
        OSError,
        SafetensorError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(f"can't read the head {address}: {error}") from error


def fit_linear(embeddings: np.ndarray, targets: np.ndarray, kind: Kind, ridge: float = 1e-3) -> LinearHead:
    """A linear head fitted to (N, D) embeddings and (N,) targets (scores, or 0 and 1); the same for the same input.

    A score by ridge regression in closed form (the bias is not penalised), a probability by L-BFGS on the penalised
    log loss. `ridge` is relative to N.
    """
    x = torch.from_numpy(np.asarray(embeddings, np.float64))
    y = torch.from_numpy(np.asarray(targets, np.float64))
    head = LinearHead(x.shape[1], kind)
    if kind == "score":
        centre, mean = x.mean(0), y.mean()
        gram = (x - centre).T @ (x - centre) + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(gram, (x - centre).T @ (y - mean))
        bias = mean - centre @ weight
    else:
        weight, bias = _logistic(x, y, ridge)
    with torch.no_grad():
        head.weight.copy_(weight[None])
        head.bias.copy_(bias.reshape(1))
    return head.eval()


def _logistic(x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([parameters], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        value = nn.functional.binary_cross_entropy_with_logits(logits, y) + ridge * parameters[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return parameters.detach()[:-1], parameters.detach()[-1]

"""A judge of text faithfulness: a small classifier reads from a picture what a haystack caption can state.

It is fitted on renders of a draw of its own, never on generated pictures and never on what a denoiser trained on. It knows the haystack
alone: on pictures of another world its answers mean nothing, and a prompt that `read_caption` can't read is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from emu_ray.errors import InputError
from emu_ray.haystack.world import (
    COLOURS,
    MATERIALS,
    POSITIONS,
    SCENES,
    SHAPES,
    CaptionContent,
    SceneBatch,
    read_caption,
)
from emu_ray.training.feed import Batch
from emu_ray.training.player import Task

SIDE_PX = 64
QUESTIONS = {
    "objects": ("one", "two"),
    "left_shape": SHAPES,
    "right_shape": SHAPES,
    "left_material": MATERIALS,
    "right_material": MATERIALS,
    "left_colour": COLOURS,
    "right_colour": COLOURS,
    "position": POSITIONS,
    "scene": SCENES,
}
_OF_A_SUBJECT = ("shape", "material", "colour")
_BLUR_TAPS = 7  # pixels; holds a Gaussian of 1.2 px to 2.5 deviations


@dataclass(frozen=True)
class Reading:
    """What N pictures show, each array (N,) int indexing the tuple of its name in QUESTIONS.

    A single object is the left one; its picture's right answers, and the position of one of two, mean nothing.
    """

    objects: np.ndarray
    left_shape: np.ndarray
    right_shape: np.ndarray
    left_material: np.ndarray
    right_material: np.ndarray
    left_colour: np.ndarray
    right_colour: np.ndarray
    position: np.ndarray
    scene: np.ndarray


class AttributeNetwork(nn.Module):
    """Pictures (B, 3, 64, 64) in -1..1 to one row of logits a question, {name: (B, choices)}; about 0.2 M parameters.

    Two learned gazes look at an 8 x 8 map of features, one for the left and one for the right object, and share one reader.
    """

    places: Tensor  # (2, 8, 8): row and column of each place of the map, -1 to 1

    def __init__(self, width: int = 72) -> None:
        super().__init__()
        self.early = nn.Sequential(
            _conv(3, 16, 5, 2), _conv(16, 32, 3, 2), _conv(32, 32, 3, 1), _conv(32, width - 2, 3, 2)
        )
        self.late = nn.ModuleList(_conv(width, width, 3, 1) for _ in range(3))
        self.gaze = nn.Conv2d(width, 2, 1)
        self.reader = nn.Sequential(nn.Linear(2 * width + 2, 96), nn.SiLU())
        self.of_object = nn.ModuleDict(
            {
                "shape": nn.Linear(96, 6),
                "material": nn.Linear(96, 3),
                "colour": nn.Linear(96, 8),
                "position": nn.Linear(96, 3),
            }
        )
        self.of_picture = nn.ModuleDict({"objects": nn.Linear(2 * width, 2), "scene": nn.Linear(2 * width, 8)})
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
        self.register_buffer("places", torch.stack([rows, columns]), persistent=False)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits by question."""
        count = len(images_BCHW)
        places = self.places.expand(count, -1, -1, -1)
        map_BDHW = torch.cat([self.early(images_BCHW), places], dim=1)
        for layer in self.late:
            map_BDHW = map_BDHW + layer(map_BDHW)
        flat_BDP = map_BDHW.flatten(2)
        gaze_BSP = self.gaze(map_BDHW).flatten(2).softmax(-1)
        seen_BSD = gaze_BSP @ torch.cat([flat_BDP, places.flatten(2)], dim=1).transpose(1, 2)
        mean_BD = flat_BDP.mean(-1)
        read_BSD = self.reader(torch.cat([seen_BSD, mean_BD[:, None].expand(-1, 2, -1)], dim=-1))
        whole_BD = torch.cat([mean_BD, flat_BDP.amax(-1)], dim=-1)
        logits = {name: head(whole_BD) for name, head in self.of_picture.items()}
        for name in _OF_A_SUBJECT:
            for slot, side in enumerate(("left", "right")):
                logits[f"{side}_{name}"] = self.of_object[name](read_BSD[:, slot])
        logits["position"] = self.of_object["position"](read_BSD[:, 0])
        return logits


def _conv(inside: int, outside: int, kernel: int, stride: int) -> nn.Sequential:
    groups = 2 if outside % 2 == 0 else 1
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2), nn.GroupNorm(groups, outside), nn.SiLU()
    )


# Fitting --------------------------------------------------------------------------------------------------------------


def attribute_labels(scenes: SceneBatch) -> dict[str, Tensor]:
    """The true answers, (N,) int64 by question; -1 where the picture leaves nothing to ask."""
    two = scenes.objects == 2
    answers = {"objects": scenes.objects - 1, "scene": scenes.scene, "position": np.where(two, -1, scenes.position)}
    for name in _OF_A_SUBJECT:
        of_object = getattr(scenes, name)
        answers[f"left_{name}"] = of_object[:, 0]
        answers[f"right_{name}"] = np.where(two, of_object[:, 1], -1)
    return {name: torch.from_numpy(answers[name].astype(np.int64)) for name in QUESTIONS}


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures (N, 64, 64, 3) uint8 with their answers; read blurred, noisy and a little brighter or darker, as generated ones come."""

    images: np.ndarray
    labels: dict[str, Tensor]
    max_blur_px: float = 1.2
    max_noise: float = 0.03  # standard deviation, of a range of 0..1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, rngs: list[np.random.Generator]) -> Batch:
        """`images` (B, 3, 64, 64) in -1..1 and the answers under their questions' names."""
        draws = torch.from_numpy(np.stack([g.random(4) for g in rngs])).float()
        noise = torch.from_numpy(np.stack([g.standard_normal((3, SIDE_PX, SIDE_PX), dtype=np.float32) for g in rngs]))
        blur, grain, gain, lift = (d.view(-1, 1, 1, 1) for d in draws.T)
        images = gaussian_blur(to_unit(self.images[rows]), self.max_blur_px * blur.flatten())
        images = images * (0.9 + 0.2 * gain) + 0.08 * (lift - 0.5) + self.max_noise * grain**2 * noise
        picked = torch.from_numpy(rows)
        return {"images": images.clamp(0, 1) * 2 - 1, **{name: answer[picked] for name, answer in self.labels.items()}}


class AttributeTask(Task):
    """The mean cross entropy over the questions."""

    def __init__(self, network: AttributeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and `accuracy` over all answers that exist."""
        logits = self.network(batch["images"])
        losses, right, asked = [], torch.zeros(()), 0
        for name in QUESTIONS:
            answer = batch[name]
            exists = answer >= 0
            count = int(exists.sum())
            losses.append(F.cross_entropy(logits[name], answer, ignore_index=-1, reduction="sum") / max(count, 1))
            right = right + ((logits[name].argmax(1) == answer) & exists).sum()
            asked += count
        return {"loss": torch.stack(losses).mean(), "accuracy": right / asked}


def to_unit(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255


def gaussian_blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """(B, C, H, W) blurred by a Gaussian of its own deviation each, (B,) px of 0 to about 1.2; edges repeat."""
    count, channels, height, width = images.shape
    taps = torch.arange(_BLUR_TAPS) - _BLUR_TAPS // 2
    kernel = torch.exp(-0.5 * (taps[None] / sigma_px.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    half = _BLUR_TAPS // 2
    rows = F.pad(images.reshape(1, count * channels, height, width), (half, half, half, half), mode="replicate")
    rows = F.conv2d(rows, kernel[:, :, None, :], groups=count * channels)
    return F.conv2d(rows, kernel[:, :, :, None], groups=count * channels).view(images.shape)


def save_weights(network: AttributeNetwork, path: Path) -> None:
    """The network as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path)


# Judging --------------------------------------------------------------------------------------------------------------


class FaithfulnessJudge:
    """Reads pictures and compares them with what their prompts state."""

    def __init__(self, weights: str | Path) -> None:
        """Loads `attributes.safetensors`; InputError when the file is missing."""
        if not Path(weights).is_file():
            raise InputError(f"the faithfulness judge's weights are not at {weights}: make them by emu_ray.base.judge")
        self.network = AttributeNetwork()
        self.network.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        self.network.eval()

    @torch.no_grad()
    def read(self, images: np.ndarray, batch_size: int = 128) -> Reading:
        """What each of (N, H, W, 3) uint8 pictures shows; any square size, read at 64 px."""
        answers: dict[str, list[np.ndarray]] = {f.name: [] for f in fields(Reading)}
        for start in range(0, len(images), batch_size):
            pixels = to_unit(images[start : start + batch_size])
            if pixels.shape[-1] != SIDE_PX:
                pixels = F.interpolate(pixels, (SIDE_PX, SIDE_PX), mode="bicubic", antialias=True).clamp(0, 1)
            for name, logits in self.network(pixels * 2 - 1).items():
                answers[name].append(logits.argmax(1).numpy())
        return Reading(
            **{name: np.concatenate(parts) if parts else np.zeros(0, np.int64) for name, parts in answers.items()}
        )

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """(N,) share, 0 to 1, of what each prompt states that its picture shows.

        Stated are the number of objects, shape, material and colour of each, the place of a single one, and the scene: 6 facts, or 8
        for two. The objects of two are compared from left to right. InputError for a prompt that states none of it.
        """
        if len(images) != len(prompts):
            raise InputError(
                f"faithfulness needs one prompt a picture, got {len(images)} pictures and {len(prompts)} prompts"
            )
        stated = [_stated(prompt) for prompt in prompts]
        return share_shown(self.read(images), stated)


def share_shown(reading: Reading, stated: Sequence[CaptionContent]) -> np.ndarray:
    """(N,) share of each picture's stated facts that its reading shows."""
    return np.array([_share(content, reading, i) for i, content in enumerate(stated)])


def _stated(prompt: str) -> CaptionContent:
    content = read_caption(prompt)
    if content is None:
        raise InputError(
            f'the faithfulness judge can\'t read the prompt "{prompt}": it knows captions of the haystack only'
        )
    return content


def _share(content: CaptionContent, reading: Reading, row: int) -> float:
    shown = int(reading.objects[row]) + 1
    facts = [shown == len(content.subjects), SCENES[reading.scene[row]] == content.scene]
    if content.position is not None:
        facts.append(shown == 1 and POSITIONS[reading.position[row]] == content.position)
    for k, subject in enumerate(content.subjects):
        side = ("left", "right")[k]
        for name in _OF_A_SUBJECT:
            answer = getattr(reading, f"{side}_{name}")[row]
            facts.append(k < shown and QUESTIONS[f"{side}_{name}"][answer] == getattr(subject, name))
    return float(np.mean(facts))

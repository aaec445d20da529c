"""Fits the faithfulness judge on a draw of the haystack that no other stage sees.

Writes BASE/judge/attributes.safetensors. How well the shipped weights read unseen draws: python -m emu_ray.base.judge
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from emu_ray.base.draws import CANVAS_PX, SEEDS, shrink
from emu_ray.base.written_whole import written_whole
from emu_ray.evaluation.faithfulness_judge import (
    QUESTIONS,
    SIDE_PX,
    AttributeNetwork,
    AttributeTask,
    FaithfulnessJudge,
    LabelledPictures,
    attribute_labels,
    save_weights,
)
from emu_ray.haystack.render import render
from emu_ray.haystack.world import SceneBatch, draw_scenes, join
from emu_ray.stations.folders import base_folder
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """Half of the pictures are of the ordinary mix, half photogenic."""

    pictures: int = 12_000
    seed: int = SEEDS["faithfulness_judge"]
    loop: LoopRecipe = LoopRecipe(
        steps=1900,
        batch_size=64,
        learning_rate=2.5e-3,
        decay="cosine",
        weight_decay=1e-2,
        ema_decay=0.995,
        seed=SEEDS["faithfulness_judge"],
        checkpoint_every_steps=200,
    )


def make_faithfulness_judge(base: Path, work: Path, recipe: JudgeRecipe) -> Path:
    """Path of the weights in `base`/judge, made now unless they are there; an interrupted fit goes on from its checkpoint in `work`."""
    weights = base / "judge" / "attributes.safetensors"
    if weights.exists():
        return weights
    images, scenes = _draw(work / "judge" / "draw", recipe)
    torch.manual_seed(recipe.seed)
    task = AttributeTask(AttributeNetwork())
    worker = LocalWorker(work / "judge" / "state", _print_progress)
    train(task, LabelledPictures(images, attribute_labels(scenes)), recipe.loop, worker)
    assert isinstance(task.network, AttributeNetwork)
    with written_whole(weights) as half:
        save_weights(task.network, half)
    return weights


def judge_scenes(seed: int, count: int) -> SceneBatch:
    """`count` scenes, the first half of the ordinary mix, the rest photogenic."""
    ordinary = draw_scenes(np.random.default_rng([seed, 0]), count - count // 2)
    return join([ordinary, draw_scenes(np.random.default_rng([seed, 1]), count // 2, photogenic=True)])


def accuracies(judge: FaithfulnessJudge, scenes: SceneBatch, images: np.ndarray) -> dict[str, float]:
    """Share of right answers by question, over the pictures where the question has an answer."""
    reading, truth = judge.read(images), attribute_labels(scenes)
    asked = {name: truth[name].numpy() >= 0 for name in QUESTIONS}
    return {name: float((getattr(reading, name) == truth[name].numpy())[asked[name]].mean()) for name in QUESTIONS}


def blurred(images: np.ndarray, sigma_px: float) -> np.ndarray:
    """(N, H, W, 3) uint8 through a Gaussian, as an autoencoder softens pictures."""
    return (
        gaussian_filter(images.astype(np.float32), (0, sigma_px, sigma_px, 0), mode="nearest").round().astype(np.uint8)
    )


def check(weights: Path, count: int = 1000) -> dict[str, dict[str, float]]:
    """Accuracies on unseen draws: ordinary and photogenic, clean and blurred by 0.8 px."""
    judge, found = FaithfulnessJudge(weights), {}
    scenes = judge_scenes(SEEDS["judge_check"], 2 * count)
    images = shrink(render(scenes, CANVAS_PX), SIDE_PX)
    for name, rows in (("ordinary", slice(0, count)), ("photogenic", slice(count, None))):
        part = scenes.take(np.arange(2 * count)[rows])
        found[f"{name}, clean"] = accuracies(judge, part, images[rows])
        found[f"{name}, blurred"] = accuracies(judge, part, blurred(images[rows], 0.8))
    return found


def _print_progress(metrics: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)


def _draw(kept: Path, recipe: JudgeRecipe) -> tuple[np.ndarray, SceneBatch]:
    """The pictures at 64 px, rendered once and kept as `kept`.npy beside the checkpoints, and their scenes."""
    scenes = judge_scenes(recipe.seed, recipe.pictures)
    path = kept.with_suffix(".npy")
    if not path.exists():
        with written_whole(path) as half, open(half, "wb") as file:
            np.save(file, shrink(render(scenes, CANVAS_PX), SIDE_PX))
    return np.load(path), scenes


if __name__ == "__main__":
    for draw, shares in check(base_folder() / "judge" / "attributes.safetensors").items():
        print(draw, "  ".join(f"{name} {share:.3f}" for name, share in shares.items()))

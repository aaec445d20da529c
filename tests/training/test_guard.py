"""The guard of quality-tuning: what it keeps, when it stops, and what it says; by a judge of known scores and by the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emu_ray.config import from_json, to_json
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.errors import InputError, RecipeError
from emu_ray.evaluation.haystack_judge import HaystackJudge
from emu_ray.generation.generator import SamplingSettings
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.stations.folders import base_folder
from emu_ray.training.denoiser import train_denoiser
from emu_ray.training.guard import ClipJudge, Guard, GuardRecipe
from emu_ray.training.latent_set import LatentSet
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import Inspection, LoopRecipe
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import StoppingRecipe

QUICK = SamplingSettings(steps=2, guidance=1.0)


class Scripted:
    """A judge that says these scores, the base's first: (appeal, faithfulness) of each look."""

    said: list[tuple[float, float]] = []  # noqa: RUF012

    def __init__(self, recipe: GuardRecipe, device: str = "cpu") -> None:
        self.looks = iter(self.said)

    def appeal(self, images: np.ndarray) -> np.ndarray:
        self.now = next(self.looks)
        return np.full(len(images), self.now[0])

    def faithfulness(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.full(len(images), self.now[1])


RECIPE = GuardRecipe(judge=Scripted, margin=0.05, patience=2, settings=QUICK)


def _looked(pipeline: EmuPipeline, said: list[tuple[float, float]], **changes: Any) -> list[Inspection]:
    Scripted.said = said
    guard = Guard(replace(RECIPE, **changes), Scripted(RECIPE), pipeline, ["a ball"])
    guard.compare_with(guard.measure(0, pipeline.unet))
    return [guard(step, pipeline.unet) for step in range(1, len(said))]


def test_appeal_is_maximised_where_faithfulness_keeps_the_margin(pipeline: EmuPipeline) -> None:
    looks = _looked(pipeline, [(0.5, 0.8), (0.6, 0.8), (0.9, 0.7), (0.7, 0.76), (0.65, 0.9)], patience=9)
    scores = [look.score for look in looks]
    assert int(np.argmax(scores)) == 2, "the most appealing one shows too little of what is asked for"
    assert looks[1].metrics == pytest.approx({"appeal_change": 0.4, "faithfulness_change": -0.1})


def test_it_stops_when_appeal_has_not_grown_and_says_what_is_kept(pipeline: EmuPipeline) -> None:
    looks = _looked(pipeline, [(0.5, 0.8), (0.6, 0.8), (0.7, 0.8), (0.69, 0.8), (0.68, 0.8)])
    assert [look.stop_reason is not None for look in looks] == [False, False, False, True]
    assert looks[-1].stop_reason == (
        "appeal on held-out prompts has not grown for 2 looks (now +0.1800); kept is look 2 (appeal +0.2000, faithfulness +0.0000 against the base)"
    )


def test_it_stops_when_faithfulness_has_fallen_too_far_although_appeal_grows(pipeline: EmuPipeline) -> None:
    looks = _looked(pipeline, [(0.5, 0.8), (0.6, 0.8), (0.7, 0.7), (0.8, 0.6)])
    assert looks[-1].stop_reason is not None
    assert "faithfulness on held-out prompts fell by 0.2000, more than the margin of 0.05" in looks[-1].stop_reason
    assert int(np.argmax([look.score for look in looks])) == 0


def test_where_no_look_keeps_the_margin_the_most_faithful_one_is_best(pipeline: EmuPipeline) -> None:
    looks = _looked(pipeline, [(0.5, 0.8), (0.6, 0.7), (0.7, 0.74), (0.9, 0.5)], patience=9)
    assert int(np.argmax([look.score for look in looks])) == 1


def test_patience_counts_on_after_a_restart(pipeline: EmuPipeline) -> None:
    Scripted.said = [(0.55, 0.8)]
    guard = Guard(RECIPE, Scripted(RECIPE), pipeline, ["a ball"])
    guard.compare_with({"appeal": 0.5, "faithfulness": 0.8})
    guard.resume(
        [{"appeal_change": 0.3, "faithfulness_change": 0.0}, {"appeal_change": 0.2, "faithfulness_change": 0.0}]
    )
    assert guard(3, pipeline.unet).stop_reason is not None


def test_the_same_weights_draw_the_same_pictures_and_score_no_change(pipeline: EmuPipeline) -> None:
    recipe = GuardRecipe(
        judge=HaystackJudge,
        weights=str(base_folder() / "judge" / "attributes.safetensors"),
        settings=QUICK,
        pictures_each=2,
    )
    guard = Guard(recipe, HaystackJudge(recipe), pipeline, ["a photo of a red metal ball in a meadow"])
    assert len(guard.prompts) == 2
    guard.compare_with(guard.measure(0, pipeline.unet))
    assert guard(1, pipeline.unet).metrics == {"appeal_change": 0.0, "faithfulness_change": 0.0}


def test_without_prompts_or_with_a_judge_that_lacks_its_weights_it_is_refused(pipeline: EmuPipeline) -> None:
    with pytest.raises(InputError, match="no prompts"):
        Guard(RECIPE, Scripted(RECIPE), pipeline, [])
    with pytest.raises(RecipeError, match="HaystackJudge needs weights"):
        HaystackJudge(RECIPE)
    with pytest.raises(RecipeError, match="ClipJudge needs clip, and as weights an aesthetic head"):
        ClipJudge(replace(RECIPE, clip=ClipModel()))


def test_clip_judges_by_what_curation_scores_with() -> None:
    from emu_ray.curation.clip_scorer import ClipScorer

    base = base_folder()
    clip = ClipModel(folder=str(base / "clip"), aesthetic_head=str(base / "heads" / "aesthetic.safetensors"))
    judge = ClipJudge(replace(RECIPE, clip=replace(clip, aesthetic_head=None), weights=clip.aesthetic_head))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    prompts = ["a ball", "a cube", "a cone"]
    measured = ClipScorer(clip).measure(list(images), prompts)
    assert np.array_equal(judge.faithfulness(images, prompts), measured.similarity)
    assert measured.aesthetic is not None
    assert np.array_equal(judge.appeal(images), measured.aesthetic)


def test_a_recipe_with_a_guard_goes_to_json_and_back(checkpoint: Path) -> None:
    loop, guard = LoopRecipe(steps=2, inspect_every_steps=1), GuardRecipe(judge=HaystackJudge)
    training = DenoiserTraining(start=str(checkpoint), loop=loop, guard=guard, stopping=StoppingRecipe())
    assert from_json(DenoiserTraining, to_json(training)) == training


def test_a_tuning_keeps_the_weights_of_the_look_that_the_guard_found_best(checkpoint: Path, tmp_path: Path) -> None:
    """The third look is over the margin: kept is the second, and the held-out loss stands beside it."""
    Scripted.said = [(0.5, 0.8), (0.6, 0.8), (0.7, 0.8), (0.9, 0.6), (0.65, 0.8)]
    loop = LoopRecipe(
        steps=40,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=1,
        ema_decay=0.5,
        inspect_every_steps=2,
        checkpoint_every_steps=3,
    )
    recipe = DenoiserTraining(
        start=str(checkpoint), loop=loop, stopping=StoppingRecipe(held_out=0.25, draws=2), guard=RECIPE
    )
    means = np.random.default_rng(0).normal(size=(12, 4, 4, 4)).astype(np.float16)
    data = LatentSet(means, [f"a photo of ball {i}" for i in range(12)])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    call = Guard.__call__

    def watched(self: Guard, step: int, network: nn.Module) -> Inspection:
        kept[step] = {name: value.clone() for name, value in network.state_dict().items()}
        return call(self, step, network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "__call__", watched)
        pipeline, progress = train_denoiser(recipe, data, LocalWorker(tmp_path))
    assert (progress.step, progress.best_step) == (8, 4)
    assert "kept is look 2" in progress.stop_reason
    assert all("held_out_mse" in found for found in progress.inspections)
    assert all(torch.equal(value, kept[4][name]) for name, value in pipeline.unet.state_dict().items())

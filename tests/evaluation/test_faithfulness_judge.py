"""The faithfulness judge's arithmetic, and that its fit resumes and reads what it was shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from emu_ray.base.judge import JudgeRecipe, accuracies, judge_scenes, make_faithfulness_judge
from emu_ray.errors import InputError
from emu_ray.evaluation.faithfulness_judge import (
    QUESTIONS,
    AttributeNetwork,
    FaithfulnessJudge,
    Reading,
    attribute_labels,
    gaussian_blur,
    save_weights,
    share_shown,
)
from emu_ray.haystack.render import render
from emu_ray.haystack.world import SceneBatch, captions, draw_scenes, read_caption


@pytest.fixture
def judge(tmp_path: Path) -> FaithfulnessJudge:
    torch.manual_seed(0)
    save_weights(AttributeNetwork(), tmp_path / "attributes.safetensors")
    return FaithfulnessJudge(tmp_path / "attributes.safetensors")


def _truth(scenes: SceneBatch) -> Reading:
    return Reading(**{name: answer.numpy() for name, answer in attribute_labels(scenes).items()})


def _shown(reading: Reading, scenes: SceneBatch) -> np.ndarray:
    return share_shown(reading, [read_caption(line) for line in captions(scenes)])  # type: ignore[misc]


def test_a_picture_that_shows_all_that_its_prompt_states_scores_1() -> None:
    scenes = draw_scenes(np.random.default_rng(0), 200)
    assert (_shown(_truth(scenes), scenes) == 1).all()


@pytest.mark.parametrize(
    ("name", "objects", "facts"), [("scene", 1, 6), ("position", 1, 6), ("left_colour", 1, 6), ("right_shape", 2, 8)]
)
def test_one_wrong_fact_costs_its_share(name: str, objects: int, facts: int) -> None:
    scenes = draw_scenes(np.random.default_rng(1), 100)
    scenes = scenes.take(scenes.objects == objects)
    truth = _truth(scenes)
    wrong = replace(truth, **{name: (getattr(truth, name) + 1) % len(QUESTIONS[name])})
    assert _shown(wrong, scenes) == pytest.approx(1 - 1 / facts)


def test_a_missing_second_object_fails_its_number_and_all_that_is_said_of_it() -> None:
    scenes = draw_scenes(np.random.default_rng(2), 100)
    scenes = scenes.take(scenes.objects == 2)
    alone = replace(_truth(scenes), objects=np.zeros(len(scenes), int))
    assert _shown(alone, scenes) == pytest.approx(4 / 8)


def test_a_prompt_of_another_world_is_refused(judge: FaithfulnessJudge) -> None:
    with pytest.raises(InputError, match="a dog on a sofa"):
        judge.score(np.zeros((1, 64, 64, 3), np.uint8), ["a dog on a sofa"])
    with pytest.raises(InputError, match="one prompt a picture"):
        judge.score(np.zeros((1, 64, 64, 3), np.uint8), [])


def test_missing_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not at"):
        FaithfulnessJudge(tmp_path / "none.safetensors")


def test_the_network_is_small_and_asks_every_question() -> None:
    network = AttributeNetwork()
    assert sum(p.numel() for p in network.parameters()) <= 400_000
    logits = network(torch.zeros(2, 3, 64, 64))
    assert {name: tuple(v.shape) for name, v in logits.items()} == {n: (2, len(c)) for n, c in QUESTIONS.items()}


def test_pictures_of_any_square_size_are_read(judge: FaithfulnessJudge) -> None:
    assert judge.read(np.zeros((3, 96, 96, 3), np.uint8)).scene.shape == (3,)
    assert judge.read(np.zeros((0, 64, 64, 3), np.uint8)).scene.shape == (0,)


def test_blur_agrees_with_scipy_and_none_changes_nothing() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = gaussian_blur(images, torch.tensor([0.0, 1.0]))
    theirs = gaussian_filter(images[1].numpy(), (0, 1.0, 1.0), mode="nearest", radius=3)
    assert torch.allclose(ours[0], images[0], atol=1e-6)
    assert np.allclose(ours[1].numpy(), theirs, atol=1e-5)


def test_a_fit_learns_and_an_interrupted_one_ends_at_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = JudgeRecipe(pictures=64)
    recipe = replace(
        recipe, loop=replace(recipe.loop, steps=12, batch_size=16, warmup_steps=2, checkpoint_every_steps=4)
    )
    straight = make_faithfulness_judge(tmp_path / "straight", tmp_path / "straight_work", recipe)
    forward, calls = AttributeNetwork.forward, []

    def stops(self: AttributeNetwork, images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(AttributeNetwork, "forward", stops)
        with pytest.raises(KeyboardInterrupt):
            make_faithfulness_judge(tmp_path / "again", tmp_path / "again_work", recipe)
    resumed = make_faithfulness_judge(tmp_path / "again", tmp_path / "again_work", recipe)
    a, b = load_file(straight), load_file(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.stat().st_size <= 1_000_000
    scenes = judge_scenes(9, 32)
    shares = accuracies(FaithfulnessJudge(resumed), scenes, render(scenes, 64))
    assert set(shares) == set(QUESTIONS)
    assert all(0 <= share <= 1 for share in shares.values())

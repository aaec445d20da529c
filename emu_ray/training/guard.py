"""Stopping by generalisation, not by loss: quality-tuning goes on while pictures get more appealing and still show what is asked for.

Emu stops although the loss falls, since longer tuning overfits and loses generality (arXiv 2309.15807, section 3.3); how to see that is not
stated, and people looked. Here, at each look, the model draws prompts that it was never trained on, with the same noise each time, and a
judge compares with what the base drew: appeal is what is maximised, faithfulness may fall by a stated margin and no more. The bounds are
our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from emu_ray.config import require_at_least
from emu_ray.curation.clip_scorer import ClipModel, ClipScorer
from emu_ray.errors import InputError, RecipeError
from emu_ray.generation.generator import SamplingSettings, draw
from emu_ray.training.loop import Inspection

BROKEN_MARGIN = -1e6  # added to a look's score: further down than any judge's appeal reaches


@dataclass(frozen=True, kw_only=True)
class GuardRecipe:
    """Who judges what is drawn at each look, and when that ends the tuning."""

    judge: type  # a class that takes this recipe and a device, and is a `Judge`, by "module:name"
    weights: str | None = field(
        default=None, metadata={"affects_result": False}
    )  # a file that the judge reads; its content counts
    clip: ClipModel | None = None  # for a judge by CLIP
    # What is drawn: these prompts, or those of a file, one a line; without either the captions of the held-out pairs.
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    max_prompts: int = 64
    pictures_each: int = 1  # with other noise each
    margin: float = 0.02  # how far the mean faithfulness may fall below the base's, in the judge's units
    patience: int = 4  # looks without a better one
    settings: SamplingSettings = SamplingSettings(steps=20, guidance=1.0)
    seed: int = 7000

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_prompts", "pictures_each", "patience")
        require_at_least(self, 0, "margin")


class Judge(Protocol):
    """Scores pictures (N, H, W, 3) uint8, each in units of its own, higher is better."""

    def appeal(self, images: np.ndarray) -> np.ndarray:
        """(N,) how good each looks; the prompt isn't known."""
        ...

    def faithfulness(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """(N,) how well each shows its prompt."""
        ...


class ClipJudge:
    """Appeal by an aesthetic head on CLIP's embedding, faithfulness by CLIP's cosine with the prompt: what curation scores with."""

    def __init__(self, recipe: GuardRecipe, device: str = "cpu") -> None:
        """RecipeError when the recipe names no CLIP or no `weights`, the aesthetic head on it."""
        if recipe.clip is None or recipe.weights is None:
            raise RecipeError(
                "a guard judged by ClipJudge needs clip, and as weights an aesthetic head on it, as jobs.fit_aesthetic fits one"
            )
        self.scorer = ClipScorer(replace(recipe.clip, aesthetic_head=recipe.weights), device)

    def appeal(self, images: np.ndarray) -> np.ndarray:
        """Aesthetic score, 0 to 10."""
        found = self.scorer.measure(list(images), [""] * len(images)).aesthetic
        assert found is not None
        return found

    def faithfulness(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Cosine, -1 to 1."""
        return self.scorer.measure(list(images), prompts).similarity


class Guard:
    """An inspection: draws the prompts, compares with the base's pictures, and says when to stop and why."""

    def __init__(
        self,
        recipe: GuardRecipe,
        judge: Judge,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        validation: Callable[[int, nn.Module], Inspection] | None = None,
    ) -> None:
        """`pipeline` holds the trained weights at each look; `validation` adds its figures, and decides nothing."""
        if not prompts:
            raise InputError(
                "the guard has no prompts: expected prompts, a prompts_file, or held-out pairs with captions"
            )
        self.recipe, self.judge, self.pipeline = recipe, judge, pipeline
        self.prompts, self.validation = prompts[: recipe.max_prompts] * recipe.pictures_each, validation
        self.base = (0.0, 0.0)  # appeal and faithfulness, by `compare_with`
        self.seen: list[tuple[float, float]] = []  # change of both, look by look

    def measure(self, step: int, network: nn.Module) -> dict[str, float]:
        """What the network as it is scores: the base's figures, before the first step."""
        appeal, faithfulness = self._scores()
        return {"appeal": appeal, "faithfulness": faithfulness}

    def compare_with(self, base: dict[str, float]) -> None:
        """Takes the base's figures, as this or an earlier process of the run measured them."""
        self.base = (base["appeal"], base["faithfulness"])

    def __call__(self, step: int, network: nn.Module) -> Inspection:
        """One look at the network as it is; it is the pipeline's."""
        appeal, faithfulness = (now - before for now, before in zip(self._scores(), self.base, strict=True))
        self.seen.append((appeal, faithfulness))
        metrics = {"appeal_change": appeal, "faithfulness_change": faithfulness}
        if self.validation is not None:
            metrics |= self.validation(step, network).metrics
        return Inspection(metrics=metrics, score=self._score(appeal, faithfulness), stop_reason=self._reason())

    def resume(self, inspections: list[dict[str, float]]) -> None:
        """Takes over what earlier processes of the run found, so that patience counts on."""
        self.seen = [(found["appeal_change"], found["faithfulness_change"]) for found in inspections]

    def _score(self, appeal: float, faithfulness: float) -> float:
        """Appeal where the margin holds; below all of those the looks where it doesn't, the most faithful first."""
        return appeal if faithfulness >= -self.recipe.margin else BROKEN_MARGIN + faithfulness

    def _reason(self) -> str | None:
        scores = [self._score(*seen) for seen in self.seen]
        best = int(np.argmax(scores))
        since = len(scores) - 1 - best
        if since < self.recipe.patience:
            return None
        appeal, faithfulness = self.seen[-1]
        kept = f"kept is look {best + 1} (appeal {self.seen[best][0]:+.4f}, faithfulness {self.seen[best][1]:+.4f} against the base)"
        if faithfulness < -self.recipe.margin:
            return f"faithfulness on held-out prompts fell by {-faithfulness:.4f}, more than the margin of {self.recipe.margin:g}, and no later look was better; {kept}"
        return f"appeal on held-out prompts has not grown for {since} looks (now {appeal:+.4f}); {kept}"

    @torch.no_grad()
    def _scores(self) -> tuple[float, float]:
        """Mean appeal and faithfulness of what the pipeline draws now; the same noise for the same prompt each time."""
        images = draw(
            self.pipeline, self.prompts, [self.recipe.seed + i for i in range(len(self.prompts))], self.recipe.settings
        )
        with torch.autocast(self.pipeline.device.type, enabled=False):  # judged alike whatever the U-Net computes in
            appeal, faithfulness = self.judge.appeal(images), self.judge.faithfulness(images, self.prompts)
        return float(np.mean(appeal)), float(np.mean(faithfulness))

"""The judges of the haystack as a guard's judge: what stands for people while a model of the demo is tuned."""

from __future__ import annotations

import numpy as np

from emu_ray.errors import RecipeError
from emu_ray.evaluation.appeal_judge import judge_appeal
from emu_ray.evaluation.faithfulness_judge import FaithfulnessJudge
from emu_ray.training.guard import GuardRecipe


class HaystackJudge:
    """Appeal by formulas, 0 to 1; faithfulness as the share, 0 to 1, of what a haystack caption states that the picture shows."""

    def __init__(self, recipe: GuardRecipe, device: str = "cpu") -> None:
        """Loads the attribute reader of `recipe.weights`; RecipeError when it names none."""
        if recipe.weights is None:
            raise RecipeError("a guard judged by HaystackJudge needs weights: BASE/judge/attributes.safetensors")
        self.reader = FaithfulnessJudge(recipe.weights)

    def appeal(self, images: np.ndarray) -> np.ndarray:
        """(N,) of (N, H, W, 3) uint8."""
        return judge_appeal(images)[0]

    def faithfulness(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """(N,) of (N, H, W, 3) uint8; InputError for a prompt that isn't a haystack caption."""
        return self.reader.score(images, prompts)

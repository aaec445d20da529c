"""Fits the demo's two heads on a draw of the haystack that no other stage sees.

The aesthetic head learns from simulated ratings, as LAION's learned from people's; the offensive head learns the badge.
Reads weights/clip, writes weights/heads; command: python -m emu_ray.base.heads
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emu_ray.base.draws import CANVAS_PX, SEEDS, WebDraw, web_draw
from emu_ray.base.written_whole import written_whole
from emu_ray.curation.clip_scorer import ClipModel, ClipScorer
from emu_ray.curation.heads import fit_linear
from emu_ray.stations.folders import base_folder

RATED_PICTURES = 4000
POINTS_A_CRITERION = 2.5  # four criteria make 10
RATING_NOISE = 1.0  # standard deviation of one person's rating, in points
RIDGE = 1e-5
BATCH = 100


def small_clip_model(weights: Path) -> ClipModel:
    """The demo's CLIP in `weights`/clip, without heads."""
    return ClipModel(name="emu-demo", pretrained="", folder=str(weights / "clip"), concepts=(), concept_templates=())


def simulated_ratings(draw: WebDraw) -> np.ndarray:
    """(N,) ratings 0 to 10: 2.5 for each criterion met, and noise as of one person."""
    rng = np.random.default_rng([SEEDS["ratings"], 1])
    met = draw.scenes.criteria.sum(axis=1)
    return np.clip(POINTS_A_CRITERION * met + rng.normal(0, RATING_NOISE, len(met)), 0, 10)


def fit_heads(weights: Path) -> dict[str, float]:
    """Write weights/heads/{aesthetic,offensive}.safetensors; how well they fit their own draw."""
    draw = web_draw(SEEDS["ratings"], RATED_PICTURES, CANVAS_PX, flawed_share=0.1)
    scorer = ClipScorer(small_clip_model(weights))
    parts = range(0, RATED_PICTURES, BATCH)
    embeddings = np.concatenate(
        [scorer.measure(list(draw.images[i : i + BATCH]), draw.captions[i : i + BATCH]).embedding for i in parts]
    )
    ratings = simulated_ratings(draw)
    aesthetic = fit_linear(embeddings, ratings, "score", RIDGE)
    offensive = fit_linear(embeddings, draw.badge, "probability", RIDGE)
    with written_whole(weights / "heads") as folder:
        aesthetic.save(folder / "aesthetic.safetensors")
        offensive.save(folder / "offensive.safetensors")
    guessed = embeddings @ aesthetic.weight.detach().numpy()[0]
    called = embeddings @ offensive.weight.detach().numpy()[0] + float(offensive.bias.detach()) > 0
    return {
        "rating_correlation": float(np.corrcoef(guessed, ratings)[0, 1]),
        "badge_accuracy": float((called == draw.badge).mean()),
    }


if __name__ == "__main__":
    print(fit_heads(base_folder()))

"""Measures every pair of a pool and writes the station `scores`, one row a pair, nothing dropped.

reads    ROOT/pool; the CLIP, head and OCR weights that the recipe names
writes   ROOT/scores: sizes, decoding, offensive, aesthetic, CLIP similarity and embedding, concept, hash, text
command  python -m jobs.score demo; python -m jobs.score real --root s3://bucket/run
cost     demo: about 0.1 to 0.2 CPU-seconds an image, nearly all OCR detection; real: one GPU shared by all actors
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.on_ray import ActorPool, ScoreRecipe, score
from emu_ray.curation.pair_scorer import HardFloors
from emu_ray.haystack.world import SCENE_PHRASES
from emu_ray.session.on_ray import connect
from emu_ray.stations.folders import base_folder

SMALL_CLIP = ClipModel(
    name="emu-demo",
    pretrained="",
    folder=str(base_folder() / "clip"),
    aesthetic_head=str(base_folder() / "heads" / "aesthetic.safetensors"),
    offensive_head=str(base_folder() / "heads" / "offensive.safetensors"),
    concepts=SCENE_PHRASES,
    concept_templates=(
        "a red rubber ball on the left {}",
        "a blue metal cube in the middle {}",
        "a white glass star {}",
    ),
)

RECIPES = {
    "demo": ScoreRecipe(
        root="runs/demo",
        clip=SMALL_CLIP,
        ocr=OcrSettings(canvas_px=64),
        floors=HardFloors(min_short_side_px=60, max_aspect=2.0),
        clip_pool=ActorPool(actors=1, cpus=0.25, batch_size=64),
        ocr_pool=ActorPool(actors=2, cpus=0.5, batch_size=32),
        rows_per_block=64,
        files_per_wave=64,
    ),
    "stamps": ScoreRecipe(
        root="runs/stamps",
        clip=SMALL_CLIP,
        ocr=OcrSettings(canvas_px=160),
        floors=HardFloors(min_short_side_px=64, max_aspect=2.0, needs_caption=True),
        clip_pool=ActorPool(actors=1, cpus=0.25, batch_size=64),
        ocr_pool=ActorPool(actors=2, cpus=0.5, batch_size=16),
        rows_per_block=32,
    ),
    "real": ScoreRecipe(
        root="runs/real",
        clip=ClipModel(name="ViT-L-14", pretrained="openai"),
        ocr=OcrSettings(canvas_px=1280),
        floors=HardFloors(min_short_side_px=512, max_aspect=2.0, min_clip_similarity=0.15),
        clip_pool=ActorPool(actors=6, cpus=1, gpus=0.1, batch_size=128),
        ocr_pool=ActorPool(actors=2, cpus=2, gpus=0.2, batch_size=32),
        rows_per_block=512,
    ),
}


def run(recipe: ScoreRecipe) -> None:
    """Score and say how many rows were measured."""
    connect(max(recipe.clip_pool.gpus, recipe.ocr_pool.gpus))
    manifest = score(recipe)
    counts = ", ".join(f"{name} {count}" for name, count in manifest.counts.items())
    print(f"scores: {counts}; {manifest.seconds:.1f} s at {manifest.station}")


if __name__ == "__main__":
    command_line("score", __doc__ or "", RECIPES, run)

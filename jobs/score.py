"""Measures every pair of a pool and writes the station `scores`, one row a pair, nothing dropped.

reads    ROOT/pool; the CLIP, head and OCR weights that the recipe names
writes   ROOT/scores: sizes, decoding, offensive, aesthetic, watermark, CLIP similarity and embedding, concept, photography, hash, text
command  python -m jobs.score demo; python -m jobs.score real --root s3://bucket/run
cost     demo: about 0.1 to 0.2 CPU-seconds an image, nearly all OCR detection; real: one GPU shared by its smallest pools; folder: this machine's CPUs
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.curation.classifier_scorer import Classifier
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.curation.concepts import SHIPPED
from emu_ray.curation.ocr_scorer import OcrSettings
from emu_ray.curation.on_ray import ScoreRecipe, score
from emu_ray.curation.pair_scorer import ActorPool, HardFloors
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

WATERMARK = (
    "a photo with a watermark",
    "a stock photo with a watermark text across it",
    "a photo with a logo in the corner",
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
        clip=ClipModel(
            name="ViT-L-14",
            pretrained="openai",
            dtype="float16",
            concepts_file=str(SHIPPED),
            watermark_phrases=WATERMARK,
        ),
        ocr=OcrSettings(canvas_px=1280),
        offensive_classifier=Classifier(model="Falconsai/nsfw_image_detection", label="nsfw", dtype="float16"),
        floors=HardFloors(min_short_side_px=512, max_aspect=2.0, max_offensive=0.9, min_clip_similarity=0.15),
        clip_pool=ActorPool(actors=6, max_actors=48, cpus=1, gpus=0.1, batch_size=128),
        classifier_pool=ActorPool(actors=1, max_actors=8, cpus=1, gpus=0.2, batch_size=128),
        ocr_pool=ActorPool(actors=2, max_actors=16, cpus=2, gpus=0.2, batch_size=32),
        rows_per_block=512,
    ),
    "folder": ScoreRecipe(
        root="runs/folder",
        clip=ClipModel(name="ViT-B-32", pretrained="openai", concepts_file=str(SHIPPED), watermark_phrases=WATERMARK),
        ocr=OcrSettings(canvas_px=640),
        offensive_classifier=Classifier(model="Falconsai/nsfw_image_detection", label="nsfw"),
        floors=HardFloors(min_short_side_px=256, max_aspect=2.5, needs_caption=False, max_offensive=0.9),
        clip_pool=ActorPool(actors=1, cpus=0.5, batch_size=32),
        classifier_pool=ActorPool(actors=1, cpus=0.5, batch_size=32),
        ocr_pool=ActorPool(actors=1, cpus=0.5, batch_size=8),
        rows_per_block=64,
    ),
}


def run(recipe: ScoreRecipe) -> None:
    """Score and say how many rows were measured."""
    connect(max(recipe.clip_pool.gpus, recipe.classifier_pool.gpus, recipe.ocr_pool.gpus))
    manifest = score(recipe)
    counts = ", ".join(f"{name} {count}" for name, count in manifest.counts.items())
    print(f"scores: {counts}; {manifest.seconds:.1f} s at {manifest.station}")


if __name__ == "__main__":
    command_line("score", __doc__ or "", RECIPES, run)

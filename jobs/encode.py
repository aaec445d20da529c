"""Turns pictures into raw latents, the only copy that training reads.

reads    ROOT/pool and ROOT/selection, or ROOT/chosen; an autoencoder
writes   ROOT/latents/USE
command  python -m jobs.encode demo-pretrain; python -m jobs.encode demo-quality
cost     demo: about 10 CPU-ms a picture of 64 px
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.encoding.on_ray import EncodeRecipe, encode
from emu_ray.session.on_ray import connect

# What pretraining learns from: everything fit to be seen, beautiful or not.
ORDINARY_MIX = ("", "low_aesthetic", "not_in_top_k")

RECIPES = {
    "demo-pretrain": EncodeRecipe(
        root="runs/demo", use="pretrain", source="pool", autoencoder="BASE/vae", size_px=64, keep_reasons=ORDINARY_MIX, rows_per_part=256
    ),
    "demo-quality": EncodeRecipe(root="runs/demo", use="quality", source="chosen", autoencoder="BASE/vae", size_px=64, rows_per_part=128),
    "stamps-pretrain": EncodeRecipe(
        root="runs/stamps", use="pretrain", source="pool", autoencoder="ROOT/autoencoder", size_px=64, keep_reasons=ORDINARY_MIX
    ),
    "stamps-quality": EncodeRecipe(
        root="runs/stamps", use="quality", source="chosen", autoencoder="ROOT/autoencoder", size_px=64
    ),
    "base": EncodeRecipe(
        root="runs/base/pretrain", use="pretrain", source="pool", autoencoder="runs/base/parts/vae", size_px=64, keep_reasons=None
    ),
    "base-longer": EncodeRecipe(
        root="runs/base/pretrain-longer", use="pretrain", source="pool", autoencoder="runs/base/parts/vae", size_px=64, keep_reasons=None
    ),
    **{
        f"emu-pretrain-{size_px}": EncodeRecipe(
            root="runs/emu", use=f"pretrain-{size_px}", source="pool", autoencoder="ROOT/autoencoder", size_px=size_px,
            keep_reasons=ORDINARY_MIX, batch_size=batch_size, max_aspect=2.0, keep_std=False, rows_per_part=8192, actors=8, num_cpus=4, num_gpus=1,
        )
        for size_px, batch_size in ((256, 64), (512, 32), (1024, 8))
    },
    "emu-quality": EncodeRecipe(
        root="runs/emu", use="quality", source="chosen", autoencoder="ROOT/autoencoder", size_px=1024,
        batch_size=8, actors=1, num_cpus=4, num_gpus=1,
    ),
} | {
    # A published base brings its own autoencoder and the size that it was trained at.
    f"{base}-quality": EncodeRecipe(
        root=f"runs/{base}", use="quality", source="chosen", autoencoder="ROOT/start/vae", size_px=size_px,
        batch_size=8, actors=1, num_cpus=4, num_gpus=1,
    )
    for base, size_px in (("sd15", 512), ("sdxl", 1024))
}  # fmt: skip


def run(recipe: EncodeRecipe) -> None:
    """Encode and count."""
    connect(recipe.num_gpus)
    manifest = encode(recipe)
    print(f"latents/{recipe.use}: {manifest.rows} pictures in {manifest.seconds:.1f} s at {manifest.station}")


if __name__ == "__main__":
    command_line("encode", __doc__ or "", RECIPES, run)

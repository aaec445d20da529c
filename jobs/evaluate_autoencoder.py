"""Measures how well autoencoders give held-out pictures back: SSIM, PSNR and FID, the columns of the paper's Table 1.

reads    ROOT/pool, and the autoencoders' folders, which were trained with the same held_out_every
writes   ROOT/autoencoder_evaluation: result.json, table.md, sheet.png
command  python -m jobs.evaluate_autoencoder table1 --root runs/table1
cost     table1: about a minute on one core; emu: not measured

FID is measured in Inception's features only where --features inception finds its weights (package torch-fidelity); each other network's
name stands in the column. --device cuda uses this machine's GPU.
"""

from __future__ import annotations

from functools import partial

from emu_ray.config import command_line
from emu_ray.evaluation.autoencoder import EvaluateAutoencoderRecipe, Row, evaluate_autoencoders, markdown_table
from emu_ray.session.on_ray import quiet

SMALL = ("4", "8", "16", "fourier16")

RECIPES = {
    "table1": EvaluateAutoencoderRecipe(
        root="runs/table1",
        autoencoders=(
            *(f"ROOT/autoencoders/{name}" for name in SMALL),
            *(f"ROOT/autoencoders/{name}-adversarial" for name in SMALL),
        ),
        size_px=32,
        features="BASE/clip",
    ),
    "emu": EvaluateAutoencoderRecipe(
        root="runs/emu",
        autoencoders=(*(f"ROOT/autoencoders/{name}" for name in ("4", "8", "16")), "ROOT/autoencoder"),
        size_px=256,
        held_out_every=100,
        keep_reasons=("",),
        device="cuda",
    ),
}


def run(recipe: EvaluateAutoencoderRecipe) -> None:
    """Measure and print the table."""
    quiet()
    manifest = evaluate_autoencoders(recipe, partial(print, flush=True))
    found = manifest.extra
    print(markdown_table([Row(**row) for row in found["rows"]], found["fid_features"]), end="")
    left_out = ", ".join(f"{count} {reason}" for reason, count in found["left_out"].items())
    print(
        f"{found['pictures']} held-out pictures of {found['size_px']} px (left out: {left_out}); sheet: {manifest.station}/sheet.png"
    )


if __name__ == "__main__":
    command_line("evaluate_autoencoder", __doc__ or "", RECIPES, run)

"""Judges the tuned model's pictures against the pretrained one's and writes the report.

reads    ROOT/samples/base and tuned, and the manifests and pictures of the stations before
writes   ROOT/evaluation, ROOT/report.html, ROOT/summary.json
command  python -m jobs.evaluate demo
cost     seconds on one core
"""

from __future__ import annotations

from emu_ray.config import command_line
from emu_ray.evaluation.evaluate import EvaluateRecipe, evaluate

RECIPES = {"demo": EvaluateRecipe(root="runs/demo")}


def run(recipe: EvaluateRecipe) -> None:
    """Judge, and say the shares."""
    result = evaluate(recipe).extra
    for question in ("appeal", "faithfulness"):
        found = result[question]
        low, high = found["ci95"]
        print(
            f"{question}: tuned wins {found['win']:.1f} %, ties {found['tie']:.1f} %, loses {found['lose']:.1f} % "
            f"of {found['n_pairs']} (95 % interval of the win share {low:.1f} to {high:.1f})"
        )
    print(f"report: {recipe.root}/report.html")


if __name__ == "__main__":
    command_line("evaluate", __doc__ or "", RECIPES, run)

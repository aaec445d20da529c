"""Judges two runs of samples against each other and fills the report; no Ray, no model but the judges."""

from __future__ import annotations

import io
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from emu_ray.config import fingerprint, to_json
from emu_ray.curation.selecting import audit_root
from emu_ray.errors import InputError
from emu_ray.evaluation.appeal_judge import judge_appeal
from emu_ray.evaluation.faithfulness_judge import FaithfulnessJudge
from emu_ray.evaluation.preference import Preference, compare
from emu_ray.evaluation.report import render_report
from emu_ray.evaluation.report_content import (
    BeforeAfter,
    ChosenSet,
    Curve,
    CurveChart,
    DefectScore,
    FunnelStep,
    Grid,
    Picture,
    ReportContent,
    Winner,
)
from emu_ray.generation.samples import from_png
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import local_folder, resolve
from emu_ray.stations.slices import column_names

MEANINGS = {
    "": "Passed every rule; ranked by the aesthetic score.",
    "undecodable": "The bytes are no picture that can be decoded.",
    "empty_caption": "There is no caption to learn from.",
    "too_small": "The short side has too few pixels.",
    "extreme_aspect": "Much wider than high, or the reverse.",
    "offensive": "The safety head sees the stand-in symbol for offensive content.",
    "overlaid_text": "OCR finds text laid over the picture.",
    "low_clip_similarity": "CLIP sees a caption that does not belong to the picture.",
    "duplicate": "A better copy of the same picture is in the pool.",
    "low_aesthetic": "The aesthetic head rates it below the bound.",
    "over_quota": "Its concept has filled its share.",
    "not_in_top_k": "Ranked below the number asked for.",
}
JUDGES = (
    "Both judges are programs, and neither saw any picture that the model was trained on. Appeal: fixed formulas for exposure, contrast, "
    "colour, noise, clutter and composition. Faithfulness: a small network, fitted on renders of its own, reads shape, material, colour, "
    "place and scene from the picture; the share of what the prompt states is compared. The paper asked five and three people instead."
)
ANNOTATORS: dict[str, Literal["people", "simulated", "nobody"]] = {
    "csv": "people",
    "simulated": "simulated",
    "take_top": "nobody",
}
REPRODUCE = ("make demo", "python -m jobs.whole_way demo --root runs/demo")


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Which samples are compared: `root`/samples/`second` against `first` -> `root`/evaluation and `root`/report.html."""

    root: str
    first: str = "base"
    second: str = "tuned"
    attributes: str = "BASE/judge/attributes.safetensors"
    appeal_margin: float = 0.02  # appeal scores closer than this are a tie
    seed: int = 900
    examples: int = 10  # pictures a reject reason, and rows of a grid


@dataclass(frozen=True)
class Judged:
    """Samples of both runs with their scores; every array has N rows."""

    prompts: list[str]
    seeds: list[int]
    first: list[bytes]
    second: list[bytes]
    appeal: tuple[np.ndarray, np.ndarray]
    faithful: tuple[np.ndarray, np.ndarray]


def evaluate(recipe: EvaluateRecipe) -> Manifest:
    """Writes the station and the report; InputError when the two runs drew different prompts or seeds."""
    names = ("selection", "chosen", f"samples/{recipe.first}", f"samples/{recipe.second}")
    stations = {name: Station(f"{recipe.root}/{name}") for name in names}
    inputs = {name: station.require().fingerprint for name, station in stations.items()}
    target = Station(f"{recipe.root}/evaluation")
    if not target.begin(fingerprint(recipe), to_json(recipe), "evaluation", inputs):
        print(f"{target.uri}: finished before; nothing to do", flush=True)
        return target.require()
    judged = judge_samples(recipe)
    appeal = compare(
        judged.appeal[1],
        judged.appeal[0],
        np.arange(len(judged.prompts)),
        tie_margin=recipe.appeal_margin,
        seed=recipe.seed,
    )
    faithful = compare(judged.faithful[1], judged.faithful[0], np.arange(len(judged.prompts)), seed=recipe.seed)
    filters = _filters(recipe.root)
    result = {
        "funnel": stations["selection"].require().counts,
        "filters": filters,
        "appeal": shares(appeal),
        "faithfulness": shares(faithful),
        "mean_faithfulness": {
            recipe.first: float(judged.faithful[0].mean()),
            recipe.second: float(judged.faithful[1].mean()),
        },
        "mean_appeal": {recipe.first: float(judged.appeal[0].mean()), recipe.second: float(judged.appeal[1].mean())},
        "chosen": stations["chosen"].require().counts | stations["chosen"].require().extra,
        "prompts": len(judged.prompts),
    }
    page = render_report(report_content(recipe, judged, appeal, faithful, filters))
    target.put_file("result.json", json.dumps(result, indent=2).encode())
    target.put_file("report.html", page.encode())
    Station(recipe.root).put_file("report.html", page.encode())
    Station(recipe.root).put_file("summary.json", json.dumps(result, indent=2).encode())
    return target.finish(extra=result)


def shares(preference: Preference) -> dict[str, Any]:
    """A preference as it stands in summary.json; shares in percent."""
    return {
        "win": preference.win,
        "tie": preference.tie,
        "lose": preference.lose,
        "ci95": list(preference.ci95),
        "win_minus_lose_ci95": list(preference.win_minus_lose_ci95),
        "n_pairs": preference.n_pairs,
        "sign_test_p": preference.sign_test_p,
        "is_significantly_worse": not preference.is_not_significantly_worse,
    }


def judge_samples(recipe: EvaluateRecipe) -> Judged:
    """Scores of both runs, pair by pair."""
    first, second = (
        Station(f"{recipe.root}/samples/{run}").read_table().sort_by("prompt_id")
        for run in (recipe.first, recipe.second)
    )
    for column in ("prompt", "seed"):
        if first[column].to_pylist() != second[column].to_pylist():
            raise InputError(
                f"{recipe.root}/samples/{recipe.first} and {recipe.second} differ in column {column!r}: draw both with the same prompts and seeds"
            )
    prompts = first["prompt"].to_pylist()
    pictures = [t["image"].to_pylist() for t in (first, second)]
    arrays = [from_png(p) for p in pictures]
    attributes = resolve(recipe.attributes, recipe.root)
    folder, _, name = attributes.rpartition("/")
    judge = FaithfulnessJudge(local_folder(folder) / name)
    return Judged(
        prompts,
        first["seed"].to_pylist(),
        pictures[0],
        pictures[1],
        (judge_appeal(arrays[0])[0], judge_appeal(arrays[1])[0]),
        (judge.score(arrays[0], prompts), judge.score(arrays[1], prompts)),
    )


def report_content(
    recipe: EvaluateRecipe, judged: Judged, appeal: Preference, faithful: Preference, filters: dict[str, Any]
) -> ReportContent:
    """The report of a run, from its stations."""
    root = recipe.root
    chosen = Station(f"{root}/chosen").require("chosen")
    pool_rows = Station(f"{root}/pool").require("pool").rows or 0
    return ReportContent(
        title="Quality-tuning on a few photogenic needles",
        summary=(
            f"{pool_rows:,} captioned pictures were filtered, {chosen.rows} were chosen, the pretrained model was tuned on them. "
            f"Its pictures win {appeal.win:.0f} % of the comparisons for appeal."
        ),
        facts=(
            ("pairs in the pool", f"{pool_rows:,}"),
            ("tuned on", f"{chosen.rows} pictures"),
            ("prompts judged", str(len(judged.prompts))),
            ("drawn with", _drawn_with(f"{root}/samples/{recipe.second}")),
            ("machine", f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"),
        ),
        funnel=_funnel(root, recipe.examples),
        filters=[_defect(name, found) for name, found in filters.items()],
        chosen=_chosen(root, chosen, recipe.examples),
        appeal=appeal,
        faithfulness=faithful,
        judges=JUDGES,
        grids=_grids(recipe, judged),
        training=_charts(root),
        seconds=_seconds(root),
        versions=[
            (name, version(name))
            for name in ("ray", "torch", "diffusers", "transformers", "open_clip_torch", "easyocr")
        ],
        commands=REPRODUCE,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _drawn_with(samples: str) -> str:
    settings = Station(samples).require("samples").recipe.get("settings", {})
    steps, guidance = settings.get("steps", "?"), settings.get("guidance", "?")
    return f"{steps} steps, {'no guidance' if guidance == 1 else f'guidance {guidance}'}"


def _filters(root: str) -> dict[str, Any]:
    """Precision and recall of each planted defect; {} for a pool whose truth is not known."""
    pool = Station(f"{root}/pool")
    parts = pool.parquet_files()
    return audit_root(root) if parts and "truth" in column_names(pool, parts[0]) else {}


def _defect(name: str, found: dict[str, Any]) -> DefectScore:
    return DefectScore(
        defect=name,
        planted=found["planted"],
        flagged=found["flagged"],
        precision=found["precision"],
        recall=found["recall"],
    )


def _funnel(root: str, examples: int) -> list[FunnelStep]:
    selection = Station(f"{root}/selection")
    manifest = selection.require("selection")
    rows = selection.read_table(["key", "reject_reason"])
    rng = np.random.default_rng(0)
    wanted: dict[str, np.ndarray] = {}
    for reason in ["", *(s["reason"] for s in manifest.extra["funnel"])]:
        keys = rows.filter(pc.equal(rows["reject_reason"], reason))["key"].to_numpy()
        wanted[reason] = rng.permutation(keys)[: 3 * examples]
    shown = _pictures(root, np.concatenate(list(wanted.values())))
    steps = [
        FunnelStep(
            reason=s["reason"],
            count=s["rejected"],
            unique_kills=s["unique"],
            meaning=MEANINGS[s["reason"]],
            examples=[shown[k] for k in wanted[s["reason"]].tolist() if k in shown][:examples],
        )
        for s in manifest.extra["funnel"]
    ]
    kept = [shown[k] for k in wanted[""].tolist() if k in shown][:examples]
    return [*steps, FunnelStep(reason="", count=manifest.counts["kept"], meaning=MEANINGS[""], examples=kept)]


def _pictures(root: str, keys: np.ndarray) -> dict[int, Picture]:
    """The pool's pictures of these keys that a browser can show."""
    pool = Station(f"{root}/pool").read_table(["key", "image", "caption"])
    pool = pool.filter(pc.is_in(pool["key"], pa.array(keys)))
    found = {}
    for row in pool.to_pylist():
        try:
            Image.open(io.BytesIO(row["image"])).load()
        except (OSError, ValueError, SyntaxError):
            continue  # a broken file has no picture to show; its caption says nothing about why
        found[row["key"]] = Picture(image=row["image"], caption=row["caption"])
    return found


def _chosen(root: str, manifest: Manifest, examples: int) -> ChosenSet:
    table = Station(f"{root}/chosen").read_table(["image", "caption"]).slice(0, 2 * examples)
    return ChosenSet(
        annotator=ANNOTATORS[manifest.extra["annotator"]],
        n_candidates=manifest.counts["candidates"],
        n_chosen=manifest.rows or 0,
        error_rate=manifest.extra.get("error_rate"),
        examples=[Picture(image=r["image"], caption=r["caption"]) for r in table.to_pylist()],
    )


def _grids(recipe: EvaluateRecipe, judged: Judged) -> list[Grid]:
    gain = judged.appeal[1] - judged.appeal[0]
    count = len(gain)
    random = np.sort(np.random.default_rng(recipe.seed).permutation(count)[: recipe.examples])
    order = np.argsort(-gain)
    return [
        Grid(title="Picked at random", how_picked="Prompts drawn by a fixed seed, before any judging.", rows=_rows(recipe, judged, random)),
        Grid(title="Where tuning helped most", how_picked="The largest gains of the appeal judge.", rows=_rows(recipe, judged, order[:5])),
        Grid(title="Where tuning hurt most", how_picked="The largest losses of the appeal judge.", rows=_rows(recipe, judged, order[::-1][:5])),
    ]  # fmt: skip


def _rows(recipe: EvaluateRecipe, judged: Judged, rows: np.ndarray) -> list[BeforeAfter]:
    def winner(pair: tuple[np.ndarray, np.ndarray], i: int, margin: float) -> Winner:
        gain = float(pair[1][i] - pair[0][i])
        if abs(gain) <= margin:
            return "tie"
        return "tuned" if gain > 0 else "base"

    return [
        BeforeAfter(
            prompt=judged.prompts[i],
            seed=judged.seeds[i],
            base=judged.first[i],
            tuned=judged.second[i],
            appeal=winner(judged.appeal, i, recipe.appeal_margin),
            faithfulness=winner(judged.faithful, i, 0.0),
        )
        for i in rows.tolist()
    ]


def _charts(root: str) -> list[CurveChart]:
    charts = []
    for run, title in (("base", "Pretraining"), ("tuned", "Quality-tuning")):
        manifest = Station(f"{root}/checkpoints/{run}").manifest()
        if manifest is None:
            continue
        history, looks = manifest.extra["history"], manifest.extra["inspections"]
        curves = [Curve(label="training", steps=[h["step"] for h in history], values=[h["mse"] for h in history])]
        if looks:
            curves.append(
                Curve(
                    label="held out, frozen noise",
                    steps=[h["step"] for h in looks],
                    values=[h["held_out_mse"] for h in looks],
                )
            )
        charts.append(
            CurveChart(
                title=title,
                y_label="mean squared error",
                curves=curves,
                note=f"Ended: {manifest.extra['stop_reason']}. Kept the weights of step {manifest.extra['best_step']}.",
                mark_step=manifest.extra["best_step"] if looks else None,
            )
        )
    return charts


def _seconds(root: str) -> list[tuple[str, float]]:
    names = (
        "pool", "scores", "selection", "chosen", "autoencoder", "latents/pretrain", "latents/quality",
        "checkpoints/base", "checkpoints/tuned", "samples/base", "samples/tuned",
    )  # fmt: skip
    found = ((name, Station(f"{root}/{name}").manifest()) for name in names)
    return [(name, manifest.seconds) for name, manifest in found if manifest is not None]

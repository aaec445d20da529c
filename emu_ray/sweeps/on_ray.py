"""The sweep over tuning-set size and steps with Ray Tune: each size is trained once, the steps axis is read off its way.

A trial writes its rows when it ends; run again, only missing trials run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from emu_ray.config import fingerprint, from_json, to_json
from emu_ray.errors import EmuRayError, JobFailedError, find_in_chain
from emu_ray.evaluation.appeal_judge import judge_appeal
from emu_ray.evaluation.faithfulness_judge import FaithfulnessJudge
from emu_ray.evaluation.preference import Preference, compare
from emu_ray.generation import EmuPipeline, Generator, SamplingSettings
from emu_ray.stations import Manifest, Station
from emu_ray.stations.folders import local_folder, resolve
from emu_ray.stations.manifest import identity
from emu_ray.sweeps.plot import plot_png
from emu_ray.sweeps.table import SweepRow, markdown_table
from emu_ray.training.denoiser import train_denoiser
from emu_ray.training.denoiser_run import fetched, load_latents, placed, require_latents
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import Inspection
from emu_ray.training.start import DenoiserTraining


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """`root`/latents/quality and one base -> `root`/sweep: appeal and faithfulness against the base at every size and step count."""

    root: str
    tuning: DenoiserTraining
    prompts: tuple[str, ...]
    sizes: tuple[int, ...] = (0, 30, 100, 300)
    steps: tuple[int, ...] = (50, 100, 200)
    settings: SamplingSettings = SamplingSettings(steps=20, guidance=1.0)
    attributes: str = "BASE/judge/attributes.safetensors"
    appeal_margin: float = 0.02
    concurrent: int = field(default=2, metadata={"affects_result": False})
    cpus_each: float = field(default=1, metadata={"affects_result": False})
    gpus_each: float = field(default=0, metadata={"affects_result": False})


def sweep(recipe: SweepRecipe) -> Manifest:
    """Runs the missing trials, then writes rows.json, table.md and plot.png."""
    tuning, inputs = placed(dataclasses.replace(recipe.tuning, stopping=None), recipe.root)
    inputs["latents"] = require_latents(Station(f"{recipe.root}/latents/quality"), tuning).fingerprint
    recipe = dataclasses.replace(recipe, tuning=tuning)
    target, mark = Station(f"{recipe.root}/sweep"), fingerprint(recipe)
    if not target.begin(mark, to_json(recipe), "sweep", inputs, keep=("trial-",)):
        print(f"{target.uri}: finished before; nothing to do", flush=True)
        return target.require()
    tuner = tune.Tuner(
        tune.with_resources(
            functools.partial(trial, recipe_json=to_json(recipe)), {"cpu": recipe.cpus_each, "gpu": recipe.gpus_each}
        ),
        param_space={"set_size": tune.grid_search(list(recipe.sizes))},
        tune_config=tune.TuneConfig(max_concurrent_trials=recipe.concurrent),
        run_config=tune.RunConfig(
            name=f"sweep-{identity('sweep', mark, inputs)}", storage_path=f"{recipe.root}/ray_tune", verbose=1
        ),
    )
    errors = tuner.fit().errors
    if errors:
        raise failure(errors, recipe) from errors[0]
    rows = [
        SweepRow(**_preferences(row))
        for size in recipe.sizes
        for row in json.loads(target.get_bytes(f"trial-{size}.json"))
    ]
    target.put_file("table.md", markdown_table(rows).encode())
    target.put_file("plot.png", plot_png(rows))
    return target.finish(extra={"rows": [dataclasses.asdict(r) for r in rows]})


def failure(errors: list[Exception], recipe: SweepRecipe) -> EmuRayError:
    """What a user is told of failed trials: the sentence that was meant for them, else the last line of the first error."""
    for error in errors:
        if (for_user := find_in_chain(error)) is not None:
            return for_user
    last = (str(errors[0]).strip() or repr(errors[0])).splitlines()[-1]
    return JobFailedError(
        f"{len(errors)} of {len(recipe.sizes)} trials failed, the first with: {last}; "
        f"their logs lie in {recipe.root}/ray_tune, and the same command runs only what is missing"
    )


def trial(config: dict[str, Any], recipe_json: str) -> None:
    """One set size: trains to the largest step count and is judged against the base on the way; a Ray Tune trainable."""
    torch.set_num_threads(1)
    recipe, size = from_json(SweepRecipe, recipe_json), int(config["set_size"])
    target = Station(f"{recipe.root}/sweep")
    if f"trial-{size}.json" in target.store.sizes():
        return
    tuning, device = fetched(recipe.tuning), "cuda" if recipe.gpus_each else "cpu"
    base = Generator(tuning.start, device=device)
    judges = _Judges(recipe, base)
    found: list[dict[str, Any]] = []

    def look(step: int, pipeline: EmuPipeline) -> Inspection:
        if step in recipe.steps:
            found.append({"set_size": size, "steps": step, **judges.compare(pipeline)})
            tune.report({"step": step, "win": found[-1]["appeal"]["win"]})
        return Inspection(metrics={})

    if size == 0:
        found.append({"set_size": 0, "steps": 0, **judges.compare(base.pipeline)})
    else:
        loop = dataclasses.replace(
            tuning.loop, steps=max(recipe.steps), inspect_every_steps=int(np.gcd.reduce(recipe.steps))
        )
        tuning = dataclasses.replace(tuning, loop=loop, max_pairs=size)
        data = load_latents(Station(f"{recipe.root}/latents/quality"), tuning.vae)
        train_denoiser(tuning, data, LocalWorker(device=device), look)
    target.put_file(f"trial-{size}.json", json.dumps(found).encode())


class _Judges:
    """The base's pictures of the sweep's prompts, judged once, to compare others with."""

    def __init__(self, recipe: SweepRecipe, base: Generator) -> None:
        self.recipe, self.generator = recipe, base
        folder, _, name = resolve(recipe.attributes, recipe.root).rpartition("/")
        self.faithfulness = FaithfulnessJudge(Path(local_folder(folder)) / name)
        self.base = self._scores(base.pipeline)

    def _scores(self, pipeline: EmuPipeline) -> tuple[np.ndarray, np.ndarray]:
        pipeline.set_progress_bar_config(disable=True)
        self.generator.pipeline = pipeline.to(self.generator.pipeline.device)
        prompts = list(self.recipe.prompts)
        images = np.concatenate(
            [
                self.generator.generate(
                    prompts[i : i + 16],
                    list(range(1000 + i, 1000 + i + len(prompts[i : i + 16]))),
                    self.recipe.settings,
                )
                for i in range(0, len(prompts), 16)
            ]
        )
        return judge_appeal(images)[0], self.faithfulness.score(images, prompts)

    def compare(self, pipeline: EmuPipeline) -> dict[str, Any]:
        appeal, faithful = self._scores(pipeline)
        ids = np.arange(len(appeal))
        return {
            "appeal": dataclasses.asdict(compare(appeal, self.base[0], ids, tie_margin=self.recipe.appeal_margin)),
            "faithfulness": dataclasses.asdict(compare(faithful, self.base[1], ids)),
        }


def _preferences(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a Preference has pairs."""
    plain: dict[str, Any] = {
        name: Preference(**{k: _pair(v) for k, v in row[name].items()}) for name in ("appeal", "faithfulness")
    }
    return {**row, **plain}


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

"""What the train function costs over a bare PyTorch loop with the same network, batch, optimizer and threads.

python -m benchmarks.loop [--quick]; the last line is JSON: {"vs_bare_loop": step time over the bare loop's}
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time

import numpy as np
import torch

from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
from emu_ray.models.denoiser import build, demo
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train

BATCH = 48


def main(quick: bool) -> None:
    """Alternates short runs of both loops and prints the median ratio."""
    torch.set_num_threads(1)
    rounds, steps = (3, 5) if quick else (10, 20)
    rng = np.random.default_rng(0)
    texts = torch.randn(65, 48, 160).half()
    latents = rng.standard_normal((512, 16, 8, 8)).astype(np.float16)
    examples = LatentExamples(latents, rng.integers(1, 65, 512), texts)
    recipe = LoopRecipe(steps=steps, batch_size=BATCH, log_every_steps=steps)
    ratios = []
    for _ in range(rounds):
        ours, bare = _engine(examples, recipe), _bare(examples, recipe)
        ratios.append(ours / bare)
        print(f"engine {ours / steps:.3f} s a step, bare loop {bare / steps:.3f} s a step", flush=True)
    print(json.dumps({"vs_bare_loop": round(statistics.median(ratios), 4)}))


def _task() -> DenoiserTask:
    torch.manual_seed(0)
    network = build(demo(), latent_channels=16, latent_side=8, text_width=160)
    return DenoiserTask(network, NoiseSchedule(ScheduleRecipe()))


def _engine(examples: LatentExamples, recipe: LoopRecipe) -> float:
    task = _task()
    started = time.process_time()
    train(task, examples, dataclasses.replace(recipe, ema_decay=0.999), LocalWorker())
    return time.process_time() - started


def _bare(examples: LatentExamples, recipe: LoopRecipe) -> float:
    task = _task()
    shape, count = examples.latents.shape[1:], len(examples)
    started = time.process_time()
    average = {k: v.detach().clone() for k, v in task.network.state_dict().items()}
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.adam_beta2))
    for _ in range(recipe.steps):
        rows = torch.randint(count, (BATCH,))
        clean = torch.from_numpy(examples.latents)[rows].float()
        batch = {
            "clean": clean,
            "noise": torch.randn(BATCH, *shape),
            "t": torch.randint(1000, (BATCH,)),
            "text": examples.texts[torch.from_numpy(examples.text_of)[rows]].float(),
        }
        optimizer.zero_grad(set_to_none=True)
        task(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in task.network.state_dict().items():
                average[name].lerp_(value, 0.001)
    return time.process_time() - started


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])

"""Serving and training at full size on one GPU, against diffusers' own pipeline and against a bare loop: python -m benchmarks.one_gpu [serving|training] [--quick]

Weights are random, of SDXL's and Emu's own configs, in bfloat16 (the decoder in float32; trained weights in float32, computed in bfloat16).
All sides run in this process in turns. The last line is JSON; a side N is of N x N pixels:
  throughput_vs_one_by_one_N   images/s of the engine, saturated, over those of the pipeline called for one picture at a time, as diffusers' server example does
  throughput_vs_batches_N      over those of the pipeline called for 4 pictures of equal steps
  latency_vs_pipeline_N        of one picture of 30 steps on an idle GPU, over the pipeline's
  recording_N                  time for all pictures with CUDA graphs over that without
  recording_latency_N          and for one picture alone
  pass_beside_decoding_N       time of a pass while pictures are decoded over one without
  step_vs_bare_loop, mfu       of a training step of the 2.8 B U-Net on latents of 256 x 256, with recomputed activations
  checkpoint_block_share       time that training of a smaller U-Net stands still for a checkpoint over that of writing it at once
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.serving_models import Job, jobs
from benchmarks.training_sides import SCHEDULE, ClockedWorker
from emu_ray.diffusion.schedule import NoiseSchedule
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.pace import Pace
from emu_ray.generation.stepping.tickets import Drawing
from emu_ray.models.denoiser import DenoiserRecipe, build, emu
from emu_ray.training.checkpoints import Checkpoints
from emu_ray.training.denoising import DenoiserTask, LatentExamples
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import LoopRecipe, train
from emu_ray.training.parallel import ParallelRecipe, checkpoint_blocks
from tests.generation.small_bases import BETAS, text_config, tokenizer

GUIDANCE = 5.0
TOGETHER = 4  # pictures in a call of the batching pipeline


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL's U-Net and autoencoder with random weights on the GPU; its text encoders are as wide and two layers deep."""
    with torch.device("cuda"):
        unet = UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).eval().to(torch.bfloat16)  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=4, sample_size=1024, scaling_factor=0.13025, force_upcast=True,
        ).eval()  # fmt: skip
        first = CLIPTextModel(text_config(hidden_act="quick_gelu", hidden_size=768, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            text_config(hidden_act="gelu", hidden_size=1280, num_attention_heads=20, projection_dim=1280)
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [tokenizer(Path(folder) / name, pad) for name, pad in (("a", "<|endoftext|>"), ("b", "!"))]
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=first.eval().to(torch.bfloat16), text_encoder_2=second.eval().to(torch.bfloat16), tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_engine(engine: Engine, asked: list[Job], side_px: int) -> float:
    """Seconds for all pictures, 16 on their way."""
    slots, started = threading.Semaphore(16), time.perf_counter()
    tickets = []
    for job in asked:
        slots.acquire()
        ticket = engine.submit(_drawing(job, side_px))
        ticket.future.add_done_callback(lambda _: slots.release())
        tickets.append(ticket)
    for ticket in tickets:
        ticket.result(600)
    return time.perf_counter() - started


def _drawing(job: Job, side_px: int) -> Drawing:
    return Drawing(
        prompt=job.prompt, seed=job.seed, steps=job.steps, guidance=GUIDANCE, solver="euler", width_px=side_px, height_px=side_px
    )  # fmt: skip


@torch.no_grad()
def by_pipeline(model: SteppedModel, asked: list[Job], side_px: int, together: int) -> float:
    """Seconds for all pictures, `together` of equal steps a call; the last call of each number may have fewer."""
    groups = [[job for job in asked if job.steps == steps] for steps in sorted({job.steps for job in asked})]
    started = time.perf_counter()
    for group in groups:
        for first in range(0, len(group), together):
            some = group[first : first + together]
            latents = model.pipeline(
                [job.prompt for job in some], num_inference_steps=some[0].steps, guidance_scale=GUIDANCE, height=side_px, width=side_px,
                generator=[torch.Generator().manual_seed(job.seed) for job in some], output_type="latent",
            ).images  # fmt: skip
            ready = list(latents.float())
            model.wait()
            model.decode(ready)
    return time.perf_counter() - started


def serving(rounds: int, counts: dict[int, int]) -> dict[str, float]:
    """The engine and the pipeline over the same weights."""
    pipeline = sdxl()
    model, plain_model = SteppedModel(pipeline), SteppedModel(pipeline, records_passes=False)
    engine, plain, found = Engine(model), Engine(plain_model), dict[str, float]()
    for side_px, count in counts.items():
        asked, one = jobs(count), [Job("a photo of a red ball", 1, 30)]
        shape = model.shape(_drawing(one[0], side_px))
        for each in (engine, plain):
            by_engine(each, one, side_px)  # profiled
            print(f"{side_px} px: seconds of a pass by rows", _told(each._paces[shape, None]), flush=True)
            by_engine(each, jobs(count, 100), side_px)
        by_pipeline(model, one * TOGETHER, side_px, TOGETHER)
        sides: dict[str, Callable[[], float]] = {
            "engine": lambda: by_engine(engine, asked, side_px),  # noqa: B023
            "unrecorded": lambda: by_engine(plain, asked, side_px),  # noqa: B023
            "one by one": lambda: by_pipeline(model, asked, side_px, 1),  # noqa: B023
            "batches": lambda: by_pipeline(model, asked, side_px, TOGETHER),  # noqa: B023
            "engine, one": lambda: by_engine(engine, one, side_px),  # noqa: B023
            "unrecorded, one": lambda: by_engine(plain, one, side_px),  # noqa: B023
            "pipeline, one": lambda: by_pipeline(model, one, side_px, 1),  # noqa: B023
        }
        turns = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
        seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}
        print(
            side_px,
            {name: round(value, 3) for name, value in seconds.items()},
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; by rows {_told(engine._paces[shape, None])}",
            flush=True,
        )
        found[f"throughput_vs_one_by_one_{side_px}"] = seconds["one by one"] / seconds["engine"]
        found[f"throughput_vs_batches_{side_px}"] = seconds["batches"] / seconds["engine"]
        found[f"latency_vs_pipeline_{side_px}"] = seconds["engine, one"] / seconds["pipeline, one"]
        found[f"recording_{side_px}"] = seconds["engine"] / seconds["unrecorded"]
        found[f"recording_latency_{side_px}"] = seconds["engine, one"] / seconds["unrecorded, one"]
        found[f"pass_beside_decoding_{side_px}"] = _beside(engine, side_px)
    engine.close()
    plain.close()
    return found


def _told(pace: Pace) -> str:
    curve = zip(pace._rows.tolist(), pace._seconds.round(4).tolist(), strict=True)
    return f"{dict(curve)}, cap {pace.cap}"


def _beside(engine: Engine, side_px: int) -> float:
    """Of one drawing's passes: with a decoder that is always at work, over without."""
    seconds = []
    for is_decoding in (False, True):
        times: list[float] = []
        ticket = engine.submit(_drawing(Job("a ball", 2, 40), side_px), lambda _: times.append(time.perf_counter()))  # noqa: B023
        latents = torch.randn(engine.model.shape(_drawing(Job("", 0, 1), side_px)), device=engine.model.device)
        engine.model.wait()
        while is_decoding and not ticket.future.done():
            engine.model.decode([latents])
        ticket.result(600)
        seconds.append(float(np.median(np.diff(times))))
    return seconds[1] / seconds[0]


BATCH = 128


def _examples(side: int, width: int) -> LatentExamples:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((256, 16, side, side)).astype(np.float16)
    return LatentExamples(latents, 1 + np.arange(256) % 8, torch.randn(9, 154, width).half())


def _unet(recipe: DenoiserRecipe, side: int, width: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return build(recipe, latent_channels=16, latent_side=side, text_width=width)


def training(steps: int) -> dict[str, float]:
    """Our loop and a bare one over Emu's U-Net; then checkpoints."""
    width = 768 + 4096
    given, lines = _examples(32, width), list[tuple[float, dict[str, float]]]()
    worker = LocalWorker(log=lambda line: lines.append((time.perf_counter(), line)), device="cuda")
    recipe = LoopRecipe(
        steps=steps, batch_size=BATCH, ema_decay=0.999, log_every_steps=1,
        parallel=ParallelRecipe(precision="bf16", activation_checkpointing=True),
    )  # fmt: skip
    train(DenoiserTask(_unet(emu(), 32, width), NoiseSchedule(SCHEDULE)), given, recipe, worker)
    ours = float(np.median(np.diff([at for at, _ in lines[2:]])))
    mfu = float(np.median([line["mfu"] for _, line in lines[3:] if "mfu" in line]))
    print("engine", {k: round(v, 4) for k, v in lines[-1][1].items()}, flush=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    theirs = _bare(_unet(emu(), 32, width), given, steps)
    print(
        f"engine {ours:.4f} s a step, bare {theirs:.4f} s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
        flush=True,
    )
    torch.cuda.empty_cache()
    return {"step_vs_bare_loop": ours / theirs, "mfu": mfu, "checkpoint_block_share": _blocked()}


def _bare(network: nn.Module, given: LatentExamples, steps: int) -> float:
    """Median seconds of a step that one would write by hand."""
    checkpoint_blocks(network)
    task = DenoiserTask(network, NoiseSchedule(SCHEDULE)).to("cuda").train()
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    times = []
    for _ in range(steps):
        rows = torch.randint(len(given), (BATCH,))
        batch = {
            "clean": torch.from_numpy(given.latents)[rows].cuda().float(),
            "noise": torch.randn(BATCH, *given.latents.shape[1:], device="cuda"),
            "t": torch.randint(1000, (BATCH,), device="cuda"),
            "text": given.texts[torch.from_numpy(given.text_of)[rows]].cuda().float(),
        }
        with torch.autocast("cuda", torch.bfloat16):
            loss = task(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(network.state_dict().values()), 0.001)
        loss.item()
        times.append(time.perf_counter())
    return float(np.median(np.diff(times[2:])))


def _blocked() -> float:
    sizes = DenoiserRecipe(
        block_out_channels=(192, 384, 768), layers_per_block=(2, 2, 2), attention=(True, True, True), heads=(3, 6, 12), cross_attention_dim=768
    )  # fmt: skip
    given = _examples(64, 768)
    with tempfile.TemporaryDirectory() as folder:
        worker = ClockedWorker(Path(folder) / "async", device="cuda")
        recipe = LoopRecipe(
            steps=331, batch_size=8, checkpoint_every_steps=110, checkpoint_every_s=1e9, parallel=ParallelRecipe(precision="bf16")
        )  # fmt: skip
        task = DenoiserTask(_unet(sizes, 64, 768), NoiseSchedule(SCHEDULE))
        train(task, given, recipe, worker)
        parameters = sum(p.numel() for p in task.network.parameters())
        blocked = worker.kept.blocked[:-1]
        state = {f"network.{i}.{name}": p.detach() for i in range(4) for name, p in task.network.named_parameters()}
        checkpoints, seconds = Checkpoints(Path(folder) / "sync"), []
        for step in range(2):
            started = time.perf_counter()
            checkpoints.save(state, step, {})
            checkpoints.wait()
            seconds.append(time.perf_counter() - started)
        checkpoints.close()
    print(
        f"{parameters / 1e6:.0f} M parameters: checkpoints block {[round(s, 4) for s in blocked]} s, at once they take {[round(s, 2) for s in seconds]} s",
        flush=True,
    )
    return float(np.median(blocked[1:])) / seconds[-1]


def main(what: str, quick: bool) -> None:
    """Runs the parts that were asked for."""
    found: dict[str, float] = {}
    if what in ("", "serving"):
        found |= serving(1 if quick else 3, {512: 12, 1024: 8} if quick else {512: 24, 1024: 12})
        torch.cuda.empty_cache()
    if what in ("", "training"):
        found |= training(8 if quick else 20)
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(words[0] if words else "", "--quick" in sys.argv[1:])

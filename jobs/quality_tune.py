"""Tunes the pretrained model on the few chosen pictures: quality learning, and stops before it overfits.

reads    ROOT/latents/quality; ROOT/checkpoints/base, or ROOT/start, a diffusers folder of Stable Diffusion or SDXL
writes   ROOT/checkpoints/tuned (of a LoRA: lora), a diffusers folder of the same class
command  python -m jobs.quality_tune demo
cost     demo: 0.9 CPU-seconds a step of 64 pictures, at most 300 steps; sd15, sdxl: not measured

A guard looks at what is drawn for held-out captions: appeal is maximised, faithfulness may fall by a margin and no more. In the demo it
decides; `NAME-guarded` of the others has it too, with ROOT/heads/aesthetic as the judge of appeal. Without it the loss on held-out pairs,
with frozen noise and steps, decides.

`sd15` also takes Stable Diffusion 2.x: objective and betas are those of the base's own scheduler. A LoRA's folder holds the adapter,
pytorch_lora_weights.safetensors, beside the pipeline into which it is fused.
"""

from __future__ import annotations

from dataclasses import replace

from emu_ray.config import command_line
from emu_ray.curation.clip_scorer import ClipModel
from emu_ray.evaluation.haystack_judge import HaystackJudge
from emu_ray.session.on_ray import connect
from emu_ray.training.denoiser_run import DenoiserRun, run_denoiser
from emu_ray.training.guard import ClipJudge, GuardRecipe
from emu_ray.training.loop import LoopRecipe
from emu_ray.training.lora import LoraRecipe
from emu_ray.training.on_ray import WorkersRecipe
from emu_ray.training.parallel import ParallelRecipe
from emu_ray.training.start import DenoiserTraining
from emu_ray.training.stopping import StoppingRecipe

# Pictures of 1024 px and 3 B parameters on GPUs of 80 GB: `python -m jobs.pretrain emu --plan` counts what a pass needs.
LARGE = ParallelRecipe(sharding="fsdp", precision="bf16", activation_checkpointing=True)

RECIPES = {
    "demo": DenoiserRun(
        root="runs/demo",
        run="tuned",
        latents="quality",
        training=DenoiserTraining(
            start="ROOT/checkpoints/base",
            noise_offset=0.1,
            stopping=StoppingRecipe(held_out=0.1, draws=8),
            guard=GuardRecipe(judge=HaystackJudge, weights="BASE/judge/attributes.safetensors", max_prompts=32, margin=0.03, patience=4),
            loop=LoopRecipe(
                steps=300, batch_size=64, learning_rate=3e-4, warmup_steps=20, ema_decay=0.98, weight_decay=1e-4, seed=802,
                inspect_every_steps=20, log_every_steps=10, checkpoint_every_steps=50,
            ),
        ),
        workers=WorkersRecipe(count=2, cpus_each=1),
    ),
    "stamps": DenoiserRun(
        root="runs/stamps",
        run="tuned",
        latents="quality",
        training=DenoiserTraining(
            start="ROOT/checkpoints/base",
            noise_offset=0.1,
            stopping=StoppingRecipe(),
            loop=LoopRecipe(steps=30, batch_size=64, learning_rate=5e-4, warmup_steps=5, ema_decay=0.9, inspect_every_steps=10, log_every_steps=10),
        ),
        workers=WorkersRecipe(count=2, cpus_each=1),
    ),
    # Batch, offset and bound are the paper's; learning rate and weight decay a sibling's (see ARCHITECTURE.md).
    "emu": DenoiserRun(
        root="runs/emu",
        run="tuned",
        latents="quality",
        training=DenoiserTraining(
            start="ROOT/checkpoints/base",
            noise_offset=0.1,
            stopping=StoppingRecipe(),
            loop=LoopRecipe(
                steps=15_000, batch_size=64, micro_batch_size=2, learning_rate=2.5e-5, weight_decay=1e-4, ema_decay=0.999, inspect_every_steps=500, parallel=LARGE
            ),
        ),
        workers=WorkersRecipe(count=8, use_gpu=True, cpus_each=8, threads_each=8),
    ),
} | {
    # Bases that others pretrained. Batch, offset and bound are the paper's; learning rates are our choice, not tuned: a tenth of what such
    # bases were pretrained with for all weights, ten times more for adapters, which start at 0.
    f"{base}{suffix}": DenoiserRun(
        root=f"runs/{base}",
        run="lora" if lora else "tuned",
        latents="quality",
        training=DenoiserTraining(
            start="ROOT/start",
            lora=lora,
            noise_offset=0.1,
            stopping=StoppingRecipe(),
            loop=LoopRecipe(
                steps=15_000, batch_size=64, micro_batch_size=2, learning_rate=1e-4 if lora else 1e-5, weight_decay=1e-4, ema_decay=0.999,
                inspect_every_steps=500, parallel=replace(LARGE, sharding="ddp") if lora or base == "sd15" else LARGE,
            ),
        ),
        workers=WorkersRecipe(count=8, use_gpu=True, cpus_each=8, threads_each=8),
    )
    for base in ("sd15", "sdxl")
    for suffix, lora in (("", None), ("-lora", LoraRecipe()))
}  # fmt: skip

# The same, stopped by what is drawn for the held-out captions: appeal by the head that `python -m jobs.fit_aesthetic` fitted on people's votes,
# faithfulness by CLIP. The margin, a cosine, is our choice.
RECIPES |= {
    f"{name}-guarded": replace(
        RECIPES[name],
        training=replace(
            RECIPES[name].training,
            guard=GuardRecipe(
                judge=ClipJudge,
                weights="ROOT/heads/aesthetic/aesthetic.safetensors",
                clip=ClipModel(name="ViT-L-14", pretrained="openai"),
                margin=0.005,
            ),
        ),
    )
    for name in ("emu", "sd15", "sd15-lora", "sdxl", "sdxl-lora")
}


def run(recipe: DenoiserRun) -> None:
    """Tune and say why it stopped."""
    connect(int(recipe.workers.use_gpu))
    manifest = run_denoiser(recipe)
    extra = manifest.extra
    print(
        f"checkpoints/{recipe.run}: kept step {extra['best_step']} of {extra['steps']}, {extra['stop_reason']}; {manifest.station}"
    )


if __name__ == "__main__":
    command_line("quality_tune", __doc__ or "", RECIPES, run)

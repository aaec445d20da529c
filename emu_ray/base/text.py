"""Trains the demo's CLIP and T5 on their own draw and writes them into the base, both in the formats that real ones come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import T5EncoderModel

from emu_ray.base.draws import SEEDS, SIZE_PX, web_draw
from emu_ray.base.recipes import CLIP_LOOP, CLIP_PAIRS, T5_CAPTIONS, T5_LOOP
from emu_ray.base.written_whole import written_whole
from emu_ray.haystack.world import captions, draw_scenes
from emu_ray.models import small_clip, small_t5
from emu_ray.models.text import tokenize
from emu_ray.training.local_worker import LocalWorker
from emu_ray.training.loop import train
from emu_ray.training.text_tasks import CaptionExamples, ContrastiveTask, PairExamples, SpanTask

Log = Callable[[dict[str, float]], None]


def make_clip(base: Path, work: Path, log: Log) -> None:
    """Writes base/clip (open_clip) and base/text_encoder + tokenizer (transformers); resumes from `work`, skips when written."""
    folder, weights = base / "clip", base / "clip" / "open_clip_model.safetensors"
    if not weights.exists():
        small_clip.write_config(folder)
        small_clip.register(folder)
        draw = web_draw(SEEDS["clip"], CLIP_PAIRS, SIZE_PX)
        torch.manual_seed(SEEDS["clip"])
        model = open_clip.create_model(small_clip.NAME)
        ids = small_clip.tokenizer(folder)(draw.captions)
        examples = PairExamples(draw.images, ids, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        train(ContrastiveTask(model), examples, CLIP_LOOP, LocalWorker(work / "clip", log))
        state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        with written_whole(weights) as half:
            save_file(state, half)
    if (base / "tokenizer").exists():
        return
    model, _ = small_clip.load(folder)
    tower, tokenizer = small_clip.hf_text_tower(model.float(), folder)
    with written_whole(base / "text_encoder") as half:
        tower.half().save_pretrained(half)
    with written_whole(base / "tokenizer") as half:
        tokenizer.save_pretrained(half)


def make_t5(base: Path, work: Path, log: Log) -> None:
    """Writes base/text_encoder_2 and tokenizer_2; skips when written."""
    if (base / "tokenizer_2").exists():
        return
    import numpy as np

    lines = captions(draw_scenes(np.random.default_rng([SEEDS["clip"], 1]), T5_CAPTIONS))
    tokenizer = small_t5.train_tokenizer(lines)
    torch.manual_seed(SEEDS["clip"])
    model = small_t5.build(len(tokenizer))
    ids = tokenize(tokenizer, lines, small_t5.TOKENS)
    examples = CaptionExamples(ids, tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    train(SpanTask(model), examples, T5_LOOP, LocalWorker(work / "t5", log))
    model.save_pretrained(work / "t5_full")
    encoder = T5EncoderModel.from_pretrained(work / "t5_full", dtype=torch.float16)
    with written_whole(base / "text_encoder_2") as half:
        encoder.save_pretrained(half)
    with written_whole(base / "tokenizer_2") as half:
        tokenizer.save_pretrained(half)

"""The engine without HTTP against a bare batched loop at its own batch sizes: python -m benchmarks.serving_bare FOLDER ROUNDS COUNT FIRST

The jobs are those of the services' closed load, COUNT from the number FIRST on: of a few dozen others the mean number of steps differs by 8 %.
Both run in this process, on the first core and one thread, in turns. The engine gets the closed load that the services get at saturation; the batches of a service's own engine can't be seen from outside. Of each pass
its rows are counted, of each call of the decoder its pictures; the loop then does just that much: text features of each prompt once, for
each pass one call of the U-Net with as many rows, guidance and a DDIM update, and decoding and PNGs in the same chunks. It has
no queue, no tickets, no lock and no thread, keeps its latents in one tensor, and finds its numbers in a table. The last line is JSON, CPU-seconds
an image (`engine_s`, `bare_s`) and requests in a pass on average (`requests`).
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.serving_models import Job, jobs
from benchmarks.serving_sides import CAN_PIN, WARM, pin
from emu_ray.generation import Generator
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.model import SteppedModel
from emu_ray.generation.stepping.tickets import Drawing
from emu_ray.models.text import TextFeatures

IN_FLIGHT = 16
GUIDANCE = 4.0


class Counted(SteppedModel):
    """A model that remembers the sizes of its calls."""

    def __init__(self, folder: str) -> None:
        super().__init__(Generator(folder).pipeline)
        self.rows: list[int] = []
        self.pictures: list[int] = []

    def answer(self, x: Tensor, t: Tensor, texts: list[TextFeatures]) -> Tensor:
        """As the engine's own."""
        self.rows.append(len(x))
        return super().answer(x, t, texts)

    def decode(self, latents: list[Tensor]) -> np.ndarray:
        """As the engine's own."""
        self.pictures.append(len(latents))
        return super().decode(latents)


def drawing(job: Job) -> Drawing:
    """What the engine is asked."""
    return Drawing(prompt=job.prompt, seed=job.seed, steps=job.steps, guidance=GUIDANCE)


def png(picture: np.ndarray) -> bytes:
    """Encoded as both sides do."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def engine_cpu_s(engine: Engine, asked: list[Job]) -> float:
    """CPU-seconds of all threads for all pictures, encoded in the decoder's thread, with IN_FLIGHT on their way."""
    left, slots, ended = iter(asked), threading.Semaphore(IN_FLIGHT), threading.Semaphore(0)

    def done(future: object) -> None:
        png(future.result())  # type: ignore[attr-defined]
        slots.release()
        ended.release()

    started = time.process_time()
    for job in left:
        slots.acquire()
        engine.submit(drawing(job)).future.add_done_callback(done)
    for _ in asked:
        ended.acquire()
    return time.process_time() - started


@torch.no_grad()
def bare_cpu_s(model: SteppedModel, asked: list[Job], rows: list[int], pictures: list[int]) -> float:
    """CPU-seconds of the same calls without an engine."""
    pipeline, unet = model.pipeline, model.unet
    table = torch.from_numpy(np.stack([np.linspace(0.9, 1.0, 50), np.linspace(-0.1, 0.1, 50)])).float()
    shape = model.shape(drawing(asked[0]))
    started = time.process_time()
    nothing = pipeline.encode_prompt("", "cpu", 1, False)[0]
    texts = []
    for job in asked:
        torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
        texts.append(pipeline.encode_prompt(job.prompt, "cpu", 1, False)[0])
    most = max(rows) // 2
    text = torch.cat([nothing.expand(most, -1, -1), torch.cat(texts).repeat(1 + most // len(texts), 1, 1)[:most]])
    x = torch.randn(most, *shape)
    for number, count in enumerate(rows):
        half = count // 2
        now = x[:half]
        which = torch.cat([text[:half], text[most : most + half]])
        out = unet(torch.cat([now, now]), torch.full((count,), 500.0), which).sample
        without, with_text = out.chunk(2)
        guided = without + GUIDANCE * (with_text - without)
        keep, lead = table[:, number % 50]
        x[:half] = keep * now + lead * guided
    for count in pictures:
        decoded = pipeline.vae.decode(x[:1].expand(count, -1, -1, -1) / pipeline.vae.config.scaling_factor).sample
        values = ((decoded / 2 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for picture in values:
            png(picture)
    return time.process_time() - started


def main(folder: str, rounds: str, count: str, first: str) -> None:
    """Alternates them; medians of the rounds."""
    torch.set_num_threads(1)
    if CAN_PIN:
        pin(os.getpid(), {min(os.sched_getaffinity(0))})
    model = Counted(folder)
    engine = Engine(model)
    engine_cpu_s(engine, jobs(IN_FLIGHT, WARM))
    ours, theirs, requests = [], [], []
    for number in range(int(rounds)):
        # another prompt each round, since the engine keeps texts, and a service sees each prompt once
        asked = [replace(job, prompt=f"{job.prompt}, {number}") for job in jobs(int(count), int(first))]
        model.rows, model.pictures = [], []
        ours.append(engine_cpu_s(engine, asked) / len(asked))
        rows, pictures = list(model.rows), list(model.pictures)
        theirs.append(bare_cpu_s(model, asked, rows, pictures) / len(asked))
        requests.append(sum(rows) / 2 / len(rows))
    engine.close()
    found = {"engine_s": ours, "bare_s": theirs, "requests": requests}
    print(json.dumps({name: statistics.median(values) for name, values in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What diffusers' example `server-async` does, written anew: python -m benchmarks.peers.server_async_images FOLDER PORT

No release of diffusers carries its examples (neither the wheel nor the sdist of 0.42.1), so that this is not their code but its behaviour, read on
the main branch 2026-11: FastAPI, each request in a thread of the pool with a shallow copy of the pipeline and a scheduler of its own,
tokenizers behind a lock, rubbish collected after each picture. Theirs saves a file and answers with its address, and has no seed; here the
PNG is the answer, which spares the client a second request.
"""

from __future__ import annotations

import copy
import gc
import sys
import threading
from io import BytesIO

import torch
import uvicorn
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel

from benchmarks.peers.plain_pipeline import GUIDANCE, load


class Asked(BaseModel):
    """The body."""

    prompt: str
    seed: int
    num_inference_steps: int = 28


def application(pipeline: StableDiffusionPipeline) -> FastAPI:
    """POST /api/diffusers/inference."""
    app, lock = FastAPI(), threading.Lock()

    def infer(asked: Asked) -> bytes:
        own = copy.copy(pipeline)
        own.scheduler = copy.deepcopy(pipeline.scheduler)
        with lock, torch.no_grad():
            text, no_text = own.encode_prompt(asked.prompt, "cpu", 1, True)
        image = own(
            prompt_embeds=text,
            negative_prompt_embeds=no_text,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(asked.seed),
        ).images[0]
        stream = BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    @app.post("/api/diffusers/inference")
    async def inference(asked: Asked) -> Response:
        try:
            return Response(await run_in_threadpool(infer, asked), media_type="image/png")
        finally:
            gc.collect()

    return app


if __name__ == "__main__":
    uvicorn.run(application(load(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

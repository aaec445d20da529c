"""Ray Serve's Stable Diffusion example: python -m benchmarks.peers.ray_serve_images VARIANT FOLDER PORT

The documentation's tutorial (docs.ray.io, serve/tutorials/stable-diffusion, read 2026-11) has a FastAPI deployment with GET /imagine and a
deployment whose `generate` calls the pipeline; that shape, with a seed and steps beside the prompt and one replica. Variants:
  example     as it stands there, with Serve's default of 5 requests at a time, which run in threads and share the pipeline's scheduler
  one-by-one  the same with max_ongoing_requests=1, which repairs what the threads break
  batch       `generate` under @serve.batch, as in its guide to dynamic batching, with its default wait of 0.01 s
"""

from __future__ import annotations

import sys
from io import BytesIO
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from PIL.Image import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.peers import local_ray

MAX_BATCH = 8
app = FastAPI()


@serve.deployment(num_replicas=1)
@serve.ingress(app)
class Ingress:
    """HTTP, and the picture's encoding."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    @app.get("/imagine", response_class=Response)
    async def imagine(self, prompt: str, seed: int, steps: int) -> Response:
        """A PNG."""
        image = await self.model.generate.remote(prompt, seed, steps)
        stream = BytesIO()
        image.save(stream, "PNG")
        return Response(content=stream.getvalue(), media_type="image/png")


@serve.deployment(num_replicas=1)
class Model:
    """The pipeline."""

    def __init__(self, folder: str) -> None:
        from benchmarks.peers.plain_pipeline import load

        self.pipeline = load(folder)

    def generate(self, prompt: str, seed: int, steps: int) -> Image:
        """One picture."""
        from benchmarks.peers.plain_pipeline import draw

        return draw(self.pipeline, [prompt], [seed], steps)[0]


@serve.deployment(num_replicas=1, max_ongoing_requests=4 * MAX_BATCH)
class BatchedModel:
    """The pipeline, called for several requests at once."""

    def __init__(self, folder: str) -> None:
        from benchmarks.peers.plain_pipeline import load

        self.pipeline = load(folder)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def generate(self, prompts: list[str], seeds: list[int], steps: list[int]) -> list[Image]:
        """One picture each."""
        from benchmarks.peers.plain_pipeline import draw_batch

        return draw_batch(self.pipeline, list(zip(prompts, seeds, steps, strict=True)))


def application(variant: str, folder: str) -> Any:
    """What `serve.run` takes."""
    if variant == "batch":  # with 5 requests in the ingress a batch would never be full
        return Ingress.options(max_ongoing_requests=1000).bind(BatchedModel.bind(folder))  # type: ignore[attr-defined]
    if variant == "one-by-one":
        return Ingress.bind(Model.options(max_ongoing_requests=1).bind(folder))  # type: ignore[attr-defined]
    return Ingress.bind(Model.bind(folder))  # type: ignore[attr-defined]


if __name__ == "__main__":
    local_ray.start()
    local_ray.run(application(sys.argv[1], sys.argv[2]), int(sys.argv[3]))
    local_ray.stay()

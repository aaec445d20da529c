"""LitServe: python -m benchmarks.peers.litserve_images VARIANT FOLDER PORT

By its documentation (lightning.ai/docs/litserve, read 2026-11): a LitAPI whose `encode_response` gives a PNG. Variants: `one-by-one`, its
default; `batch`, with max_batch_size and a batch_timeout of 0.01 s. Its limit of 30 s on a request is off.
"""

import sys
from io import BytesIO
from typing import Any

import litserve
from fastapi import Request, Response

from benchmarks.peers.plain_pipeline import draw, draw_batch, load

MAX_BATCH = 8


class Images(litserve.LitAPI):
    """POST /predict with prompt, seed, steps."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def setup(self, device: str) -> None:
        """In the worker's process."""
        self.pipeline = load(self.folder)

    def decode_request(self, request: Request) -> tuple[str, int, int]:
        """(prompt, seed, steps). LitServe reads the annotation, which says how the body comes in, and hands over its JSON."""
        return request["prompt"], request["seed"], request["steps"]

    def predict(self, asked: Any) -> Any:
        """One picture for one request."""
        prompt, seed, steps = asked
        return draw(self.pipeline, [prompt], [seed], steps)[0]

    def encode_response(self, image: Any) -> Response:
        """A PNG."""
        stream = BytesIO()
        image.save(stream, "PNG")
        return Response(content=stream.getvalue(), media_type="image/png")


class BatchedImages(Images):
    """The same for several requests at once."""

    def batch(self, inputs: list[Any]) -> list[Any]:
        """As they are."""
        return list(inputs)

    def predict(self, asked: list[Any]) -> list[Any]:
        """One picture each."""
        return draw_batch(self.pipeline, asked)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """As they are."""
        return output


if __name__ == "__main__":
    variant, folder, port = sys.argv[1:4]
    api = BatchedImages(folder, max_batch_size=MAX_BATCH, batch_timeout=0.01) if variant == "batch" else Images(folder)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False, log_level="warning")

"""A Ray Serve application that draws nothing: python -m benchmarks.peers.ray_serve_nothing FOLDER PORT

An HTTP deployment that asks another one, as ours does, and answers each request with the same picture: what its processes grow by is Ray's.
No `from __future__ import annotations`: Ray carries this module's classes to its workers by value, where FastAPI couldn't look up the names in them.
"""

import base64
import io
import sys
from typing import Any

from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.peers import local_ray

app = FastAPI()


@serve.deployment(max_ongoing_requests=100)
class Painter:
    """Has one picture."""

    def __init__(self) -> None:
        stream = io.BytesIO()
        Image.effect_noise((16, 16), 64).convert("RGB").save(stream, "PNG")
        self.png = stream.getvalue()

    async def draw(self, asked: dict[str, Any]) -> bytes:
        """A PNG."""
        return self.png


@serve.deployment(max_ongoing_requests=2000)
@serve.ingress(app)
class Ingress:
    """HTTP, and the answer's encoding."""

    def __init__(self, painter: DeploymentHandle) -> None:
        self.painter = painter

    @app.post("/v1/images/generations")
    async def images(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As ours answers."""
        png = await self.painter.draw.remote(asked)
        return {"created": 0, "data": [{"b64_json": base64.b64encode(png).decode()}]}


if __name__ == "__main__":
    local_ray.start()
    local_ray.run(Ingress.bind(Painter.bind()), int(sys.argv[2]))
    local_ray.stay()

"""Names the class for diffusers; the code is emu_ray's."""

from emu_ray.generation.pipeline import EmuPipeline  # noqa: F401

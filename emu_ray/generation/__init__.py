"""A checkpoint and prompts to images; one `Generator` serves sampling, evaluation and serving. No Ray."""

from emu_ray.generation.generator import Generator, SamplingSettings
from emu_ray.generation.pipeline import EmuPipeline

__all__ = ["EmuPipeline", "Generator", "SamplingSettings"]

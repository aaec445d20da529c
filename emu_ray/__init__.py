"""emu_ray: quality-tuning of text-to-image diffusion models after the Emu paper, on Ray.

The rooms and the floors they stand on are drawn in ARCHITECTURE.md; nothing is imported here, so that a job pays only
for what it uses.
"""

__version__ = "0.1.0"

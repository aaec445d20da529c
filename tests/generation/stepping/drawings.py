"""What tests ask of engines."""

from __future__ import annotations

from emu_ray.generation.stepping.tickets import Drawing


def mixed_drawings() -> list[Drawing]:
    """Nine, of different steps, guidance and solvers."""
    return [
        Drawing(
            prompt=f"a ball {i}",
            seed=i,
            steps=2 + i % 5,
            guidance=(1.0, 4.0, 7.5)[i % 3],
            solver=("ddim", "euler", "dpm++2m")[i % 3],
        )
        for i in range(9)
    ]

"""CLIP, OCR and the autoencoder on a real GPU: what the CPU says, and less at once when memory ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_ray.curation.clip_scorer import ClipModel, ClipScorer
from emu_ray.curation.ocr_scorer import OcrScorer, OcrSettings
from emu_ray.encoding.encoder import LatentEncoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
WORDS = ("", "BALL", "cube 7", "SALE", "mist", "Emu", "river", "50 %")


@pytest.mark.parametrize(("dtype", "far"), [("float32", 2e-3), ("float16", 1e-2)])
def test_clip_measures_what_it_does_on_the_cpu(
    untrained: Path, lettered: Callable[[str], np.ndarray], dtype: str, far: float
) -> None:
    heads = {name: str(untrained / "heads" / f"{name}.safetensors") for name in ("aesthetic", "offensive")}
    model = {"name": "emu-demo", "folder": str(untrained / "clip"), "concepts": ("ball", "cube", "ring")}
    pictures, captions = [lettered(word) for word in WORDS], [f"a sign that says {word}" for word in WORDS]
    expected = ClipScorer(
        ClipModel(**model, aesthetic_head=heads["aesthetic"], offensive_head=heads["offensive"])
    ).measure(pictures, captions)
    found = ClipScorer(
        ClipModel(**model, aesthetic_head=heads["aesthetic"], offensive_head=heads["offensive"], dtype=dtype),
        "cuda",  # type: ignore[arg-type]
    ).measure(pictures, captions)
    print("embedding apart by", np.abs(found.embedding - expected.embedding).max())
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=far)
    np.testing.assert_allclose(found.similarity, expected.similarity, atol=far)
    assert found.aesthetic is not None and expected.aesthetic is not None
    np.testing.assert_allclose(found.aesthetic, expected.aesthetic, atol=20 * far)


def test_where_memory_ends_clip_takes_fewer_at_once(untrained: Path, lettered: Callable[[str], np.ndarray]) -> None:
    scorer = ClipScorer(ClipModel(name="emu-demo", folder=str(untrained / "clip"), concepts=("ball",)), "cuda")
    pictures = [lettered(word) for word in WORDS] * 512
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = scorer.measure(pictures, ["a ball"] * len(pictures))
    half = before + (torch.cuda.max_memory_allocated() - before) // 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(half / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = scorer.measure(pictures, ["a ball"] * len(pictures))  # at once they need twice what there is
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=2e-3)


def test_ocr_reads_what_it_does_on_the_cpu(lettered: Callable[[str], np.ndarray]) -> None:
    pictures = [lettered(word) for word in WORDS]
    on_cpu, on_gpu = (OcrScorer(OcrSettings(canvas_px=96), device).measure(pictures) for device in ("cpu", "cuda"))
    assert [found.words for found in on_gpu] == [found.words for found in on_cpu]
    np.testing.assert_allclose([f.area for f in on_gpu], [f.area for f in on_cpu], atol=0.02)
    assert sum(found.words for found in on_gpu) >= 6


def test_latents_are_the_cpus(checkpoint: Path, noise_picture: Callable[..., bytes]) -> None:
    batch = {
        "key": np.arange(6),
        "image": np.array([noise_picture(i, 48, 48) for i in range(6)], dtype=object),
        "caption": np.array([f"ball {i}" for i in range(6)], dtype=object),
    }
    on_cpu, on_gpu = (
        LatentEncoder(str(checkpoint / "vae"), [(16, 16)], keeps_std=True, device=device)(dict(batch))
        for device in ("cpu", "cuda")
    )
    for name in ("latent_mean", "latent_std"):
        a, b = (np.stack(list(side[name])).astype(float) for side in (on_cpu, on_gpu))
        np.testing.assert_allclose(b, a, atol=5e-3 * max(1.0, np.abs(a).max()))

"""The engine on a real GPU: in each precision, with adapters, with decoding beside the passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.loading import Dtype, Lora, Placement, load_engine
from emu_ray.generation.stepping.tickets import Drawing, Progress
from tests.generation.small_bases import lora_of, sd15, sdxl
from tests.generation.stepping.drawings import mixed_drawings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DRAWINGS = mixed_drawings()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL."""
    return sdxl(tmp_path_factory.mktemp("base") / "sdxl")


def _engine(folder: Path, device: str = "cuda", dtype: Dtype = "float32", cuda_graphs: bool = True) -> Engine:
    engine = load_engine(folder, {}, Placement(device=device, dtype=dtype, cuda_graphs=cuda_graphs))
    assert isinstance(engine, Engine)
    return engine


def _drawn(engine: Engine, drawings: list[Drawing]) -> np.ndarray:
    return np.stack([t.result(120) for t in [engine.submit(drawing) for drawing in drawings]]).astype(int)


@pytest.fixture(scope="module")
def on_cpu(base: Path) -> Iterator[np.ndarray]:
    """All pictures as the CPU draws them in float32."""
    engine = _engine(base, "cpu")
    yield _drawn(engine, DRAWINGS)
    engine.close()


# Levels of 255 by which a picture may differ from the CPU's, at most and on average. A GPU's convolutions round float32 to 10 bits.
@pytest.mark.parametrize(("dtype", "most", "mean"), [("float32", 3, 0.1), ("float16", 4, 0.2), ("bfloat16", 16, 1.0)])
def test_a_picture_is_the_cpus_alone_and_in_company(
    base: Path, on_cpu: np.ndarray, dtype: Dtype, most: int, mean: float
) -> None:
    engine = _engine(base, dtype=dtype)
    together = _drawn(engine, DRAWINGS)
    alone = np.concatenate([_drawn(engine, [drawing]) for drawing in DRAWINGS])
    assert engine.model._recorded is not None and engine.model._recorded._recordings, "no pass was recorded"
    engine.close()
    for name, found in (("together", together), ("alone", alone)):
        difference = np.abs(found - on_cpu)
        print(f"{dtype} {name}: at most {difference.max()}, mean {difference.mean():.3f}")
        assert difference.max() <= most and difference.mean() <= mean, name
    assert np.abs(together - alone).max() <= most


def test_adapters_take_turns_in_recorded_passes_too(tmp_path: Path) -> None:
    base = sd15(tmp_path / "base")
    loras = {"stamps": Lora(folder=lora_of(base, tmp_path / "lora"))}
    drawings = [Drawing(prompt="a ball", seed=i, steps=6, lora=(None, "stamps")[i % 2]) for i in range(6)]
    pictures = {}
    for device in ("cpu", "cuda"):
        engine = load_engine(base, loras, Placement(device=device))
        assert isinstance(engine, Engine)
        pictures[device] = _drawn(engine, drawings)
        if device == "cuda":
            assert engine.model._recorded is not None
            assert {variant for variant, *_ in engine.model._recorded._recordings} == {None, "stamps"}
        engine.close()
    assert np.abs(pictures["cuda"] - pictures["cpu"]).max() <= 4
    assert np.abs(pictures["cuda"][0] - pictures["cuda"][1]).max() > 4


def test_previews_come_while_passes_go_on_and_change_no_picture(base: Path) -> None:
    engine, told = _engine(base, dtype="bfloat16"), list[Progress]()
    alone = _drawn(engine, [Drawing(prompt="a ball", seed=1, steps=12)])[0]  # and libraries are loaded
    ticket = engine.submit(Drawing(prompt="a ball", seed=1, steps=12), told.append, previews=3)
    others = [engine.submit(Drawing(prompt="a box", seed=i, steps=4)) for i in range(6)]
    picture = ticket.result(120)
    assert all(other.result(120).shape == picture.shape for other in others)
    shown = sorted(p.step for p in told if p.preview is not None)
    assert shown and set(shown) <= {3, 6, 9}  # one that would come after the picture is left out
    assert np.abs(picture.astype(int) - alone).max() <= 16
    engine.close()


def test_what_can_not_be_recorded_is_launched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(base)
    recorded = engine.model._recorded
    assert recorded is not None
    eager = recorded._eager

    def looked_at(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs["t"].sum().item()  # waits for the GPU, which no recording can
        return eager(inputs)

    expected = _drawn(engine, DRAWINGS[:1])
    monkeypatch.setattr(recorded, "_eager", looked_at)
    recorded._recordings.clear()
    found = [_drawn(engine, DRAWINGS[:1]) for _ in range(3)]
    assert recorded._is_off and not recorded._recordings
    assert all(np.abs(one - expected).max() <= 3 for one in found)
    assert torch.rand(1, device="cuda") < 1  # which torch refuses during a recording, and after one that failed
    engine.close()


def test_where_memory_ends_each_picture_is_drawn_all_the_same(base: Path) -> None:
    engine = _engine(base)
    drawings = [Drawing(prompt="a ball", seed=i, steps=4 + i % 3, width_px=1024, height_px=1024) for i in range(8)]
    latents = [torch.zeros(engine.model.shape(drawings[0]), device="cuda")]
    expected = _drawn(engine, drawings)  # and paces are known, passes recorded
    assert engine.model._recorded is not None and engine.model._recorded._recordings
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    engine.model.decode(latents)
    a_picture = torch.cuda.max_memory_allocated() - held
    limit = held + 1.5 * a_picture  # reserved memory comes in blocks
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = _drawn(engine, drawings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"a picture takes {a_picture / 2**20:.0f} MiB to decode; most at once {engine._decoder._most}")
    assert np.abs(found - expected).max() <= 3
    engine.close()

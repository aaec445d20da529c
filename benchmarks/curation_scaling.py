"""How the scoring pipeline on Ray compares with a plain loop, and how time and memory grow with the pool.

Used by `benchmarks.curation`; python -m benchmarks.curation_scaling pipeline|loop|memory ROOT ... is one measured process.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa

from benchmarks.pictures import write_folder
from emu_ray.curation.on_ray import READ_COLUMNS, ScoreRecipe, score
from emu_ray.curation.pair_scorer import ActorPool
from emu_ray.ingest.pairs import Caps, Pair, pool_tables
from emu_ray.stations import Station
from emu_ray.stations.slices import cut, read_slice

REPOSITORY = Path(__file__).resolve().parent.parent
CORES = 2
TINY = 16
ROWS_PER_FILE = 50


def scaling_ratios(quick: bool) -> dict[str, float]:
    """vs_limit, time_ratio_4x, memory_ratio_10x.

    Start-up is what the TINY pool takes, run once before so that files are cached and workers started alike for all
    sizes; what is compared are seconds beyond it, over the images beyond it.
    """
    count, rounds = (160, 1) if quick else (400, 3)
    with tempfile.TemporaryDirectory(prefix="emu_ray-bench-") as work:
        root = Path(work)
        small, large, wide = root / "n", root / "4n", root / "10n"
        for place, rows in ((root / "tiny", TINY), (small, count), (large, 4 * count)):
            write_pool(place, rows, 512, 384)
        against, growth = [], []
        for number in range(rounds):
            tiny = str(root / "tiny")
            cold, start, first, fourth = _measure("pipeline", str(number), tiny, tiny, str(small), str(large))[
                "seconds"
            ]
            _, loop_start, loop_fourth = _measure("loop", str(number), tiny, tiny, str(large))["seconds"]
            per_image, per_image_of_few = (fourth - start) / (4 * count - TINY), (first - start) / (count - TINY)
            per_image_of_loop = (loop_fourth - loop_start) / (4 * count - TINY)
            against.append(per_image_of_loop / per_image)
            growth.append(4 * per_image / per_image_of_few)
            print(
                f"pipeline: {1 / per_image:.1f} images/s beyond {start:.1f} s of start-up ({cold:.1f} s the first time); plain loop "
                f"on {CORES} cores: {1 / per_image_of_loop:.1f} images/s beyond {loop_start:.1f} s; 4N over N {growth[-1]:.2f}",
                flush=True,
            )
        few = 100 if quick else 500
        write_pool(root / "few", few, 128, 128)
        write_pool(wide, 10 * few, 128, 128)
        peaks = [_measure("memory", "0", str(place))["peak_mb"] for place in (root / "few", wide)]
        print(
            f"peak memory of all processes and the object store: {peaks[0]:.0f} MB for {few} rows, {peaks[1]:.0f} MB for {10 * few}",
            flush=True,
        )
    return {
        "vs_limit": round(statistics.median(against), 3),
        "time_ratio_4x": round(statistics.median(growth), 3),
        "memory_ratio_10x": round(peaks[1] / peaks[0], 3),
    }


def write_pool(root: Path, rows: int, width_px: int, height_px: int) -> None:
    """ROOT/pool of `rows` photographs, ROWS_PER_FILE a file."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(write_folder(Path(folder), rows, width_px, height_px).glob("*.jpg"))
        pool = Station(root / "pool")
        pool.begin("bench", "{}", "pool", {})
        for start in range(0, rows, ROWS_PER_FILE):
            pairs = [
                Pair(image=f.read_bytes(), caption="a picture", address=f.name)
                for f in files[start : start + ROWS_PER_FILE]
            ]
            pool.write_table(f"part-{start:06d}.parquet", pa.concat_tables(pool_tables(pairs, Caps())))
        pool.finish(rows=rows)


def recipe_of(root: str) -> ScoreRecipe:
    """Every scorer of the demo on larger pictures, waves of the usual size."""
    from emu_ray.curation.ocr_scorer import OcrSettings
    from jobs.score import SMALL_CLIP

    return ScoreRecipe(
        root=root,
        clip=SMALL_CLIP,
        ocr=OcrSettings(canvas_px=128),
        clip_pool=ActorPool(actors=1, cpus=0.25, batch_size=10),
        ocr_pool=ActorPool(actors=2, cpus=0.5, batch_size=10),
        rows_per_block=10,
    )


def _pipeline(number: str, roots: list[str]) -> list[float]:
    """Seconds of `score` over each pool, on a Ray that stands already."""
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=CORES,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}},
    )
    seconds = []
    for turn, root in enumerate(roots):
        place = Path(f"{root}-{number}-{turn}")
        place.mkdir()
        (place / "pool").symlink_to(Path(root) / "pool")
        started = time.perf_counter()
        score(recipe_of(str(place)))
        seconds.append(time.perf_counter() - started)
    return seconds


def _loop(roots: list[str]) -> list[float]:
    """Seconds of one process a core, each doing every step on its share of the files, the weights loaded anew each time."""
    seconds = []
    for root in roots:
        started = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        shares = [context.Process(target=_loop_share, args=(root, share)) for share in range(CORES)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
            if share.exitcode:
                sys.exit(f"the plain loop ended with {share.exitcode}")
        seconds.append(time.perf_counter() - started)
    return seconds


def _loop_share(root: str, share: int) -> None:
    import cv2
    import torch

    from emu_ray.curation.clip_scorer import ClipScorer
    from emu_ray.curation.ocr_scorer import OcrScorer
    from emu_ray.curation.perceptual_hash import perceptual_hash
    from emu_ray.curation.photography import photography
    from emu_ray.pictures.decode import decode

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    recipe = recipe_of(root)
    clip, ocr, pool = ClipScorer(recipe.clip), OcrScorer(recipe.ocr), Station(f"{root}/pool")
    names = [f.removeprefix(f"{pool.uri}/") for f in pool.parquet_files()]
    found = []
    for wanted in cut(pool, names, recipe.rows_per_block)[share::CORES]:
        table = read_slice(pool, wanted, READ_COLUMNS)
        pictures = [
            p for image in table["image"].to_pylist() if (p := decode(image, side_px=recipe.side_px).pixels) is not None
        ]
        found.append([(perceptual_hash(p), photography(p)) for p in pictures])
        found.append(clip.measure(pictures, table["caption"].to_pylist()))
        for start in range(0, len(pictures), recipe.ocr_pool.batch_size):
            found.append(ocr.measure(pictures[start : start + recipe.ocr_pool.batch_size]))


def _memory(number: str, root: str) -> float:
    """Peak MB of all processes of the run, shared pages (the object store among them) counted once; twice a second."""
    peak, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            total = 0
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            peak[0] = max(peak[0], total / 1e6)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    _pipeline(number, [root])
    ended.set()
    sampler.join()
    return peak[0]


def _measure(kind: str, *arguments: str) -> dict[str, list[float]]:  # type: ignore[type-arg]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_worker_niceness"] = "0"
    command = [sys.executable, "-m", "benchmarks.curation_scaling", kind, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    kind, number, *roots = sys.argv[1:]
    if kind == "memory":
        print(json.dumps({"peak_mb": _memory(number, roots[0])}))
    else:
        print(json.dumps({"seconds": _pipeline(number, roots) if kind == "pipeline" else _loop(roots)}))

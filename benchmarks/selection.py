"""What a selection with global near-duplicates costs: time and memory at N and 4 N pairs, and what it finds of planted copies.

python -m benchmarks.selection [--quick]; N is 2.5 million (quick: 50 thousand). Start-up and making the pools are left
out; each selection runs in a process of its own. The last line is JSON: time_ratio_4x (wall time at 4 N over that at N;
4 is linear), bytes_per_row (peak memory at 4 N above the memory before, over its rows), rows_per_s, peak_gb, recall and
precision of planted copies, long_runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from emu_ray.stations import Station

ROWS_PER_PART = 500_000
WIDTH = 16  # numbers of an embedding
CONCEPTS = np.array(["portrait", "food", "animal", "landscape", "car", "building", "plant", "object"])


def main(quick: bool) -> None:
    """Measure both sizes and print the figures."""
    rows = 50_000 if quick else 2_500_000
    with tempfile.TemporaryDirectory(prefix="emu_ray-selection-") as folder:
        found = []
        for count in (rows, 4 * rows):
            root = Path(folder) / str(count)
            write_scores(root, count)
            found.append(_measured(root))
            found[-1] |= judged_copies(root, count)
            print(f"{count} pairs: {json.dumps(found[-1])}", flush=True)
    small, large = found
    told = {
        "time_ratio_4x": round(large["wall_s"] / small["wall_s"], 2),
        "cpu_ratio_4x": round(large["cpu_s"] / small["cpu_s"], 2),
        "bytes_per_row": round((large["peak_bytes"] - large["bytes_before"]) / (4 * rows)),
        "rows_per_s": round(4 * rows / large["wall_s"]),
        "wall_s": large["wall_s"],
        "peak_gb": round(large["peak_bytes"] / 1e9, 2),
        **{name: large[name] for name in ("recall", "precision", "long_runs")},
    }
    print(json.dumps(told))


def write_scores(root: Path, count: int) -> None:
    """A `scores` station of `count` pairs; everything about a row follows from its number."""
    station = Station(root / "scores")
    station.begin("benchmark", "{}", "scores", {})
    for index, start in enumerate(range(0, count, ROWS_PER_PART)):
        table = scores_table(np.arange(start, min(start + ROWS_PER_PART, count)), count)
        station.write_table(f"part-{index:05d}.parquet", table)
    station.finish(rows=count)


def original_of(rows: np.ndarray, count: int) -> np.ndarray:
    """The row of which each is a planted copy, itself for 19 of 20; every fifth copy has the same bytes."""
    drawn = _mixed(rows, 1) % np.uint64(count)
    drawn -= drawn % np.uint64(20)  # neither a copy nor alike by hash alone
    return np.where(rows % 20 == 19, drawn, rows.astype(np.uint64)).astype(np.int64)


def scores_table(rows: np.ndarray, count: int) -> pa.Table:
    """The `scores` of these rows: copies within 6 bits and cosine 0.99, 1 in 100 alike by hash alone."""
    original = original_of(rows, count)
    is_same_file = (rows % 100 == 19) | (original == rows)
    looks_like = np.where(rows % 100 == 7, (rows + count // 2) // 20 * 20 % count, original)
    phash = _mixed(looks_like, 2)
    for flip in range(6):
        bit = _mixed(rows, 10 + flip) % np.uint64(64)
        phash = np.where(is_same_file & (looks_like == original), phash, phash ^ (np.uint64(1) << bit))
    vectors = _numbers(original, 3) + np.where(is_same_file, 0, 0.1)[:, None] * _numbers(rows, 4)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    share = [(_mixed(rows, 20 + i) >> np.uint64(11)).astype(np.float64) / 2**53 for i in range(6)]
    columns = {
        "key": pa.array(_mixed(rows, 30).view(np.int64)),
        "width_px": pa.array((400 + 1200 * share[0]).astype(np.int32)),
        "height_px": pa.array(np.full(len(rows), 800, np.int32)),
        "decode_error": pa.array([""] * len(rows), pa.string()),
        "offensive": pa.array((0.7 * share[1]).astype(np.float32)),
        "aesthetic": pa.array((10 * share[2]).astype(np.float32)),
        "clip_similarity": pa.array((0.1 + 0.4 * share[3]).astype(np.float32)),
        "embedding": pa.ListArray.from_arrays(
            np.arange(0, WIDTH * (len(rows) + 1), WIDTH, dtype=np.int32), vectors.astype(np.float32).ravel()
        ),
        "concept": pa.array(CONCEPTS[(_mixed(rows, 31) % np.uint64(8)).astype(int)]),
        "phash": _hex(phash),
        "text_words": pa.array((4 * share[4]).astype(np.int32)),
        "text_area": pa.array((0.05 * share[4]).astype(np.float32)),
        "gate_reason": pa.array([""] * len(rows), pa.string()),
        "has_caption": pa.array(np.ones(len(rows), bool)),
        "image_digest": _hex(_mixed(np.where(is_same_file, original, rows), 32)),
        "likes": pa.array((1000 * share[5] ** 4).astype(np.int64)),
    }
    return pa.table(columns)


def judged_copies(root: Path, count: int) -> dict[str, float]:
    """Recall over planted pairs of which both passed the bounds, precision over rejected duplicates."""
    table = Station(root / "selection").read_table(["key", "reject_reason", "duplicate_of"])
    key, reason = table["key"].to_numpy(), table["reject_reason"].combine_chunks().dictionary_encode()
    names = np.array(reason.dictionary.to_pylist())
    kind = names[reason.indices.to_numpy()]
    keeper = table["duplicate_of"].fill_null(0).to_numpy()
    keeper = np.where(kind == "duplicate", keeper, key)
    rows = np.arange(count)
    at = np.searchsorted(key, _mixed(rows, 30).view(np.int64))
    original = original_of(rows, count)
    passed = np.isin(kind[at], ["", "duplicate", "low_aesthetic", "over_quota", "not_in_top_k"])
    planted = (original != rows) & passed & passed[original]
    is_together = keeper[at] == keeper[at[original]]
    row_at = np.empty(count, np.int64)
    row_at[at] = rows
    rejected = np.flatnonzero(kind[at] == "duplicate")
    kept_instead = row_at[np.searchsorted(key, keeper[at[rejected]])]
    right = original[rejected] == original[kept_instead]
    return {
        "planted": int(planted.sum()),
        "recall": round(float(is_together[planted].mean()), 6),
        "precision": round(float(right.mean()), 6),
    }


def run_one(root: str) -> None:
    """In a process of its own: select once and print what it took."""
    from emu_ray.curation.policy import SelectionPolicy
    from emu_ray.curation.selecting import SelectRecipe, select

    before = _peak_bytes()
    policy = SelectionPolicy(
        likes_weight=0.1, max_share_per_concept=0.2, concept_quotas={"food": 1000}, max_images=100_000
    )
    wall, cpu = time.perf_counter(), time.process_time()
    manifest = select(SelectRecipe(root=root, policy=policy))
    told = {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "bytes_before": before,
        "peak_bytes": _peak_bytes(),
        "kept": manifest.counts["kept"],
        **manifest.extra["copies"],
    }
    print(json.dumps(told))


def _measured(root: Path) -> dict:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.selection", "--one", str(root)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    print("".join(f"  {line}\n" for line in ended.stdout.splitlines()[:-1]), end="", flush=True)
    return json.loads(ended.stdout.splitlines()[-1])


def _peak_bytes() -> int:
    """The most memory this process had; getrusage would tell that of its parent, if larger."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) * 1024


def _mixed(rows: np.ndarray, salt: int) -> np.ndarray:
    """(N,) uint64 that look random: splitmix64 of the row's number and a salt."""
    with np.errstate(over="ignore"):
        z = (rows.astype(np.uint64) + np.uint64(salt << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _numbers(rows: np.ndarray, salt: int) -> np.ndarray:
    """(N, WIDTH) numbers between -0.5 and 0.5."""
    flat = (rows[:, None] * WIDTH + np.arange(WIDTH)).ravel()
    return ((_mixed(flat, 1000 + salt) >> np.uint64(11)).astype(np.float64) / 2**53 - 0.5).reshape(-1, WIDTH)


def _hex(words: np.ndarray) -> pa.Array:
    octets = words.astype(">u8").view(np.uint8)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[np.stack([octets >> 4, octets & 15], axis=1).ravel()]
    offsets = np.arange(0, 16 * (len(words) + 1), 16, dtype=np.int32)
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits)))


if __name__ == "__main__":
    if "--one" in sys.argv:
        run_one(sys.argv[-1])
    else:
        main("--quick" in sys.argv[1:])

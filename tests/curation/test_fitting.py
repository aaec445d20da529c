"""An aesthetic head from votes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from emu_ray.curation.fitting import FILE, FitAestheticRecipe, fit_aesthetic
from emu_ray.curation.heads import load_head
from emu_ray.errors import InputError
from emu_ray.stations import Station


@pytest.fixture
def root(tmp_path: Path, make_scores: Callable[..., pa.Table]) -> Path:
    """ROOT/scores of 120 rows with random embeddings of 8 numbers; row 7 has none."""
    rng = np.random.default_rng(0)
    rows = [{"key": i, "embedding": rng.standard_normal(8).astype(np.float32).tolist()} for i in range(120)]
    rows[7]["embedding"] = None
    scores = Station(tmp_path / "scores")
    scores.begin("r", "{}", "scores", {})
    scores.write_table("part-0.parquet", make_scores(*rows))
    scores.finish(rows=120)
    return tmp_path


def write_votes(root: Path, taste: np.ndarray) -> Path:
    table = Station(root / "scores").read_table(["key", "embedding"])
    lines = ["key,vote"]
    for key, embedding in zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True):
        liked = 5 + float(np.dot(embedding or np.zeros(8), taste))
        lines += [f"{key},{min(10, max(0, liked + d))}" for d in (-0.1, 0.1)]
    (root / "votes.csv").write_text("\n".join(lines))
    return root / "votes.csv"


def test_a_linear_taste_is_found_and_its_quality_told(root: Path) -> None:
    taste = np.array([1, -1, 0.5, 0, 0, 0, 0, 0.2])
    manifest = fit_aesthetic(FitAestheticRecipe(root=str(root), votes=str(write_votes(root, taste))))
    assert manifest.extra["pictures"] == 119 and manifest.extra["votes"] == 240
    assert manifest.extra["spearman"] > 0.95
    assert manifest.extra["mean_error"] < 0.3 * manifest.extra["mean_error_of_guessing"]
    head = load_head(root / "heads" / "aesthetic" / FILE, "score")
    found = head.weight.detach().numpy()[0]
    assert float(found @ taste / np.linalg.norm(found) / np.linalg.norm(taste)) > 0.98
    assert fit_aesthetic(FitAestheticRecipe(root=str(root), votes=str(root / "votes.csv"))) == manifest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key,vote\n1,11", "line 2: expected votes from 0 to 10, found 11"),
        ("key,vote\n1,x", "line 2: expected a key and a vote"),
        (f"key,vote\n{2**63},3", f"line 2: expected a key and a vote, found '{2**63}', '3'"),
        ("id,vote\n1,3", "expected the columns key and vote, found id, vote"),
        ("key,vote\n1,3\n2,4", "at least 20 pictures .* found 2 of 2"),
        ("", "found no rows"),
    ],
)
def test_wrong_votes_are_one_sentence(root: Path, text: str, said: str) -> None:
    (root / "votes.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        fit_aesthetic(FitAestheticRecipe(root=str(root), votes=str(root / "votes.csv")))

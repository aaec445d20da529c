"""Fits an aesthetic head on the project's own human votes: ROOT/scores and votes -> ROOT/heads/aesthetic."""

from __future__ import annotations

import csv
import io
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from emu_ray.config import absolute, fingerprint, to_json
from emu_ray.curation.heads import MAX_SCORE, LinearHead, fit_linear
from emu_ray.curation.row_batches import row_batches
from emu_ray.errors import InputError, RecipeError, first_line
from emu_ray.stations import Manifest, Station, open_filesystem

FILE = "aesthetic.safetensors"
FEWEST = 20  # pictures with votes


@dataclass(frozen=True, kw_only=True)
class FitAestheticRecipe:
    """Whose votes, and how they are fitted."""

    root: str
    votes: str | None = (
        None  # a CSV with the columns key and vote, 0 to 10, a row a vote; None: the votes in ROOT/chosen
    )
    ridge: float = 1e-3  # relative to the number of pictures
    held_out: float = 0.2  # share of the pictures that only judge the head, 0 to 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise RecipeError(f"expected held_out above 0 and below 1, found {self.held_out}")


def fit_aesthetic(recipe: FitAestheticRecipe) -> Manifest:
    """Write ROOT/heads/aesthetic with the file `aesthetic.safetensors`, which `--clip.aesthetic-head` of score takes.

    The target of a picture is its mean vote. The manifest's extra: `pictures`, `votes`, and of the held-out pictures
    `spearman` (rank correlation of head and mean vote), `mean_error` and `mean_error_of_guessing` (always the mean).
    The head that is written is fitted on all of them. InputError for unreadable votes, votes outside 0..10, and for
    fewer than FEWEST pictures that have votes and an embedding.
    """
    base = recipe.root.rstrip("/")
    scores, target = Station(f"{base}/scores"), Station(f"{base}/heads/aesthetic")
    inputs = {"scores": scores.require("scores").fingerprint}
    votes = _votes_of_chosen(Station(f"{base}/chosen"), inputs) if recipe.votes is None else _votes_of_csv(recipe.votes)
    inputs["votes"] = fingerprint(sorted((k, v) for k, v in votes.items()))
    if not target.begin(fingerprint(recipe), to_json(recipe), "head", inputs):
        print(f"{target.uri}: finished before; nothing to do", flush=True)
        return target.require("head")
    embeddings, means = _examples(scores, votes)
    judged = _held_out(embeddings, means, recipe)
    head = fit_linear(embeddings, means, "score", recipe.ridge)
    with tempfile.TemporaryDirectory() as folder:
        head.save(Path(folder) / FILE)
        target.put_file(FILE, Path(folder) / FILE)
    told = {"pictures": len(means), "votes": sum(map(len, votes.values())), **judged}
    return target.finish(counts={"pictures": len(means)}, extra=told)


def _held_out(embeddings: np.ndarray, means: np.ndarray, recipe: FitAestheticRecipe) -> dict[str, float]:
    order = np.random.default_rng(recipe.seed).permutation(len(means))
    judge = order[: max(2, int(recipe.held_out * len(means)))]
    learn = np.setdiff1d(order, judge)
    found = _apply(fit_linear(embeddings[learn], means[learn], "score", recipe.ridge), embeddings[judge])
    constant = np.ptp(found) == 0 or np.ptp(means[judge]) == 0
    return {
        "held_out": len(judge),
        "spearman": 0.0 if constant else round(float(spearmanr(found, means[judge]).statistic), 4),
        "mean_error": round(float(np.abs(found - means[judge]).mean()), 4),
        "mean_error_of_guessing": round(float(np.abs(means[learn].mean() - means[judge]).mean()), 4),
    }


def _apply(head: LinearHead, embeddings: np.ndarray) -> np.ndarray:
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    return np.clip(embeddings @ weight[0] + bias, 0, MAX_SCORE)


def _examples(scores: Station, votes: dict[int, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) embeddings and (N,) mean votes, in the order of the keys; the scores pass batch by batch."""
    wanted = np.fromiter(votes, np.int64)
    found: dict[int, list[float]] = {}
    for table in row_batches(scores, ["key", "embedding"]):
        table = table.filter(np.isin(table["key"].to_numpy(), wanted))
        pairs = zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True)
        found.update((key, embedding) for key, embedding in pairs if embedding is not None)
    if len(found) < FEWEST:
        raise InputError(
            f"expected votes on at least {FEWEST} pictures that {scores.uri} measured, found {len(found)} "
            f"of {len(votes)} with votes"
        )
    keys = sorted(found)
    return np.asarray([found[k] for k in keys], np.float32), np.asarray([np.mean(votes[k]) for k in keys])


def _votes_of_chosen(chosen: Station, inputs: dict[str, str]) -> dict[int, list[float]]:
    inputs["chosen"] = chosen.require("chosen").fingerprint
    table = chosen.read_table(["key", "votes"])
    pairs = zip(table["key"].to_pylist(), table["votes"].to_pylist(), strict=True)
    return {key: _checked(votes, f"{chosen.uri}, key {key}") for key, votes in pairs if votes}


def _votes_of_csv(path: str) -> dict[int, list[float]]:
    system, local = open_filesystem(absolute(path, "--votes"))
    try:
        with system.open_input_stream(local) as stream:
            rows = list(csv.DictReader(io.StringIO(stream.read().decode("utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read the votes {path}: {first_line(error)}") from error
    if not rows or not {"key", "vote"} <= set(rows[0]):
        raise InputError(
            f"{path}: expected the columns key and vote, found {', '.join(rows[0]) if rows else 'no rows'}"
        )
    votes: dict[int, list[float]] = defaultdict(list)
    for line, row in enumerate(rows, 2):
        try:
            key, vote = int(np.int64(int(row["key"]))), float(row["vote"])
        except (TypeError, ValueError, OverflowError):  # a key is 64 bits wide
            raise InputError(
                f"{path}, line {line}: expected a key and a vote, found {row['key']!r}, {row['vote']!r}"
            ) from None
        votes[key] += _checked([vote], f"{path}, line {line}")
    return dict(votes)


def _checked(votes: list[float], where: str) -> list[float]:
    for vote in votes:
        if not 0 <= vote <= MAX_SCORE:
            raise InputError(f"{where}: expected votes from 0 to {MAX_SCORE:g}, found {vote}")
    return [float(v) for v in votes]

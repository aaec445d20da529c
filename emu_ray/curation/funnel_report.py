"""The funnel as one HTML page that needs nothing beside itself: counts, histograms, examples, concepts, costs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from emu_ray.curation.costs import Prices, StageCost, stage_costs
from emu_ray.pictures.decode import decode
from emu_ray.stations import Manifest, Station
from emu_ray.stations.slices import CHEAP_TO_REREAD_BYTES, Slice, cut, read_part, read_slice
from emu_ray.stations.store import Store

THUMBNAIL_PX = 192
SHOWN_CONCEPTS = 100


@dataclass(frozen=True)
class Example:
    """A picture of the pool as it is shown."""

    uri: str  # data:
    caption: str


def render_funnel(
    selection: Manifest, stages: Mapping[str, Mapping[str, float]], examples: Mapping[int, Example], prices: Prices
) -> str:
    """The page of a `selection` manifest; `stages` is {} and `examples` (by key) empty where there are none."""
    costs = stage_costs(stages, prices)
    environment = Environment(
        loader=PackageLoader("emu_ray.curation", "templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("funnel.html").render(
        station=selection.station,
        finished_at=selection.finished_at,
        rows=max(1, selection.counts["rows"]),
        rows_text=f"{selection.counts['rows']:,}",
        kept_text=f"{selection.counts['kept']:,}",
        steps=selection.extra["funnel"],
        charts=[
            histogram_svg(name, found) for name, found in selection.extra["histograms"].items() if any(found["counts"])
        ],
        walls=_walls(selection.extra["examples"], examples),
        concepts=selection.extra["concepts"][:SHOWN_CONCEPTS],
        costs=costs,
        prices=prices,
        total=_total(costs),
    )


def write_report(root: str, prices: Prices) -> str:
    """Write ROOT/funnel.html from ROOT/selection, with the rates of ROOT/scores and pictures of ROOT/pool; its address."""
    base = root.rstrip("/")
    selection = Station(f"{base}/selection").require("selection")
    scores = Station(f"{base}/scores").require("scores")
    wanted = {key for told in selection.extra["examples"] for key in (*told["below"], *told["above"])}
    pool = Station(f"{base}/pool")
    examples = read_examples(pool, wanted) if pool.is_finished() else {}
    page = render_funnel(selection, scores.extra.get("stages", {}), examples, prices)
    Store(base).put("funnel.html", page.encode())
    return Store(base).path("funnel.html")


def histogram_svg(name: str, found: Mapping[str, Any]) -> Markup:
    """One score's histogram with its bounds drawn in and the share of rows on the rejected side."""
    edges, counts = np.asarray(found["edges"]), np.asarray(found["counts"])
    figure = Figure(figsize=(4, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color="#2a7d6f")
    for side in ("least", "most"):
        if found[side] is not None:
            axes.axvline(found[side], color="#c2593f", linewidth=1.5)
            axes.text(
                found[side], axes.get_ylim()[1], f" {side} {found[side]:g}", color="#c2593f", va="top", fontsize=8
            )
    missing = f", {found['missing']:,} not measured" if found["missing"] else ""
    axes.set_title(f"{name}: {int(counts.sum()):,} pairs{missing}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # else the ids are others in each run
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Markup(stream.getvalue()[stream.getvalue().index("<svg") :])


def read_examples(pool: Station, keys: set[int]) -> dict[int, Example]:
    """Thumbnails of the pool's pictures with these keys: the key column is scanned, few pictures are read."""
    found: dict[int, Example] = {}
    wanted = np.fromiter(keys, np.int64)
    for uri in pool.parquet_files() if keys else []:
        name = uri.removeprefix(f"{pool.uri}/")
        here = np.flatnonzero(np.isin(read_part(pool, name, ["key"])["key"].to_numpy(), wanted))
        if len(here):
            found.update(_thumbnails(pool, name, here))
        if len(found) == len(keys):
            break
    return found


def _thumbnails(pool: Station, name: str, rows: np.ndarray) -> dict[int, Example]:
    """Row numbers of one file -> thumbnails; the row groups that hold none are not read."""
    found: dict[int, Example] = {}
    start = 0
    for whole in cut(pool, [name], CHEAP_TO_REREAD_BYTES):
        inside = rows[(rows >= start) & (rows < start + whole.rows)] - start
        start += whole.rows
        if len(inside):
            table = read_slice(pool, Slice(**vars(whole)), ["key", "image", "caption"]).take(inside)
            for row in table.to_pylist():
                pixels = decode(row["image"], side_px=THUMBNAIL_PX).pixels
                if pixels is not None:
                    found[row["key"]] = Example(_data_uri(pixels), row["caption"][:200])
    return found


def _data_uri(pixels: np.ndarray) -> str:
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _walls(told: list[dict[str, Any]], examples: Mapping[int, Example]) -> list[SimpleNamespace]:
    walls = []
    for each in told:
        sides = []
        for where in ("below", "above"):
            rejected = (where == "below") == (each["side"] == "least")
            images = [examples[key] for key in each[where] if key in examples]
            sides.append(SimpleNamespace(name="rejected" if rejected else "kept", images=images))
        if any(side.images for side in sides):
            walls.append(SimpleNamespace(title=f"{each['score']}: at {each['side']} {each['bound']:g}", sides=sides))
    return walls


def _total(costs: list[StageCost]) -> SimpleNamespace:
    return SimpleNamespace(
        cpu_hours=sum(c.cpu_hours_per_million for c in costs),
        gpu_seconds=sum(c.gpu_seconds_per_million for c in costs),
        dollars=sum(c.dollars_per_million for c in costs),
    )

"""The report's training charts as inline SVG, drawn by matplotlib without a display.

Ink and grid take the page's text colour (`currentColor`), so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emu_ray.evaluation.report_content import CurveChart

LINE_COLOURS = ("#3d7dd8", "#d9772b", "#2f9e6e", "#a35bc4", "#c94f6d")  # legible on white and on near-black
_INK = "#123456"  # replaced by currentColor in the SVG


@contextmanager
def drawn_figure(width_in: float, height_in: float, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with `columns` plain axes side by side, closed whatever happens."""
    figure, grid = plt.subplots(1, columns, figsize=(width_in, height_in), layout="constrained", squeeze=False)
    panels = list(grid[0])
    try:
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", linewidth=0.6, alpha=0.25)
            axes.set_axisbelow(True)
        yield figure, panels
    finally:
        plt.close(figure)


def curve_chart_svg(chart: CurveChart) -> str:
    """One `<svg>` element with every curve of the chart; its ids are unique on a page of such charts."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _INK,
    }
    with matplotlib.rc_context(settings), drawn_figure(5.2, 2.9) as (figure, (axes,)):
        _draw_curves(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label=chart.title)


def _draw_curves(axes: Axes, chart: CurveChart) -> None:
    for i, curve in enumerate(chart.curves):
        marker = "o" if len(curve.steps) <= 12 else None
        axes.plot(
            curve.steps,
            curve.values,
            label=curve.label,
            color=LINE_COLOURS[i % len(LINE_COLOURS)],
            linewidth=1.8,
            marker=marker,
            markersize=4,
        )
    if chart.mark_step is not None:
        axes.axvline(chart.mark_step, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="kept")
    axes.set_xlabel("step")
    axes.set_ylabel(chart.y_label)
    if len(chart.curves) > 1 or chart.mark_step is not None:
        axes.legend(frameon=False)


def _inline(svg: str, label: str) -> str:
    """The drawing alone: no XML prolog, no metadata block (it names outside addresses), no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1; font-family: inherit", svg)
    prefix = "c" + re.sub(r"\W+", "", label)
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return svg.replace("<svg", '<svg role="img"', 1)

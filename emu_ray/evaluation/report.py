"""The run's report: one HTML page that needs nothing beside itself.

Pictures and charts lie inside the page; it loads nothing from anywhere. What is shown is decided by `ReportContent`,
how it looks by `templates/report.html`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from emu_ray.errors import InputError
from emu_ray.evaluation.charts import curve_chart_svg
from emu_ray.evaluation.preference import Preference
from emu_ray.evaluation.report_content import ReportContent

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """One row of the paper's results: tuned against pretrained, in percent."""

    label: str
    win: float
    tie: float
    lose: float


# Emu (arXiv 2309.15807), quality-tuned against pretrained, on PartiPrompts and on Open User Input
PAPER_APPEAL = (
    PaperFigure(label="PartiPrompts", win=82.9, tie=1.7, lose=15.4),
    PaperFigure(label="Open User Input", win=91.2, tie=0.9, lose=7.9),
)
PAPER_FAITHFULNESS = (
    PaperFigure(label="PartiPrompts", win=36.7, tie=42.3, lose=21.0),
    PaperFigure(label="Open User Input", win=47.9, tie=33.6, lose=18.5),
)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One question of the comparison, ours above the paper's."""

    title: str
    asked: str
    ours: Preference
    paper: Sequence[PaperFigure]


def render_report(content: ReportContent) -> str:
    """The whole page as text. InputError when a picture is neither PNG, JPEG nor WebP."""
    environment = Environment(
        loader=PackageLoader("emu_ray.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["duration"] = duration
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    total = sum(step.count for step in content.funnel)
    return environment.get_template("report.html").render(
        c=content,
        total=total,
        largest=max((step.count for step in content.funnel), default=1) or 1,
        questions=_questions(content),
        charts=[(chart, Markup(curve_chart_svg(chart))) for chart in content.training],
        total_seconds=sum(seconds for _, seconds in content.seconds),
    )


def data_uri(image: bytes) -> str:
    """The picture as a `data:` address. InputError when it is neither PNG, JPEG nor WebP."""
    for signature, mime in _SIGNATURES.items():
        if image.startswith(signature):
            return f"data:{mime};base64,{base64.b64encode(image).decode('ascii')}"
    raise InputError(f"a picture of the report must be PNG, JPEG or WebP bytes, got {len(image)} bytes of neither")


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would use: `0.4 s`, `48 s`, `12 min 05 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _questions(content: ReportContent) -> list[_Question]:
    questions = []
    if content.appeal is not None:
        asked = "Which picture is the more beautiful one? The prompt is not considered."
        questions.append(_Question(title="Visual appeal", asked=asked, ours=content.appeal, paper=PAPER_APPEAL))
    if content.faithfulness is not None:
        asked = "Which picture shows what the prompt says?"
        questions.append(
            _Question(title="Text faithfulness", asked=asked, ours=content.faithfulness, paper=PAPER_FAITHFULNESS)
        )
    return questions

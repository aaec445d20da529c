"""The report holds everything it shows, shows the numbers it was given, and loads nothing from outside."""

from __future__ import annotations

import base64
import dataclasses
import io
import re

import pytest
from matplotlib import pyplot as plt
from PIL import Image

from emu_ray.errors import InputError
from emu_ray.evaluation.preference import Preference
from emu_ray.evaluation.report import data_uri, duration, render_report
from emu_ray.evaluation.report_content import (
    BeforeAfter,
    ChosenSet,
    Curve,
    CurveChart,
    DefectScore,
    FunnelStep,
    Grid,
    Picture,
    ReportContent,
)


def _image(colour: tuple[int, int, int], encoding: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, encoding)
    return buffer.getvalue()


def _preference(win: float) -> Preference:
    return Preference(
        win=win,
        tie=5.5,
        lose=94.5 - win,
        ci95=(win - 4.2, win + 3.1),
        win_minus_lose_ci95=(-2.5, 7.5),
        n_pairs=1234,
        n_prompts=617,
        sign_test_p=0.0321,
    )


def _content() -> ReportContent:
    pair = BeforeAfter(
        prompt="a red & round ball",
        seed=77,
        base=_image((9, 9, 9)),
        tuned=_image((200, 9, 9), "JPEG"),
        appeal="tuned",
        faithfulness="base",
    )
    charts = [
        CurveChart(title=title, y_label="loss", curves=[Curve(label="train", steps=[0, 1, 2], values=[3, 2, 1.5])])
        for title in ("Pretraining", "Quality-tuning")
    ]
    return ReportContent(
        title="Run of the test",
        facts=[("pool", "4,321 pairs")],
        funnel=[
            FunnelStep(
                reason="too_small",
                count=1111,
                unique_kills=987,
                meaning="The shorter side is under 64 px.",
                examples=[Picture(image=_image((1, 2, 3), "WEBP"), caption="<script>alert(1)</script>")],
            ),
            FunnelStep(reason="", count=3210, meaning="All rules hold."),
        ],
        filters=[DefectScore(defect="too_small", planted=1100, flagged=1111, precision=0.9876, recall=None)],
        chosen=ChosenSet(annotator="simulated", n_candidates=3210, n_chosen=300, error_rate=0.05),
        appeal=_preference(81.3),
        faithfulness=_preference(44.4),
        grids=[Grid(title="At random", how_picked="the first eight prompts", rows=[pair])],
        training=charts,
        seconds=[("quality_tune", 754.0)],
        versions=[("ray", "2.60.0")],
        commands=["make demo > log"],
        made_at="2026-11-22",
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(_content())


def test_page_loads_nothing_from_outside(page: str) -> None:
    loads = re.findall(r'(?:src|href|action|poster|data|srcset)\s*=\s*"([^"]*)"', page)
    assert loads
    assert all(load.startswith(("data:", "#")) for load in loads), loads
    assert not re.search(r"url\((?!#)|@import|<script|<iframe|<object", page)


def test_every_picture_decodes(page: str) -> None:
    pictures = re.findall(r'<img [^>]*src="data:image/[a-z]+;base64,([^"]+)"', page)
    assert len(pictures) == 3  # one example, two sides of a pair
    for text in pictures:
        Image.open(io.BytesIO(base64.b64decode(text, validate=True))).load()


def test_the_numbers_given_are_on_the_page(page: str) -> None:
    for shown in ("4,321 pairs", "1,111", "987", "98.8", "81.3", "77.1 to 84.4", "44.4", "617 prompts", "0.0321"):
        assert shown in page, shown
    for shown in ("12 min 34 s", "2.60.0", "82.9", "91.2", "36.7", "47.9", "seed 77"):
        assert shown in page, shown


def test_page_says_how_pictures_and_the_chosen_set_were_picked(page: str) -> None:
    assert "the first eight prompts" in page
    assert "No person looked at these images. A simulated annotator that judges wrongly in 5 % of cases" in page
    assert "Emu paper, PartiPrompts" in page


def test_a_caption_with_markup_is_shown_as_text(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a red &amp; round ball" in page
    assert "make demo &gt; log" in page


def test_ids_of_two_charts_do_not_meet(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_drawing_leaves_no_figure_open(page: str) -> None:
    assert page
    assert plt.get_fignums() == []


def test_parts_that_are_not_given_leave_no_section() -> None:
    page = render_report(ReportContent(title="Empty"))
    assert "<section" not in page


def test_people_are_named_when_people_chose() -> None:
    chosen = ChosenSet(annotator="people", n_candidates=50, n_chosen=7)
    page = render_report(dataclasses.replace(_content(), chosen=chosen))
    assert "People chose 7 of 50 candidates; their choice was read from a list of keys and captions." in page
    assert "simulated" not in page


def test_a_set_that_nobody_looked_at_is_called_so() -> None:
    said = ChosenSet(annotator="nobody", n_candidates=50, n_chosen=7).sentence()
    assert said == "Nobody chose: the best-ranked 7 of 50 candidates were taken with their own captions."


def test_bytes_that_are_no_picture_are_refused() -> None:
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        data_uri(b"GIF89a...")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.44, "0.4 s"), (48.2, "48 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (12_000, "3 h 20 min")],
)
def test_duration_takes_the_readers_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown

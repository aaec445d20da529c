"""The page in a real Chromium, before the real server: what a person sees of a drawing, and what they can do about it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve as ray_serve

from serve.access import add_key
from serve.app import app
from serve.args import ServeArgs
from serve.schemas import ImagesRequest

pytest.importorskip("selenium", reason="the page is tested in a browser: pip install selenium")
from selenium.webdriver.common.keys import Keys

from tests.serve.broken_line import broken_line
from tests.serve.client import stream
from tests.serve.tab import Tab, chromium, programs

pytestmark = pytest.mark.slow
PHONE = (360, 740)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A running Chromium, and the folder that it saves to."""
    found = programs()
    if found is None:
        pytest.skip("the page is tested in a browser: no chromium with its chromedriver is on the PATH")
    folder = tmp_path_factory.mktemp("chromium")
    with chromium(folder, *found) as driver:
        yield driver, folder / "saved"


@pytest.fixture
def tab(browser: tuple[Any, Path], address: str) -> Tab:
    """The studio, opened for the first time."""
    return Tab(browser[0], address, browser[1])


@pytest.fixture(scope="module")
def keyed(address: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a second application, below a path of its own, and two keys, each of which may have 2 images a minute."""
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    keys = [add_key(file, name, images_per_minute=2, together=1) for name in ("somebody", "another one")]
    application = app(ServeArgs(checkpoint=model, num_cpus=0.2, keys_file=str(file)))
    ray_serve.run(application, name="keyed", route_prefix="/keyed")
    yield f"{address}/keyed", keys
    ray_serve.delete("keyed")


def _waiting_s() -> float:
    waiting: float = ray_serve.get_deployment_handle("painter", "emu_ray").waiting_s.remote().result(timeout_s=30)
    return waiting


def _pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def _parameters(picture: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(picture.text["parameters"])
    return told


def test_a_prompt_becomes_a_picture_seen_on_its_way(tab: Tab) -> None:
    tab.draw(prompt="a red ball", n=2, steps=40)
    assert "2 pictures in " in tab.status()
    steps, looks, _ = tab.seen()
    assert all(len(set(steps[place]) - {0}) >= 3 for place in ("0", "1")), steps
    for place in "01":
        own = [look for look in looks if look.startswith(place)]
        assert sum(" data:" in look for look in own) >= 2, "no partial images"
    sizes = tab.run("return [...document.querySelectorAll('#stage img')].map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[64, 64], [64, 64]]


def test_escape_stops_two_models_and_says_so_and_the_server_stops_too(tab: Tab) -> None:
    tab.choose_mode("pair")
    tab.set(n=8, steps=200, size="64x96")
    tab.begin()
    ahead_s = tab.until(lambda: len(tab.seen()[0]) > 1 and _waiting_s(), "nothing was drawn")
    tab.press(Keys.ESCAPE)
    tab.until(lambda: tab.status().startswith("Stopped after"), "it never stopped", 5)
    tab.until(
        lambda: _waiting_s() == 0,
        "the server goes on though nobody waits for it",
        timeout_s=max(1.5, ahead_s / 12),  # far sooner than the drawing would end; what it has ahead is guessed high
    )
    assert tab.find("#go").text == "Draw"
    assert not tab.all("#stage progress")


def test_every_setting_reaches_the_server_and_a_saved_picture_holds_them(tab: Tab) -> None:
    tab.find("#negative").send_keys("blur")
    tab.draw(
        prompt="Ein roter Ball, 1", n=1, seed=11, steps=3, guidance=2.5, size="64x96", scheduler="euler", model="base"
    )
    assert tab.captions() == ["base\nseed 11\nSave"] or tab.captions() == ["base seed 11 Save"]
    name, picture = tab.save()
    assert (name, picture.format) == ("ein-roter-ball-1-base-11.png", "PNG")
    assert _parameters(picture) == {
        "model": "base", "prompt": "Ein roter Ball, 1", "negative_prompt": "blur", "steps": 3, "guidance": 2.5, "solver": "euler",
        "width_px": 64, "height_px": 96, "seed": 11,
    }  # fmt: skip


def test_the_last_seed_draws_the_same_picture_and_a_random_one_another(tab: Tab) -> None:
    tab.draw(n=1, steps=2)
    first = tab.save()[1]
    tab.find("#seed-last").click()
    assert tab.value("seed") == str(_parameters(first)["seed"])
    tab.draw()
    assert np.abs(_pixels(tab.save()[1]) - _pixels(first)).max() <= 1
    tab.find("#seed-random").click()
    tab.draw()
    assert _parameters(tab.save()[1])["seed"] != _parameters(first)["seed"]


def test_history_survives_a_reload_and_gives_its_settings_back(tab: Tab) -> None:
    older = {"prompt": "a red ball", "n": "2", "seed": "5", "steps": "3", "guidance": "2", "size": "96x64", "scheduler": "dpm++2m", "model": "base"}  # fmt: skip
    tab.draw(**older, negative="fog")
    picture = tab.save(1)[1]
    tab.draw(
        prompt="a blue cube",
        n=1,
        seed=6,
        steps=2,
        guidance=3,
        size="64x64",
        scheduler="ddim",
        model="tuned",
        negative=" ",
    )
    tab.open()
    assert (tab.value("prompt"), tab.value("seed"), tab.value("steps")) == ("a blue cube", "6", "2"), "the form forgot"
    tab.until(lambda: len(tab.all("#history .thumb")) == 2, "the history is gone")
    tab.all("#history .thumb")[1].click()
    assert {field: tab.value(field) for field in older} == older
    assert tab.value("negative") == "fog"
    assert np.array_equal(_pixels(tab.save(1)[1]), _pixels(picture))


def test_history_can_be_deleted_by_one_and_altogether(tab: Tab) -> None:
    for seed in (1, 2, 3):
        tab.draw(n=1, steps=1, seed=seed)
    tab.run("document.querySelector('#history .delete').click()")
    tab.open()
    thumbs = tab.until(lambda: tab.all("#history .thumb"), "the history is gone")
    assert [str(thumb.get_attribute("title"))[-2] for thumb in thumbs] == ["2", "1"]
    tab.find("#clear").click()
    tab.driver.switch_to.alert.accept()
    tab.until(lambda: not tab.find("#past").is_displayed(), "the history is still there")
    tab.open()
    time.sleep(0.3)
    assert not tab.all("#history .thumb")


def test_history_keeps_the_last_60(tab: Tab) -> None:
    tab.draw(n=1, steps=1)
    kept = tab.run("""
        const {addDrawing, drawings} = await import("/pages/memory.js");
        for (let i = 1; i <= 61; i++) await addDrawing({settings: {...drawings[0].settings, prompt: `number ${i}`}, images: drawings[0].images});
        return drawings.length;
    """)
    tab.open()
    thumbs = tab.until(lambda: tab.all("#history .thumb"), "the history is gone")
    assert (kept, len(thumbs)) == (60, 60)
    assert [str(thumbs[i].get_attribute("title")).split(" (")[0] for i in (0, 59)] == ["number 61", "number 2"]


def test_it_draws_where_the_browser_keeps_nothing(tab: Tab) -> None:
    added = tab.tell(
        "Page.addScriptToEvaluateOnNewDocument",
        source="for (const name of ['indexedDB', 'localStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('no'); }});",
    )
    try:
        tab.open()
        tab.draw(n=1, steps=1)
        assert len(tab.all("#history .thumb")) == 1
    finally:
        tab.tell("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
        tab.driver.get("about:blank")


def test_side_by_side_draws_two_named_pictures_of_one_seed(tab: Tab) -> None:
    tab.choose_mode("pair")
    tab.draw(prompt="a red ball", n=2, steps=20)
    left, right, *_ = pictures = [tab.save(place)[1] for place in range(4)]
    told = [_parameters(picture) for picture in pictures]
    assert [one["model"] for one in told] == ["tuned", "base", "tuned", "base"]
    assert told[0]["seed"] == told[1]["seed"] == told[2]["seed"] - 1 == told[3]["seed"] - 1
    assert [caption.split()[0] for caption in tab.captions()] == ["tuned", "base", "tuned", "base"]
    assert np.abs(_pixels(left) - _pixels(right)).max() <= 1  # the two are one model here
    assert all(len(steps) >= 3 for steps in tab.seen()[0].values()), "no progress of one of them"
    boxes = [figure.rect for figure in tab.all("#stage figure")]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]


def test_a_key_is_asked_for_kept_over_a_reload_and_forgotten(tab: Tab, keyed: tuple[str, list[str]]) -> None:
    tab.address = keyed[0]
    tab.open()
    assert "an API key is needed" in tab.find("#key-told").text.replace("An", "an")
    tab.set(key="wrong")
    tab.press(Keys.ENTER)
    tab.until(lambda: "isn't known here" in tab.find("#key-told").text, "a wrong key was taken")
    tab.set(key=keyed[1][0])
    tab.press(Keys.ENTER)
    tab.until(lambda: not tab.find("#key-form").is_displayed(), "the right key wasn't taken")
    tab.open()
    tab.draw(n=1, steps=1)
    tab.find("#forget").click()
    tab.until(lambda: tab.find("#key-form").is_displayed(), "the key wasn't forgotten")
    tab.open()
    assert tab.find("#key-form").is_displayed()


def test_too_much_asked_for_says_what_is_too_much_and_when_to_try_again_and_loses_nothing(
    tab: Tab, keyed: tuple[str, list[str]]
) -> None:
    tab.address = keyed[0]
    tab.open()
    tab.set(key=keyed[1][1])
    tab.press(Keys.ENTER)
    tab.until(lambda: not tab.find("#key-form").is_displayed(), "the right key wasn't taken")
    tab.set(prompt="a lot", n=8, steps=1)
    tab.begin()
    tab.until(lambda: "2 images a minute" in tab.status() and "ask for fewer" in tab.status(), "no refusal")
    assert (tab.value("prompt"), tab.value("n"), tab.find("#go").text) == ("a lot", "8", "Draw")
    tab.draw(n=2, steps=1)
    tab.begin()
    tab.until(lambda: re.search(r"2 images a minute.*Try again in \d+ s\.", tab.status()) is not None, "no refusal")
    assert (tab.value("prompt"), tab.value("n"), tab.find("#go").text) == ("a lot", "2", "Draw")


def test_a_refusal_is_the_servers_own_sentence_and_loses_nothing(tab: Tab) -> None:
    tab.draw(n=1, steps=1)
    tab.set(prompt="   ", seed=3)
    tab.begin()
    tab.until(lambda: "the prompt is empty" in tab.status(), "no refusal")
    assert (tab.value("prompt"), tab.value("seed")) == ("   ", "3")
    assert len(tab.all("#stage img")) == 1, "the picture before is gone"


def test_a_line_that_breaks_on_the_way_is_told(browser: tuple[Any, Path], address: str) -> None:
    with broken_line(address, last_byte=60_000) as line:
        tab = Tab(browser[0], line, browser[1])
        tab.set(prompt="a red ball", n=8, steps=200)
        tab.begin()
        tab.until(lambda: "broke off before the pictures were finished" in tab.status(), "nothing was said")
        assert (tab.value("prompt"), tab.find("#go").text) == ("a red ball", "Draw")
    tab.begin()
    tab.until(lambda: "The server can't be reached." in tab.status(), "nothing was said")


def test_who_waits_sees_how_many_are_before(tab: Tab, address: str) -> None:
    """A replica draws for eight at once."""
    with ExitStack() as others:
        for _ in range(8):
            others.enter_context(stream(address, n=8, steps=200, progress=True)).readline()
        tab.set(n=1, steps=2)
        tab.begin()
        tab.until(lambda: "8 requests before you" in tab.seen()[2], "nothing was said")


def test_blind_comparison_hides_the_names_until_the_vote(tab: Tab) -> None:
    assert tab.find("#blind-mode").is_displayed(), "this server compares nothing"
    tab.choose_mode("blind")
    tab.set(prompt="a red ball", steps=2)
    for key, told in (
        (Keys.ARROW_LEFT, "You preferred "),
        ("t", "A tie."),
        (Keys.ARROW_DOWN, "A tie."),
        (Keys.ARROW_RIGHT, "You preferred "),
    ):
        tab.begin()
        tab.until(lambda: tab.find("#vote").is_displayed(), "no pair came")
        assert len(tab.all("#stage img")) == 2 and not tab.captions() and not tab.all("#stage a")
        tab.press(key)
        tab.until(lambda told=told: tab.status().startswith(told), "the vote wasn't counted")  # type: ignore[misc]
        names = [caption.split()[0] for caption in tab.captions()]
        assert sorted(names) == ["base", "tuned"]
        if told == "You preferred ":
            at = 0 if key == Keys.ARROW_LEFT else 1
            assert tab.status() == f"You preferred {names[at]}."
            assert "chosen" in str(tab.all("#stage figure")[at].get_attribute("class"))
    assert len(tab.all("#history .thumb")) == 4
    seed = tab.captions()[0]
    tab.press(Keys.ENTER)  # the focus is on "Next pair"
    tab.until(lambda: tab.find("#vote").is_displayed(), "no next pair came")
    tab.find("[data-choice=tie]").click()
    tab.until(lambda: tab.captions(), "the vote wasn't counted")
    assert tab.captions()[0] != seed


def _offered(tab: Tab, **answer: Any) -> None:
    tab.run("(await import('/pages/settings.js')).offerModels(arguments[0])", answer)


def test_what_the_models_are_like_is_offered(tab: Tab) -> None:
    preference = {"against": "base", "win": 82.9, "tie": 4.1, "lose": 13.0, "ci95": [78.0, 87.0], "n_pairs": 240}
    tuned, base = {"id": "tuned", "size_px": 64, "preference": preference}, {"id": "base", "size_px": 64}
    failed = {"id": "newest", "size_px": None, "status": "failed"}
    _offered(tab, data=[tuned, base, failed], comparisons=True)
    assert tab.find("#preference").text == "tuned is preferred to base in 82.9 % of 240 pairs"
    assert not tab.find("#model option[value=newest]").is_enabled()
    assert tab.find("#blind-mode").is_displayed()
    tab.set(model="base")
    assert not tab.find("#preference").is_displayed()
    _offered(tab, data=[tuned, base])
    assert tab.find("#modes").is_displayed() and not tab.find("#blind-mode").is_displayed()
    _offered(tab, data=[tuned, failed], comparisons=True)
    assert not tab.find("#modes").is_displayed()


@pytest.mark.parametrize("own_px", [32, 64, 96, 512, 768, 1024])
def test_each_offered_size_is_one_that_the_server_draws(tab: Tab, own_px: int) -> None:
    _offered(tab, data=[{"id": "tuned", "size_px": own_px}])
    sizes = [str(option.get_attribute("value")) for option in tab.all("#size option")]
    drawn = [ImagesRequest(prompt="a", size=size).size_px(own_px) for size in sizes]
    assert drawn[0] == (own_px, own_px)
    assert any(width < height for width, height in drawn) and any(width > height for width, height in drawn)


def _overflowing(tab: Tab) -> list[str]:
    """What stands out at the right of the screen."""
    found: list[str] = tab.run("""
        return [document.documentElement, ...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest(".unseen")
          && (e.getBoundingClientRect().right > innerWidth + .5 || (e === document.documentElement && e.scrollWidth > innerWidth)))
          .map(e => `${e.tagName} ${e.id} ${e.getBoundingClientRect().right}`);
    """)
    return found


@pytest.mark.parametrize("mode", ["one", "pair"])
def test_on_a_phone_nothing_stands_out_and_buttons_are_large(tab: Tab, mode: str) -> None:
    tab.look(*PHONE, touch=True)
    tab.open()
    tab.find("summary").click()
    tab.choose_mode(mode)
    tab.draw(prompt="w" * 12, n=4, steps=1, seed=9007199254740000)
    tab.set(prompt="w" * 300)
    assert tab.run("return innerWidth") == PHONE[0]
    assert not _overflowing(tab)
    heights = tab.run("""
        return Object.fromEntries([...document.querySelectorAll("button, input:not([type=radio]), select")].filter(e => e.checkVisibility())
          .map(e => [e.id || e.className, e.getBoundingClientRect().height]));
    """)
    assert not {name: height for name, height in heights.items() if height < 44}
    for opener, dialog in (("#stage button", "#large"), ("#keys", "#help")):
        tab.run("document.querySelector(arguments[0]).click()", opener)
        assert tab.find(dialog).is_displayed() and not _overflowing(tab)
        tab.press(Keys.ESCAPE)


def test_dark_mode_is_dark_and_readable(tab: Tab) -> None:
    def lightness() -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            tab.run("""
                const style = getComputedStyle(document.body);
                return [style.backgroundColor, style.color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + Number(one), 0) / 765);
            """)
        )

    paper, ink = lightness()
    assert paper > 0.9 and ink < 0.2
    tab.look(1280, 900, dark=True)
    paper, ink = lightness()
    assert paper < 0.2 and ink > 0.8


def test_the_keyboard_alone_is_enough(tab: Tab) -> None:
    def focus() -> str:
        focused: str = tab.run("const e = document.activeElement; return e.id || e.className || e.tagName")
        return focused

    assert focus() == "prompt"
    tab.press(Keys.CONTROL, "a")
    tab.press("a red ball")
    met = []
    while focus() != "n":
        tab.press(Keys.TAB)
        met.append(focus())
        outline = tab.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"one can't see that the focus is on {met[-1]}"
    assert met[0] == "go" and "model" in met
    tab.press(Keys.CONTROL, "a")
    tab.press("3", Keys.ENTER)  # Enter in a field draws
    tab.until(lambda: "3 pictures" in tab.status(), "the drawing never ended")
    while focus() != "canvas":
        tab.press(Keys.TAB)
    tab.press(Keys.ENTER)
    large = tab.find("#large")
    for key, place in ((Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, 3)):
        tab.press(key)
        assert f"{place} of 3" in large.text
    tab.press(Keys.ESCAPE)
    assert not large.is_displayed() and "3 pictures" in tab.status()
    tab.press("?")
    assert tab.find("#help").is_displayed()


def test_no_request_leaves_the_server_and_nothing_is_complained_about(tab: Tab, address: str) -> None:
    tab.draw(n=2, steps=3)
    tab.choose_mode("pair")
    tab.draw(n=1)
    tab.open()
    tab.until(lambda: tab.all("#history .thumb"), "the history is gone")[0].click()
    tab.find("#stage button").click()
    asked = tab.requested()
    assert f"{address}/pages/studio.js" in asked and f"{address}/v1/images/generations" in asked
    outside = {url.split(",")[0] for url in asked if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))}
    assert not outside
    assert not tab.complaints()

"""A whole study in Debian's chromium, desktop and phone: keys, watch gate, resuming, break, withdrawal, contrast."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studies.serving import Serving
from tests.studykit import MODELS, Served, make_study

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
OUTSIDE_OK = ("blob:", "data:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium; .ci/run installs it")
        pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    study, db = make_study(
        tmp_path_factory.mktemp("browser"), count=4, seeds=1, votes_per_item=3, trials_per_rater=4, catch_share=0.25,
        break_every=2, serving=Serving(completion_code="C0DE-1"),
    )  # fmt: skip
    server = Served(study, db).start()
    yield server
    server.stop()


class Visit:
    """A rater's browser window."""

    def __init__(self, browser: Any, served: Served, name: str, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.served, self.name = served, name
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)

    def open(self) -> None:
        self.page.goto(f"{self.served.url}/?rater={self.name}")
        self.page.wait_for_selector("#study h1, #study video")

    def heading(self) -> str:
        self.page.wait_for_selector(".card h1")
        return str(self.page.inner_text(".card h1"))

    def begin(self) -> None:
        assert self.heading() == "Before you start"
        start = self.page.locator("#study button.go")
        assert start.is_disabled(), "no start without consent"
        self.page.check("#study input[type=checkbox]")
        start.click()
        self.page.wait_for_selector("text=How it works")
        self.page.click("#study button.go")

    def unlocked(self) -> None:
        self.page.wait_for_selector("#study input[type=radio]:enabled")

    def votes(self) -> int:
        query = (
            "SELECT count(*) FROM study_votes v JOIN study_raters r ON r.id = v.rater_id WHERE r.id = "
            "(SELECT max(id) FROM study_raters)"
        )
        return int(sqlite3.connect(self.served.db).execute(query).fetchone()[0])


def test_a_whole_study_by_keyboard(browser: Any, served: Served):
    visit = Visit(browser, served, "desk")
    visit.open()
    visit.begin()
    page = visit.page
    page.wait_for_selector("#study video")
    assert (
        page.locator("#study input[type=radio]:enabled").count() == 0 and page.locator(".submit button").is_disabled()
    )
    page.keyboard.press("1")
    assert page.locator("#study input[type=radio]:checked").count() == 0, "locked until both clips were watched"
    screens, trials, drift, shown = [], 0, [], set()
    while True:
        page.wait_for_selector(".card h1, #study input[type=radio]:enabled")
        if page.locator(".card h1").count():
            screens.append(visit.heading())
            if screens[-1] == "Thank you!":
                break
            page.keyboard.press("Tab")
            page.locator("#study button.go").press("Enter")
            continue
        if trials == 0:
            page.keyboard.press("s")
            assert page.locator("button[aria-pressed=true]").count() == 1
            page.keyboard.press("s")
            page.keyboard.press("r")
        drift.append(
            page.evaluate(
                "(([a, b]) => Math.abs(a.currentTime - b.currentTime))([...document.querySelectorAll('video')])"
            )
        )
        page.keyboard.press("1")
        page.keyboard.press("0")
        assert page.locator("#study input[type=radio]:checked").count() == 2
        if trials == 2:
            # reload in the middle: the same trial again, answers unsent
            prompt = page.inner_text(".prompt")
            page.reload()
            page.wait_for_selector("#study video")
            assert page.inner_text(".prompt") == prompt
            visit.unlocked()
            page.keyboard.press("1")
            page.keyboard.press("0")
        before = page.inner_text(".prompt")
        shown.add(before)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "before => document.querySelector('.card h1') || document.querySelector('.prompt').innerText !== before "
            "|| document.querySelectorAll('#study input[type=radio]:enabled').length === 0", arg=before,
        )  # fmt: skip
        trials += 1
    assert trials == 6 and visit.votes() == 6
    assert all("blue square" in text or "<img src=x onerror=alert(1)>" in text for text in shown), "prompts are text"
    assert screens == ["Practice", "Practice", "Time for a short break?", "Thank you!"]
    assert page.inner_text(".code") == "C0DE-1"
    assert sorted(drift)[len(drift) // 2] <= 1 / 8, "clips run together, to a frame"
    outside = [url for url in visit.requests if not url.startswith((served.url, *OUTSIDE_OK))]
    assert not outside, "no request leaves the machine"
    assert not visit.problems
    names = [*MODELS, "sealed"]
    assert not [url for url in visit.requests for name in names if name in url]
    assert not [name for name in MODELS if name in page.content()]
    visit.context.close()


def test_on_a_phone_by_touch_and_withdrawal(browser: Any, served: Served):
    visit = Visit(
        browser, served, "phone", viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )  # fmt: skip
    visit.open()
    visit.begin()
    page = visit.page
    visit.unlocked()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "nothing hangs over the edge"
    boxes = [box.bounding_box() for box in page.locator("#study video").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], "side by side"
    for target in page.locator("#study .choices label, #study .submit button").all():
        assert target.bounding_box()["height"] >= 44
    for number in (0, 1):
        page.locator("fieldset").nth(number).locator("label").nth(1).tap()
    page.locator(".submit button").tap()
    page.wait_for_selector("text=Practice")
    page.locator("#study button.go").tap()
    page.wait_for_selector("#study video")
    page.get_by_role("button", name="Withdraw").tap()
    page.get_by_role("button", name="Yes, withdraw").tap()
    page.wait_for_selector("text=You have withdrawn")
    visit.open()
    assert visit.heading() == "You have withdrawn"
    visit.context.close()


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("#study *")) {
    const text = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data).join("");
    if (!text.trim() || !node.checkVisibility() || node.closest(":disabled, .heard")) continue;
    let below = node;
    while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
    const pair = [getComputedStyle(node).color, getComputedStyle(below).backgroundColor].map(light);
    found.push([(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), text]);
  }
  return found;
}"""
"""Contrast of every visible text with what lies below it, by WCAG 2.2."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_whatever_the_system_prefers(browser: Any, served: Served, scheme: str):
    visit = Visit(browser, served, f"eyes-{scheme}", color_scheme=scheme)
    visit.open()
    found = visit.page.evaluate(CONTRAST)
    visit.begin()
    visit.unlocked()
    visit.page.keyboard.press("1")
    found += visit.page.evaluate(CONTRAST)
    assert len(found) > 20 and min(found)[0] >= 4.5, sorted(found)[:5]
    visit.context.close()


def test_everything_has_a_name_for_screen_readers(browser: Any, served: Served):
    visit = Visit(browser, served, "reader")
    visit.open()
    assert visit.page.evaluate("document.documentElement.lang") == "en"
    visit.begin()
    visit.unlocked()
    page = visit.page
    for role in ("button", "radio", "progressbar", "group"):
        for node in page.get_by_role(role).all():
            label = "(n.labels && n.labels[0] && n.labels[0].innerText)"
            name = node.evaluate(
                f"n => n.getAttribute('aria-label') || n.innerText || {label} "
                "|| (n.querySelector('legend') || {}).innerText"
            )
            assert name and name.strip(), node
    assert page.evaluate("document.activeElement.innerText") == "Practice", "a new comparison is said"
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    assert page.locator("#study video[aria-label]").count() == 2
    assert page.locator("#study [role=status]").count() == 1
    assert page.locator("#study [role=alert]").count() == 1
    page.keyboard.press("Tab")  # the ring is for those who use the keyboard
    page.locator("#study input[type=radio]").first.focus()
    outline = page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
    assert outline == "solid", "the focus can be seen"
    visit.context.close()

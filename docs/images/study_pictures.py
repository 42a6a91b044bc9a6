"""Walks through a study in Debian's chromium as a rater would, desktop and phone, and takes the manual's pictures.

    python docs/images/study_pictures.py quickstart/runs/student quickstart/runs/teacher [--out docs/images] [--all]

needs two video sets that share prompts. ``--all`` also keeps the pictures that the manual does not show.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from studies.create import create_study, plan_study
from studies.serving import Serving
from tests.studykit import Served

SHOWN = ("consent", "instructions", "trial", "break", "end")
SCREENS: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1280, "height": 860}, "device_scale_factor": 1},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}


def walk(page: Any, url: str, shoot: Any) -> None:
    """From the consent to the end; every screen is shot once."""
    page.goto(url)
    page.wait_for_selector(".card h1")
    shoot("consent")
    page.check("#study input[type=checkbox]")
    page.click("#study button.go")
    page.wait_for_selector("text=How it works")
    shoot("instructions")
    page.click("#study button.go")
    trials = 0
    while True:
        page.wait_for_selector(".card h1, #study input[type=radio]:enabled")
        if page.locator(".card h1").count():
            heading = page.inner_text(".card h1")
            shoot({"Practice": "feedback", "Thank you!": "end"}.get(heading, "break"))
            if heading == "Thank you!":
                return
            page.click("#study button.go")
            if trials == 2:
                page.wait_for_selector("#study video")
                page.wait_for_timeout(500)
                shoot("locked")
            continue
        if trials == 2:
            page.get_by_role("button", name="Withdraw").click()
            shoot("withdraw")
            page.click("#study button.go")
            page.wait_for_selector("#study input[type=radio]:enabled")
            page.keyboard.press("1")
            page.wait_for_timeout(300)
            shoot("trial")
        page.keyboard.press("1")
        page.keyboard.press("0")
        page.keyboard.press("Enter")
        page.wait_for_selector(".card h1, #study input[type=radio]:disabled")
        trials += 1


def main() -> None:
    """Make a small study, serve it, and walk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    settings = {"name": "pictures", "seeds": 1, "votes_per_item": 2, "trials_per_rater": 8, "break_every": 4}
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as play:
        db = str(Path(temporary) / "votes.db")
        serving = Serving(platform="prolific", completion_code="C1X7QP2K", contact="studies@lab.example")
        videos = dict(zip("ab", options.sets, strict=True))
        plan = plan_study(videos, settings, num_prompts=12, serving=serving, allow_unequal=True)
        create_study(plan, Path(temporary) / "study", db, command="pictures")
        served = Served(Path(temporary) / "study", db).start()
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            for screen, settings in SCREENS.items():
                page = browser.new_context(**settings).new_page()
                page.set_default_timeout(120_000)
                taken = set()

                def shoot(name: str, page: Any = page, screen: str = screen, taken: set[str] = taken) -> None:
                    if name not in taken and (options.all or name in SHOWN):
                        page.screenshot(path=str(options.out / f"study-{screen}-{name}.png"))
                    taken.add(name)

                walk(page, f"{served.url}/?PROLIFIC_PID={screen}", shoot)
        finally:
            browser.close()
            served.stop()


if __name__ == "__main__":
    main()

"""Many raters at once against the served study, with the server killed in the middle.

The short form runs with the normal tests; the full form (200 raters x 20 trials, clips of 5 s) is slow:
``python -m pytest -m slow tests/test_studies_load.py -s`` prints its figures.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.studykit import Served, make_study

QUESTIONS = ("visual quality", "prompt alignment")


@dataclass
class Tally:
    """What the raters saw."""

    acknowledged: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Answers by trial token, once the server said 200."""
    seconds: list[float] = field(default_factory=list)
    """Of every vote that was answered at the first try."""
    retries: int = 0
    clips: int = 0
    done: int = 0


class Rater:
    """One rater's browser: a kept connection, a cookie, and patience."""

    def __init__(self, port: int, name: str, tally: Tally, think: float) -> None:
        self.port, self.name, self.tally, self.think = port, name, tally, think
        self.cookie = ""
        self.pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.random = random.Random(name)

    async def once(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        if self.pipe is None:
            self.pipe = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.pipe
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Cookie: {self.cookie}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == "set-cookie":
                self.cookie = value.split(";")[0]
            headers[key.lower()] = value
        return int(lines[0].split()[1]), await reader.readexactly(int(headers["content-length"]))

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """As the page does: repeat until the server answers."""
        first = True
        while True:
            start = time.perf_counter()
            try:
                status, data = await asyncio.wait_for(self.once(method, path, body), 60)
                if status < 500:
                    if first and path.endswith("/vote"):
                        self.tally.seconds.append(time.perf_counter() - start)
                    return status, json.loads(data) if path.startswith("/api") else data
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                if self.pipe is not None:
                    self.pipe[1].close()
                self.pipe = None
            first = False
            self.tally.retries += 1
            await asyncio.sleep(0.2 + 0.3 * self.random.random())

    async def run(self, seconds: float, delay: float) -> None:
        await asyncio.sleep(delay)
        await self.ask("GET", "/api/texts")
        status, state = await self.ask("POST", "/api/enter", {"params": {"rater": self.name}})
        assert status == 200 and state["stage"] == "consent"
        status, state = await self.ask("POST", "/api/consent", {"agree": True, "consent": state["consent"]})
        while state["stage"] == "trial":
            trial = state["trial"]
            for side in ("left", "right"):
                status, data = await self.ask("GET", "/" + trial[side])
                assert status == 200 and data[4:8] == b"ftyp"
                self.tally.clips += 1
            await asyncio.sleep(seconds + self.think * self.random.random())
            answers = {question: self.random.choice(["left", "right"]) for question in QUESTIONS}
            body = {
                "answers": answers, "seconds": dict.fromkeys(QUESTIONS, 1.0), "watched": {"left": 1, "right": 1},
                "replays": 0, "slow": False,
            }  # fmt: skip
            status, answer = await self.ask("POST", f"/api/trial/{trial['token']}/vote", body)
            assert status == 200, answer
            assert trial["token"] not in self.tally.acknowledged
            self.tally.acknowledged[trial["token"]] = (answers[QUESTIONS[0]], answers[QUESTIONS[1]])
            state = answer["next"]
        assert state["stage"] == "done", state
        self.tally.done += 1
        if self.pipe is not None:
            self.pipe[1].close()


async def crowd(served: Served, raters: int, seconds: float, think: float, ramp: float, kill_after: float) -> Tally:
    """All raters at once; the server is killed with -9 after a while and started again."""
    tally = Tally()

    async def accident() -> None:
        await asyncio.sleep(kill_after)
        await asyncio.to_thread(served.kill)
        await asyncio.to_thread(served.start)

    tasks = [
        Rater(served.port, f"rater {number}", tally, think).run(seconds, ramp * number / raters)
        for number in range(raters)
    ]
    await asyncio.gather(accident(), *tasks)
    return tally


def check(study: Path, db: str, tally: Tally, raters: int) -> None:
    """Nothing lost, nothing doubled, sides exact."""
    rows = sqlite3.connect(db).execute(
        "SELECT t.token, v.quality, v.alignment, t.kind, s.number, t.position, v.rater_id FROM study_votes v "
        "JOIN study_trials t ON t.id = v.trial_id JOIN study_sheets s ON s.id = t.sheet_id"
    ).fetchall()  # fmt: skip
    assert {row[0]: (row[1], row[2]) for row in rows} == tally.acknowledged
    assert len(rows) == len(tally.acknowledged) and tally.done == raters
    sealed = json.loads((study / "sealed.json").read_text())
    sides: dict[Any, Counter[bool]] = defaultdict(Counter)
    for _, _, _, kind, sheet, position, rater in rows:
        if kind == "main":
            trial = sealed["sheets"][sheet]["trials"][position]
            for key in (("prompt", trial["pair"], trial["prompt"]), ("rater", rater), ("pair", trial["pair"])):
                sides[key][trial["a_left"]] += 1
    for key, count in sides.items():
        assert abs(count[True] - count[False]) <= sum(count.values()) % 2, key
    wanted = sealed["design"]
    mains = sum(row[3] == "main" for row in rows)
    assert mains == len(wanted["prompts"]) * wanted["seeds"] * wanted["votes_per_item"]


def test_raters_at_once_with_a_killed_server_lose_nothing(tmp_path: Path):
    study, db = make_study(
        tmp_path, count=6, num_prompts=6, seeds=2, votes_per_item=8, trials_per_rater=6, catch_share=0.3,
        practice_trials=1,
    )  # fmt: skip
    raters = len(json.loads((study / "sealed.json").read_text())["sheets"])
    assert raters == 24
    served = Served(study, db).start()
    try:
        tally = asyncio.run(crowd(served, raters, seconds=0.5, think=0.2, ramp=0.5, kill_after=2.0))
    finally:
        served.stop()
    assert tally.retries > 0, "the kill went unnoticed"
    check(study, db, tally, raters)


@pytest.mark.slow
def test_two_hundred_raters_of_twenty_trials(tmp_path: Path):
    study, db = make_study(
        tmp_path, count=20, seeds=2, votes_per_item=90, trials_per_rater=20, catch_share=0.1, frames=40,
        practice_trials=0,
    )  # fmt: skip
    served = Served(study, db).start()
    start = time.perf_counter()
    try:
        tally = asyncio.run(crowd(served, 200, seconds=5.0, think=2.0, ramp=10.0, kill_after=60.0))
    finally:
        served.stop()
    wall = time.perf_counter() - start
    check(study, db, tally, 200)
    assert len(tally.acknowledged) == 4000
    ordered = sorted(tally.seconds)
    p50, p95, p99 = (1000 * ordered[int(share * len(ordered))] for share in (0.5, 0.95, 0.99))
    print(
        f"\n200 raters x 20 trials, killed once: {len(tally.acknowledged)} votes, {tally.clips} clips in {wall:.0f} s, "
        f"{tally.retries} repeated requests; a vote p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"
    )
    assert p95 < 500

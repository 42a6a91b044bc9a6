"""What a rater's trial costs the server of a preference study: processor time and latency of each route.

    python -m benchmarks.study_speed [--raters 20] [--trials 20] [--frames 40]

prints one JSON line: for two clips, the vote and a repeated vote, milliseconds of the server's processor time a request
and the median and 95th percentile of the latency, with one request at a time. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.studykit import Served, make_study

QUESTIONS = ("visual quality", "prompt alignment")
TICKS = os.sysconf("SC_CLK_TCK")


class Client:
    """One rater's connection; ``seconds`` holds the latency of every request by route."""

    def __init__(self, port: int, seconds: dict[str, list[float]]) -> None:
        self.connection, self.seconds = http.client.HTTPConnection("127.0.0.1", port), seconds
        self.cookie = ""

    def ask(self, route: str, method: str, path: str, body: Any = None) -> bytes:
        """One request, timed."""
        headers = {"content-type": "application/json", "cookie": self.cookie}
        start = time.perf_counter()
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self.connection.getresponse()
        data = answer.read()
        self.seconds[route].append(time.perf_counter() - start)
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {data[:200]!r}")
        self.cookie = (answer.getheader("set-cookie") or self.cookie).split(";")[0]
        return data


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raters", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--frames", type=int, default=40, help="of a clip; 8 a second")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    used: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as temporary:
        study, db = make_study(
            Path(temporary), count=20, seeds=2, votes_per_item=-(-options.raters * options.trials // 40),
            trials_per_rater=options.trials, catch_share=0.0, frames=options.frames, practice_trials=0,
        )  # fmt: skip
        size = float(np.mean([clip.stat().st_size for clip in (study / "clips").iterdir()]))
        served = Served(study, db).start()
        try:
            assert served.process is not None
            pid = served.process.pid
            clients = [Client(served.port, seconds) for _ in range(options.raters)]
            states = []
            for number, client in enumerate(clients):
                state = json.loads(client.ask("enter", "POST", "/api/enter", {"params": {"rater": str(number)}}))
                consent = {"agree": True, "consent": state["consent"]}
                states.append(json.loads(client.ask("consent", "POST", "/api/consent", consent)))
            body = {
                "answers": dict.fromkeys(QUESTIONS, "left"), "seconds": dict.fromkeys(QUESTIONS, 1.0),
                "watched": {"left": 1, "right": 1}, "replays": 0, "slow": False,
            }  # fmt: skip
            for _ in range(options.trials):
                before = processor_seconds(pid)
                for state, client in zip(states, clients, strict=True):
                    for side in ("left", "right"):
                        client.ask("clip", "GET", "/" + state["trial"][side])
                used["clip"] += processor_seconds(pid) - before
                time.sleep(options.frames / 8 + 0.05)
                before = processor_seconds(pid)
                for place, client in enumerate(clients):
                    path = f"/api/trial/{states[place]['trial']['token']}/vote"
                    states[place] = json.loads(client.ask("vote", "POST", path, body))["next"]
                used["vote"] += processor_seconds(pid) - before
        finally:
            served.stop()
    shown = {}
    for route, total in used.items():
        values = 1000 * np.array(seconds[route])
        shown[route] = {
            "requests": len(values), "processor_ms": round(1000 * total / len(values), 2),
            "p50_ms": round(float(np.median(values)), 2), "p95_ms": round(float(np.quantile(values, 0.95)), 2),
        }  # fmt: skip
    trial = 2 * shown["clip"]["processor_ms"] + shown["vote"]["processor_ms"]
    print(json.dumps({"clip_bytes": round(size), **shown, "trial_processor_ms": round(trial, 2)}))


if __name__ == "__main__":
    main()

"""What the tests of the studies share: video sets of coloured squares, studies made from them, a served study."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from studies.create import create_study, plan_study
from studies.serving import Serving

MODELS = ("secret-alpha", "secret-beta", "secret-gamma")
"""Names that must never reach a rater."""


def prompts(count: int) -> list[str]:
    """Prompts, the first of them hostile."""
    return ['<img src=x onerror=alert(1)> & "moves"', *(f"a blue square number {i} moves" for i in range(1, count))]


def make_set(
    folder: Path, texts: Sequence[str], *, seeds: int = 2, shade: int = 0, frames: int = 4, fps: int = 8, side: int = 16
) -> Path:
    """A video set as generation leaves it; ``shade`` tells the models apart."""
    (folder / "videos").mkdir(parents=True)
    rows = []
    for line, text in enumerate(texts):
        for index in range(seeds):
            clip = np.full((frames, side, side, 3), 60 + 40 * shade, np.uint8)
            clip[:, line % 8 : line % 8 + 5, 3 + index : 9 + index] = (20 * line % 255, 90, 200)
            name = f"{line:05d}-{index}.mp4"
            with av.open(str(folder / "videos" / name), "w") as container:
                stream: Any = container.add_stream("libx264", rate=fps)
                stream.width = stream.height = side
                stream.pix_fmt = "yuv444p"
                stream.options = {"preset": "ultrafast", "threads": "1"}
                for image in clip:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode(None))
            row = {"video": name, "prompt": text, "line": line, "index": index, "seed": 1000 * shade + index}
            rows.append(row | {"checkpoint_hash": str(shade) * 64})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_study(
    folder: Path, *, models: int = 2, count: int = 4, frames: int = 4, db: str | None = None, serving: Any = None,
    num_prompts: int | None = None, **settings: Any,
) -> tuple[Path, str]:  # fmt: skip
    """Create a study in ``folder``; returns its folder and database."""
    seeds = settings.setdefault("seeds", 2)
    folder.mkdir(parents=True, exist_ok=True)
    videos = {
        name: make_set(folder / f"set{shade}", prompts(count), seeds=seeds, shade=shade, frames=frames)
        for shade, name in enumerate(MODELS[:models])
    }
    settings = {"name": "test", "trials_per_rater": 4, "catch_share": 0.25, "votes_per_item": 1, **settings}
    plan = plan_study(videos, settings, num_prompts=num_prompts or count, serving=serving or Serving())
    db = db or str(folder / "votes.db")
    create_study(plan, folder / "study", db, command="test")
    return folder / "study", db


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A study served by the real command, which may be killed and started again on the same port."""

    def __init__(self, study: Path, db: str) -> None:
        self.study, self.db, self.port = study, db, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Served:
        words = ["study", "serve", str(self.study), "--db", self.db, "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tmd_eval.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "TMD_EVAL_DB": ""},
        )  # fmt: skip
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        assert self.process is not None
        end = time.monotonic() + 300  # gradio takes seconds to import, and many more on a busy machine
        while time.monotonic() < end:
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                raise RuntimeError(self.process.stderr.read().decode())
            try:
                with urllib.request.urlopen(f"{self.url}/api/texts", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stderr is not None:
            self.process.stderr.close()

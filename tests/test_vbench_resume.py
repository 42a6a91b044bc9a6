"""Real workers killed with SIGKILL, and real ranks under torchrun, end in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from students.errors import EnvironmentMissingError
from tmd_eval.vbench import environment
from tmd_eval.video import write_video

FLICKER = "temporal_flickering"
CLIPS = 10


@pytest.fixture(scope="module")
def vbench_environment() -> None:
    """The managed environment; skips where it cannot be built, fails under CI."""
    try:
        environment.setup()
    except EnvironmentMissingError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(CLIPS):
        noise = np.random.default_rng(number).integers(0, 30 * (number + 1) // CLIPS + 2, (40, 240, 320, 3))
        write_video(folder / f"{number}.mp4", noise.astype(np.uint8), 8, lossless=False)
    return folder


def command(videos: Path, out: Path) -> list[str]:
    call = ["-m", "tmd_eval.cli", "vbench", "--videos", str(videos), "--dimensions", FLICKER, "--device", "cpu"]
    return [*call, "--out", str(out)]


@pytest.fixture(scope="module")
def whole(vbench_environment: None, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, *command(videos, out)], check=True, capture_output=True)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / "scores" / name).read_bytes() for name in ("summary.json", "vbench.json", f"{FLICKER}.jsonl")}


def finished(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (out / "scores" / "parts" / FLICKER).glob("*.jsonl"))


def worker_of(pid: int) -> int | None:
    """The worker process that a run has started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"worker.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def kill_in_the_middle(videos: Path, out: Path, victim: Callable[[int], int | None]) -> subprocess.Popen[bytes]:
    """Start a run and send SIGKILL to one of its processes as soon as there is a result."""
    process = subprocess.Popen([sys.executable, *command(videos, out)], stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not finished(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    killed = victim(process.pid)
    assert killed is not None and 0 < finished(out) < CLIPS
    os.kill(killed, signal.SIGKILL)
    return process


def test_a_run_killed_with_its_worker_resumes_to_the_same_bytes(
    whole: dict[str, bytes], videos: Path, tmp_path: Path
) -> None:
    process = kill_in_the_middle(videos, tmp_path, lambda pid: pid)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "scores" / "summary.json").exists()
    subprocess.run([sys.executable, *command(videos, tmp_path)], check=True, capture_output=True)
    assert files(tmp_path) == whole


def test_a_killed_worker_is_started_once_more(whole: dict[str, bytes], videos: Path, tmp_path: Path) -> None:
    process = kill_in_the_middle(videos, tmp_path, worker_of)
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()
    assert files(tmp_path) == whole and finished(tmp_path) == CLIPS  # none was scored twice


def test_two_ranks_give_the_scores_of_one(whole: dict[str, bytes], videos: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *command(videos, tmp_path)], check=True, capture_output=True)
    assert files(tmp_path) == whole
    parts = (tmp_path / "scores" / "parts" / FLICKER).glob("*.jsonl")
    assert [len(path.read_text().splitlines()) for path in parts] == [CLIPS // 2, CLIPS // 2]

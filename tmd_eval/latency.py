"""Where the time of a video goes: text encoder, main backbone, flow head, VAE and file, timed apart.

On a GPU every part is bracketed by two device events, read after the device has finished, so that measuring does not
make the host wait between parts; on the CPU by ``perf_counter``. Text is encoded anew each time: no cache takes part.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from students.checkpoint import TEACHER_STEPS, Checkpoint
from students.errors import ConfigError
from tmd_eval.video import default_lossless, write_video

PARTS = ("text", "backbone", "head", "vae", "write")
"""Parts of ``seconds`` beside "total"; what total has beyond them is the sampler's own arithmetic and noise."""
PROMPT = "A red panda climbs a mossy tree in a misty forest, the camera slowly moving closer"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How latency is measured."""

    repeats: int = 5
    """Timed runs."""
    warmup: int = 1
    """Runs before them that are not timed."""
    batches: tuple[int, ...] = (1,)
    """Videos at once."""
    m: tuple[int, ...] = ()
    """Numbers of outer steps of students; none: each as trained."""
    teacher_m: int = TEACHER_STEPS
    """Steps of teachers."""

    def __post_init__(self) -> None:
        for name, value in (("--repeats", self.repeats), ("--teacher-m", self.teacher_m), *(
            ("--batch", batch) for batch in self.batches
        ), *(("--m", m) for m in self.m)):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if self.warmup < 0 or not self.batches:
            raise ConfigError(f"--warmup must be at least 0, not {self.warmup}.")


class DeviceClock:
    """Adds up the seconds of parts of one run; :meth:`read` may be called once the run is over.

    Args:
        device: where the networks run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((part, start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by part; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for part, start, end in self._marks:
            seconds[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        return dict(seconds)


def run_once(checkpoint: Checkpoint, batch: int, m: int | None, folder: Path, clock: DeviceClock) -> None:
    """Make ``batch`` videos from captions to files, every part under the clock.

    Args:
        checkpoint: the model, its networks loaded.
        batch: videos at once.
        m: outer steps; None: as trained.
        folder: where the files go.
        clock: told of all PARTS.
    """
    base = checkpoint.base
    prompts = [f"{PROMPT}, {i}" for i in range(batch)]
    guided = checkpoint.settings(m)["guidance"] > 1
    with clock("text"):
        texts = base.encode_prompts([*prompts, base.negative_prompt] if guided else prompts)
    text, negative = texts[:batch], texts[batch:]
    latents = checkpoint.latents(text, negative, range(batch), m=m, clock=clock)
    with clock("vae"):
        videos = base.decode(latents).cpu()
    with clock("write"):
        for i, frames in enumerate(videos.numpy()):
            _, height, width, _ = frames.shape
            write_video(folder / f"{i}.mp4", frames, base.fps, lossless=default_lossless(height, width))


def measure(
    checkpoint: Checkpoint, protocol: Protocol, told: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Rows of ``latency.json`` for one checkpoint: one a batch size and number of steps.

    Args:
        checkpoint: the model.
        protocol: repeats and batches.
        told: called after every run, timed or not.
    """
    base, device = checkpoint.base, checkpoint.base.device
    _ = checkpoint.network, base.vae, base._text_pipeline  # loaded here: no part of a timed run, even with no warm-up
    rows = []
    teacher = checkpoint.kind == "teacher"
    for m in (protocol.teacher_m,) if teacher else (protocol.m or (None,)):
        settings = checkpoint.settings(m)
        for batch in protocol.batches:
            runs: list[dict[str, float]] = []
            with tempfile.TemporaryDirectory() as folder:
                for i in range(protocol.warmup + protocol.repeats):
                    if i == protocol.warmup:
                        _reset_peak(device)
                    clock = DeviceClock(device)
                    with clock("total"):
                        run_once(checkpoint, batch, m, Path(folder), clock)
                    if i >= protocol.warmup:
                        runs.append(clock.read())
                    told()
            rows.append({
                "name": checkpoint.name, "checkpoint_hash": checkpoint.hash,
                **{key: settings[key] for key in ("method", "role", "m", "n", "h", "effective_nfe", "guidance")},
                "batch": batch, "dtype": str(base.dtype).removeprefix("torch."), "frames": base.frames,
                "height": base.height, "width": base.width, "repeats": protocol.repeats,
                "seconds": {part: _spread([run.get(part) for run in runs]) for part in (*PARTS, "total")},
                "peak_memory_bytes": _peak(device),
            })  # fmt: skip
    return rows


def _spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Median and 95th percentile; None for a part that never ran."""
    values = [value for value in seconds if value is not None]
    if not values:
        return None
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Largest memory of tensors on the GPU since the warm-up; on the CPU the largest of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dominant(row: dict[str, Any]) -> str:
    """The part that takes most of a row's time."""
    return max((part for part in PARTS if row["seconds"][part]), key=lambda part: row["seconds"][part]["median"])

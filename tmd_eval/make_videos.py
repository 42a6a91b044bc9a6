"""Making the videos of a plan: alone, or shared by the ranks of torchrun; every finished video is on record at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tmd_eval import video_set
from tmd_eval.files import remove_debris, write_atomic
from tmd_eval.provenance import provenance, utc_now
from tmd_eval.video import default_lossless, write_video
from tmd_eval.video_set import VIDEOS, Unit

if TYPE_CHECKING:
    import numpy as np

    from students.checkpoint import Checkpoint
    from students.distributed import Ranks
    from tmd_eval.generate import Plan

PROVENANCE = ("command", "code_revision", "device", "packages", "created")


def make(work: Plan, *, command: str | None = None, ranks: Ranks | None = None) -> int:
    """Make the missing videos of a plan; the caller, or its rank 0, holds the folder's lock.

    A batch is sampled; then, while the next is, each of its videos is written and renamed into place, and its row
    appended and synced.

    Args:
        work: what :func:`tmd_eval.generate.plan` found, the same on every rank.
        command: command line to record, by default this process's.
        ranks: processes that share the videos; None for this one alone.

    Returns:
        How many videos were made here.

    Raises:
        TmdError: the disk is full; what is finished stays.
    """
    from tqdm import tqdm

    out, missing = work.out, work.missing
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    wait = (lambda: None) if ranks is None else ranks.barrier
    wait()  # every rank has made its plan of the folder as it was
    if rank == 0:
        _prepare(work, command)
    wait()
    if not missing and not work.changed:
        return 0
    start = time.perf_counter()
    mine = missing[rank::world]
    if mine:
        _load(work.checkpoint)
        done = len(work.units) - len(missing)
        shown = {"total": done + len(mine), "initial": done, "unit": "video", "desc": "videos", "file": sys.stderr}
        with tqdm(**shown, disable=rank > 0) as bar:
            _make_batches(work, mine, bar.update)
    wait()
    if rank == 0:
        _sort_manifest(work)
        _event(out, "generate_finished", made=len(missing), seconds=round(time.perf_counter() - start, 3))
    wait()
    return len(mine)


def _prepare(work: Plan, command: str | None) -> None:
    """Write the configuration and clear what the present plan does not keep."""
    out = work.out
    origin = _write_config(work, command)
    video_set.check_case(out, [unit.video for unit in work.units])
    for folder in (out, out / VIDEOS):
        remove_debris(folder)
    if work.changed:
        _say(f"{work.changed} videos in {out} come from other settings or are damaged; they are removed or made anew")
    if not work.missing and not work.changed:
        return
    _drop_scores(out)
    _drop_others(work)
    video_set.write_manifest(out, work.rows.values())
    _event(out, "generate_started", missing=len(work.missing), present=len(work.rows), changed=work.changed, **origin)


def _sort_manifest(work: Plan) -> None:
    """Put the rows, which came in the order the videos were finished, into the plan's order."""
    order = {unit.video: place for place, unit in enumerate(work.units)}
    rest = len(order)
    rows = video_set.read_manifest(work.out)
    video_set.write_manifest(
        work.out, sorted(rows, key=lambda row: (order.get(row["video"], rest), row["line"], row["index"]))
    )


def _make_batches(work: Plan, units: Sequence[Unit], tell: Callable[[], Any]) -> None:
    """Sample batch after batch; a thread writes each while the next is sampled, and is never more than one behind."""
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for batch in _batches(units, work.config["batch_size"]):
            videos, seconds = _sample(work, batch)
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, work, batch, videos, seconds, tell)
        if writing is not None:
            writing.result()


def _sample(work: Plan, batch: Sequence[Unit]) -> tuple[np.ndarray, float]:
    """The videos of one batch, uint8 (B, T, H, W, 3), and the seconds that each took."""
    start = time.perf_counter()
    videos = work.checkpoint.sample(
        [unit.text for unit in batch],
        [unit.seed for unit in batch],
        **work.settings.sampling(),
    ).numpy()
    return videos, (time.perf_counter() - start) / len(batch)  # encoding of texts and decoding included, writing not


def _write(work: Plan, batch: Sequence[Unit], videos: np.ndarray, seconds: float, tell: Callable[[], Any]) -> None:
    """Write the videos of a batch, and of each its row as soon as it is there."""
    fps = work.checkpoint.base.fps
    for unit, frames in zip(batch, videos, strict=True):
        count, height, width, _ = frames.shape
        path = work.out / VIDEOS / unit.video
        digest = write_video(path, frames, fps, lossless=default_lossless(height, width))
        row = {
            "video": unit.video, "prompt": unit.prompt, "text": unit.text, "line": unit.line, "index": unit.index,
            "seed": unit.seed, "sampler": work.config["checkpoint"]["sampler"],
            "checkpoint_hash": work.checkpoint.hash, "key": unit.key, "frames": count, "height": height,
            "width": width, "fps": fps, "sha256": digest, "seconds": round(seconds, 6),
        }  # fmt: skip
        video_set.append_row(work.out, row)
        tell()


def _load(checkpoint: Checkpoint) -> None:
    """Load every component now, so that loading does not count as seconds a video."""
    checkpoint.base.encode_prompts([""])
    _ = checkpoint.base.vae
    if checkpoint.kind == "teacher":
        _ = checkpoint.base.transformer


def _batches(units: Sequence[Unit], size: int) -> Iterator[Sequence[Unit]]:
    for start in range(0, len(units), size):
        yield units[start : start + size]


def _write_config(work: Plan, command: str | None) -> dict[str, Any]:
    """Write ``config.yaml``; a run that goes on keeps its date, a run that is complete its whole file."""
    origin = provenance(command=command, device=str(work.checkpoint.base.device))
    old = read_config(work.out)
    if old is not None and not work.changed:
        if not work.missing:
            return origin
        if {k: v for k, v in old.items() if k not in PROVENANCE} == work.config:
            origin["created"] = old.get("created", origin["created"])
    text = yaml.safe_dump({**origin, **work.config}, sort_keys=False, allow_unicode=True)
    write_atomic(work.out / "config.yaml", text)
    return origin


def _drop_scores(out: Path) -> None:
    """Scores of a set that is about to change would pass for scores of the new one."""
    old = sorted((out / "scores").glob("*.json*")) if (out / "scores").is_dir() else []
    for path in old:
        path.unlink()
    if old:
        _say(f"removed {len(old)} files of scores from {out / 'scores'}, since the videos change; score them again")


def _drop_others(work: Plan) -> None:
    """Remove the videos of earlier settings that the present ones will not overwrite."""
    planned = {unit.video for unit in work.units}
    for row in video_set.read_manifest(work.out):
        if row["video"] not in work.rows and row["video"] not in planned:
            (work.out / VIDEOS / row["video"]).unlink(missing_ok=True)


def _event(out: Path, event: str, **values: Any) -> None:
    with (out / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": utc_now(), "event": event, **values}, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def read_config(out: Path) -> dict[str, Any] | None:
    """The run's ``config.yaml``; None where there is none that can be read."""
    try:
        config = yaml.safe_load((out / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None

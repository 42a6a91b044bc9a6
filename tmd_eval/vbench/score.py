"""Which videos a VBench dimension is scored on, and from their scores to ``scores/``.

Two protocols. *Standard*: the folder's videos bear VBench's names, ``{prompt}-{index}.mp4``, and a dimension is scored
on five videos of each of its own prompts. *Custom*: any other videos, each scored as it is. VBench itself shrinks the
denominator when videos are missing; here a missing, unreadable or unscorable video means no score, unless the run was
meant to be smaller, and then ``completeness`` says so. The optional static filter of temporal_flickering is not
applied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from students.errors import ConfigError, IncompleteError
from tmd_eval import video_set
from tmd_eval.prompts import vbench_prompts
from tmd_eval.scores import merge_summary, write_rows
from tmd_eval.vbench import VERSION, runner
from tmd_eval.vbench.dimensions import SAMPLES
from tmd_eval.video import check_video


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The videos one dimension is scored on."""

    videos: list[Path]
    """Files, sorted as they are recorded."""
    prompts: list[str]
    """The prompt of each, which intervals resample; the file's own name where none is known."""
    missing: list[str]
    """Names of videos that should be there and are not."""
    expected: int
    """Videos the protocol asks for, of which ``completeness`` is a share."""
    protocol: str
    """ "standard" or "custom"."""


def score(folder: Path, out: Path, dimensions: Sequence[str], *, device: str = "cpu") -> dict[str, Any]:
    """Score a folder of videos, or a run, and write ``out/scores``.

    Args:
        folder: a run folder, its ``videos/``, or any folder with mp4 files.
        out: run folder for the scores.
        dimensions: names of VBench dimensions.
        device: "cpu" or "cuda".

    Returns:
        The summary's entries of these dimensions.

    Raises:
        ConfigError: no such dimension or folder, or no video in it.
        IncompleteError: videos are missing, unreadable or got no number; names them, and nothing is written.
        EnvironmentMissingError: VBench's environment or weights are missing.
    """
    for dimension in dimensions:
        runner.check_ready(dimension)
    selections = {dimension: select(folder, dimension) for dimension in dimensions}
    for dimension, selection in selections.items():
        check_selection(dimension, selection)
    _check_readable({video: None for selection in selections.values() for video in selection.videos})
    entries: dict[str, Any] = {}
    for dimension, selection in selections.items():
        scores = runner.score(dimension, selection.videos, device=device)
        extra = [{"prompt": prompt, "protocol": selection.protocol} for prompt in selection.prompts]
        rows = [
            {"video": s.video, "value": s.value, "extra": {**e, **s.extra}} for s, e in zip(scores, extra, strict=True)
        ]
        write_rows(out, dimension, rows)
        entries[dimension] = summarize([s.value for s in scores], selection)
        merge_summary(out, {dimension: entries[dimension]})
    return entries


def select(folder: Path, dimension: str) -> Selection:
    """The videos of a folder that a dimension is scored on; see the module.

    Raises:
        ConfigError: no such folder, or no video in it.
    """
    run, videos = _locate(Path(folder))
    if run is not None:
        return _select_run(run, dimension)
    names = sorted(path.name for path in videos.iterdir() if path.suffix.lower() == ".mp4" and path.is_file())
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise ConfigError(f"{videos} holds no mp4 file; give a folder of videos or a run.")
    every = {f"{prompt}-{index}.mp4" for prompt in vbench_prompts().prompts for index in range(SAMPLES)}
    if every.isdisjoint(names):
        return Selection(
            videos=[videos / name for name in names], prompts=names, missing=[], expected=len(names), protocol="custom"
        )
    if strays := [name for name in names if name not in every]:
        print(f"not VBench's, left out: {runner.list_names(strays)}", file=sys.stderr)
    wanted = [(p, f"{p}-{index}.mp4") for p in vbench_prompts([dimension]).prompts for index in range(SAMPLES)]
    present = [(prompt, name) for prompt, name in wanted if name in set(names)]
    return Selection(
        videos=[videos / name for _, name in present],
        prompts=[prompt for prompt, _ in present],
        missing=[name for _, name in wanted if name not in set(names)],
        expected=len(wanted),
        protocol="standard",
    )


def check_selection(dimension: str, selection: Selection) -> None:
    """Refuse an incomplete selection.

    Raises:
        IncompleteError: videos are missing; names them.
    """
    if selection.missing:
        total = len(selection.missing) + len(selection.videos)
        raise IncompleteError(
            f"{len(selection.missing)} of {total} videos for {dimension} are missing: "
            f"{runner.list_names(selection.missing)}; nothing was scored."
        )
    if not selection.videos:
        raise IncompleteError(f"The run has no video of a prompt of {dimension}; generate some first.")


def summarize(values: Sequence[float], selection: Selection) -> dict[str, Any]:
    """The entry of ``summary.json``: mean of the videos' values, 95 % bootstrap interval over prompts.

    Args:
        values: one a video, on the aggregate's scale.
        selection: the videos; with a single prompt there is no interval (None).
    """
    from tmd_eval.micro_scores import mean_interval

    _, clusters = np.unique(np.array(selection.prompts), return_inverse=True)
    value, low, high = mean_interval(np.array(values), clusters)
    single = clusters.max() == 0
    return {
        "n": len(values), "value": value, "low": None if single else low, "high": None if single else high,
        "completeness": len(values) / selection.expected, "metric_version": VERSION, "weight_hashes": {},
    }  # fmt: skip


def _select_run(run: Path, dimension: str) -> Selection:
    rows = video_set.read_manifest(run)
    standard = any(not row["video"].startswith(f"{row['line']:05d}-") for row in rows)
    whole_set = vbench_prompts().prompts if standard else None
    listed = {row["video"] for row in rows}
    planned = video_set.planned_videos(run, whole_set)
    missing = [name for name in planned if name not in listed or not (run / video_set.VIDEOS / name).is_file()]
    expected = len(rows) + len([name for name in planned if name not in listed])
    if standard:
        of_dimension = set(vbench_prompts([dimension]).prompts)
        rows = [row for row in rows if row["prompt"] in of_dimension and row["index"] < SAMPLES]
        names = {f"{prompt}-{index}.mp4" for prompt in of_dimension for index in range(SAMPLES)}
        missing, expected = [name for name in missing if name in names], len(names)
    there = [row for row in rows if (run / video_set.VIDEOS / row["video"]).is_file()]
    missing += [row["video"] for row in rows if row not in there and row["video"] not in missing]
    return Selection(
        videos=[run / video_set.VIDEOS / row["video"] for row in there],
        prompts=[row["prompt"] for row in there],
        missing=missing,
        expected=expected,
        protocol="standard" if standard else "custom",
    )


def _locate(folder: Path) -> tuple[Path | None, Path]:
    """(run folder or None, folder of the videos)."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    if (folder / video_set.MANIFEST).is_file() and (folder / video_set.VIDEOS).is_dir():
        return folder, folder / video_set.VIDEOS
    if folder.absolute().name == video_set.VIDEOS and (folder.absolute().parent / video_set.MANIFEST).is_file():
        return folder.absolute().parent, folder
    return None, folder


def _check_readable(videos: dict[Path, None]) -> None:
    from tqdm import tqdm

    broken = []
    for video in tqdm(videos, desc="checking", unit="video", file=sys.stderr):
        try:
            if check_video(video) < 2:
                broken.append(f"{video.name} (a single frame)")
        except ConfigError:
            broken.append(f"{video.name} (unreadable or truncated)")
    if broken:
        raise IncompleteError(
            f"{len(broken)} of {len(videos)} videos cannot be scored: {runner.list_names(broken)}; nothing was scored."
        )

"""Diversity of the samples of one prompt, which VBench cannot see: a model with a single video a prompt may score high.

For each prompt the mean over pairs of its samples of 1 - cos of their features (the mean over eight frames of DINO
ViT-B/16's or CLIP ViT-B/32's normalised features, the weights that VBench uses); then the mean over prompts with an
interval over prompts. 0: all samples alike. It stands beside VBench's totals, never in them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from students.errors import ConfigError, IncompleteError
from tmd_eval import video_set
from tmd_eval.scores import locked, merge_summary, write_rows
from tmd_eval.vbench import plan, runner, statistics, weights
from tmd_eval.vbench.plan import Selection, Video
from tmd_eval.vbench.ranks import Ranks
from tmd_eval.vbench.runner import Workers
from tmd_eval.vbench.score import Options, items_of, run_jobs
from tmd_eval.vbench.videos import PARTS, inspect_videos, usable

METRIC_VERSION = "pairwise-cosine-1"
FEATURES = ("dino", "clip")


def pairwise_distance(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of 1 - cos of each sample to the other samples of its prompt.

    Args:
        features: (S, D) of the S >= 2 samples of one prompt.

    Returns:
        (S,); its mean is the mean over pairs.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    return (distance.sum(axis=1) - np.diag(distance)) / (len(features) - 1)


def score_diversity(
    folder: Path,
    out: Path,
    kind: str,
    *,
    workers: Workers | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Measure the diversity of a video set and write ``scores/diversity_{kind}.jsonl`` and its summary.

    Args:
        folder: a run folder, its ``videos/``, or any folder of mp4 files.
        out: run folder for the scores.
        kind: "dino" or "clip".
        workers: how many at once, and where.
        options: as for scoring; prompts of videos with names of their own.

    Returns:
        The entry of summary.json.

    Raises:
        ConfigError: an unknown kind, or videos whose prompts nobody knows.
        IncompleteError: no prompt has two samples, or videos cannot be read.
        EnvironmentMissingError: VBench's environment or weights are missing.
    """
    if kind not in FEATURES:
        raise ConfigError(f"Features must be {' or '.join(FEATURES)}, not {kind!r}.")
    workers, options, task = workers or Workers(), options or Options(), f"diversity_{kind}"
    weights.prepare()
    weights.check(task, unverified=options.unverified)
    with Ranks() as ranks:
        selection = _groups(folder, options.prompts)
        video_set.check_writable(out, PARTS)
        found = inspect_videos([selection], out, ranks)
        selection = usable(task, selection, found, None, allow_partial=options.allow_partial)
        items = items_of(task, selection, found, workers.engine)
        failed = run_jobs({task: items}, out, workers, ranks)
    if failed:
        raise IncompleteError(f"{task} failed: {failed[task]}; run the same command again.")
    rows = runner.read_parts(out / PARTS / task)
    vectors = {
        video.path: np.array(rows[item.key]["value"]) for video, item in zip(selection.videos, items, strict=True)
    }
    samples: dict[str, list[Video]] = {}
    for video in selection.videos:
        samples.setdefault(video.prompt, []).append(video)
    lines: list[dict[str, Any]] = []
    for prompt, videos in samples.items():
        if len(videos) < 2:
            continue
        distances = pairwise_distance(np.stack([vectors[video.path] for video in videos]))
        lines += [
            {"video": video.name, "value": float(distance), "extra": {"prompt": prompt}}
            for video, distance in zip(videos, distances, strict=True)
        ]
    # each prompt counts once, however many samples it has
    share = {prompt: 1 / len(videos) for prompt, videos in samples.items()}
    sums = statistics.sums(
        [row["extra"]["prompt"] for row in lines],
        [row["value"] for row in lines],
        [share[row["extra"]["prompt"]] for row in lines],
    )
    value, low, high = statistics.interval(sums, most=2.0)  # 1 - cos
    entry: dict[str, Any] = {
        "n": len(lines), "value": value, "low": low, "high": high,
        "completeness": len(selection.videos) / selection.expected, "metric_version": METRIC_VERSION,
        "weight_hashes": weights.hashes(task),
    }  # fmt: skip
    if selection.missing:
        entry["partial"] = True
        print(f"diversity without {runner.list_names(selection.missing)}: marked partial", file=sys.stderr)
    with locked(out):
        write_rows(out, task, lines)
        merge_summary(out, {task: entry})
    return entry


def _groups(folder: Path, prompts: Mapping[str, str] | None) -> Selection:
    """All videos of prompts that have at least two samples."""
    run, place = plan.locate(Path(folder))
    files = plan.listed(place)
    known: dict[str, str] = dict(prompts or {})
    if run is not None and not known:
        known = {row["video"]: str(row["prompt"]) for row in video_set.read_manifest(run)}
    elif not known and plan.is_standard(folder):
        own = {entry["prompt_en"] for entry in plan.full_info()}
        known = {name: stem for name in files if (stem := name.rpartition("-")[0]) in own}
    if not known:
        raise ConfigError(
            f"Nobody knows which videos of {place} belong to one prompt; give --prompt-file FILE.json with "
            "{file name: prompt}."
        )
    videos = [Video(path=files[name], prompt=known[name]) for name in files if name in known]
    counts = Counter(video.prompt for video in videos)
    videos = [video for video in videos if counts[video.prompt] > 1]
    if not videos:
        raise IncompleteError(f"No prompt of {place} has two videos, so there is no diversity to measure.")
    wanted = known if prompts or run is None else _planned(run, folder) or known
    samples = Counter(wanted.values())
    there = {video.name for video in videos}
    missing = [name for name, prompt in wanted.items() if name not in there and samples[prompt] > 1]
    return Selection(videos=videos, missing=missing, expected=len(videos) + len(missing), protocol="custom")


def _planned(run: Path, folder: Path) -> dict[str, str]:
    """Name to what stands for its prompt of every video that a run is to hold; none where nobody knows."""
    whole = dict.fromkeys(entry["prompt_en"] for entry in plan.full_info()) if plan.is_standard(folder) else None
    names = video_set.planned_videos(run, None if whole is None else list(whole))
    return {name: name.rpartition("-")[0] for name in names}

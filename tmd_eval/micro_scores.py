"""Scores of a micro run: alignment by the exact judges, fidelity, diversity, each with n and an interval over prompts.

Prompts are what is resampled everywhere: clips of one caption are alike, so they are one draw, not many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from students.errors import ConfigError, IncompleteError
from students.micro.world import Attributes, parse_caption
from tmd_eval.micro_diversity import METRIC_VERSION as DIVERSITY_VERSION
from tmd_eval.micro_diversity import diversity, nuisance_table
from tmd_eval.micro_fidelity import METRIC_VERSION as FRECHET_VERSION
from tmd_eval.micro_fidelity import SECOND_SEED, features, frechet_interval, real_clips
from tmd_eval.micro_judges import METRIC_VERSION as JUDGE_VERSION
from tmd_eval.micro_judges import Reading, compare, read_attributes
from tmd_eval.scores import locked, merge_summary, write_rows
from tmd_eval.video_set import VIDEOS, planned_videos, read_manifest

ATTRIBUTES = ("color", "shape", "direction", "speed", "background", "count", "color2", "shape2", "relation", "joint")
METRIC_VERSIONS = f"{JUDGE_VERSION}, {FRECHET_VERSION}, {DIVERSITY_VERSION}"
MIN_FRECHET = 64  # clips; with fewer, 48 x 48 covariances say nothing
RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True, kw_only=True)
class _Video:
    name: str
    prompt: str
    stated: Attributes
    index: int


def mean_interval(
    values: np.ndarray, clusters: np.ndarray, *, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of all values with a 95 % bootstrap interval that resamples prompts.

    Where all values are 0, or all 1, resampling shows no spread although the truth may lie off it; the far end is then
    the exact (Clopper-Pearson) bound for no success, or no failure, in P prompts.

    Args:
        values: (n,) numbers.
        clusters: (n,) number of the prompt of each value; numbers need not be contiguous.
        seed: of the resampling.
        resamples: number of resampled sets.

    Returns:
        Value, low, high.
    """
    _, group = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(group, weights=values), np.bincount(group).astype(float)
    prompts = len(sums)
    value = float(values.mean())
    if np.all(values == values[0]) and value in (0.0, 1.0):
        edge = 0.025 ** (1 / prompts)
        return (1.0, float(edge), 1.0) if value else (0.0, 0.0, float(1 - edge))
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return value, float(low), float(high)


def _entry(result: tuple[float, float, float], n: int, completeness: float, version: str) -> dict[str, Any]:
    value, low, high = result
    return {
        "n": n, "value": value, "low": low, "high": high, "completeness": completeness,
        "metric_version": version, "weight_hashes": {},
    }  # fmt: skip


def summarize(
    clips: Sequence[np.ndarray], readings: Sequence[Reading], captions: Sequence[str], completeness: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Every dimension of a set of clips, in the format of ``summary.json``.

    Args:
        clips: uint8, (T, 32, 32, 3) each.
        readings: of these clips.
        captions: of these clips.
        completeness: share of the expected clips that are here, written into every entry.
    """
    stated = [parse_caption(c) for c in captions]
    clusters = _clusters(captions)
    verdicts = [compare(r, a) for r, a in zip(readings, stated, strict=True)]
    summary = {}
    for name in ATTRIBUTES:
        having = np.array([name in v for v in verdicts])
        if having.any():
            values = np.array([float(v[name]) for v in verdicts if name in v])
            interval = mean_interval(values, clusters[having])
            summary[f"alignment_{name}"] = _entry(interval, len(values), completeness, JUDGE_VERSION)
    real = _real(tuple(captions))
    n = len(clips)
    if real.features is not None:
        result = frechet_interval(features(clips), real.features, clusters, seed=SEED)
        summary["frechet"] = _entry(result, n, completeness, FRECHET_VERSION)
        summary["frechet_real"] = _entry(real.frechet, n, completeness, FRECHET_VERSION)
    if real.nuisances is not None:
        made = nuisance_table(readings, stated)
        for name, result in diversity(made, real.nuisances, clusters, seed=SEED).items():
            summary[name] = _entry(result, _repeated(clusters), completeness, DIVERSITY_VERSION)
    return summary


@dataclass(frozen=True, kw_only=True)
class _Real:
    """What real clips of some captions measure."""

    features: np.ndarray | None
    """Of one real clip a caption, (n, 48); None below ``MIN_FRECHET`` captions."""
    frechet: tuple[float, float, float]
    """Fréchet distance of a second real set to the first, with its interval."""
    nuisances: np.ndarray | None
    """(n, d); None where no caption stands twice."""


@lru_cache(maxsize=2)
def _real(captions: tuple[str, ...]) -> _Real:
    """As many real clips as a run has, measured once for all runs of the same captions: half of what scoring costs."""
    real, clusters = real_clips(captions), _clusters(captions)
    reference, frechet, nuisances = None, (np.nan, np.nan, np.nan), None
    if len(captions) >= MIN_FRECHET:
        reference = features(real)
        frechet = frechet_interval(features(real_clips(captions, SECOND_SEED)), reference, clusters, seed=SEED)
    if _repeated(clusters):
        nuisances = nuisance_table([read_attributes(clip) for clip in real], [parse_caption(c) for c in captions])
    return _Real(features=reference, frechet=frechet, nuisances=nuisances)


def _clusters(captions: Sequence[str]) -> np.ndarray:
    """Number of the prompt of each clip."""
    return np.unique(np.array(captions), return_inverse=True)[1]


def _repeated(clusters: np.ndarray) -> int:
    """How many clips share their prompt with another."""
    return int((np.bincount(clusters)[clusters] >= 2).sum())


def _rows(run: Path) -> list[_Video]:
    rows = []
    for row in read_manifest(run):
        try:
            stated = parse_caption(row["prompt"])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{row['video']} of {run} cannot be judged: {error}") from error
        rows.append(_Video(name=row["video"], prompt=row["prompt"], stated=stated, index=int(row.get("index", 0))))
    if not rows:
        raise ConfigError(f"{run} lists no videos; make them with: tmd-eval micro --ckpt C --out {run}")
    return rows


def score_run(run: Path, *, expected: int | None = None, allow_partial: bool = False) -> dict[str, dict[str, Any]]:
    """Score the videos of a run; write ``scores/<dimension>.jsonl`` and ``scores/summary.json``.

    Per video there are files for the alignment dimensions; Fréchet distances and diversity belong to the set and are
    in the summary only. Diversity needs two clips of one prompt and the Fréchet distances ``MIN_FRECHET`` clips: what
    is not measured is absent.

    Args:
        run: folder with ``manifest.jsonl`` and ``videos/``.
        expected: number of videos the run should hold; by default what its config.yaml promises, and without one the
            rows of the manifest.
        allow_partial: score what is there, and say so in ``completeness``.

    Returns:
        The summary.

    Raises:
        ConfigError: no manifest, or a row whose prompt is no caption of the micro world.
        IncompleteError: videos are missing or unreadable; the message names them.
    """
    from tqdm import tqdm

    from tmd_eval.video import read_video

    planned = dict.fromkeys(planned_videos(run))
    rows = [
        row for row in _rows(run) if row.name in planned or not planned
    ]  # videos beyond a smaller plan may lie there
    clips, readings, present, missing = [], [], [], []
    for row in tqdm(rows, desc="judging", unit="video", mininterval=1):
        try:
            clip, _ = read_video(run / VIDEOS / row.name)
            readings.append(read_attributes(clip))
        except (ConfigError, ValueError) as error:
            missing.append(f"{row.name} ({error})")
            continue
        clips.append(clip)
        present.append(row)
    if expected is None:
        listed = {row.name for row in rows}
        missing += [name for name in planned if name not in listed]
    elif expected > len(rows):
        missing.append(f"{expected - len(rows)} videos that its manifest does not list")
    total = max(expected or 0, len(present) + len(missing))
    if missing and not (allow_partial and present):
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise IncompleteError(
            f"{total - len(present)} of {total} videos of {run} cannot be scored: {shown}. Run the same generation "
            "again to make what is missing, or score what is there with --allow-partial."
        )
    summary = summarize(clips, readings, [row.prompt for row in present], len(present) / total)
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row, reading in zip(present, readings, strict=True):
        for name, right in compare(reading, row.stated).items():
            item = {"video": row.name, "value": float(right), "extra": {"prompt": row.prompt, "index": row.index}}
            rows_of.setdefault(f"alignment_{name}", []).append(item)
    with locked(run):
        for dimension, items in rows_of.items():
            write_rows(run, dimension, items)
        merge_summary(run, summary)
    return summary

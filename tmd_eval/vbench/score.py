"""From a folder of videos to ``scores/``: check the videos, run the workers, aggregate, summarise.

A missing, unreadable or odd video means no score unless ``allow_partial``, and then every figure is marked partial and
there is no total. A dimension that crashed, or gave something that is not a number, is "not measured", never 0.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from students.errors import ConfigError, IncompleteError
from tmd_eval import video_set
from tmd_eval.vbench import long, plan, runner, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, FIRST_FRAMES, SAMPLES, check_dimension, engine_of
from tmd_eval.vbench.plan import Selection, Video
from tmd_eval.vbench.ranks import Ranks
from tmd_eval.vbench.runner import STATIC, Item, Job, Workers
from tmd_eval.vbench.summary import Scored, write_summary
from tmd_eval.vbench.videos import PARTS, Found, inspect_videos, promised, usable


class NotMeasuredError(IncompleteError):
    """Some dimensions could not be measured; the others are written."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record
        """Content of ``scores/vbench.json``."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a folder is scored."""

    allow_partial: bool = False
    """Score what is there; every figure is then marked partial."""
    static_filter: bool | None = None
    """Whether temporal_flickering is scored on the five stillest samples' first; None: if there are more than five."""
    unverified: bool = False
    """Take weights whose hash differs from the published one."""
    prompts: Mapping[str, str] | None = None
    """Prompt of each file, for videos with names of their own."""
    protocol: str = "vbench"
    """One of ``long.RULES``."""


def score(
    folder: Path,
    out: Path,
    dimensions: Sequence[str],
    *,
    workers: Workers | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Score a folder of videos, or a run, and write ``out/scores``.

    Args:
        folder: a run folder, its ``videos/``, or any folder with mp4 files.
        out: run folder for the scores.
        dimensions: names of VBench dimensions.
        workers: how many at once, and where; one on the CPU by default.
        options: see the class.

    Returns:
        The content of ``scores/vbench.json``: protocol, scores, totals, what was not measured.

    Raises:
        ConfigError: no such dimension or folder, no video in it, or an ``out`` that cannot be written to.
        IncompleteError: videos are missing, unreadable or odd; then nothing is scored.
        NotMeasuredError: a dimension could not be measured; the others are written.
        EnvironmentMissingError: VBench's environment or weights are missing.
    """
    workers, options = workers or Workers(), options or Options()
    for dimension in dimensions:
        runner.check_ready(check_dimension(dimension), unverified=options.unverified)
        long.check(dimension, options.protocol, unverified=options.unverified)
    with Ranks() as ranks:
        filtered = _filters(folder, dimensions, options)
        selections = {
            name: plan.select(
                folder,
                name,
                prompts=options.prompts,
                filtered=filtered and name == "temporal_flickering" and options.protocol == "vbench",
            )
            for name in dimensions
        }
        selections = _with_videos(selections, options.allow_partial)
        dimensions = list(selections)
        for name, selection in selections.items():
            plan.check_selection(name, selection, allow_partial=options.allow_partial)
        video_set.check_writable(out, PARTS)
        found = inspect_videos(selections.values(), out, ranks)
        usual = promised(folder)
        selections = {
            name: usable(name, s, found, usual, allow_partial=options.allow_partial) for name, s in selections.items()
        }
        failed: dict[str, str] = {}
        filter_record = None
        videos = selections
        pieces: dict[str, long.Pieces] = {}
        if options.protocol != "vbench":
            pieces = long.split(videos, found.facts, out, ranks)
            selections = {name: one.selection for name, one in pieces.items()}
        if filtered and "temporal_flickering" in selections:
            selections["temporal_flickering"], filter_record = _keep_still(
                selections["temporal_flickering"], found, out, workers, ranks, options
            )
            if pieces:
                pieces["temporal_flickering"].selection = selections["temporal_flickering"]
                pieces["temporal_flickering"].filtered = True
        items = {name: items_of(name, selection, found, workers.engine) for name, selection in selections.items()}
        first: dict[str, list[Item]] = {}
        if options.protocol == "long":
            between = {task: pieces[name] for name, task in FIRST_FRAMES.items() if name in pieces}
            first = {t: items_of(t, cut.first_frames, found, workers.engine) for t, cut in between.items()}
        failed |= run_jobs({**items, **first}, out, workers, ranks)
        if ranks.rank:
            return {}
        scored = {name: _collect(name, selections[name], items[name], out, failed) for name in dimensions}
        for name, cut in pieces.items():
            scored[name] = _by_video(scored[name], videos[name], cut, first, out, failed)
        for name, one in videos.items():
            names = {video.name: found.facts[video.path].sha256 for video in (*one.videos, *one.candidates)}
            scored[name] = replace(scored[name], videos=names)
        record = write_summary(
            out, scored, folder=folder, engine=workers.engine, found=found.facts, static_filter=filter_record,
            unverified=options.unverified, device=workers.device, rule=options.protocol,
        )  # fmt: skip
    if lost := {name: record["not_measured"][name] for name in dimensions if name in record["not_measured"]}:
        named = "; ".join(f"{name} ({reason})" for name, reason in lost.items())
        raise NotMeasuredError(
            f"Not measured: {named}. The other dimensions are recorded; run the same command again to try these again.",
            record,
        )
    return record


def _with_videos(selections: dict[str, Selection], allow_partial: bool) -> dict[str, Selection]:
    """The dimensions of which a deliberately small run, or a partial set, has at least one video."""
    kept = {name: s for name, s in selections.items() if s.videos or (s.missing and not allow_partial)}
    if left_out := [name for name in selections if name not in kept]:
        if not kept:
            raise IncompleteError(f"There is no video of a prompt of {', '.join(left_out)}; generate some first.")
        print(f"no video of a prompt of {', '.join(left_out)}: left out", file=sys.stderr)
    return kept


def _filters(folder: Path, dimensions: Sequence[str], options: Options) -> bool:
    """Whether the static filter is applied; says so when the protocol would want it and it is not."""
    name = "temporal_flickering"
    if name not in dimensions or not plan.is_standard(folder) or options.prompts is not None:
        if options.static_filter:
            raise ConfigError("The static filter belongs to temporal_flickering of VBench's own prompts.")
        return False
    if options.protocol == "vbench":
        more = bool(plan.select(folder, name, filtered=True).candidates)
    else:  # VBench-Long's scripts always filter, and choose among the pieces of the five samples
        more = not weights.problems(STATIC, unverified=options.unverified)
    wanted = more if options.static_filter is None else options.static_filter
    if not wanted and options.static_filter is None:
        print(
            "temporal_flickering without its static filter, which needs "
            + ("more than five samples a prompt (25 by the protocol)" if options.protocol == "vbench" else "RAFT")
            + "; this is recorded",
            file=sys.stderr,
        )
    if wanted:
        weights.check(STATIC, unverified=options.unverified)
    return wanted


def _keep_still(
    selection: Selection, found: Found, out: Path, workers: Workers, ranks: Ranks, options: Options
) -> tuple[Selection, dict[str, Any]]:
    """The first five videos of each prompt that the static filter passes.

    Raises:
        IncompleteError: a prompt has fewer than five, and partial scores are not wanted.
    """
    everything = [*selection.videos, *selection.candidates]
    whole = Selection(videos=everything, expected=len(everything), protocol="standard")
    items = {STATIC: items_of(STATIC, whole, found, workers.engine)}
    if failed := run_jobs(items, out, workers, ranks):
        raise IncompleteError(f"The static filter failed: {failed[STATIC]}; see there, or give --no-static-filter.")
    rows = runner.read_parts(out / PARTS / STATIC)
    by_prompt: dict[str, list[Video]] = {video.prompt: [] for video in everything}
    order = {video.path: video for video in everything}
    for video, item in zip(order.values(), items[STATIC], strict=True):
        if rows[item.key]["value"]:
            by_prompt[video.prompt].append(video)
    kept = {prompt: videos[:SAMPLES] for prompt, videos in by_prompt.items()}
    short = {prompt: SAMPLES - len(videos) for prompt, videos in kept.items() if len(videos) < SAMPLES}
    record = {
        "applied": True, "videos": len(everything), "still": sum(map(len, by_prompt.values())),
        "kept": sum(map(len, kept.values())), "prompts_with_fewer_than_five": len(short),
    }  # fmt: skip
    if short and not options.allow_partial:
        names = [f"{prompt!r} lacks {count}" for prompt, count in short.items()]
        raise IncompleteError(
            f"{len(short)} of {len(kept)} prompts have fewer than five still videos: {runner.list_names(names)}. "
            "Sample more of them, give --no-static-filter, or score what is there with --allow-partial."
        )
    return (
        Selection(
            videos=[video for videos in kept.values() for video in videos],
            missing=[f"{prompt} (a still video)" for prompt, count in short.items() for _ in range(count)],
            expected=selection.expected, protocol="standard",
        ),
        record,
    )  # fmt: skip


def items_of(dimension: str, selection: Selection, found: Found, engine: str) -> list[Item]:
    """The videos of a selection as workers get them, for a dimension or another task."""
    one = DIMENSIONS.get(dimension)
    reads = one is not None and (one.reads_prompt or one.needs_prompts)
    digests = weights.hashes(dimension)
    items = []
    for video in selection.videos:
        link = _link_name(video) if selection.protocol == "custom" else video.name
        auxiliary = (video.auxiliary or {}).get(dimension)
        seen = [video.prompt, link, auxiliary] if reads else []
        key = runner.item_key(dimension, engine_of(dimension, engine), digests, found.facts[video.path].sha256, seen)
        record = None if auxiliary is None else {dimension: auxiliary}
        items.append(Item(key=key, path=video.path, link=link, prompt=video.prompt, auxiliary=record))
    return items


def _link_name(video: Video) -> str:
    """Human action takes the label from the file's name, so a custom video is shown under its prompt."""
    text = video.prompt.removesuffix(".mp4").replace("/", " ").replace("\0", " ").encode()[:200].decode(errors="ignore")
    return f"{text}-0.mp4"


def run_jobs(items: Mapping[str, list[Item]], out: Path, workers: Workers, ranks: Ranks) -> dict[str, str]:
    """Score this rank's share; returns what failed on any rank."""
    jobs = []
    together = [name for name in items if engine_of(name, workers.engine) == "fast"]
    for group in [together, *([name] for name in items if name not in together)]:
        # a video's place decides its rank and shard: dimensions that share a decoded video get it in the same worker
        paths = dict.fromkeys(item.path for dimension in group for item in items[dimension])
        place = {path: number for number, path in enumerate(paths)}
        for dimension in group:
            unique = list({item.key: item for item in items[dimension]}.values())
            for shard in range(workers.count):
                mine = ranks.rank + shard * ranks.world
                share = [item for item in unique if place[item.path] % (ranks.world * workers.count) == mine]
                if share:
                    jobs.append(
                        Job(
                            dimension=dimension, items=share, parts=out / PARTS / dimension,
                            name=f"{ranks.rank}-{shard}",
                        )
                    )  # fmt: skip
    failed: dict[str, str] = {}
    for one in ranks.gather(runner.run(jobs, workers)):
        failed |= one
    return failed


def _by_video(
    one: Scored, whole: Selection, pieces: long.Pieces, first: Mapping[str, Sequence[Item]], out: Path,
    failed: Mapping[str, str],
) -> Scored:  # fmt: skip
    """A dimension of VBench-Long: the rows of pieces become rows of videos."""
    between: dict[str, float] | None = None
    task = FIRST_FRAMES.get(one.dimension)
    if task is not None and task in first:
        results = runner.read_parts(out / PARTS / task)
        between = long.first_frames_of(pieces, results, first[task])
        if between is None:
            reason = failed.get(task, f"{task} gave no number")
            return replace(one, rows=[], reason=reason)
    return long.by_video(one, whole, pieces, between)


def _collect(
    dimension: str, selection: Selection, items: Sequence[Item], out: Path, failed: Mapping[str, str]
) -> Scored:
    """The rows of a dimension, in the plan's order, from the parts."""
    results = runner.read_parts(out / PARTS / dimension)
    one = DIMENSIONS[dimension]
    rows, lost, undetected, seconds = [], [], 0, []
    for video, item in zip(selection.videos, items, strict=True):
        result = results.get(item.key)
        if not runner.is_result(dimension, result):
            lost.append(video.name)
            continue
        assert result is not None
        seconds.append(float(result["seconds"]))
        if result["value"] is None:
            undetected += 1
            continue
        extra = {"prompt": video.prompt, "protocol": selection.protocol, **result["extra"]}
        rows.append({"video": video.name, "value": result["value"] * one.scale, "extra": extra})
    reason = failed.get(dimension)
    if lost and reason is None:
        reason = f"VBench gave no number for {runner.list_names(lost)}"
    if not rows and reason is None:
        reason = "the detector found no object of any prompt with a colour"
    return Scored(
        dimension=dimension, rows=[] if lost else rows, reason=reason if lost or not rows else None,
        n=len(rows), undetected=undetected, missing=selection.missing, expected=selection.expected,
        protocol=selection.protocol, seconds=seconds,
    )  # fmt: skip

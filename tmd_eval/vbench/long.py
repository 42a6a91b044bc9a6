"""VBench-Long: a clip of 5 s and more is cut into pieces that VBench scores, and a video's value is their mean.

The wheel ships VBench-Long's code without its configuration, and that code imports what torchvision and moviepy no
longer have, so it cannot run (``tmd-eval vbench doctor`` says so). Its steps are few and are done here: the same cuts,
the official dimensions on the pieces, the same means. Two rules:

*long*, the one of VBench's own scripts (``--dev_flag``): for the two consistencies half of the value comes from the
first frames of the pieces, seen by another network (subject: DINOv2; background: DreamSim).
*long-in-clip*, what ``eval_long.py`` does without that flag: the consistencies within the pieces alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from students.errors import ConfigError, EnvironmentMissingError, IncompleteError
from tmd_eval.vbench import plan, runner, weights
from tmd_eval.vbench.dimensions import FIRST_FRAMES, LONG_CONFIG, RULES
from tmd_eval.vbench.plan import Facts, Selection, Video
from tmd_eval.vbench.ranks import Ranks
from tmd_eval.vbench.summary import PIECES, Scored

CLIPS = Path("scores", "clips")
PIECE_SECONDS = 2
"""Length of the pieces."""
LONG_PIECES = {"human_action": 10, "temporal_style": 10, "overall_consistency": 10}
"""Length where one of the prompt's dimensions reads more at once; VBench-Long cuts a video once, for all of them."""
BETWEEN = {"subject_consistency": "subject", "background_consistency": "background"}
"""Dimensions that the rule "long" also scores between the pieces (by the tasks of ``FIRST_FRAMES``), and the stem of
their mapping table."""
LONGEST_STEM = 230
"""Bytes of a video's name that still leave room for a piece's number; a longer name is replaced by its hash."""
SHARE = 0.5
"""Share of the value between the pieces, in VBench-Long's ``slow_fast_params.yaml``."""


@dataclass(kw_only=True)
class Pieces:
    """What became of a dimension's videos."""

    selection: Selection
    """The pieces, as videos."""
    parents: dict[str, Video]
    """Video of each piece, by the piece's name."""
    first_frames: Selection
    """Videos of the pieces' first frames, of those with two pieces and more."""
    filtered: bool = False
    """Whether only the pieces that the static filter kept are left."""


def check_rule(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in RULES:
        raise ConfigError(f"--protocol must be {', '.join(RULES)}, not {name!r}.")
    return name


def problems(dimension: str, rule: str, *, unverified: bool = False) -> dict[str, str]:
    """What a dimension lacks for a protocol beyond VBench's own weights: file to what is wrong."""
    if rule != "long" or dimension not in BETWEEN:
        return {}
    return weights.problems(FIRST_FRAMES[dimension], unverified=unverified)


def check(dimension: str, rule: str, *, unverified: bool = False) -> None:
    """Fail before any work if a dimension cannot be scored by a protocol here.

    Raises:
        ConfigError: there is no such protocol.
        EnvironmentMissingError: files are missing; names each and what to do.
    """
    if found := problems(dimension, check_rule(rule), unverified=unverified):
        listed = ", ".join(f"{weights.folder() / path} {reason}" for path, reason in found.items())
        raise EnvironmentMissingError(
            f"{dimension} by VBench-Long lacks: {listed}; tmd-eval vbench setup --long --fetch downloads them, "
            "setup --long --weights DIR takes them from a folder, and --protocol long-in-clip does without."
        )


def cuts(frames: int, length: int) -> list[tuple[int, int]]:
    """Where VBench-Long cuts a video: pieces of one length, the last one reaching back for what it lacks.

    Args:
        frames: of the video.
        length: frames of a piece.

    Returns:
        First frame and the one after the last, of each piece; the whole video where it is shorter than one.
    """
    if frames < length:
        return [(0, frames)]
    whole = [(start, start + length) for start in range(0, frames - length + 1, length)]
    return whole if frames % length == 0 else [*whole, (frames - length, frames)]


def piece_frames(prompt: str, protocol: str, fps: float) -> int:
    """Frames of a video's pieces, by its prompt's dimensions and its fps, which VBench-Long rounds down."""
    seconds = PIECE_SECONDS
    if protocol == "standard":
        of_prompt = {d for entry in plan.full_info() if entry["prompt_en"] == prompt for d in entry["dimension"]}
        seconds = max(LONG_PIECES.get(dimension, PIECE_SECONDS) for dimension in of_prompt)
    return max(1, int(fps)) * seconds


def split(selections: Mapping[str, Selection], facts: dict[Path, Facts], out: Path, ranks: Ranks) -> dict[str, Pieces]:
    """Cut every video once and put the pieces in the videos' place; ``facts`` gets those of the pieces.

    Pieces lie under ``out/scores/clips`` under the hash of their video; those that are there are not made again.

    Raises:
        IncompleteError: a video could not be cut.
    """
    wanted: dict[Path, dict[str, Any]] = {}
    for selection in selections.values():
        for video in selection.videos:
            one = facts[video.path]
            length = piece_frames(video.prompt, selection.protocol, one.fps)
            parts = cuts(one.frames, length)
            stem = video.name.removesuffix(".mp4")
            if len(stem.encode()) > LONGEST_STEM:
                stem = hashlib.sha256(stem.encode()).hexdigest()
            names = [f"{stem}_full.mp4"] if one.frames < length else [f"{stem}_{n:03d}.mp4" for n in range(len(parts))]
            place = (out / CLIPS / f"{one.sha256[:32]}-{length}").absolute()
            wanted[video.path] = {
                "path": str(video.path.absolute()), "folder": str(place), "cuts": parts, "names": names,
                "fps": max(1, int(one.fps)), "first_frames": f"{stem}.first-frames.mp4",
            }  # fmt: skip
    failed: dict[str, str] = {}
    share = list(wanted.values())[ranks.rank :: ranks.world]  # of all: what is there already, others may have made now
    if left := [entry for entry in share if not _is_cut(entry)]:
        failed = runner.split(left, (out / CLIPS).absolute(), f"{ranks.rank}")
    everywhere = [one for found in ranks.gather(failed) for one in found.items()]
    if everywhere:
        listed = runner.list_names([f"{Path(path).name} ({reason})" for path, reason in everywhere], 5)
        raise IncompleteError(f"{len(everywhere)} videos could not be cut for VBench-Long: {listed}.")
    return {name: _pieces(selection, wanted, facts) for name, selection in selections.items()}


def _is_cut(entry: Mapping[str, Any]) -> bool:
    names = [*entry["names"], *([entry["first_frames"]] if len(entry["names"]) > 1 else [])]
    return all(Path(entry["folder"], name).is_file() for name in names)


def _pieces(selection: Selection, wanted: Mapping[Path, Mapping[str, Any]], facts: dict[Path, Facts]) -> Pieces:
    videos, firsts, parents = [], [], {}
    for video in selection.videos:
        entry, one = wanted[video.path], facts[video.path]
        made = [Path(entry["folder"], name) for name in entry["names"]]
        for path, (start, stop) in zip(made, entry["cuts"], strict=True):
            piece = replace(video, path=path)
            parents[piece.name] = video
            videos.append(piece)
            facts[path] = replace(one, sha256=weights.sha256(path), frames=stop - start, fps=entry["fps"])
        if len(made) > 1:
            path = Path(entry["folder"], entry["first_frames"])
            facts[path] = replace(one, sha256=weights.sha256(path), frames=len(made), fps=entry["fps"])
            firsts.append(replace(video, path=path))
            parents[path.name] = video
    return Pieces(
        selection=replace(selection, videos=videos),
        parents=parents,
        first_frames=Selection(videos=firsts, expected=len(firsts), protocol="custom"),
    )


def by_video(one: Scored, whole: Selection, pieces: Pieces, between: Mapping[str, float] | None) -> Scored:
    """A dimension's rows of pieces as rows of videos: the mean over a video's pieces, fused with what is between them.

    Args:
        one: scored pieces.
        whole: the videos.
        pieces: which piece is whose.
        between: consistency of the first frames by the video's name; None for a dimension or rule without it.
    """
    values: dict[str, list[float]] = {}
    for row in one.rows:
        values.setdefault(pieces.parents[row["video"]].name, []).append(row["value"])
    table = mapping_table(BETWEEN[one.dimension]) if between is not None else {}
    rows = []
    for video in whole.videos:
        if video.name not in values:
            continue
        of_pieces = values[video.name]
        value = sum(of_pieces) / len(of_pieces)
        # as in the official aggregates: every piece counts once, but behind the static filter every video
        counted = "kept_pieces" if pieces.filtered else PIECES
        extra = {"prompt": video.prompt, "protocol": whole.protocol, counted: len(of_pieces)}
        if between is not None:
            first = between.get(video.name, 0.0)
            extra |= {"in_clip": value, "first_frames": first}
            value = fuse(value, first, table)
        rows.append({"video": video.name, "value": value, "extra": extra})
    lacking = pieces.selection.missing if pieces.filtered else whole.missing
    return replace(
        one, rows=rows, n=len(rows), missing=lacking,
        undetected=len(whole.videos) - len(rows) if one.dimension == "color" and rows else 0,
        expected=len(rows) + len(lacking) if pieces.filtered else whole.expected,
    )  # fmt: skip


def mapping_table(stem: str) -> dict[float, float]:
    """VBench-Long's table from the consistency of first frames to the scale of that within a piece."""
    import yaml

    found = yaml.safe_load((weights.folder() / LONG_CONFIG / f"{stem}_mapping_table.yaml").read_text("utf-8"))
    return {float(key): float(value) for key, value in sorted(found.items())}


def fuse(in_clip: float, first_frames: float, table: Mapping[float, float]) -> float:
    """A video's consistency from that within its pieces and that of their first frames (0 with a single piece)."""
    import numpy as np

    mapped = float(np.interp(first_frames, list(table), list(table.values())))
    return in_clip if mapped == 0 else (1 - SHARE) * in_clip + SHARE * mapped


def first_frames_of(
    pieces: Pieces, results: Mapping[str, Mapping[str, Any]], items: Sequence[runner.Item]
) -> dict[str, float] | None:
    """Consistency of the first frames by the video's name; None if one could not be measured."""
    found = {}
    for video, item in zip(pieces.first_frames.videos, items, strict=True):
        row = results.get(item.key)
        if row is None or row["value"] is None:
            return None
        found[pieces.parents[video.name].name] = float(row["value"])
    return found

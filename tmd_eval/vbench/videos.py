"""The videos before they are scored: whether each can be read, and is of the length, size and fps of the set."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path

import yaml

from students.errors import ConfigError, IncompleteError
from tmd_eval.files import write_atomic
from tmd_eval.vbench import plan, runner
from tmd_eval.vbench.plan import Facts, Selection
from tmd_eval.vbench.ranks import Ranks

PARTS = Path("scores", "parts")


@dataclass(kw_only=True)
class Found:
    """What is known of the videos before they are scored."""

    facts: dict[Path, Facts] = field(default_factory=dict)
    """Of every video that can be read."""
    broken: dict[Path, str] = field(default_factory=dict)
    """What is wrong with the others."""


def sha256(path: Path) -> str:
    """SHA-256 of a video's bytes."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def inspect_videos(selections: Iterable[Selection], out: Path, ranks: Ranks) -> Found:
    """Decode every video once, each rank its share; what was read before under the same hash is not read again."""
    from tqdm import tqdm

    from tmd_eval.video import describe_video

    parts = out / PARTS / "videos"
    known = {row["key"]: row for row in runner.read_parts(parts).values()}
    paths = list(dict.fromkeys(v.path for s in selections for v in (*s.videos, *s.candidates)))
    found, new = Found(), []
    for path in tqdm(paths[ranks.rank :: ranks.world], desc="checking", unit="video", file=sys.stderr, mininterval=1):
        digest = sha256(path)
        row = known.get(digest)
        if row is None:
            try:
                frames, height, width, fps = describe_video(path)
            except ConfigError:
                found.broken[path] = "unreadable or truncated"
                continue
            row = {"key": digest, "frames": frames, "height": height, "width": width, "fps": fps}
            new.append(row)
        if row["frames"] < 2:
            found.broken[path] = "a single frame"
            continue
        found.facts[path] = Facts(sha256=digest, **{k: row[k] for k in ("frames", "height", "width", "fps")})
    if new:
        parts.mkdir(parents=True, exist_ok=True)
        mine = parts / f"{ranks.rank}.jsonl"
        old = mine.read_text() if mine.is_file() else ""
        write_atomic(mine, old + "".join(json.dumps(row) + "\n" for row in new))
    result = Found()
    for other in ranks.gather(found):
        result.facts |= other.facts
        result.broken |= other.broken
    return result


def promised(folder: Path) -> tuple[int, int, int, float] | None:
    """Frames, height, width and fps that a run's configuration promises; None for other folders."""
    run, _ = plan.locate(folder)
    try:
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8")) if run else {}
        return int(config["frames"]), int(config["size"][0]), int(config["size"][1]), float(config["fps"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def usable(
    dimension: str,
    selection: Selection,
    found: Found,
    usual: tuple[int, int, int, float] | None,
    *,
    allow_partial: bool,
) -> Selection:
    """The selection without the videos that cannot be scored; the static filter's candidates are held to the same.

    Raises:
        IncompleteError: there are some, and partial scores are not wanted.
    """
    every = [*selection.videos, *selection.candidates]
    reasons = dict(found.broken)
    if selection.protocol == "standard" or usual is not None:
        reasons |= plan.odd_ones(found.facts, [video.path for video in every], usual)
    bad = [f"{video.name} ({reasons[video.path]})" for video in every if video.path in reasons]
    good = [video for video in selection.videos if video.path not in reasons]
    if bad and not (allow_partial and good):
        raise IncompleteError(
            f"{len(bad)} of {len(every)} videos cannot be scored in {dimension}: {runner.list_names(bad)}; "
            "nothing was scored. Make them anew, or score the others with --allow-partial."
        )
    if bad:
        print(f"left out of {dimension}: {runner.list_names(bad)}", file=sys.stderr)
    lost = [f"{video.name} ({reasons[video.path]})" for video in selection.videos if video.path in reasons]
    return Selection(
        videos=good, missing=[*selection.missing, *lost], expected=selection.expected, protocol=selection.protocol,
        candidates=[video for video in selection.candidates if video.path not in reasons],
    )  # fmt: skip

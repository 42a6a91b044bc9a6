"""Video sets as a study takes them: which clips there are of each prompt, and whether the sets can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from studies.errors import StudyError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What clips of one study must share."""

    frames: int
    fps: Fraction
    height: int
    """Pixels."""
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height} at {float(self.fps):g} fps"


@dataclass(frozen=True, kw_only=True)
class Video:
    """One clip of a set."""

    path: Path
    seed: int | None
    """Seed it was sampled with, where the manifest tells."""


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """The clips of one model."""

    name: str
    """Name of the model."""
    folder: Path
    videos: dict[str, dict[int, Video]]
    """By prompt, in the order of the set, and index of the sample."""
    checkpoint_hash: str | None
    """Hash of the checkpoint that made all of them, where the manifest tells."""


def read_set(name: str, folder: Path) -> VideoSet:
    """Read a run folder (manifest.jsonl and videos/), or a plain folder of ``{prompt}-{index}.mp4``.

    Raises:
        StudyError: there is no such folder, or nothing in it can be read as a video set.
    """
    if not folder.is_dir():
        raise StudyError(f"No video set at {folder}; give a run folder or a folder of {{prompt}}-{{index}}.mp4.")
    manifest = folder / "manifest.jsonl"
    videos: dict[str, dict[int, Video]] = {}
    hashes: set[str | None] = set()
    if manifest.is_file():
        rows = []
        try:
            lines = manifest.read_text("utf-8").split("\n")
        except UnicodeError as error:
            raise StudyError(f"{manifest} is not UTF-8 text ({error}); restore it, or make the set anew.") from error
        for number, line in enumerate(lines[:-1], 1):  # a last line without newline was cut short by a crash
            try:
                row = dict(json.loads(line))
                place = (int(row.get("line", 0)), str(row["prompt"]), int(row["index"]), str(row["video"]))
                rows.append((*place, row.get("seed")))
                hashes.add(row.get("checkpoint_hash"))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise StudyError(f"Line {number} of {manifest} does not describe a video; delete it.") from error
        rows.sort(key=lambda row: row[0])
        for _, prompt, index, video, seed in rows:
            path = folder / "videos" / Path(video).name
            videos.setdefault(prompt, {})[index] = Video(path=path, seed=seed)
    else:
        for path in sorted(folder.glob("*.mp4")) or sorted(folder.glob("videos/*.mp4")):
            found = re.fullmatch(r"(.+)-(\d+)", path.stem)
            if found:
                videos.setdefault(found[1], {})[int(found[2])] = Video(path=path, seed=None)
    if not videos:
        raise StudyError(f"{folder} holds neither a manifest.jsonl nor videos named {{prompt}}-{{index}}.mp4.")
    known = hashes.pop() if len(hashes) == 1 else None
    return VideoSet(name=name, folder=folder, videos=videos, checkpoint_hash=known)


def common_prompts(sets: Sequence[VideoSet], seeds: int, *, allow_unequal: bool = False) -> list[str]:
    """Prompts of which every set has the clips 0 to ``seeds - 1``, in the order of the first set.

    Args:
        sets: two or more.
        seeds: clips needed of each prompt.
        allow_unequal: go on with what the sets share, instead of refusing sets of different prompts.

    Raises:
        StudyError: the sets' prompts differ (unless allowed), a set has too few clips of a prompt, or nothing is
            shared.
    """
    first = sets[0]
    for other in sets[1:]:
        differ = [
            *(p for p in first.videos if p not in other.videos),
            *(p for p in other.videos if p not in first.videos),
        ]
        if differ and not allow_unequal:
            raise StudyError(
                f"The sets {first.name!r} and {other.name!r} differ in {len(differ)} prompts, such as "
                f"{differ[0][:80]!r}; --allow-unequal-prompts takes those that all sets share."
            )
    common = [prompt for prompt in first.videos if all(prompt in other.videos for other in sets)]
    whole = [prompt for prompt in common if all(set(range(seeds)) <= set(other.videos[prompt]) for other in sets)]
    if len(whole) < len(common) and not allow_unequal:
        prompt = next(prompt for prompt in common if prompt not in whole)
        least = min(sets, key=lambda item: len(item.videos[prompt]))
        raise StudyError(
            f"The set {least.name!r} has {len(least.videos[prompt])} videos of {prompt[:80]!r}, and the study needs "
            f"indices 0 to {seeds - 1} of every prompt; lower --seeds, make the missing videos, or leave such "
            "prompts out with --allow-unequal-prompts."
        )
    if not whole:
        raise StudyError(f"The sets share no prompt of which each has {seeds} videos; see --seeds.")
    return whole


def probe(path: Path) -> Shape:
    """Length, rate and size of a clip, from its container.

    Raises:
        StudyError: the file is missing or no video.
    """
    import av

    if not path.is_file():
        raise StudyError(f"The video {path} is missing; make the set whole, then create the study.")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(1 for _ in container.decode(stream))
            rate = stream.average_rate
            if not frames or not rate:
                raise ValueError("no frames or no rate")
            return Shape(frames=frames, fps=Fraction(rate), height=stream.height, width=stream.width)
    except (OSError, IndexError, ValueError) as error:  # PyAV's errors are OSErrors or ValueErrors
        raise StudyError(f"The video {path} is unreadable ({error}); make it anew.") from error


def common_shape(shapes: Sequence[tuple[str, Shape]], *, conform: bool = False) -> Shape:
    """The shape that all clips get.

    Args:
        shapes: the set's name and the shape of every clip.
        conform: bring clips to the lowest rate, the shortest length and the smallest size instead of refusing.

    Raises:
        StudyError: the clips differ (unless ``conform``).
    """
    name, first = shapes[0]
    for other, shape in shapes:
        if shape != first and not conform:
            raise StudyError(
                f"A clip of {other!r} has {shape}, one of {name!r} {first}: raters would tell the sets apart by that; "
                "--conform brings all to the lowest rate, the shortest length and the smallest size."
            )
    fps = min(shape.fps for _, shape in shapes)
    seconds = min(shape.frames / shape.fps for _, shape in shapes)
    smallest = min((shape for _, shape in shapes), key=lambda shape: (shape.height * shape.width, shape.width))
    frames = max(1, int(seconds * fps))
    return Shape(frames=frames, fps=fps, height=smallest.height, width=smallest.width)

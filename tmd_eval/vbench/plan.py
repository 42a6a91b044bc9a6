"""The file plan: which videos a dimension is scored on, and what stands in the way.

*Standard*: the videos bear VBench's names, ``{prompt}-{index}.mp4``, and a dimension is scored on samples 0 to 4 of
each of its own prompts. *Custom*: any other videos, each scored as it is, in the dimensions that need no record of
VBench's about the prompt. VBench itself shrinks the denominator when videos are missing; here each gap has a name.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from students.errors import ConfigError, IncompleteError
from tmd_eval import video_set
from tmd_eval.vbench import runner
from tmd_eval.vbench.dimensions import DIMENSIONS, SAMPLES

SAMPLE_NAME = re.compile(r"(.*)-(?:0|[1-9][0-9]*)\.mp4", re.DOTALL)
"""A prompt and the number of its sample, as VBench writes it: "-05" or "-0 copy" is none."""
OTHER_FORMATS = (".mov", ".webm", ".gif", ".avi", ".mkv")


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of a dimension."""

    path: Path
    """The file."""
    prompt: str
    """Its prompt, which intervals resample; the file's own name where none is known."""
    auxiliary: Mapping[str, Any] | None = None
    """What VBench records about the prompt, for the dimensions that need it."""

    @property
    def name(self) -> str:
        """File name, as it is recorded: in composed Unicode, as VBench's names are."""
        return unicodedata.normalize("NFC", self.path.name)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The videos one dimension is scored on."""

    videos: list[Video]
    """Sorted as they are recorded."""
    missing: list[str] = field(default_factory=list)
    """Names of videos that should be there and are not, or not as they should be, each with its reason if known."""
    expected: int
    """Videos the protocol asks for, of which ``completeness`` is a share."""
    protocol: str
    """ "standard" or "custom"."""
    candidates: list[Video] = field(default_factory=list)
    """Samples beyond the fifth that the static filter may choose from, after those of ``videos``."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a video file holds."""

    sha256: str
    """Of the file."""
    frames: int
    """Frames that could be decoded."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fps: float
    """Frames a second, as the container states them."""


def full_info() -> list[dict[str, Any]]:
    """VBench's own list: 946 entries of prompt, dimensions and auxiliary information."""
    return _read_info(runner.full_info())


@cache
def _read_info(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text("utf-8")))


def prompts_of(dimension: str) -> dict[str, Mapping[str, Any] | None]:
    """The prompts a dimension is scored on, in VBench's order, each with the auxiliary information it needs."""
    entries = [entry for entry in full_info() if dimension in entry["dimension"]]
    return {e["prompt_en"]: e.get("auxiliary_info") if DIMENSIONS[dimension].needs_prompts else None for e in entries}


def locate(folder: Path) -> tuple[Path | None, Path]:
    """(run folder or None, folder of the videos).

    Raises:
        ConfigError: no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    if (folder / video_set.MANIFEST).is_file() and (folder / video_set.VIDEOS).is_dir():
        return folder, folder / video_set.VIDEOS
    if folder.absolute().name == video_set.VIDEOS and (folder.absolute().parent / video_set.MANIFEST).is_file():
        return folder.absolute().parent, folder
    return None, folder


def is_standard(folder: Path) -> bool:
    """Whether a folder's videos bear VBench's names.

    Raises:
        ConfigError: no such folder, or no video in it.
    """
    run, videos = locate(Path(folder))
    if run is not None:
        rows = video_set.read_manifest(run)
        return any(not row["video"].startswith(f"{row['line']:05d}-") for row in rows)
    every = {f"{entry['prompt_en']}-{index}.mp4" for entry in full_info() for index in range(SAMPLES)}
    return not every.isdisjoint(listed(videos))


def select(
    folder: Path, dimension: str, *, prompts: Mapping[str, str] | None = None, filtered: bool = False
) -> Selection:
    """The videos of a folder that a dimension is scored on; see the module.

    Args:
        folder: a run folder, its ``videos/``, or any folder with mp4 files.
        dimension: one of the sixteen.
        prompts: prompt of each file name, for videos with names of their own.
        filtered: gather the samples beyond the fifth as well, for the static filter.

    Raises:
        ConfigError: no such folder, no video in it, a dimension that custom videos cannot be scored in, or a prompt
            that is missing.
        IncompleteError: files that differ only in case where one is expected.
    """
    run, videos = locate(Path(folder))
    if not is_standard(folder) or prompts is not None:
        return _custom(run, videos, dimension, prompts)
    files = listed(videos)
    wanted = prompts_of(dimension)
    names = {f"{prompt}-{i}.mp4": prompt for prompt in wanted for i in range(SAMPLES)}
    planned = list(names)
    if run is not None:
        whole = dict.fromkeys(entry["prompt_en"] for entry in full_info())
        of_run = set(
            video_set.planned_videos(run, list(whole)) or [row["video"] for row in video_set.read_manifest(run)]
        )
        planned = [name for name in names if name in of_run]
    _refuse_twins(planned, files)
    known = {e["prompt_en"] for e in full_info()}
    stems = {name: match[1] for name in files if (match := SAMPLE_NAME.fullmatch(name)) and match[1] in known}
    if strays := [name for name in files if name not in stems]:
        print(f"not VBench's, left out: {runner.list_names(strays)}", file=sys.stderr)
    more = []
    if filtered:
        more = [
            Video(path=files[name], prompt=prompt)
            for prompt in wanted
            for name in sorted(
                (n for n, stem in stems.items() if stem == prompt and n not in names), key=lambda n: (len(n), n)
            )
        ]
    return Selection(
        videos=[
            Video(path=files[name], prompt=names[name], auxiliary=wanted[names[name]])
            for name in planned if name in files
        ],
        missing=[_why_missing(name, videos) for name in planned if name not in files],
        expected=len(names),
        protocol="standard",
        candidates=more,
    )  # fmt: skip


def check_selection(dimension: str, selection: Selection, *, allow_partial: bool = False) -> None:
    """Refuse an incomplete selection.

    Raises:
        IncompleteError: videos are missing; names them.
    """
    if selection.missing and not allow_partial:
        total = len(selection.missing) + len(selection.videos)
        raise IncompleteError(
            f"{len(selection.missing)} of {total} videos for {dimension} are missing: "
            f"{runner.list_names(selection.missing)}; nothing was scored. Make them, or score what is there with "
            "--allow-partial."
        )


def odd_ones(
    facts: Mapping[Path, Facts], uniform: Iterable[Path], usual: tuple[int, int, int, float] | None = None
) -> dict[Path, str]:
    """Videos of a standard set whose length, size or fps are not those they should have.

    Args:
        facts: of every video that can be read.
        uniform: the videos of the set.
        usual: frames, height, width and fps they should have; by default those of most.

    Returns:
        Path to what is odd about it.
    """
    paths = [path for path in uniform if path in facts]
    if not paths:
        return {}
    kinds = {path: (f.frames, f.height, f.width, round(f.fps, 3)) for path in paths if (f := facts[path])}
    source = "the run's configuration asks for" if usual else "most have"
    usual = usual or Counter(kinds.values()).most_common(1)[0][0]

    def text(kind: tuple[int, int, int, float]) -> str:
        return f"{kind[0]} frames of {kind[2]}x{kind[1]} at {kind[3]:g} fps"

    return {path: f"{text(kind)} where {source} {text(usual)}" for path, kind in kinds.items() if kind != usual}


def _custom(run: Path | None, videos: Path, dimension: str, prompts: Mapping[str, str] | None) -> Selection:
    needs = DIMENSIONS[dimension]
    if needs.needs_prompts:
        raise ConfigError(
            f"{dimension} compares with what VBench records about its own prompts, so it cannot score other videos; "
            "name the videos {prompt}-{index}.mp4 after VBench's prompts, or leave the dimension out."
        )
    if run is not None:
        rows = video_set.read_manifest(run)
        files = {row["video"]: run / video_set.VIDEOS / row["video"] for row in rows}
        planned = video_set.planned_videos(run)
        if not planned:  # the manifest is all we know
            planned = [row["video"] for row in rows]
        known = {row["video"]: str(row["prompt"]) for row in rows}
        there = [name for name in dict.fromkeys(planned) if name in files and files[name].is_file()]
        missing = [name for name in dict.fromkeys(planned) if name not in there]
    else:
        files, known = listed(videos), dict(prompts or {})
        there, missing = list(files), [name for name in known if name not in files]
        if needs.reads_prompt and (lost := [name for name in there if name not in known]):
            raise ConfigError(
                f"{dimension} compares with the prompt, and {runner.list_names(lost)} have none; "
                "give --prompt-file FILE.json with {file name: prompt}."
            )
    return Selection(
        videos=[Video(path=files[name], prompt=known.get(name, name)) for name in there],
        missing=missing, expected=len(there) + len(missing), protocol="custom",
    )  # fmt: skip


def listed(videos: Path) -> dict[str, Path]:
    """Name (composed Unicode) to path of the mp4 files of a folder, sorted; hidden files do not count."""
    every = sorted(path for path in videos.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {unicodedata.normalize("NFC", path.name): path for path in every if path.suffix == ".mp4"}
    if files:
        return files
    if others := [path.name for path in every if path.suffix.lower() in (*OTHER_FORMATS, ".mp4")]:
        raise ConfigError(
            f"{videos} holds no .mp4 file, and VBench reads no other: convert {runner.list_names(others, 5)}, "
            "for example with: ffmpeg -i IN -crf 17 OUT.mp4"
        )
    raise ConfigError(f"{videos} holds no mp4 file; give a folder of videos or a run.")


def _refuse_twins(planned: Sequence[str], files: Mapping[str, Path]) -> None:
    """Two files for one name but for case: nobody knows which is meant. VBench has two such prompts of its own."""
    known = {entry["prompt_en"] for entry in full_info()}
    folded: dict[str, list[str]] = {}
    for name in files:
        folded.setdefault(name.casefold(), []).append(name)
    twins = [
        f"{extra} (beside {name})"
        for name in planned
        if name in files
        for extra in folded[name.casefold()]
        if extra != name and extra.rpartition("-")[0] not in known
    ]
    if twins:
        raise IncompleteError(f"{runner.list_names(twins)} differ from an expected name only in case; remove them.")


def _why_missing(name: str, videos: Path) -> str:
    """The name, and what lies there instead, if anything does."""
    stem = name.removesuffix(".mp4")
    for suffix in OTHER_FORMATS:
        if (videos / f"{stem}{suffix}").exists():
            return f"{name} (there is {suffix}; convert it)"
    near = [path.name for path in videos.iterdir() if path.name.casefold() == name.casefold() and path.name != name]
    return f"{name} (there is {near[0]!r}, which differs in case)" if near else name

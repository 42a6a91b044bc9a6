"""Contact sheets of a matrix: for every row, clips of the same prompts, all seeds and samples side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leaderboard.clips import data_uri, decode
from leaderboard.errors import LeaderboardError
from leaderboard.matrix import MatrixRow
from leaderboard.run_folder import read_manifest

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = 5
"""Prompts on a sheet, at most."""
CLIPS = 8
"""Clips of a prompt, at most: seeds first, then samples."""
WIDTH = 96
"""Pixels to which larger frames are scaled down."""
GAP = 2


@dataclass(frozen=True, kw_only=True)
class RowSheet:
    """One row's sheet: a line of pictures a prompt, each the middle frame of a clip."""

    row: MatrixRow
    image: str
    """Data URI."""
    width: int
    height: int
    prompts: tuple[str, ...]
    clips: int
    """Clips of a prompt."""


def row_sheet(row: MatrixRow) -> RowSheet | None:
    """The sheet of a row, None where its clips are gone.

    Args:
        row: with its run folders.

    Raises:
        LeaderboardError: a manifest or a video is unreadable.
    """
    from PIL import Image

    videos: dict[str, list[tuple[Path, str]]] = {}
    for run in row.runs:
        if not (run / "manifest.jsonl").is_file():
            return None
        for prompt, name in sheet_clips(run):
            videos.setdefault(prompt, []).append((run, name))
    names = list(videos)[:PROMPTS]
    pictures = [[still(run, name) for run, name in videos[prompt][:CLIPS]] for prompt in names]
    if not pictures:
        return None
    width, height = pictures[0][0].size
    columns = max(len(shots) for shots in pictures)
    size = (columns * (width + GAP) - GAP, len(pictures) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for down, shots in enumerate(pictures):
        for across, picture in enumerate(shots):
            shown = picture if picture.size == (width, height) else picture.resize((width, height))
            sheet.paste(shown, (across * (width + GAP), down * (height + GAP)))
    data = io.BytesIO()
    small = width <= 64
    sheet.save(data, format="WEBP", lossless=small, quality=100 if small else 60, method=4)
    return RowSheet(
        row=row, image=data_uri("webp", data.getvalue()), width=size[0], height=size[1], prompts=tuple(names),
        clips=columns,
    )  # fmt: skip


def sheet_clips(run: Path) -> list[tuple[str, str]]:
    """The clips of a run that a sheet may show: prompt and name of the video, for the first prompts.

    Raises:
        LeaderboardError: the manifest is unreadable.
    """
    rows = sorted(read_manifest(run), key=lambda line: (int(line.get("line", 0)), int(line.get("index", 0))))
    found: dict[str, list[str]] = {}
    for line in rows:
        prompt = str(line.get("prompt"))
        if prompt in found or len(found) < PROMPTS:
            found.setdefault(prompt, []).append(str(line["video"]).rsplit("/", 1)[-1])
    return [(prompt, name) for prompt, names in found.items() for name in names[:CLIPS]]


def still(run: Path, video: str) -> Image.Image:
    """The middle frame of a clip, scaled down to the width of a sheet: from ``stills/`` or else from the video.

    Raises:
        LeaderboardError: neither can be read.
    """
    from PIL import Image

    kept = run / "stills" / f"{Path(video).stem}.webp"
    if kept.is_file():
        try:
            with Image.open(kept) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise LeaderboardError(f"Cannot read the picture {kept} ({error}); import its record again.") from error
    frames = decode(run / "videos" / video)[0]
    picture: Image.Image = frames[len(frames) // 2]
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
    return picture


def row_sheets(rows: Sequence[MatrixRow]) -> list[RowSheet]:
    """The sheets of all rows that have clips."""
    sheets = [row_sheet(row) for row in rows]
    return [sheet for sheet in sheets if sheet is not None]

"""Contact sheets of a matrix: for every row, clips of the same prompts, all seeds and samples side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from leaderboard.clips import data_uri, decode
from leaderboard.matrix import MatrixRow
from leaderboard.run_folder import read_manifest

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

    videos: dict[str, list[tuple[int, str]]] = {}
    names: list[str] = []
    for number, run in enumerate(row.runs):
        if not (run / "manifest.jsonl").is_file():
            return None
        rows = sorted(read_manifest(run), key=lambda line: (int(line.get("line", 0)), int(line.get("index", 0))))
        for line in rows:
            prompt = str(line.get("prompt"))
            if prompt in videos or (not number and len(videos) < PROMPTS):
                videos.setdefault(prompt, []).append((number, str(line["video"]).rsplit("/", 1)[-1]))
        names = list(videos)
    pictures = []
    for prompt in names:
        chosen = videos[prompt][:CLIPS]
        frames = [decode(row.runs[number] / "videos" / name)[0] for number, name in chosen]
        pictures.append([clip[len(clip) // 2] for clip in frames])
    if not pictures:
        return None
    width, height = pictures[0][0].size
    if width > WIDTH:
        width, height = WIDTH, round(height * WIDTH / width)
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


def row_sheets(rows: Sequence[MatrixRow]) -> list[RowSheet]:
    """The sheets of all rows that have clips."""
    sheets = [row_sheet(row) for row in rows]
    return [sheet for sheet in sheets if sheet is not None]

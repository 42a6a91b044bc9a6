"""The contact sheet: clips of several rows for the same prompts, small enough to live inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from leaderboard.errors import LeaderboardError
from leaderboard.models import Result
from leaderboard.run_folder import read_manifest

PROMPTS = 6
"""Prompts on a sheet, at most."""
BUDGET = 1_000_000
"""Bytes of the images of a sheet, as data URIs; prompts that no longer fit are left out."""
STRIP = 4
"""Frames of a filmstrip, evenly spaced from first to last."""
LARGEST = 224
"""Width in pixels to which larger clips are scaled down."""
MOVING = 16
"""Frames of the moving picture, at most; longer clips lose frames, not duration."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip on the sheet."""

    result: Result
    moving: str
    """Data URI of an animated WebP, endless."""
    strip: str
    """Data URI of ``STRIP`` frames side by side."""
    width: int
    height: int
    """Pixels of the moving picture."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Rows: prompts; columns: results. The first prompts by line that all results have, never chosen by eye."""

    results: tuple[Result, ...]
    rows: tuple[tuple[str, tuple[Clip, ...]], ...]
    """Prompt and one clip a result."""
    common: int
    """Prompts that all results have."""
    same_seeds: bool
    """Whether the clips of each row were sampled from the same seed, so that they start from the same noise."""


def contact_sheet(
    results: Sequence[Result], runs: Mapping[int, Path], *, prompts: int = PROMPTS, budget: int = BUDGET
) -> Sheet | None:
    """The sheet of the results that have a run folder, or None where they share no prompt.

    Args:
        results: in the order of the columns.
        runs: run folder by result id.
        prompts: prompts on the sheet, at most.
        budget: bytes of its images, at most.

    Raises:
        LeaderboardError: a manifest or a video is unreadable.
    """
    shown = [result for result in results if result.id in runs]
    listed = {result.id: _first_videos(runs[result.id]) for result in shown}
    if not shown:
        return None
    first = listed[shown[0].id]
    common = [prompt for prompt in first if all(prompt in videos for videos in listed.values())]
    rows: list[tuple[str, tuple[Clip, ...]]] = []
    size = 0
    same_seeds = True
    for prompt in common[:prompts]:
        files = [runs[result.id] / "videos" / listed[result.id][prompt][0] for result in shown]
        clips = tuple(_clip(result, file) for result, file in zip(shown, files, strict=True))
        size += sum(len(clip.moving) + len(clip.strip) for clip in clips)
        if rows and size > budget:
            break
        rows.append((prompt, clips))
        same_seeds &= len({listed[result.id][prompt][1] for result in shown}) == 1
    if not rows:
        return None
    return Sheet(results=tuple(shown), rows=tuple(rows), common=len(common), same_seeds=same_seeds)


def _first_videos(run: Path) -> dict[str, tuple[str, Any]]:
    """Each prompt's first video (index 0) that is there, with its seed; prompts by line of the prompt file."""
    rows = [row for row in read_manifest(run) if row.get("index", 0) == 0]
    rows.sort(key=lambda row: int(row.get("line", 0)))
    videos: dict[str, tuple[str, Any]] = {}
    for row in rows:
        name = Path(str(row["video"])).name
        if (run / "videos" / name).is_file():
            videos.setdefault(str(row.get("prompt", name)), (name, row.get("seed")))
    return videos


def decode(path: Path) -> tuple[list[Any], float]:
    """Frames as Pillow images and frames a second."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 8)
            frames = [frame.to_image(threads=1) for frame in container.decode(stream)]
    except (OSError, IndexError, ValueError) as error:  # PyAV's errors are OSErrors or ValueErrors
        raise LeaderboardError(
            f"Cannot read the video {path} ({error}); make the run again, or leave clips out."
        ) from error
    if not frames:
        raise LeaderboardError(f"The video {path} has no frames; make the run again.")
    return frames, rate


def _clip(result: Result, path: Path) -> Clip:
    state = path.stat()
    moving, strip, width, height = _pictures(path, state.st_mtime_ns, state.st_size)
    return Clip(result=result, moving=moving, strip=strip, width=width, height=height)


@lru_cache(maxsize=512)
def _pictures(path: Path, _changed: int, _size: int) -> tuple[str, str, int, int]:
    """Moving picture and strip as data URIs, width and height; kept, since a clip is shown on several pages."""
    from PIL import Image

    frames, rate = decode(path)
    width, height = frames[0].size
    exact = width <= LARGEST
    if not exact:
        height, width = round(height * LARGEST / width), LARGEST
        frames = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    stride = -(-len(frames) // MOVING)
    kept = frames[::stride]
    moving = io.BytesIO()
    # small clips keep their very pixels; large ones are compressed, being pictures of pictures anyway
    quality: dict[str, Any] = {"lossless": True, "quality": 100} if exact else {"quality": 55}
    kept[0].save(
        moving,
        format="WEBP",
        save_all=True,
        append_images=kept[1:],
        duration=round(1000 * stride / rate),
        loop=0,
        method=4,
        **quality,
    )
    picked = [frames[round(i * (len(frames) - 1) / (STRIP - 1))] for i in range(STRIP)]
    strip = Image.new("RGB", (STRIP * width, height))
    for position, frame in enumerate(picked):
        strip.paste(frame, (position * width, 0))
    still = io.BytesIO()
    if exact:
        strip.save(still, format="PNG", optimize=True)
    else:
        strip.save(still, format="WEBP", quality=60, method=4)
    kind = "png" if exact else "webp"
    return data_uri("webp", moving.getvalue()), data_uri(kind, still.getvalue()), width, height


def data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

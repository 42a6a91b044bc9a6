"""Training data out of videos with captions, and out of a teacher's own samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from students.base import Base
from students.errors import ConfigError
from students.order import stream_seed
from students.sampling import VideoNoise, sample_teacher
from students.tar_shards import Sample, pack
from tmd_eval.prompts import PromptSet
from tmd_eval.shards import Make
from tmd_eval.video import read_video

SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi"})
FILE_KEYS, TEXT_KEYS = ("file", "video", "file_name"), ("text", "prompt", "caption")


@dataclass(frozen=True)
class Clip:
    """A video and what is to be seen in it."""

    path: Path
    """The file."""
    caption: str
    """Its caption."""

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Wish:
    """A sample that the teacher is to make."""

    line: int
    """Place of the prompt in its list, from 0."""
    index: int
    """Number of the sample of that prompt, from 0."""
    prompt: str
    """What the teacher is told."""
    seed: int
    """Of its noise."""

    def __str__(self) -> str:
        return f"{self.line:05d}-{self.index}"


def find_clips(folder: Path, captions: Path | None) -> tuple[list[Clip], int]:
    """The videos of a folder with their captions, in the order of their names.

    Args:
        folder: of videos; subfolders are not searched.
        captions: JSONL with a file name (``file``, ``video`` or ``file_name``) and a caption (``text``, ``prompt`` or
            ``caption``) a line; None: manifest.jsonl in the folder or beside it, and text files named as the videos.

    Returns:
        The clips, and the number of videos without a caption, which are left out.

    Raises:
        ConfigError: no such folder, no video, no caption, or an unreadable list.
    """
    if not folder.is_dir():
        raise ConfigError(f"--videos names {folder}, which is no folder.")
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not videos:
        raise ConfigError(f"{folder} holds no video ({', '.join(sorted(SUFFIXES))}).")
    lists = [captions] if captions else [folder / "manifest.jsonl", folder.parent / "manifest.jsonl"]
    known: dict[str, str] = {}
    for path in lists:
        if captions or path.is_file():
            known = _read_captions(path)
            break
    clips = []
    for path in videos:
        text = known.get(path.name)
        beside = path.with_suffix(".txt")
        if text is None and captions is None and beside.is_file():
            try:
                text = beside.read_text("utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{beside} cannot be read as text ({error}); save it as UTF-8.") from None
        if text:
            clips.append(Clip(path, text))
    if not clips:
        raise ConfigError(
            f"None of the {len(videos)} videos in {folder} has a caption; give --captions FILE.jsonl, a manifest.jsonl "
            "or a text file beside each video."
        )
    return clips, len(videos) - len(clips)


def _read_captions(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}).") from None
    known = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = next(str(row[key]) for key in FILE_KEYS if key in row)
            text = next(row[key] for key in TEXT_KEYS if key in row)
            known[Path(name).name] = "" if text is None else str(text).strip()  # null: no caption
        except (ValueError, TypeError, StopIteration):
            raise ConfigError(
                f"{path}, line {number}: not a JSON object with one of {', '.join(FILE_KEYS)} and one of "
                f"{', '.join(TEXT_KEYS)}."
            ) from None
    return known


def fit(frames: np.ndarray, fps: float, base: Base) -> Tensor:
    """A video as the base model takes it: its first frames at the model's rate, scaled to cover, cut in the middle.

    Args:
        frames: uint8 (n, h, w, 3).
        fps: of the video.
        base: gives frames, height, width and fps.

    Returns:
        uint8 (frames, height, width, 3).

    Raises:
        ConfigError: the video is too short.
    """
    times = np.floor(np.arange(base.frames) * (fps / base.fps) + 0.5).astype(int)
    if times[-1] >= len(frames):
        raise ConfigError(
            f"too short: {len(frames)} frames at {fps:g} fps, but {base.frames} at {base.fps} fps are needed"
        )
    video = torch.from_numpy(frames[times])
    height, width = video.shape[1:3]
    if (height, width) == (base.height, base.width):
        return video
    scale = max(base.height / height, base.width / width)
    size = (max(base.height, round(height * scale)), max(base.width, round(width * scale)))
    pixels = interpolate(video.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    top, left = (size[0] - base.height) // 2, (size[1] - base.width) // 2
    pixels = pixels[:, :, top : top + base.height, left : left + base.width]
    return pixels.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def encoder(base: Base, dtype: torch.dtype) -> Make[Clip]:
    """Makes samples of videos; those that cannot be read or are too short are left out.

    Args:
        base: gives VAE and text encoder.
        dtype: storage.
    """

    def make(clips: list[Clip]) -> list[Sample | str]:
        results: list[Sample | str] = [""] * len(clips)
        videos: dict[int, Tensor] = {}
        for i, clip in enumerate(clips):
            try:
                videos[i] = fit(*read_video(clip.path), base)
            except ConfigError as error:
                results[i] = str(error)
        if videos:
            latents = base.encode_videos(torch.stack(list(videos.values())))
            text = base.embeddings([clips[i].caption for i in videos])
            for row, i in enumerate(videos):
                record = {"prompt": clips[i].caption, "source": clips[i].path.name}
                results[i] = pack(latents[row], text[row], record, dtype)
        return results

    return make


def wishes(prompts: PromptSet, samples_per_prompt: int, seed: int) -> list[Wish]:
    """Every sample of a list of prompts, each with a seed of its own that depends on nothing but its place.

    Args:
        prompts: what the teacher is told.
        samples_per_prompt: at least 1.
        seed: of the whole set.
    """
    if samples_per_prompt < 1:
        raise ConfigError(f"--samples-per-prompt must be at least 1, not {samples_per_prompt}.")
    return [
        Wish(line, index, prompts.text(line), stream_seed("synthesize", seed, line, index))
        for line in range(len(prompts.prompts))
        for index in range(samples_per_prompt)
    ]


def synthesizer(base: Base, m: int, guidance: float, dtype: torch.dtype) -> Make[Wish]:
    """Makes samples by the teacher's own sampler; ``VideoNoise([seed])`` of a record gives its noise again.

    Args:
        base: the teacher.
        m: steps.
        guidance: w.
        dtype: storage.
    """

    def make(batch: list[Wish]) -> list[Sample | str]:
        noise = VideoNoise([wish.seed for wish in batch], base.latent_shape).draw().to(base.device)
        text = base.embeddings([wish.prompt for wish in batch])
        negative = base.embeddings([base.negative_prompt]) if guidance > 1 else None
        latents = sample_teacher(base, text, negative, noise, m, guidance)
        return [
            pack(latents[i], text[i], {"prompt": wish.prompt, "source": str(wish), "seed": wish.seed}, dtype)
            for i, wish in enumerate(batch)
        ]

    return make


def listing(items: Sequence[Clip] | Sequence[Wish]) -> list[list[str]]:
    """What the content of a set depends on: names and captions, in order."""
    return [[str(item), item.caption if isinstance(item, Clip) else item.prompt] for item in items]

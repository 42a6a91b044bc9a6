"""Clips as raters see them: one codec, size, rate and length, nothing in the file that tells where it came from."""

from __future__ import annotations

import hashlib
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from studies.errors import StudyError
from studies.files import write_atomic
from studies.video_sets import Shape

SMALLEST = 256
"""Clips smaller than this (longer side, pixels) are enlarged by a whole number, so that 4:2:0 loses no colour."""
CRF = 14
"""Quality of H.264: finer than a rater can see, the same for all."""


def scale_of(shape: Shape) -> int:
    """The whole number by which small clips are enlarged."""
    return max(1, SMALLEST // max(shape.height, shape.width))


def read_frames(path: Path, shape: Shape) -> np.ndarray:
    """Decode a clip into a shape: frames nearest in time, size by area where it differs.

    Returns:
        uint8 (T, H, W, 3), RGB.

    Raises:
        StudyError: the clip cannot be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or shape.fps)
            frames = []
            for frame in container.decode(stream):
                if (frame.height, frame.width) != (shape.height, shape.width):
                    frame = frame.reformat(width=shape.width, height=shape.height, interpolation="AREA", threads=1)
                frames.append(frame.to_ndarray(format="rgb24", threads=1))
    except (OSError, IndexError, ValueError) as error:
        raise StudyError(f"The video {path} is unreadable ({error}); make it anew.") from error
    if not frames:
        raise StudyError(f"The video {path} has no frames; make it anew.")
    times = [min(len(frames) - 1, int(Fraction(t) / shape.fps * rate)) for t in range(shape.frames)]
    return np.stack([frames[t] for t in times])


def spoil(frames: np.ndarray, seed: int) -> np.ndarray:
    """Ruin a clip so that no one could prefer it: coarse blocks, wrong colours, noise, frames out of order.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        seed: of noise and order.
    """
    rng = np.random.default_rng(seed)
    count, height, width, _ = frames.shape
    block = max(2, min(height, width) // 6)
    rows, columns = (np.arange(n) // block * block for n in (height, width))
    coarse = frames[rng.permutation(count)][:, rows][:, :, columns].astype(np.float64)
    grey = coarse.mean(axis=-1, keepdims=True)
    return (0.5 * grey + 0.5 * coarse[..., ::-1] + rng.normal(0, 60, frames.shape)).clip(0, 255).astype(np.uint8)


def encode(frames: np.ndarray, fps: Fraction, scale: int) -> bytes:
    """Encode frames as mp4 without metadata.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        fps: frames a second.
        scale: enlargement by repeating pixels.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    big = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    big = big[:, : big.shape[1] // 2 * 2, : big.shape[2] // 2 * 2]  # 4:2:0 takes even sides only
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = big.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"threads": "1", "crf": str(CRF), "flags": "+bitexact"}
        context = stream.codec_context
        context.colorspace = Colorspace.ITU601.value
        context.color_primaries = context.color_trc = 6
        context.color_range = ColorRange.MPEG.value
        for image in big:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(
                stream.encode(
                    frame.reformat(
                        format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
                    )
                )
            )
        container.mux(stream.encode(None))
    return buffer.getvalue()


def digest_of(source: Path) -> str:
    """SHA-256 of a source file."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def make_clip(source: Path, target: Path, shape: Shape, *, spoiled: bool = False) -> None:
    """Re-encode one clip of a set; an existing target is kept, so its name must stand for source and shape."""
    if not target.is_file():
        frames = read_frames(source, shape)
        if spoiled:
            frames = spoil(frames, int(digest_of(source)[:8], 16))
        write_atomic(target, encode(frames, shape.fps, scale_of(shape)))

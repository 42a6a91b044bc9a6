"""Clips as mp4 files (PyAV): written whole, byte for byte the same for the same frames, and read back with a check.

Micro clips are stored as H.264 without quantisation (``qp 0``), 4:4:4, full range, BT.601: the colour conversion alone
rounds, by at most 1/255 a channel, and browsers, OpenCV and FFmpeg show the same pixels (H.264 in RGB would be exact,
but Chromium 156 plays it in wrong colours). Large clips are 4:2:0, limited range, BT.601, crf 17.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from students.errors import ConfigError
from tmd_eval.files import write_atomic

LOSSLESS_AREA = 128 * 128
"""Frames of at most this many pixels are stored losslessly by :func:`default_lossless`."""

_BT601 = np.array([[0.299, 0.587, 0.114], [-0.299 / 1.772, -0.587 / 1.772, 0.5], [0.5, -0.587 / 1.402, -0.114 / 1.402]])
_OFFSET = np.array([0.0, 128.0, 128.0])


def default_lossless(height: int, width: int) -> bool:
    """Whether clips of this size (pixels) are stored losslessly: true for the micro world, false for Wan."""
    return height * width <= LOSSLESS_AREA


def write_video(path: Path, frames: np.ndarray, fps: float, *, lossless: bool) -> str:
    """Write a clip as mp4, atomically; the same frames give the same bytes with the same PyAV.

    Args:
        path: final path, in an existing folder.
        frames: uint8 (T, H, W, 3), RGB.
        fps: frames a second, above 0; true fps matters, as VBench's dynamic degree reads it from the container.
        lossless: 4:4:4 without quantisation (error at most 1/255), else crf 17 (4:2:0; 4:4:4 when a side is odd).

    Returns:
        The SHA-256 of the file, in hex.

    Raises:
        ConfigError: frames of another type or shape, or fps not above 0.
        TmdError: the disk is full.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConfigError(f"A clip must be uint8 (T, H, W, 3) with T, H, W above 0, not {frames.dtype} {frames.shape}.")
    if not fps > 0:
        raise ConfigError(f"fps must be above 0, not {fps}.")
    data = _encode(frames, fps, lossless)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Read every frame of a clip.

    Args:
        path: a video file that FFmpeg can decode.

    Returns:
        frames, uint8 (T, H, W, 3) RGB with T at least 1, and frames a second.

    Raises:
        ConfigError: the file is missing, empty, truncated or not a video; the message names it.
    """
    frames: list[np.ndarray] = []
    _, fps = _decode(Path(path), lambda frame: frames.append(frame.to_ndarray(format="rgb24", threads=1)))
    return np.stack(frames), fps


def check_video(path: Path) -> int:
    """Decode every frame of a clip, keeping none; returns their number.

    Raises:
        ConfigError: as :func:`read_video`.
    """
    return _decode(Path(path), lambda frame: None)[0]


def describe_video(path: Path) -> tuple[int, int, int, float]:
    """Decode every frame of a clip, keeping none.

    Returns:
        Frames, height and width (pixels), frames a second.

    Raises:
        ConfigError: as :func:`read_video`.
    """
    sizes: list[tuple[int, int]] = []
    count, fps = _decode(Path(path), lambda frame: sizes.append((frame.height, frame.width)))
    return count, *sizes[0], fps


_SMALL = 256 * 256
"""Pixels of a frame below which threads cost more than they save: on two busy cores a micro clip took 42 ms with
FFmpeg's choice and 2 ms with one thread."""


def _decode(path: Path, use: Callable[[Any], None]) -> tuple[int, float]:
    import av

    if not path.is_file():
        raise ConfigError(f"No video {path}.")
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ConfigError(f"{path} holds no video stream.")
            stream = container.streams.video[0]
            expected, fps = stream.frames, stream.average_rate
            if stream.width * stream.height < _SMALL:
                stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                use(frame)
                count += 1
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} is not a readable video ({reason}); make it anew.") from error
    if count == 0 or count < expected:
        raise ConfigError(f"{path} is truncated: {count} of {expected} frames could be read; make it anew.")
    if not fps:
        raise ConfigError(f"{path} does not state its frames a second; make it anew.")
    return count, float(fps)


def _encode(frames: np.ndarray, fps: float, lossless: bool) -> bytes:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    full_chroma = lossless or height % 2 or width % 2
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if full_chroma else "yuv420p"
        # a fixed number of threads: x264's output depends on it
        stream.options = {"threads": "1" if lossless else "4", **({"qp": "0"} if lossless else {"crf": "17"})}
        context = stream.codec_context
        # BT.601 also for large clips: OpenCV and decord assume it whatever the file says
        context.colorspace = Colorspace.ITU601.value
        context.color_primaries = context.color_trc = 6
        context.color_range = ColorRange.JPEG.value if lossless else ColorRange.MPEG.value
        for image in frames:
            if lossless:
                yuv = np.rint(image @ _BT601.T + _OFFSET).clip(0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(yuv.transpose(2, 0, 1)), format="yuv444p")
            else:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                    format=stream.pix_fmt, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()

# ruff: noqa: RUF001 - the negative prompt has Chinese commas
"""What a pipeline folder does not say about its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from students.errors import ConfigError
from students.weights import read_json

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan's own repository (``sample_neg_prompt``)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a pipeline folder does not say about its model; ``base.json`` in the folder, by default Wan2.1's."""

    text_length: int = 512
    """Tokens a caption is padded or cut to, in training, in our samplers and as ``max_sequence_length``."""
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    """The text of the branch without caption in classifier-free guidance."""
    frames: int = 81
    """Frames of a video."""
    height: int = 480
    """Height in pixels."""
    width: int = 832
    """Width in pixels."""
    fps: int = 16
    """Frames per second."""
    guidance: float = 5.0
    """Classifier-free guidance scale w the model is normally sampled with; 1 is none."""


def read_facts(folder: Path) -> Facts:
    """The facts of a pipeline folder.

    Raises:
        ConfigError: ``base.json`` has an unknown key or a bad value, or contradicts the scheduler.
    """
    path = folder / "base.json"
    if not path.is_file():
        return Facts()
    record = read_json(path)
    record.pop("encoder_hash", None)  # written by ckpt export, read by students.published.exported_base
    shift = record.pop("flow_shift", None)
    actual = None if shift is None else read_json(folder / "scheduler" / "scheduler_config.json").get("flow_shift")
    if shift != actual:
        raise ConfigError(
            f"{path} gives flow_shift {shift}, but the scheduler beside it has {actual}; make them agree."
        )
    if unknown := sorted(set(record) - set(Facts.__dataclass_fields__)):
        raise ConfigError(f"{path} has the unknown key {unknown[0]!r}; known: {', '.join(Facts.__dataclass_fields__)}.")
    for key, value in record.items():
        expected = type(getattr(Facts, key))
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ConfigError(f"{path}: {key} must be of type {expected.__name__}, not {value!r}.")
        if expected is not str and not value > 0:
            raise ConfigError(f"{path}: {key} is {value}; it must be above 0.")
    return Facts(**record)

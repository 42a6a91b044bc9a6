"""Clips survive the trip through an mp4 file, and damaged files are named."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest

from students.errors import ConfigError, TmdError
from students.micro.world import FPS, make_clip
from tmd_eval import files
from tmd_eval.files import write_atomic
from tmd_eval.video import read_video, write_video


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_lossless_errs_by_one_at_most_even_on_noise(tmp_path: Path) -> None:
    for name, clip in {
        "noise": noise(9, 32, 32, 3),
        "micro": np.rint(make_clip((1,), held_out=True)[1] * 255).astype(np.uint8),
        "corners": np.array([[[[r, g, b] for b in (0, 255)] for g in (0, 255)] for r in (0, 255)], np.uint8).repeat(
            8, 2
        ),
    }.items():
        write_video(tmp_path / "a.mp4", clip, FPS, lossless=True)
        back, fps = read_video(tmp_path / "a.mp4")
        assert back.shape == clip.shape and fps == FPS, name
        assert np.abs(back.astype(int) - clip).max() <= 1, name


def test_lossy_keeps_colours_of_smooth_clips(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 96)
    clip = np.zeros((5, 64, 96, 3), np.uint8)
    clip[..., 0], clip[..., 1], clip[..., 2] = ramp, ramp[::-1], 200
    write_video(tmp_path / "a.mp4", clip, 16, lossless=False)
    back, fps = read_video(tmp_path / "a.mp4")
    assert fps == 16 and np.abs(back.astype(int) - clip).mean() < 2


@pytest.mark.parametrize("lossless", [True, False])
def test_odd_sizes_and_single_frames(tmp_path: Path, lossless: bool) -> None:
    clip = np.full((1, 33, 47, 3), (200, 40, 90), np.uint8)
    write_video(tmp_path / "a.mp4", clip, 8, lossless=lossless)
    back, _ = read_video(tmp_path / "a.mp4")
    assert back.shape == clip.shape and np.abs(back.astype(int) - clip).max() <= 4


@pytest.mark.parametrize("lossless", [True, False])
def test_same_frames_same_bytes(tmp_path: Path, lossless: bool) -> None:
    clip = noise(9, 32, 32, 3)
    first = write_video(tmp_path / "a.mp4", clip, 8, lossless=lossless)
    second = write_video(tmp_path / "b.mp4", clip, 8, lossless=lossless)
    assert first == second == hashlib.sha256((tmp_path / "b.mp4").read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    write_video(whole, noise(9, 32, 32, 3), 8, lossless=True)
    data = whole.read_bytes()
    hole = bytearray(data)
    middle = data.index(b"mdat") + 4
    hole[middle + 2000 : middle + 20000] = bytes(18000)
    damaged = {"empty": b"", "text": b"not a video", "half": data[: len(data) // 2], "hole": bytes(hole)}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}.mp4"):
            read_video(path)
    with pytest.raises(ConfigError, match="absent"):
        read_video(tmp_path / "absent.mp4")


def test_bad_frames_are_refused(tmp_path: Path) -> None:
    for clip in (np.zeros((2, 8, 8, 3), np.float32), noise(8, 8, 3), noise(0, 8, 8, 3)):
        with pytest.raises(ConfigError):
            write_video(tmp_path / "a.mp4", clip, 8, lossless=True)
    with pytest.raises(ConfigError, match="fps"):
        write_video(tmp_path / "a.mp4", noise(2, 8, 8, 3), 0, lossless=True)


def test_a_full_disk_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TmdError, match=r"disk is full.*a\.mp4") as caught:
        write_atomic(target, b"new")
    assert caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and target.read_bytes() == b"old"

"""The shipped micro teacher: a whole diffusers pipeline, small, documented, and as good as the issue asks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from students.base import load_base, micro_folder
from students.micro.world import FRAMES, SIZE, make_clip
from tmd_eval.micro_judges import judge


@pytest.fixture(scope="module")
def folder() -> Path:
    return micro_folder()


def test_it_is_a_small_pipeline_with_its_history(folder: Path):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    history = json.loads((folder / "provenance.json").read_text())
    for part in ("vae", "teacher"):
        assert history[part]["command"].startswith(f"python -m students.micro.train_{part}")
        assert history[part]["seconds"] > 0 and history[part]["device"]


def test_diffusers_own_pipeline_loads_and_runs_it(folder: Path):
    from diffusers import WanPipeline

    facts = json.loads((folder / "base.json").read_text())
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert 8 <= len(pipeline.transformer.blocks) <= 12
    frames = pipeline(
        "a red circle moves left slowly on a dark background", negative_prompt="", height=SIZE, width=SIZE,
        num_frames=FRAMES, num_inference_steps=2, guidance_scale=facts["guidance"],
        max_sequence_length=facts["text_length"], generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames  # fmt: skip
    assert frames.shape == (1, FRAMES, SIZE, SIZE, 3) and np.isfinite(frames).all()


def test_latents_are_normalised():
    base = load_base("micro")
    clips = np.stack([make_clip((31, i), held_out=True)[1] for i in range(64)])
    latents = base.encode_videos(torch.from_numpy(clips))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.25
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.2


def rates(right: dict[str, list[bool]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in right.items()}


def test_judges_are_right_on_real_clips_before_and_after_the_vae():
    """The issue's bar is 99 %; 256 clips here, 2,048 in the slow test."""
    for after in (False, True):
        for name, rate in rates(judged(256, after)).items():
            assert rate >= 0.98, (name, rate, "after the VAE" if after else "as rendered")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_judges_are_right_on_99_percent_of_many_clips(after: bool):
    for name, rate in rates(judged(2048, after)).items():
        assert rate >= 0.99, (name, rate)


def judged(count: int, after_vae: bool) -> dict[str, list[bool]]:
    base = load_base("micro")
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, 64):
        pairs = [make_clip((32, start + i), held_out=True) for i in range(64)]
        clips = np.stack([clip for _, clip in pairs])
        if after_vae:
            clips = base.decode(base.encode_videos(torch.from_numpy(clips))).numpy()
        for (caption, _), clip in zip(pairs, clips, strict=True):
            for name, value in judge(clip, caption).items():
                right[name].append(value)
    return right


@pytest.mark.slow
def test_the_teacher_meets_its_bar_and_few_steps_are_hard(tmp_path: Path):
    """Quality bar of the teacher on 1,024 held-out captions, 50 steps with CFG; one and two undistilled steps fail."""
    from tmd_eval.generate import generate_run
    from tmd_eval.micro_scores import score_run
    from tmd_eval.prompts import load_prompts

    def scores(m: int) -> dict[str, float]:
        run = generate_run("micro", load_prompts("micro", count=1024), tmp_path / str(m), m=m, batch_size=64)
        return {name: entry["value"] for name, entry in score_run(run).items()}

    teacher = scores(50)
    for name in ("color", "shape", "direction", "speed", "background", "count", "color2", "shape2"):
        assert teacher[f"alignment_{name}"] >= 0.95, name
    assert teacher["alignment_relation"] >= 0.90
    assert teacher["alignment_joint"] >= 0.85
    assert teacher["frechet"] <= 3 * teacher["frechet_real"]
    assert scores(1)["alignment_joint"] <= 0.10
    assert scores(2)["alignment_joint"] <= 0.50

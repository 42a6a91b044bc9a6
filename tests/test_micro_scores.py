"""Intervals, Fréchet distance, diversity and the scoring of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import typer
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from students.errors import ConfigError, IncompleteError
from students.micro.world import FRAMES, Scene, make_clip, parse_caption, render, sample_scene
from tests.tiny import tiny_pipeline
from tmd_eval.commands.micro import micro
from tmd_eval.micro_diversity import GROUPS, diversity, nuisance_table
from tmd_eval.micro_fidelity import SECOND_SEED, features, frechet_distance, frechet_interval, quantize, real_clips
from tmd_eval.micro_judges import read_attributes
from tmd_eval.micro_scores import mean_interval, score_run
from tmd_eval.video import write_video

N = 160


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [make_clip((8, i), held_out=True)[0] for i in range(N)]


@pytest.fixture(scope="module")
def real(captions: list[str]) -> list[np.ndarray]:
    return real_clips(captions, SECOND_SEED)


@pytest.fixture(scope="module")
def reference(captions: list[str]) -> np.ndarray:
    return features(real_clips(captions))


def test_frechet_distance_agrees_with_scipys_matrix_root_and_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) + 0.5
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(6 * 4.0)  # moved only: the squared distance of the means
    assert frechet_distance(a, a.mean(0) + 3 * (a - a.mean(0))) == pytest.approx(4 * np.trace(np.cov(a.T)))
    twice = frechet_distance(np.concatenate([a, a[:50]]), b)
    assert frechet_distance(a, b, np.r_[np.full(50, 2.0), np.ones(150)]) == pytest.approx(twice)


def test_frechet_distance_rises_with_saturation_blur_and_stillness(
    real: list[np.ndarray], reference: np.ndarray
) -> None:
    def distance(change: object) -> float:
        return frechet_distance(features([quantize(change(c / 255)) for c in real]), reference)  # type: ignore[operator]

    def saturated(k: float) -> float:
        return distance(lambda c: np.clip(c.mean(-1, keepdims=True) * (1 - k) + k * c, 0, 1))

    def blurred(sigma: float) -> float:
        return distance(lambda c: gaussian_filter(c, (0, sigma, sigma, 0)))

    real_to_real = distance(lambda c: c)
    assert real_to_real < saturated(1.1) < saturated(1.3) < saturated(1.6)
    assert real_to_real < blurred(0.5) < blurred(0.8) < blurred(1.5)
    assert saturated(1.3) > 3 * real_to_real and blurred(0.8) > 2 * real_to_real
    assert distance(lambda c: np.repeat(c[:1], FRAMES, axis=0)) > 2 * real_to_real
    checks = np.indices((32, 32)).sum(0)[..., None] % 2 * 0.1
    assert distance(lambda c: np.clip(c + checks, 0, 1)) > 3 * real_to_real


def test_two_real_sets_are_about_equally_far_from_a_third(captions: list[str], reference: np.ndarray) -> None:
    distances = [frechet_distance(features(real_clips(captions, seed)), reference) for seed in (1, 2, SECOND_SEED)]
    assert max(distances) / min(distances) < 1.25


def test_the_reference_clip_of_a_caption_does_not_depend_on_the_list() -> None:
    a, b = "a red circle moves up slowly on a dark background", "a blue cross moves left quickly on a light background"
    first, again, other = real_clips([a, a, b])
    np.testing.assert_array_equal(real_clips([b, a, a])[1], first)
    np.testing.assert_array_equal(real_clips([b])[0], other)
    assert (first != again).any()


def test_the_interval_of_a_mean_covers_the_truth_and_knows_of_clusters() -> None:
    rng = np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(150):  # 60 prompts of 4 clips; each prompt has its own probability, on average 0.6
        p = rng.beta(1.2, 0.8, size=60)
        values = (rng.random((60, 4)) < p[:, None]).astype(float).ravel()
        prompts = np.repeat(np.arange(60), 4)
        value, low, high = mean_interval(values, prompts, resamples=400)
        assert low <= value <= high
        covered += low <= 0.6 <= high
        _, low, high = mean_interval(values, np.arange(240), resamples=400)  # as if clips were independent
        naive += low <= 0.6 <= high
    assert covered / 150 >= 0.89  # 0.95 less three standard errors and the bootstrap's own shortfall
    assert naive < covered - 15


def test_the_interval_of_a_clean_sweep_is_not_a_point() -> None:
    value, low, high = mean_interval(np.ones(100), np.arange(100))
    assert (value, high) == (1.0, 1.0)
    assert low**100 == pytest.approx(0.025)
    assert mean_interval(np.zeros(100), np.arange(100))[2] == pytest.approx(1 - low)
    assert mean_interval(np.ones(100), np.repeat(np.arange(10), 10))[1] < low  # ten prompts say less than a hundred


def test_the_interval_of_the_frechet_distance_is_as_wide_as_its_spread() -> None:
    rng = np.random.default_rng(1)
    scale = np.linspace(0.5, 1.5, 6)
    many = [frechet_distance(rng.normal(size=(120, 6)) * scale + 0.7, rng.normal(size=(120, 6))) for _ in range(200)]
    widths = []
    for _ in range(10):
        a, b = rng.normal(size=(120, 6)) * scale + 0.7, rng.normal(size=(120, 6))
        value, low, high = frechet_interval(a, b, np.arange(120))
        assert low < value < high
        widths.append(high - low)
    assert np.mean(widths) / (2 * 1.96 * np.std(many)) == pytest.approx(1, abs=0.25)


CAPTIONS = (
    "a red circle moves left slowly above a blue square on a striped background",
    "a green cross moves up slowly on a shaded background",
    "a cyan triangle moves right slowly below a red cross on a striped background",
)
PER_PROMPT = 8


def _table(seed: int, collapse: object = None, modes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Nuisances of PER_PROMPT clips a caption, each scene made like one of the first ``modes``."""
    readings, stated, clusters = [], [], []
    for k, caption in enumerate(CAPTIONS):
        rng = np.random.default_rng((seed, k))
        scenes = [sample_scene(rng, parse_caption(caption)) for _ in range(PER_PROMPT)]
        for i, scene in enumerate(scenes):
            made = scene if collapse is None else collapse(scene, scenes[i % modes])  # type: ignore[operator]
            readings.append(read_attributes(render(made)))
            stated.append(scene.attributes)
            clusters.append(k)
    return nuisance_table(readings, stated), np.array(clusters)


def _like(*fields: str) -> object:
    """Take some fields of the scene from the other one."""
    return lambda scene, other: Scene(**{**vars(scene), **{f: getattr(other, f) for f in fields}})


def test_diversity_is_one_for_real_clips_and_falls_with_each_collapse() -> None:
    real, clusters = _table(1)
    same = diversity(_table(2)[0], real, clusters)
    assert set(same) == {"diversity", *(f"diversity_{g}" for g in GROUPS)}
    for value, low, high in same.values():
        assert 0.75 < value < 1.25 and low <= value <= high
    for fields, groups in (
        (("start", "still", "travel", "radii"), ("place", "size", "motion")),
        (("levels", "tint", "angle", "period", "phase"), ("background", "phase")),
    ):
        one = diversity(_table(2, _like(*fields))[0], real, clusters)
        two = diversity(_table(2, _like(*fields), modes=2)[0], real, clusters)
        assert one["diversity"][0] < two["diversity"][0] < same["diversity"][0]
        assert all(one[f"diversity_{g}"][0] < 0.1 for g in groups)
        assert all(
            abs(one[f"diversity_{g}"][0] / same[f"diversity_{g}"][0] - 1) < 0.1 for g in GROUPS if g not in groups
        )
    for field, group, share in (("start", "place", 0.75), ("radii", "size", 0.1), ("phase", "phase", 0.1)):
        fixed = diversity(_table(2, _like(field))[0], real, clusters)  # of places, the still object's is left free
        assert fixed[f"diversity_{group}"][0] < share * same[f"diversity_{group}"][0], field
        assert fixed["diversity"][0] < 0.95 * same["diversity"][0], field


def test_unreadable_clips_have_no_diversity() -> None:
    real, clusters = _table(1)
    assert diversity(np.full_like(real, np.nan), real, clusters) == {}
    plain = clusters == 1  # a shaded background has no phase
    result = diversity(real[plain], real[plain], clusters[plain] - 1)
    assert "diversity_phase" not in result and result["diversity"][0] == pytest.approx(1.0)


def _run(folder: Path, captions: list[str], samples: int = 1, planned: int | None = None) -> Path:
    (folder / "videos").mkdir(parents=True)
    rows = []
    for line, caption in enumerate(captions):
        for index in range(samples):
            name = f"{line:05d}-{index}.mp4"
            rng = np.random.default_rng((line, index))
            clip = quantize(render(sample_scene(rng, parse_caption(caption))))
            write_video(folder / "videos" / name, clip, 8, lossless=True)
            rows.append({"video": name, "prompt": caption, "index": index, "seed": 0})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    count = len(captions) if planned is None else planned
    (folder / "config.yaml").write_text(f"prompts: {{count: {count}}}\nsamples_per_prompt: {samples}\n")
    return folder


def test_a_run_of_real_clips_scores_one(tmp_path: Path, captions: list[str]) -> None:
    distinct = list(dict.fromkeys(captions))[:64]
    run = _run(tmp_path / "run", distinct)
    summary = score_run(run)
    assert summary == json.loads((run / "scores" / "summary.json").read_text())
    two = sum(" of a " in c or " above " in c or " below " in c for c in distinct)
    for name, entry in summary.items():
        assert set(entry) == {"n", "value", "low", "high", "completeness", "metric_version", "weight_hashes"}
        assert entry["completeness"] == 1.0 and entry["low"] <= entry["value"] <= entry["high"]
        if name.startswith("alignment"):
            assert entry["value"] == 1.0
            assert entry["n"] == (two if name.split("_")[1] in ("relation", "color2", "shape2") else 64)
            rows = [json.loads(x) for x in (run / "scores" / f"{name}.jsonl").read_text().splitlines()]
            assert len(rows) == entry["n"] and {"video", "value", "extra"} == set(rows[0])
            assert np.mean([r["value"] for r in rows]) == entry["value"]
    assert summary["frechet"]["value"] < 1.5 * summary["frechet_real"]["value"]
    assert not any(name.startswith("diversity") for name in summary)  # one clip a prompt: not measured, hence absent


def test_a_run_of_two_samples_has_diversity_and_a_small_one_no_frechet_distance(tmp_path: Path) -> None:
    summary = score_run(_run(tmp_path / "run", list(CAPTIONS), samples=3))
    assert summary["diversity"]["n"] == 9 and summary["diversity"]["value"] > 0.4
    assert "frechet" not in summary


def test_real_clips_are_measured_once_for_all_runs_of_the_same_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def noted(captions: tuple[str, ...], *more: int) -> list[np.ndarray]:
        asked.append(tuple(captions))
        return real_clips(captions, *more)

    monkeypatch.setattr("tmd_eval.micro_scores.real_clips", noted)
    captions = list(CAPTIONS)
    here, there = (_run(tmp_path / name, captions, samples=2) for name in ("here", "there"))
    other = score_run(_run(tmp_path / "other", captions[:2], samples=2))
    first, again = score_run(here), score_run(there)
    assert [len(found) for found in asked] == [4, 6]
    assert first == again and first["diversity"] != other["diversity"]


def test_missing_videos_are_named_and_never_shrink_the_count_silently(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", list(CAPTIONS), planned=4)
    (run / "videos" / "00001-0.mp4").write_bytes(b"not a video")
    (run / "videos" / "00002-0.mp4").unlink()
    with pytest.raises(IncompleteError, match=r"3 of 4 videos.*00001-0\.mp4.*00002-0\.mp4.*00003-0\.mp4") as caught:
        score_run(run)
    assert caught.value.exit_code == 3 and not (run / "scores").exists()
    summary = score_run(run, allow_partial=True)
    assert summary["alignment_joint"]["n"] == 1 and summary["alignment_joint"]["completeness"] == 0.25
    with pytest.raises(IncompleteError, match="5 of 6"):
        score_run(run, expected=6)


def test_a_limit_is_part_of_the_plan(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", list(CAPTIONS), samples=2)
    config = run / "config.yaml"
    config.write_text(config.read_text() + "limit: 3\n")  # three finished videos beyond the plan may stay
    assert score_run(run)["alignment_joint"]["n"] == 3


def test_runs_that_cannot_be_judged_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no videos"):
        score_run(tmp_path)
    run = _run(tmp_path / "run", list(CAPTIONS[:1]))
    (run / "manifest.jsonl").write_text(json.dumps({"video": "00000-0.mp4", "prompt": "a dog runs"}) + "\n")
    with pytest.raises(ConfigError, match=r"00000-0\.mp4.*'a dog runs' is not a caption"):
        score_run(run)


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(micro)
    return app


def test_the_command_scores_a_run(tmp_path: Path, command: typer.Typer) -> None:
    run = _run(tmp_path / "run", list(CAPTIONS), samples=2)
    shown = CliRunner().invoke(command, ["--videos", str(run)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "joint" in shown.stdout and "100.0 %" in shown.stdout and "Fréchet distance: not measured" in shown.stdout
    answer = CliRunner().invoke(command, ["--videos", str(run), "--json"], catch_exceptions=False)
    result = json.loads(answer.stdout)
    assert result["summary"] == json.loads((run / "scores" / "summary.json").read_text())
    (run / "videos" / "00001-0.mp4").unlink()
    assert isinstance(CliRunner().invoke(command, ["--videos", str(run)]).exception, IncompleteError)
    partial = CliRunner().invoke(command, ["--videos", str(run), "--allow-partial"], catch_exceptions=False)
    assert "INCOMPLETE: 83.3 %" in partial.stdout


@pytest.mark.parametrize("wrong", [[], ["--ckpt", "x"], ["--ckpt", "x", "--videos", "y"], ["--out", "z"]])
def test_the_command_wants_a_checkpoint_with_out_or_videos(wrong: list[str], command: typer.Typer) -> None:
    error = CliRunner().invoke(command, wrong).exception
    assert isinstance(error, ConfigError) and "--videos RUN" in str(error)


def test_the_command_generates_and_scores(tmp_path: Path, command: typer.Typer) -> None:
    pipeline, run = tiny_pipeline(tmp_path / "pipeline"), tmp_path / "run"
    arguments = ["--ckpt", str(pipeline), "--out", str(run), "--num-prompts", "3", "--m", "1", "--json"]
    planned = CliRunner().invoke(command, [*arguments, "--dry-run"], catch_exceptions=False)
    assert json.loads(planned.stdout)["missing"] == 3 and not run.exists()
    answer = CliRunner().invoke(command, arguments, catch_exceptions=False)
    summary = json.loads(answer.stdout)["summary"]
    assert summary["alignment_joint"]["n"] == 3 and summary["alignment_joint"]["value"] == 0.0  # random weights
    assert summary["alignment_joint"]["high"] == pytest.approx(1 - 0.025 ** (1 / 3))

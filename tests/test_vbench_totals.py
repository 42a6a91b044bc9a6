"""VBench's arithmetic: totals, aggregates, intervals, comparison and export, against the official formulas."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from students.errors import ConfigError, IncompleteError
from tmd_eval.commands.vbench import app as vbench_app
from tmd_eval.vbench import statistics, summary
from tmd_eval.vbench.compare import compare_runs
from tmd_eval.vbench.dimensions import DIMENSIONS
from tmd_eval.vbench.export import export_zip
from tmd_eval.vbench.totals import totals, totals_of_file

OFFICIAL_RANGE = {
    "subject consistency": (0.1462, 1.0), "background consistency": (0.2615, 1.0), "temporal flickering": (0.6293, 1.0),
    "motion smoothness": (0.706, 0.9975), "dynamic degree": (0, 1), "aesthetic quality": (0, 1),
    "imaging quality": (0, 1), "object class": (0, 1), "multiple objects": (0, 1), "human action": (0, 1),
    "color": (0, 1), "spatial relationship": (0, 1), "scene": (0, 0.8222), "appearance style": (0.0009, 0.2855),
    "temporal style": (0, 0.364), "overall consistency": (0, 0.364),
}  # fmt: skip


def official_total(scores: dict[str, float]) -> tuple[float, float, float]:
    """The official script's steps, on names with spaces, in its order."""
    normal = {k: (scores[k] - low) / (high - low) for k, (low, high) in OFFICIAL_RANGE.items()}
    normal["dynamic degree"] *= 0.5
    quality = sum(list(normal.values())[:7]) / 6.5
    semantic = sum(list(normal.values())[7:]) / 9
    return quality, semantic, (4 * quality + semantic) / 5


def scored_run(run: Path, shift: float = 0.0, seed: int = 0, prompts: int = 12) -> Path:
    """A run with made-up scores in all sixteen dimensions."""
    rng = np.random.default_rng(seed)
    (run / "scores").mkdir(parents=True)
    for name, one in DIMENSIONS.items():
        rows = []
        for prompt in range(prompts):
            base = rng.uniform(0.3, 0.7)
            for index in range(2):
                extra: dict[str, Any] = {"prompt": f"prompt {prompt}", "protocol": "standard"}
                if one.weight is not None:
                    count = int(rng.integers(1, 9))
                    extra[one.weight] = [0.0] * count if one.weight == "frame_results" else count
                value = base + shift + rng.normal(0, 0.01)
                rows.append({"video": f"prompt {prompt}-{index}.mp4", "value": value, "extra": extra})
        (run / "scores" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "version": "vbench-0.1.5", "protocol": {"set": "standard", "fps": 16}, "totals": None, "not_measured": {},
        "dimensions": {name: {"partial": False} for name in DIMENSIONS},
    }  # fmt: skip
    (run / summary.RECORD).write_text(json.dumps(record))
    return run


def invoke(*arguments: str) -> Any:
    tree = typer.Typer(pretty_exceptions_enable=False)
    tree.add_typer(vbench_app, name="vbench")
    tree.command("other")(lambda: None)
    return CliRunner().invoke(tree, ["vbench", *arguments])


def test_totals_by_the_official_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores = dict(zip(DIMENSIONS, rng.uniform(-0.2, 1.2, 16), strict=True))  # not clipped, either end
        expected = official_total({name.replace("_", " "): value for name, value in scores.items()})
        assert totals(scores) == pytest.approx(expected, abs=1e-12)
    perfect = {name: high for name, (_, high) in zip(DIMENSIONS, OFFICIAL_RANGE.values(), strict=True)}
    assert [name.replace("_", " ") for name in DIMENSIONS] == list(OFFICIAL_RANGE)
    assert totals(perfect) == pytest.approx((1, 1, 1))
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({name: 100 * value for name, value in scores.items()}))
    result = invoke("total", str(file), "--json")
    assert list(json.loads(result.stdout).values()) == pytest.approx([100 * e for e in expected], abs=1e-10)
    lines = invoke("total", str(file)).stdout.split("\n")
    assert lines[2] == f"total: {100 * expected[2]:.2f}"


def test_a_total_needs_all_sixteen(tmp_path: Path) -> None:
    scores = dict.fromkeys(DIMENSIONS, 50.0)
    file = tmp_path / "scores.json"
    for name in ("scene", "dynamic_degree"):
        file.write_text(json.dumps({k: v for k, v in scores.items() if k != name}))
        with pytest.raises(IncompleteError, match=name) as caught:
            totals_of_file(file)
        assert caught.value.exit_code == 3
    file.write_text(json.dumps({**scores, "color": float("nan")}))  # a bare NaN, as the official package writes
    with pytest.raises(IncompleteError, match="color"):
        totals_of_file(file)
    for wrong, match in (
        ({"colour": 1}, "did you mean color"),
        ({**scores, "color": "high"}, "high"),
        ([1], "must map"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=match):
            totals_of_file(file)
    with pytest.raises(ConfigError, match="absent"):
        totals_of_file(tmp_path / "absent.json")


def test_aggregates_weigh_as_the_official_code_sums() -> None:
    # subject consistency: sum over frame pairs of all videos / number of pairs
    pairs = {"a-0.mp4": [0.9, 0.8, 0.7], "a-1.mp4": [0.5], "b-0.mp4": [1.0, 0.6]}
    rows = [
        {"video": v, "value": np.mean(s), "extra": {"prompt": v[0], "frame_pairs": len(s)}} for v, s in pairs.items()
    ]
    expected = sum(sum(s) for s in pairs.values()) / 6
    assert summary.sums_of("subject_consistency", rows).aggregate == pytest.approx(expected, abs=1e-15)
    # appearance style: mean over all frames, not over videos, and never the last frame's
    rows = [
        {"value": np.mean(s), "extra": {"prompt": v, "frame_results": s, "cur_sim": s[-1]}} for v, s in pairs.items()
    ]
    assert summary.sums_of("appearance_style", rows).aggregate == pytest.approx(expected, abs=1e-15)
    # scene: successes / frames
    rows = [{"value": k / n, "extra": {"prompt": str(n), "frame_count": n}} for k, n in ((3, 16), (8, 8))]
    assert summary.sums_of("scene", rows).aggregate == pytest.approx(11 / 24, abs=1e-15)
    rows = [{"value": v, "extra": {"prompt": str(v)}} for v in (0.25, 0.75, 0.8)]
    assert summary.sums_of("color", rows).aggregate == pytest.approx(0.6, abs=1e-15)


def test_intervals_resample_prompts_and_share_draws() -> None:
    rng = np.random.default_rng(3)
    prompts = [f"p{i // 5}" for i in range(500)]
    values = np.repeat(rng.normal(0.5, 0.1, 100), 5)  # five equal videos a prompt: 100 draws, not 500
    one = statistics.sums(prompts, list(values), [1.0] * 500)
    value, low, high = statistics.interval(one)
    assert value == pytest.approx(values.mean()) and low is not None and high is not None
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    drawn = statistics.resample({"x": one, "y": one})
    assert np.array_equal(drawn["x"], drawn["y"])
    assert statistics.interval(statistics.sums(["p"] * 3, [0.1, 0.2, 0.3], [1.0] * 3))[1:] == (None, None)
    sure = statistics.interval(statistics.sums([str(i) for i in range(50)], [1.0] * 50, [1.0] * 50))
    assert sure == pytest.approx((1.0, 0.025 ** (1 / 50), 1.0))


def test_holm_by_hand() -> None:
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert statistics.holm({"a": 0.9, "b": 0.8})["a"] == 1.0


def test_comparison_of_two_runs(tmp_path: Path) -> None:
    a, b = scored_run(tmp_path / "a"), scored_run(tmp_path / "b", shift=0.05)
    same = compare_runs(a, a)["differences"]
    assert all(row["value"] == 0 and row["p_value"] == 1 for row in same.values()) and len(same) == 19
    found = compare_runs(a, b)["differences"]
    for name in DIMENSIONS:
        row = found[name]
        assert row["low"] <= row["value"] <= row["high"] and row["value"] == pytest.approx(5, abs=1e-9)
        assert row["p_value"] <= row["p_holm"] and row["n_prompts"] == 12
        assert row["p_value"] < 0.01  # 2 in 4,096 swaps reach it
    expected = [100 * totals({n: s.aggregate for n, s in summary.read_sums(run).items()}).total for run in (a, b)]
    assert found["total"]["value"] == pytest.approx(expected[1] - expected[0], abs=1e-9)
    printed = json.loads(invoke("compare", str(a), str(b), "--json").stdout)
    assert printed["differences"] == found and printed["warnings"] == []
    assert "prompts" in invoke("compare", str(a), str(b)).stdout
    with pytest.raises(ConfigError, match="no scores"):
        compare_runs(a, tmp_path)


def test_a_comparison_takes_only_what_both_records_hold(tmp_path: Path) -> None:
    a, b = scored_run(tmp_path / "a"), scored_run(tmp_path / "b")
    record = json.loads((b / summary.RECORD).read_text())
    del record["dimensions"]["scene"]  # its rows are of an earlier protocol
    record["protocol"]["static_filter"] = {"applied": True, "videos": 60}
    (b / summary.RECORD).write_text(json.dumps(record))
    found = compare_runs(a, b)
    assert set(found["differences"]) == set(DIMENSIONS) - {"scene"}  # and so no totals
    assert found["warnings"] == ["static_filter of temporal_flickering differs: False and True"]
    record["protocol"]["static_filter"] = {"applied": False}
    (b / summary.RECORD).write_text(json.dumps(record))
    assert compare_runs(a, b)["warnings"] == []


def test_intervals_of_few_prompts_are_as_wide_as_the_leaderboard_s() -> None:
    from leaderboard.stats import paired_differences

    rng = np.random.default_rng(5)
    for count in (5, 8, 30):
        names = [f"p{i:02d}" for i in range(count)]
        a, b = rng.normal(0.5, 0.05, (2, count))
        board = paired_differences({(0, 1): (dict(enumerate(b)), dict(enumerate(a)))})[0, 1]
        ones = [{"scene": statistics.sums(names, list(values), [1.0] * count)} for values in (a, b)]
        ours = statistics.differences(*ones)["scene"]
        assert ours.value == pytest.approx(board.value) and ours.low is not None and ours.high is not None
        assert ours.high - ours.low == pytest.approx(board.high - board.low, rel=0.08)
        value, low, high = statistics.interval(ones[0]["scene"])
        drawn = np.quantile(statistics.resample(ones[0])["scene"], [0.025, 0.975])
        assert [low, high] == pytest.approx(list(value + statistics.wider(count) * (drawn - value)))
    few = statistics.sums(["a", "b", "c"], [0.2, 0.5, 0.9], [1.0] * 3)
    assert statistics.differences({"scene": few}, {"scene": few})["scene"].low is None
    value, low, high = statistics.interval(few)
    assert (low, high) == (0, 1)  # never beyond what a score can be
    assert statistics.wider(2) == pytest.approx(2**0.5 * 12.7062 / 1.959964, rel=1e-4) and statistics.wider(1) == 1


def test_the_official_formula_on_the_exported_zip_gives_our_total(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    path = export_zip(run, tmp_path / "out.zip")
    uploaded: dict[str, float] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            assert name.endswith(".json")
            content = json.loads(archive.read(name))
            uploaded |= {key.replace("_", " "): value[0] for key, value in content.items()}
            ((dimension, (_, rows)),) = content.items()
            if dimension == "imaging_quality":
                assert 30 < np.mean([row["video_results"] for row in rows]) < 70  # the official scale of one video
    ours = statistics.totals_intervals(summary.read_sums(run))
    assert official_total(uploaded) == pytest.approx([ours[k][0] for k in ("quality", "semantic", "total")], abs=1e-9)
    assert all(low < value < high for value, low, high in ours.values())
    assert export_zip(run, tmp_path / "again.zip").read_bytes() == path.read_bytes()
    record = json.loads((run / summary.RECORD).read_text())
    (run / summary.RECORD).unlink()  # the contract on disk has no such file: summary.json is enough
    entries = {name: {"completeness": 1.0} for name in DIMENSIONS}
    (run / "scores" / "summary.json").write_text(json.dumps(entries))
    assert export_zip(run, tmp_path / "again.zip").read_bytes() == path.read_bytes()
    record["dimensions"]["color"]["partial"] = True
    del record["dimensions"]["scene"]
    (run / summary.RECORD).write_text(json.dumps(record))
    with pytest.raises(IncompleteError, match=r"scene not measured; color partial"):
        export_zip(run, tmp_path / "partial.zip")
    assert not (tmp_path / "partial.zip").exists()
    with pytest.raises(ConfigError, match="in a folder that exists"):
        export_zip(run, tmp_path / "absent" / "x.zip")

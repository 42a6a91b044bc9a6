"""``benchmarks.gpu_wan`` on the CPU at tiny size: the code that a GPU will run, with nothing but the device changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_wan


def test_every_part_runs_and_lands_in_the_table(tmp_path: Path) -> None:
    words = ["--size", "tiny", "--device", "cpu", "--rounds", "1", "--warmup", "0", "--out", str(tmp_path)]
    assert gpu_wan.main(words) == 0
    result = json.loads((tmp_path / "wan_tiny.json").read_text())
    assert not result["failed"] and set(gpu_wan.PARTS) < set(result)
    assert [(row["m"], row["n"], round(row["effective_nfe"], 3)) for row in result["sampling"]] == [
        (1, 2, 1.417), (2, 2, 2.833), (1, 4, 2.25), (2, 4, 4.5),
    ]  # fmt: skip
    update = result["stage2_over_dmd2v"]
    assert update["median"] == pytest.approx(update["seconds"] / update["reference_seconds"]) and update["rounds"] == 1
    assert result["stage1_memory"]["plan_bytes"] > 0 and result["stage1_memory"]["peak_bytes"] is None
    lines = (tmp_path / "wan_tiny.md").read_text().splitlines()
    assert len(lines) == 4 + 8 and not any("not measured" in line for line in lines)


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu_wan.Bench) -> None:
        raise RuntimeError("CUDA out of memory | tried\nmore")

    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(gpu_wan.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu_wan, "PARTS", {"a_part": broken, "late": broken})
    words = ["--size", "tiny", "--device", "cpu", "--seconds", "250", "--out", str(tmp_path)]
    assert gpu_wan.main(words) == 3
    text = (tmp_path / "wan_tiny.md").read_text()
    assert "| a part | not measured: RuntimeError: CUDA out of memory / tried | |" in text
    assert "| late | not measured: not started, as 300 s of 250 were over | |" in text

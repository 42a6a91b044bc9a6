"""Prompt sets: order, names and refusal of what cannot be a file name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from students.errors import ConfigError, EnvironmentMissingError
from students.micro.world import is_held_out, parse_caption
from tmd_eval import prompts as prompts_module
from tmd_eval.prompts import PromptSet, load_prompts, micro_prompts, single_prompt, vbench_prompts
from tmd_eval.vbench import runner


def test_hostile_prompts_get_harmless_names(tmp_path: Path) -> None:
    hostile = ["../../etc/passwd", "/", "a" * 600, "x\x1b[31m", ".."]
    (tmp_path / "p.txt").write_text("\n".join(["", *hostile, "  "]))
    chosen = load_prompts(str(tmp_path / "p.txt"))
    assert chosen.prompts == tuple(hostile) and chosen.name == "p.txt"
    assert [chosen.video_name(line, 3) for line in range(5)] == [f"0000{line}-3.mp4" for line in range(5)]


@pytest.mark.parametrize("prompt", ["a/b", "..", "é" * 125, "a\0b"])
def test_names_made_of_prompts_cannot_leave_the_folder(prompt: str) -> None:
    with pytest.raises(ConfigError):
        PromptSet(name="vbench", prompts=("fine", prompt), named_by_prompt=True)


def test_hash_depends_on_text_and_order() -> None:
    sets = [PromptSet(name="x", prompts=p) for p in (("a", "b"), ("b", "a"), ("a",))]
    assert len({s.sha256 for s in sets}) == 3
    assert PromptSet(name="other", prompts=("a", "b")).sha256 == sets[0].sha256
    assert sets[0].first(1).sha256 == sets[2].sha256 and sets[0].first(9) is sets[0]


def test_micro_prompts_are_distinct_held_out_and_nested() -> None:
    all_of_them = micro_prompts().prompts
    assert len(set(all_of_them)) == len(all_of_them) == prompts_module.MICRO_COUNT
    assert all(is_held_out(caption) and parse_caption(caption).caption == caption for caption in all_of_them)
    assert micro_prompts(10).prompts == all_of_them[:10] == load_prompts("micro", count=10).prompts
    with pytest.raises(ConfigError, match="99999"):
        micro_prompts(99999)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary.txt", "absent.txt"):
        with pytest.raises(ConfigError, match=name):
            load_prompts(str(tmp_path / name))
    with pytest.raises(ConfigError):
        single_prompt("  ")
    with pytest.raises(ConfigError):
        single_prompt("a").first(0)


def test_vbench_prompts_are_unique_in_order_and_by_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "info.json"
    entries = [("b.", ["color"]), ("a", ["scene", "color"]), ("b.", ["scene"]), ("A", ["scene"])]
    info.write_text(json.dumps([{"prompt_en": p, "dimension": d} for p, d in entries]))
    monkeypatch.setattr(runner, "full_info", lambda: info)
    assert vbench_prompts().prompts == ("b.", "a", "A")
    assert vbench_prompts(["color"]).prompts == ("b.", "a")
    assert load_prompts("vbench", count=2).video_name(0, 4) == "b.-4.mp4"


def test_vbench_without_its_environment_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMissingError, match="tmd-eval vbench setup"):
        load_prompts("vbench")

"""Every ``--json`` output: its keys and types are frozen, for scripts read them (VBench's are in test_vbench)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tmd_eval.cli import app

SURFACE = Path(__file__).parent / "json_surface.json"


def shape(value: Any) -> Any:
    """Keys and types of a JSON value; a list of objects has the shape of its first one."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value and isinstance(value[0], dict) else "list"
    return {bool: "bool", int: "number", float: "number", str: "text", type(None): "null"}[type(value)]


def outputs(folder: Path) -> dict[str, Any]:
    def call(*words: str) -> Any:
        result = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return shape(json.loads(result.stdout))

    run, db = str(folder / "run"), ("--db", str(folder / "board.db"))
    micro = ("micro", "--ckpt", "micro", "--num-prompts", "2", "--m", "1")
    return {
        "doctor": call("doctor", "--json"),
        "nfe": call("nfe", "--m", "2", "--n", "2", "--h", "5", "--blocks", "30", "--json"),
        "nfe --ckpt --measure": call("nfe", "--ckpt", "micro", "--m", "1", "--measure", "--json"),
        "ckpt inspect": call("ckpt", "inspect", "micro", "--json"),
        "latency": call(
            "latency", "--ckpt", "micro", "--teacher-m", "1", "--repeats", "1", "--warmup", "0", "--out",
            str(folder / "latency"), *db, "--json",
        ),
        "generate": call(
            "generate", "--ckpt", "micro", "--prompts", "micro", "--num-prompts", "1", "--m", "1", "--out",
            str(folder / "other"), "--json",
        ),
        "data encode": call(
            "data", "encode", "--base", "micro", "--videos", str(folder / "other" / "videos"), "--out",
            str(folder / "encoded"), "--json",
        ),
        "data synthesize --dry-run": call(
            "data", "synthesize", "--base", "micro", "--prompts", "micro", "--num-prompts", "2", "--out",
            str(folder / "made"), "--dry-run", "--json",
        ),
        "micro --dry-run": call(*micro, "--out", run, "--dry-run", "--json"),
        "micro": call(*micro, "--out", run, "--json"),
        "leaderboard add": call("leaderboard", "add", run, *db, "--json"),
        "leaderboard import": call("leaderboard", "import", "published", "--db", str(folder / "p.db"), "--json"),
        "leaderboard export": call("leaderboard", "export", "--out", str(folder / "board.zip"), *db, "--json"),
        "leaderboard show": call("leaderboard", "show", *db, "--json"),
        "leaderboard build": call("leaderboard", "build", "--out", str(folder / "site"), *db, "--json"),
    }  # fmt: skip


def test_json_outputs_are_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a deliberate change run `python -m tests.test_json_output`."""
    monkeypatch.chdir(tmp_path)
    assert outputs(tmp_path) == json.loads(SURFACE.read_text())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        SURFACE.write_text(json.dumps(outputs(Path(name)), indent=1) + "\n")

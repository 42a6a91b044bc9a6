"""From torchrun to servers and back: tiny Wan students, trained by two sharded ranks, through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from typer.testing import CliRunner

from leaderboard.database import reading
from leaderboard.models import Latency, Result
from students.checkpoint import open_checkpoint
from students.config import TrainConfig
from students.pipeline import TMDPipeline
from students.train import train
from tests.test_train import STAGE1, STAGE2, make, world
from tests.test_vbench import FLICKER, vbench_environment
from tmd_eval.cli import app

__all__ = ["vbench_environment", "world"]  # fixtures
DMD = {"method.name": "dmd2v", "method.guidance": 1.5, "method.student_every": 2}
SHARDED = {"parallel__shard": "fsdp", "micro_batch": 1, "batch": 2, "iterations": 2, "ema": 0.5}


def torchrun(*configs: TrainConfig) -> None:
    """``torchrun --nproc-per-node 2 -m students.train``, one run after the other, by torchrun's own agent."""
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, monitor_interval=0.1, start_method="fork", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="trip",
    )  # fmt: skip
    elastic_launch(launch, _train_all)(configs)


def _train_all(configs: tuple[TrainConfig, ...]) -> None:
    for config in configs:
        train(config, progress=False)


@pytest.fixture(scope="module")
def trained(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A TMD student of both stages and a plain one of DMD2-v."""
    folder = tmp_path_factory.mktemp("runs")
    plain = {name: value for name, value in world.items() if name not in ("student.h", "optimiser.lr_gate")}
    first = str(folder / "stage1" / "checkpoint")
    torchrun(
        make(world, folder / "stage1", STAGE1, **SHARDED),
        make(world, folder / "tmd", {**STAGE2, "method.student_every": 2}, parent=first, **SHARDED),
        make(plain, folder / "plain", DMD, **SHARDED),
    )
    return {name: folder / name / "checkpoint" for name in ("tmd", "plain")}


def call(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("name", ["tmd", "plain"])
def test_a_student_of_two_ranks_goes_through_every_command(
    world: dict[str, Any], trained: dict[str, Path], vbench_environment: Path, tmp_path: Path, name: str
) -> None:
    checkpoint, board, run = trained[name], tmp_path / "board.db", tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left\na blue square moves up\n")
    facts = call("ckpt", "inspect", checkpoint)
    assert (facts["kind"], facts["m"]) == ("TMD student" if name == "tmd" else "plain student", 2)

    made = call("generate", "--prompts", prompts, "--out", run, "--device", "cpu", "--ckpt", checkpoint)
    assert (made["made"], made["missing"]) == (2, 0)
    score = ("vbench", "--prompts", prompts, "--dimensions", FLICKER, "--out", run, "--device", "cpu", "--db", board)
    scores = call(*score, "--ckpt", checkpoint)["scores"][FLICKER]
    assert scores["n"] == 2 and 0 < scores["value"] <= 1 and scores["completeness"] == 1

    out = tmp_path / "exported"
    assert call("ckpt", "export", checkpoint, "--out", out)["hash"] == facts["hash"]
    served = TMDPipeline.from_pretrained(out) if name == "tmd" else DiffusionPipeline.from_pretrained(out)
    assert isinstance(served, TMDPipeline if name == "tmd" else WanPipeline)
    weights = load_file(next(checkpoint.glob("*.safetensors")))
    state = served.transformer.state_dict()
    assert set(weights) <= set(state) and all(torch.equal(state[key], weights[key]) for key in weights)

    same = call("generate", "--prompts", prompts, "--out", run, "--device", "cpu", "--ckpt", out)
    assert (same["made"], same["changed"]) == (0, 0)  # the export goes on with the checkpoint folder's run
    again = call("generate", "--prompts", prompts, "--out", tmp_path / "back", "--device", "cpu", "--ckpt", out)
    assert again["made"] == 2
    files = [sorted((folder / "videos").iterdir()) for folder in (run, tmp_path / "back")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert open_checkpoint(out).spec == open_checkpoint(checkpoint).spec

    words = ("latency", "--ckpt", world["base"], "--ckpt", out, "--teacher-m", "2", "--repeats", "1", "--db", board)
    rows = call(*words, "--out", tmp_path / "latency")["rows"]
    assert [row["role"] for row in rows] == ["undistilled", "student"] and rows[1]["checkpoint_hash"] == facts["hash"]
    assert (rows[1]["seconds"]["head"] is not None) == (name == "tmd")
    with reading(str(board)) as session:
        assert session.query(Result).count() == 1 and session.query(Latency).count() == 2

"""Generation under torchrun: the ranks share the videos, and the set is the one a single process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import tiny_pipeline


def test_two_ranks_make_the_set_of_one(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "pipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left\na blue square moves up\na green circle moves down\n")
    words = [
        "tmd_eval.cli", "generate", "--ckpt", str(pipeline), "--prompts", str(prompts), "--m", "2", "--device", "cpu",
        "--batch-size", "1", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*launcher: str, out: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, *launcher, *words, "--out", str(tmp_path / out)], capture_output=True, text=True,
            env=environment, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)  # one rank speaks

    def rows(out: str) -> list[dict[str, object]]:
        lines = (tmp_path / out / "manifest.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    together = run(*torchrun, out="two")
    alone = run("-m", out="one")
    assert (together["made"], together["missing"]) == (alone["made"], alone["missing"]) == (3, 0)
    assert rows("two") == rows("one")  # order, seeds and sha256 of every file

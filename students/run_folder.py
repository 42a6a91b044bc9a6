"""The folder of a training run: who may write in it, whether it is complete, and how to go on with it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import yaml

from students.config import TrainConfig
from students.errors import ConfigError
from students.settings import flatten
from students.spec import StudentSpec

FREE_ON_RESUME = frozenset(
    {
        "out", "parent", "iterations", "save_every", "keep", "keep_every", "log_every", "device", "data.cache", "wandb",
        "parallel.shard", "parallel.shard_ranks", "parallel.context", "parallel.compile", "parallel.checkpoint_head",
        "preview.every", "preview.count", "preview.decode",
    }
)  # fmt: skip
"""Settings that a resumed run may change; with any other the result would be neither run's. The parent may lie
elsewhere: that it is the same one, its hash in the state tells."""


def prepare(out: Path, config: TrainConfig, resume: bool) -> None:
    """Refuse to overwrite or to mix runs, and write ``config.yaml``."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is {out}, a file; name a folder.")
    partial = out / ".config.yaml.partial"
    if out.is_dir() and any(path != partial for path in out.iterdir()):  # a killed run may have left no more than that
        if not resume:
            raise ConfigError(
                f"{out} is not empty: add --resume to go on with the run in it, or choose another folder with "
                "--set out=..."
            )
        _check_same_run(out, config)
    out.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(config.yaml(), encoding="utf-8")
        partial.replace(out / "config.yaml")
    finally:
        partial.unlink(missing_ok=True)


def withdraw(out: Path) -> None:
    """Take back a run's ``config.yaml`` that nothing followed, so that the mended command finds the folder empty."""
    if [path.name for path in out.iterdir()] == ["config.yaml"]:
        (out / "config.yaml").unlink()
        out.rmdir()


def complete(out: Path, config: TrainConfig) -> bool:
    """True if the run's checkpoint is there and has all its iterations."""
    path = out / "checkpoint" / "student.json"
    return path.exists() and StudentSpec.from_file(path).training.get("iteration") == config.iterations


def _check_same_run(out: Path, config: TrainConfig) -> None:
    path = out / "config.yaml"
    if not path.exists():
        raise ConfigError(
            f"{out} holds no run to resume (it has no config.yaml); choose another folder with --set out=..."
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} is damaged; put the run's settings back, or start in another folder with --set out=..."
        )
    old, new = flatten(tree), flatten(config.tree())
    for name in sorted(set(old) | set(new)):
        if name not in FREE_ON_RESUME and old.get(name) != new.get(name):
            raise ConfigError(
                f"cannot resume {out}: its run has {name} = {old.get(name)}, this one {new.get(name)}; "
                f"use {path}, or start in another folder with --set out=..."
            )


def restarted() -> bool:
    """True if torchrun or Slurm has started this command again after a rank or node was lost."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def resume_command(out: Path, world: int) -> str:
    """The command that goes on with the run in a folder; on several nodes, each runs it with its --rdzv options."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    nodes = f"--nnodes {world // local} " if world > local else ""
    start = "tmd-eval train" if world == 1 else f"torchrun {nodes}--nproc-per-node {local} -m students.train"
    return f"{start} {out / 'config.yaml'} --resume"


class StopRequest:
    """Notes SIGINT and SIGTERM inside a with block; a second signal acts as it did before."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

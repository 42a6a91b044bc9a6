"""What a training run writes while it goes: its state (to resume to the bit) and its log."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from students.errors import ConfigError, EnvironmentMissingError, TmdError
from students.parallel import local, put
from students.run_folder import resume_command

STATES = "state"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(TmdError):
    """A write failed for want of space; everything written before is intact."""


class NonFiniteError(TmdError):
    """A loss term or a gradient is not finite; no weight has moved by it."""


class TrainingInterrupted(TmdError):
    """A signal stopped the run after its state was saved; the message says how to go on."""

    exit_code = 130


@contextlib.contextmanager
def told_when_full(out: Path) -> Iterator[None]:
    """Turn "no space left" (also a quota or file size limit) inside the block into one sentence.

    Raises:
        DiskFullError: a write found no space.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _full(error)
        if full is None:
            raise
        raise DiskFullError(
            f"no space left while writing {full.filename or out} ({full.strerror}); earlier states in {out} "
            f"are intact: free space, then go on with {resume_command(out, int(os.environ.get('WORLD_SIZE', 1)))}."
        ) from error


def _full(error: BaseException | None) -> OSError | None:
    """The "no space left" among an error and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error
        if isinstance(error, SafetensorError):  # has the system's error number in its text only
            number = re.search(r"os error (\d+)|code: (\d+)", str(error))
            if number and int(number[1] or number[2]) in NO_SPACE:
                return OSError(int(number[1] or number[2]), os.strerror(int(number[1] or number[2])))
        error = error.__cause__ or error.__context__
    return None


class _Sink:
    """A binary file that remembers why a write failed: torch.save reports any failure as a bare RuntimeError."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_state(out: Path, iteration: int, state: dict[str, Any], keep: int, keep_every: int | None = None) -> Path:
    """Write ``state/<iteration>.pt`` atomically, then remove old ones (:func:`prune`).

    Raises:
        OSError: the write failed; earlier states are untouched.
    """
    folder = out / STATES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{iteration:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            sink = _Sink(file)
            try:
                torch.save(state, sink)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            except Exception as error:
                if sink.error is not None:
                    sink.error.filename = str(path)
                    raise sink.error from error
                raise
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    prune(out, keep, keep_every)
    return path


def prune(out: Path, keep: int, keep_every: int | None) -> None:
    """Remove all states but the latest ``keep`` and those at multiples of ``keep_every`` iterations."""
    for old in _states(out)[:-keep]:
        if keep_every and int(old.stem) % keep_every == 0:
            continue
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def latest_state(out: Path) -> Path | None:
    """The newest state of a run, a file or the folder of a sharded run; None before the first."""
    return max(_states(out), key=lambda path: int(path.stem), default=None)


def _states(out: Path) -> list[Path]:
    """Complete states, oldest first."""
    found = [path for path in (out / STATES).glob("*") if re.fullmatch(r"\d{8}(\.pt)?", path.name)]
    return sorted(found, key=lambda path: path.stem)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state, on the CPU.

    Raises:
        ConfigError: it is truncated or no state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ConfigError(
            f"training state {path} is damaged ({reason}); delete it to go on from an earlier one."
        ) from None
    if not isinstance(state, dict) or "iteration" not in state:
        raise ConfigError(f"{path} is no training state; delete it to go on from an earlier one.")
    return state


class Average:
    """Exponential moving average of a network's parameters, in float32: the weights that are sampled from.

    The decay grows as (1 + k) / (10 + k) over the first updates k, so that a short run is not held at its start.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.weights = [p.detach().to(torch.float32, copy=True) for p in network.parameters()]
        """Whole, or cut up over ranks as the network's parameters are."""

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network's weights, once after each of its updates."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [local(p.detach()).float() for p in network.parameters()]
        torch._foreach_lerp_([local(weight) for weight in self.weights], current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Put the averaged weights into the network."""
        for parameter, weight in zip(network.parameters(), self.weights, strict=True):
            local(parameter).copy_(local(weight))

    @contextlib.contextmanager
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """The network with the averaged weights, within a with block; its own come back to the bit."""
        mine = [local(p.detach()) for p in network.parameters()]
        kept = [weight.clone() for weight in mine]
        self.copy_to(network)
        try:
            yield
        finally:
            torch._foreach_copy_(mine, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for mine, saved in zip(self.weights, state["weights"], strict=True):
            put(mine, saved)


class MetricLog:
    """Appends metrics to ``events.jsonl``, TensorBoard's files and, if asked, Weights & Biases; on resume, cuts what is
    too new."""

    def __init__(self, out: Path, after: int, wandb: str | None = None):
        """Open the log.

        Args:
            out: the run's folder.
            after: iteration the run goes on from; later lines, of a run that was killed, are dropped.
            wandb: project of Weights & Biases that gets the metrics and previews as well.

        Raises:
            EnvironmentMissingError: wandb is asked for but not installed.
        """
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard: 1 s

        self._wandb = _open_wandb(wandb, out) if wandb else None
        self.path = out / "events.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _iteration(line) <= after]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self.path)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=after + 1)
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: dict[str, float]) -> None:
        """Take the figures of one iteration; :meth:`write` gives their mean."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, iteration: int, seconds: float) -> dict[str, float]:
        """Append the means since the last call, and forget them."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, "seconds": round(seconds, 3), **means}) + "\n")
        for name, value in means.items():
            self._board.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(means, step=iteration)
        return means

    def image(self, pixels: np.ndarray, iteration: int) -> None:
        """Write a contact sheet to ``previews/<iteration>.png`` and to the other logs.

        Args:
            pixels: (height, width, 3), uint8.
            iteration: it was made after.
        """
        folder = self.path.parent / "previews"
        folder.mkdir(exist_ok=True)
        path, partial = folder / f"{iteration:08d}.png", folder / f".{iteration:08d}.png"
        try:
            Image.fromarray(pixels).save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._board.add_image("preview", pixels, iteration, dataformats="HWC")
        if self._wandb:
            self._wandb.log({"preview": sys.modules["wandb"].Image(str(path))}, step=iteration)

    def close(self) -> None:
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def import_wandb(project: str) -> Any:
    """The wandb package, which is asked for.

    Raises:
        EnvironmentMissingError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise EnvironmentMissingError(
            f"wandb is {project}, but the package is not installed: pip install wandb, or set wandb to null."
        ) from None


def _open_wandb(project: str, out: Path) -> Any:
    wandb = import_wandb(project)
    identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in the same curve
    return wandb.init(project=project, name=out.name, id=identity, resume="allow", dir=str(out))


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return float("inf")

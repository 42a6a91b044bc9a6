"""One training loop for every method.

    python -m students.train CONFIG.yaml [--set name=value ...] [--resume] [--dry-run]
    torchrun --nproc-per-node 8 -m students.train CONFIG.yaml

Every random draw comes from (seed, iteration, pass), where a pass is one forward and backward over ``micro_batch``
pairs of the global batch. So a run that was killed and resumed ends with the same weights to the bit (one thread count
on the CPU; on CUDA as far as its deterministic algorithms reach), and the number of ranks changes only rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from students.build import Parts, build_parts, describe, student_spec
from students.checkpoint import save_student
from students.config import TrainConfig, load_config
from students.data import stream_seed
from students.distributed import Ranks
from students.errors import ConfigError, TmdError
from students.method import Batch
from students.parallel import free_gathered
from students.preview import Preview
from students.revision import code_revision
from students.run_folder import StopRequest, complete, prepare, restarted, resume_command, withdraw
from students.states import States
from students.trainer_state import (
    Average,
    MetricLog,
    NonFiniteError,
    TrainingInterrupted,
    import_wandb,
    latest_state,
    told_when_full,
)

log = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Path:
    """Run a training to its end.

    Args:
        config: the run.
        resume: go on from the latest state in ``config.out``; without one, start.
        progress: bars on stderr.

    Returns:
        The checkpoint folder, ``out/checkpoint``.

    Raises:
        ConfigError: settings do not fit the base model, the parent or the data; ``out`` holds another run.
        NonFiniteError: a loss term or gradient is not finite; the latest state is from before it.
        DiskFullError: no space left; earlier states are intact.
        TrainingInterrupted: SIGINT or SIGTERM; the state is saved.
    """
    out = Path(config.out)
    context = config.parallel.context
    with Ranks(config.device, context=context) as ranks, told_when_full(out), _deterministic(ranks.device):
        config.passes(ranks.data_world)
        again = resume or restarted()
        new = not (out.is_dir() and any(out.iterdir()))
        ranks.agree(lambda: _begin(out, config, again) if ranks.main else None)
        if complete(out, config):
            return out / "checkpoint"
        try:
            parts = build_parts(config, ranks, progress=progress and ranks.main)
        except TmdError:
            if new and ranks.main:
                withdraw(out)
            raise
        run = Run(config, ranks, parts)
        path = latest_state(out)
        if path is not None:
            run.load(path)
        ranks.barrier()
        run.go(progress and ranks.main)
        run.export()
        ranks.barrier()
    return out / "checkpoint"


def _begin(out: Path, config: TrainConfig, again: bool) -> None:
    """Refuse what cannot go on, before anything is written or loaded; then write ``config.yaml``."""
    if config.wandb:
        import_wandb(config.wandb)
    prepare(out, config, again)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms on CUDA; operations that have none warn and stay as they are."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class Run:
    """The state of a training run and its loop."""

    def __init__(self, config: TrainConfig, ranks: Ranks, parts: Parts):
        """Make optimisers and the moving average for freshly built networks."""
        self.config, self.ranks, self.parts, self.out = config, ranks, parts, Path(config.out)
        self.method, self.data = parts.method, parts.data
        self.layout, self.iteration, self.seconds = parts.layout, 0, 0.0
        self.micro, self.count = config.passes(ranks.data_world)
        self.optimisers = {name: optimiser(config, name, net) for name, net in self.method.networks.items()}
        self.rates = {name: [g["lr"] for g in opt.param_groups] for name, opt in self.optimisers.items()}
        self.updates = Counter[str]()
        self.average = Average(parts.student, config.ema) if config.ema else None
        self.states = States(
            self.out, ranks, self.layout, networks=self.method.networks, optimisers=self.optimisers,
            average=self.average, averaged=parts.student, keep=config.keep, keep_every=config.keep_every,
        )  # fmt: skip
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None
        self.preview = (
            Preview(config.preview, parts.base, self.data, low=config.precision == "bf16")
            if config.preview.every
            else None
        )

    def record(self) -> dict[str, Any]:
        """The plain values of a state: where the run is, and what it must go on with."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "data_hash": self.data.hash,
            "base_hash": self.parts.base.hash,
            "parent_hash": self.parts.parent["hash"] if self.parts.parent else None,
            "threads": torch.get_num_threads(),
            "micro_batch": self.micro,
        }

    def load(self, path: Path) -> None:
        """Go back to a saved state.

        Raises:
            ConfigError: it is damaged, or was made with other data, another base model or other passes.
        """
        record = self.states.load(path, lambda found: self.ranks.agree(lambda: self._check(found)))
        self.iteration, self.seconds = record["iteration"], record["seconds"]
        self.updates = Counter(name for i in range(1, self.iteration + 1) for name in self.method.turn(i))

    def _check(self, record: dict[str, Any]) -> None:
        if record["iteration"] > self.config.iterations:
            raise ConfigError(
                f"cannot resume {self.out}: it is at iteration {record['iteration']}, and iterations is "
                f"{self.config.iterations}; raise it, or start in another folder with --set out=..."
            )
        ours = self.record()
        keys = ["data_hash", "base_hash"]
        keys += ["parent_hash"] if self.ranks.main and "parent_hash" in record else []  # it read the parent
        for key in keys:
            then, now = record[key], ours[key]
            if then != now:
                what = key.removesuffix("_hash")
                raise ConfigError(
                    f"cannot resume {self.out}: its {what} had hash {str(then)[:12]}, now it is {str(now)[:12]}; "
                    "restore it, or start in another folder with --set out=..."
                )
        if record.get("micro_batch", self.micro) != self.micro:
            raise ConfigError(
                f"cannot resume {self.out} on {self.ranks.world} ranks: its passes held {record['micro_batch']} pairs, "
                f"now {self.micro}; use as many ranks as before (runs that set micro_batch go on with any number)."
            )
        if self.ranks.device.type == "cpu" and record["threads"] != torch.get_num_threads():
            log.warning(
                "resuming with %d threads a run of %d: the result agrees to rounding, not to the bit",
                torch.get_num_threads(), record["threads"],
            )  # fmt: skip

    def go(self, progress: bool) -> None:
        """Iterate to the end, saving and logging on the way."""
        config, main = self.config, self.ranks.main
        metrics = MetricLog(self.out, after=self.iteration, wandb=config.wandb) if main else None
        bar = tqdm(
            total=config.iterations, initial=self.iteration, desc=config.method_name, unit="it", disable=not progress
        )  # fmt: skip
        clock = time.perf_counter()
        with bar, StopRequest() as stop, contextlib.closing(metrics or contextlib.ExitStack()):
            while self.iteration < config.iterations:
                figures, stopping = self.step(self.iteration + 1, stop)
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
                last = self.iteration == config.iterations
                if metrics:
                    metrics.add(figures)
                    bar.update()
                    if last or self.iteration % config.log_every == 0:
                        bar.set_postfix(
                            loss=f"{metrics.write(self.iteration, self.seconds)['loss']:.4g}", refresh=False
                        )
                self.states.poll()
                if last or stopping or self.iteration % config.save_every == 0:
                    self.states.save(self.iteration, self.record(), wait=last or stopping)
                if self.preview and (last or self.iteration % self.preview.every == 0):
                    self._preview(metrics)
                if stopping and not last:
                    self.ranks.barrier()  # torchrun ends all ranks as soon as one is gone
                    raise TrainingInterrupted(
                        f"interrupted at iteration {self.iteration} of {config.iterations}, state saved; "
                        f"go on with: {resume_command(self.out, self.ranks.world)}"
                    )

    def step(self, iteration: int, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One iteration: forward and backward passes, then the update of the networks whose turn it is.

        Returns:
            The iteration's figures, and whether any rank was asked to stop.

        Raises:
            NonFiniteError: before any weight has moved.
        """
        config, turn = self.config, self.method.turn(iteration)
        for optimiser_ in self.optimisers.values():
            optimiser_.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        bad = ""
        for k in range(self.count):
            losses = self._losses(iteration, self.ranks.data_rank * self.count + k)
            bad = next((name for name, value in losses.items() if not torch.isfinite(value)), "")
            if self.layout.one_stops_all(bool(bad)):
                break
            torch.stack([value.double() for value in losses.values()]).sum().div(self.count).backward()
            for name, value in losses.items():
                terms[name] = terms.get(name, torch.zeros(())) + value.detach().double().cpu() / self.count
        failed, stopping = self.ranks.largest([float(bool(bad)), float(stop.received)])
        if failed:
            self._refuse(
                f"loss term {bad} is not finite" if bad else "a loss term of another rank is not finite", iteration
            )
        figures = self.method.metrics()
        for name in turn:
            network = self.method.networks[name]
            self.layout.average_gradients(network)
            norm = self.layout.clip(network, config.optimiser.clip)
            figures[f"grad_norm/{name}"] = float(norm)
            if not torch.isfinite(norm):
                self._refuse(f"gradient of {name} is not finite", iteration)
        warmup = config.optimiser.warmup
        for name in turn:
            self.updates[name] += 1
            share = min(1.0, self.updates[name] / warmup) if warmup else 1.0
            for group, rate in zip(self.optimisers[name].param_groups, self.rates[name], strict=True):
                group["lr"] = rate * share
            self.optimisers[name].step()
        if self.average and "student" in turn:
            self.average.update(self.parts.student)
        self.iteration = iteration
        broken = float(getattr(self.data, "broken", 0))  # of those that this rank has met
        means = torch.stack([*terms.values(), torch.tensor(broken, dtype=torch.float64)]).to(self.ranks.device)
        self.ranks.average([means])
        *losses_, broken = means.tolist()
        figures |= {f"loss/{name}": value for name, value in zip(terms, losses_, strict=True)}
        if broken:
            figures["data/broken"] = broken * self.ranks.world
        return {"loss": sum(losses_), **figures}, bool(stopping)

    def _losses(self, iteration: int, index: int) -> dict[str, Tensor]:
        """Loss terms of pass ``index`` of the global batch."""
        config, device = self.config, self.ranks.device
        batch = self._draw(iteration, index)
        batch = replace(batch, latents=batch.latents.to(device), text=batch.text.to(device))
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "pass", iteration, index))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return self.method.losses(batch, iteration, generator)

    def _draw(self, iteration: int, index: int) -> Batch:
        """The pairs of a pass; where they are read from disk, a thread has read them during the pass before."""

        def read(iteration: int, index: int) -> Batch:
            part = slice(index * self.micro, (index + 1) * self.micro)
            return self.data.draw(self.config.seed, iteration, self.config.batch, part)

        if not getattr(self.data, "reads_ahead", False):
            return read(iteration, index)
        waiting, first = self._ahead, self.ranks.data_rank * self.count
        batch = waiting[1].result() if waiting and waiting[0] == (iteration, index) else read(iteration, index)
        follows = (iteration, index + 1) if index + 1 < first + self.count else (iteration + 1, first)
        self._ahead = follows, self._reader.submit(read, *follows)
        return batch

    def _refuse(self, what: str, iteration: int) -> None:
        state = latest_state(self.out)
        kept = f"the last good state is {state}" if state else "no state was saved before"
        raise NonFiniteError(
            f"{what} at iteration {iteration}; no weight has moved by it and {kept}. "
            "Try a lower optimiser.lr or optimiser.clip, or fp32, in another folder."
        )

    def export(self) -> None:
        """Write ``out/checkpoint`` with the averaged weights and the run's provenance."""
        student = self.parts.student
        if self.average:
            self.average.copy_to(student)
        student = self.layout.whole(student)
        if student is None:
            return
        training = {
            "config": self.config.tree(),
            "iteration": self.iteration,
            "data_hash": self.data.hash,
            "code_revision": code_revision(),
            "parent": self.parts.parent,
            "device": self.ranks.device_name,
            "seconds": round(self.seconds, 1),
        }
        made = getattr(self.data, "setup_seconds", None)  # what ``prepare`` made, in this run or an earlier one
        if made is not None:
            training["setup_seconds"] = round(made, 1)
        save_student(self.out / "checkpoint", student, student_spec(self.config, self.parts.base, training))

    def _preview(self, metrics: MetricLog | None) -> None:
        """A contact sheet by the averaged weights, which are what the checkpoint will hold."""
        assert self.preview is not None
        student, average = self.parts.student, self.average
        free_gathered(student)
        spec = student_spec(self.config, self.parts.base, {})
        with average.in_place_of(student) if average else contextlib.nullcontext():
            latents = self.preview.sample(student, spec, self.ranks.device)
        free_gathered(student)
        if metrics:
            metrics.image(self.preview.sheet(latents), self.iteration)


def optimiser(config: TrainConfig, name: str, network: nn.Module) -> torch.optim.AdamW:
    """AdamW for one network; the fusion gate is a group of its own rate, without weight decay."""
    settings = config.optimiser
    gate = getattr(network, "gate_parameter", None)
    others = [p for p in network.parameters() if p is not gate]
    cut = [p for p in others if isinstance(p, DTensor)]  # a group of their own, as kernels take no mixture
    parts = (cut, [p for p in others if not isinstance(p, DTensor)])
    groups: list[dict[str, Any]] = [{"params": part} for part in parts if part]
    if gate is not None:
        groups.append({"params": [gate], "lr": settings.rate("gate"), "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=settings.rate(name), betas=(settings.betas[0], settings.betas[1]), eps=settings.eps,
        weight_decay=settings.weight_decay,
    )  # fmt: skip


def run_file(path: Path, *, overrides: list[str], resume: bool, dry_run: bool) -> str:
    """What the command line does: resolve a config file, then train or describe.

    Returns:
        What goes to stdout: the checkpoint folder, or the resolved config and the plan.
    """
    config = load_config(path, overrides)
    if dry_run:
        return config.yaml() + "\n" + describe(config)
    return str(train(config, resume=resume))


def main() -> None:
    """Entry point of ``python -m students.train``."""
    parser = argparse.ArgumentParser(prog="python -m students.train", description="Train a student from a YAML config.")
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="for example optimiser.lr=1e-4"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest state in out")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan")
    arguments = parser.parse_args()
    try:
        text = run_file(arguments.config, overrides=arguments.set, resume=arguments.resume, dry_run=arguments.dry_run)
    except TmdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)


if __name__ == "__main__":
    main()

"""The runner: gives jobs to worker processes, keeps failures apart, and stops in an orderly way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job
from tmd_eval.experiment.worker import LAST, note_failure, serve

PATIENCE = 120.0
"""Seconds a stopped worker gets to save its state."""
Stop = Literal["", "budget", "interrupted"]


@dataclass(kw_only=True)
class Worker:
    """A worker process."""

    process: Any
    pipe: Connection
    job: Job | None = None
    since: float = 0.0


@dataclass(kw_only=True)
class Progress:
    """What the live table shows."""

    running: dict[str, float] = field(default_factory=dict)
    """Id of a job to the time it started (``time.monotonic``)."""
    finished: list[str] = field(default_factory=list)
    """Ids of the jobs done in this run."""
    failed: dict[str, str] = field(default_factory=dict)
    """Id of a job to the sentence that says why it failed."""
    blocked: list[str] = field(default_factory=list)
    """Ids of the jobs that need a failed one."""
    stopped: Stop = ""


class Runner:
    """Runs jobs in worker processes until they end, the time is up, or it is told to stop; a context manager."""

    def __init__(
        self, out: Path, *, command: str, workers: int, gpus: int = 0, deadline: float | None = None,
        show: Callable[[Progress, Job | None], None] = lambda progress, job: None,
    ):  # fmt: skip
        """Take the settings; processes start with the first job.

        Args:
            out: folder of the run.
            command: command line that run folders record.
            workers: processes at once.
            gpus: GPUs to share among them, 0 for the CPU.
            deadline: ``time.monotonic()`` at which to stop, None for never.
            show: called about twice a second, and with each job that has ended.
        """
        self.out, self.command, self.gpus, self.deadline, self.show = out, command, gpus, deadline, show
        self.slots: list[Worker | None] = [None] * workers
        self.progress = Progress()
        self._wish = threading.Event()
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.slots:
            if worker is not None:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
                worker.process.join(timeout=5)
                if worker.process.is_alive():
                    worker.process.kill()

    def run(self, jobs: Iterable[Job], *, done: Callable[[Job], None] = lambda job: None) -> Progress:
        """Do jobs, those that others need first.

        Args:
            jobs: in the order in which to start them; jobs they need that are not among them count as done.
            done: called after each that succeeded.

        Returns:
            What happened, over all calls.
        """
        pending = {job.id: job for job in jobs}
        with _stop_signals() as self._wish:
            while (pending or self.progress.running) and not self.progress.stopped:
                if self._wish.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline):
                    self.progress.stopped = "interrupted" if self._wish.is_set() else "budget"
                    self._stop(done)
                    break
                self._block(pending)
                self._start(pending)
                self._collect(done, timeout=0.5)
                self.show(self.progress, None)
            if self._wish.is_set():
                self.progress.stopped = "interrupted"
        return self.progress

    def _start(self, pending: dict[str, Job]) -> None:
        for slot, worker in enumerate(self.slots):
            if worker is not None and worker.job is not None:
                continue
            busy = set(pending) | set(self.progress.running)
            ready = next((job for job in pending.values() if not busy & set(job.after)), None)
            if ready is None:
                return
            worker = worker or self._new(slot)
            store.failed_file(self.out, ready).unlink(missing_ok=True)
            try:
                worker.pipe.send(ready)
            except OSError:  # it died while it had nothing to do
                worker = self._new(slot)
                worker.pipe.send(ready)
            worker.job, worker.since = pending.pop(ready.id), time.monotonic()
            self.progress.running[ready.id] = worker.since

    def _new(self, slot: int) -> Worker:
        ours, theirs = self._context.Pipe()
        gpu = slot % self.gpus if self.gpus else None
        with _worker_environment():
            arguments = (theirs, os.getpid(), self.out, self.command, gpu)
            process = self._context.Process(target=serve, args=arguments, daemon=True)
            process.start()
        theirs.close()
        worker = Worker(process=process, pipe=ours)
        self.slots[slot] = worker
        return worker

    def _collect(self, done: Callable[[Job], None], timeout: float) -> None:
        busy = {worker.pipe: slot for slot, worker in enumerate(self.slots) if worker is not None and worker.job}
        for pipe in wait(list(busy), timeout=timeout):
            slot = busy[pipe]  # type: ignore[index]
            worker = self.slots[slot]
            assert worker is not None and worker.job is not None
            job = worker.job
            try:
                code, sentence = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                code = 1
                sentence = f"the process died (exit code {worker.process.exitcode}); a signal has a negative one"
                self.slots[slot] = None
            if code in LAST:
                self.slots[slot] = None
            worker.job = None
            self.progress.running.pop(job.id)
            if code == 0:
                self.progress.finished.append(job.id)
                done(job)
            elif not self.progress.stopped and not self._wish.is_set():  # a signal may reach workers first
                self.progress.failed[job.id] = sentence
                note_failure(self.out, job, sentence)
            self.show(self.progress, job)

    def _block(self, pending: dict[str, Job]) -> None:
        lost = {*self.progress.failed, *self.progress.blocked}
        for job in list(pending.values()):
            if lost & set(job.after):
                self.progress.blocked.append(pending.pop(job.id).id)
                lost.add(job.id)

    def _stop(self, done: Callable[[Job], None]) -> None:
        """Ask the busy workers to save their state, and end those that do not."""
        for worker in self.slots:
            if worker is not None and worker.job is not None:
                worker.process.terminate()
        end = time.monotonic() + PATIENCE
        while self.progress.running and time.monotonic() < end:
            self._collect(done, timeout=0.5)
        for worker in self.slots:
            if worker is not None and worker.job is not None:
                worker.process.kill()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a lost terminal) into a wish to stop; the next acts as before."""
    wish = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        wish.set()
        for other, handler in before.items():
            signal.signal(other, handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before |= {number: signal.signal(number, note) for number in numbers}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_workers() -> tuple[int, int]:
    """Workers and GPUs: one process a GPU, or one a core."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (gpus, gpus) if gpus else (len(os.sched_getaffinity(0)), 0)


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set what torch and the C library read only when a process starts; the user's own tunables stay."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GLIBC_TUNABLES")}
    os.environ["OMP_NUM_THREADS"] = "1"
    # Tensors in huge pages, which makes training on the CPU of a virtual machine faster.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

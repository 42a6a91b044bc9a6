"""A worker process: takes jobs one after another and calls the same functions as the commands do.

It has one thread (or one GPU), a session of its own, so that Ctrl-C reaches the runner alone, and it ends when the
runner is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job
from tmd_eval.files import write_atomic, write_json

STOPPED, UNFORESEEN = 130, 1
LAST = (STOPPED, UNFORESEEN)
"""Exit codes after which a worker is another process: a GPU's driver may be of no more use to the old one."""


def serve(pipe: Connection, runner: int, out: Path, command: str, gpu: int | None) -> None:
    """Answer every job with (exit code, sentence); None ends the process, and so does an error nobody foresaw.

    Args:
        pipe: to the runner.
        runner: its process id.
        out: folder of the run.
        command: command line that run folders record.
        gpu: number, among those that the runner sees, of the GPU this process may see; None for one thread of the CPU.
    """
    os.setsid()
    threading.Thread(target=_end_with, args=(runner,), daemon=True).start()
    if gpu is not None:
        ours = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = ours[gpu] if gpu < len(ours) else str(gpu)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # bars go to a log
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job: Job | None = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        with store.job_lock(out, job.id), _told_to(store.log_file(out, job)):
            answer = _attempt(out, job, command)
        pipe.send(answer)
        if answer[0] in LAST:
            return


def _attempt(out: Path, job: Job, command: str) -> tuple[int, str]:
    try:
        if not store.done(out, job):  # a worker that outlived a killed run may have finished it meanwhile
            perform(out, job, command)
        return 0, ""
    except Exception as error:
        code = int(getattr(error, "exit_code", UNFORESEEN))
        print(traceback.format_exc() if code == UNFORESEEN else f"error: {error}", file=sys.stderr, flush=True)
        return code, f"{error}" if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"


def perform(out: Path, job: Job, command: str) -> None:
    """Do a job in this process.

    Args:
        out: folder of the run.
        job: any job whose needed jobs are done.
        command: command line that run folders record.
    """
    {"measure": _measure, "train": _train, "generate": _generate, "score": _score}[job.kind](out, job, command)


def _measure(out: Path, job: Job, command: str) -> None:
    from tmd_eval.experiment.measure import measure_sampling, measure_training

    place = store.folder(out, job)
    place.parent.mkdir(parents=True, exist_ok=True)
    act = measure_training if job.spec["what"] == "training" else measure_sampling
    write_json(place, act(job.spec, place.parent))


def _train(out: Path, job: Job, command: str) -> None:
    from students.config import resolve
    from students.settings import Layer, flatten
    from students.train import train
    from students.trainer_state import NonFiniteError

    config = resolve([Layer("experiment", flatten(job.spec["config"]))])
    parent = job.spec["parent"]
    place = out.resolve()  # checkpoints record where their parent lies
    config = replace(
        config, out=str(store.folder(place, job)), parent=config.parent if parent is None else str(place / parent)
    )
    try:
        train(config, resume=True)
    except NonFiniteError as error:
        write_atomic(store.folder(out, job) / store.DIVERGED, f"{error}\n")
        raise


def _generate(out: Path, job: Job, command: str) -> None:
    from tmd_eval import generate as generation
    from tmd_eval.prompts import load_prompts

    spec, place = job.spec, store.folder(out, job)
    checkpoint = spec["base"] if spec["checkpoint"] is None else str(out / spec["checkpoint"])
    lines = spec["settings"]["lines"]
    settings = generation.Settings(**{**spec["settings"], "lines": None if lines is None else tuple(lines)})
    prompts = load_prompts(spec["prompts"], count=spec["count"])
    mark = store.checkpoint_mark(out, job)
    if (place / store.RECORD).is_file():  # of an older version of the metrics
        shutil.rmtree(place)
    generation.run(checkpoint, prompts, place, settings, command=command)
    write_json(place / "generated.json", {"checkpoint": mark, "videos": spec["videos"]})


def _score(out: Path, job: Job, command: str) -> None:
    from tmd_eval.micro_scores import score_run

    place = store.folder(out, job)
    score_run(place)
    write_json(place / "scored.json", store.score_mark(place, job))


def note_failure(out: Path, job: Job, sentence: str) -> None:
    """Keep why a job failed, for ``status`` and the report."""
    store.failed_file(out, job).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(store.failed_file(out, job), sentence + "\n")


def _end_with(parent: int) -> None:
    """End this process when its parent has died: nobody would take its answer, and a new run wants the job."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """Send stdout and stderr, of this process and of libraries in C, to a log."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab", buffering=0) as file:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for target, old in zip((1, 2), kept, strict=True):
                os.dup2(old, target)
                os.close(old)

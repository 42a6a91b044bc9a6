"""Starts VBench workers, one process and one dimension each, and collects what they write.

Every video's result is a line in ``RUN/scores/parts/{dimension}/*.jsonl`` under a key that covers all that decides it:
dimension, engine, package version, weights, the file's bytes, its prompt. A result whose key is there is never computed
again, whoever wrote it: an earlier run that was killed, another worker or another host on a shared file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from students.errors import ConfigError, EnvironmentMissingError
from students.machine import home
from tmd_eval.vbench import environment, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, FIRST_FRAMES, check_dimension, engine_of, weights_of

WORKER = Path(__file__).with_name("worker.py")
STATIC = "static_filter"
"""Name of the static filter among the jobs."""
ACTIONS = {
    STATIC: "static", "diversity_dino": "features", "diversity_clip": "features",
    **dict.fromkeys(FIRST_FRAMES.values(), "first_frames"),
}  # fmt: skip
"""What a worker is asked for where it is not a dimension's score."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video to be scored."""

    key: str
    """Of its result; see :func:`item_key`."""
    path: Path
    """The file."""
    link: str
    """File name that the official code sees: human action reads the label from it."""
    prompt: str
    """The prompt."""
    auxiliary: Mapping[str, Any] | None = None
    """VBench's record of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Videos of one dimension for one worker."""

    dimension: str
    """One of the sixteen, or another task of ``ACTIONS``."""
    items: Sequence[Item]
    """The videos."""
    parts: Path
    """Folder of this dimension's results."""
    name: str
    """Stem of the files of results and log, its own for each rank and shard."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers run at once, and where."""

    count: int = 1
    """Processes on this host."""
    device: str = "cpu"
    """ "cpu", or "cuda": then each worker gets one GPU."""
    gpus: tuple[str, ...] = ()
    """What ``CUDA_VISIBLE_DEVICES`` is set to for each; with "cuda" as many as ``count``."""
    engine: str = "official"
    """ "official" or "fast"."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the run is interrupted: nothing is retried any more."""


def full_info() -> Path:
    """VBench's own list of prompts, in its environment.

    Raises:
        EnvironmentMissingError: no environment.
    """
    site = environment.python().parents[1] / "lib"
    found = sorted(site.glob("python*/site-packages/vbench/VBench_full_info.json"))
    if not found:
        raise EnvironmentMissingError(
            f"{environment.folder()} lacks VBench_full_info.json; run {environment.SETUP} --force."
        )
    return found[0]


def official_version() -> str:
    """Version of the package in the environment, as pip recorded it."""
    found = metadata.distributions(name="vbench", path=[str(full_info().parents[1])])
    return next(iter(found)).version


def import_problems() -> dict[str, str | None]:
    """Why each of the sixteen dimensions cannot be imported, and the wheel's own VBench-Long ("long"); None if it can.

    Raises:
        EnvironmentMissingError: there is no environment, or it is broken as a whole.
    """
    reply = _ask({"action": "import", "dimensions": list(DIMENSIONS)}, timeout=600)
    if not reply["ok"]:
        raise EnvironmentMissingError(
            f"VBench's environment does not work ({reply['error']}: {reply['message']}); "
            f"run {environment.SETUP} --force."
        )
    return {**reply["reasons"], "long": reply["long"]}


def split(videos: Sequence[Mapping[str, Any]], folder: Path, name: str) -> dict[str, str]:
    """Let a worker cut videos into VBench-Long's pieces; returns why each failed that did.

    Args:
        videos: as the worker's action "split" wants them.
        folder: for the log.
        name: stem of the log, its own for each rank.

    Raises:
        EnvironmentMissingError: the worker does not work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    reply = _ask({"action": "split", "videos": list(videos)}, log=log)
    if not reply["ok"]:
        raise EnvironmentMissingError(
            f"The worker that cuts videos failed ({reply['error']}: {reply['message']}; log: {log}); run again."
        )
    return dict(reply["failed"])


def check_ready(dimension: str, *, unverified: bool = False) -> None:
    """Fail before any work if a dimension cannot be scored here.

    Raises:
        ConfigError: no such dimension.
        EnvironmentMissingError: the environment or weights are missing; names each file.
    """
    check_dimension(dimension)
    environment.python()
    weights.check(dimension, unverified=unverified)


def item_key(dimension: str, engine: str, digests: Mapping[str, str], video_sha256: str, item: Sequence[Any]) -> str:
    """Hash over all that decides a video's result.

    Args:
        dimension: one of the sixteen, or another task of ``ACTIONS``.
        engine: "official" or "fast".
        digests: SHA-256 of the weights files.
        video_sha256: of the video.
        item: prompt, file name and record of the prompt, as far as the dimension reads them.
    """
    text = json.dumps([dimension, engine, official_version(), dict(digests), video_sha256, list(item)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_parts(parts: Path) -> dict[str, dict[str, Any]]:
    """Every result in a folder of parts by key; half-written lines are passed over."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
    return rows


def is_result(dimension: str, row: Mapping[str, Any] | None) -> bool:
    """Whether a row needs no second try: a number, or color's "nothing was detected"."""
    return row is not None and (row["value"] is not None or (dimension == "color" and not row["extra"]))


def run(jobs: Sequence[Job], workers: Workers) -> dict[str, str]:
    """Run jobs, several at once, each with one second try; a job that fails does not stop the others.

    The fast engine's jobs of one name share a worker on the first try, which decodes a video once for all of them; what
    is left then gets workers of its own.

    Args:
        jobs: disjoint videos; those with a result already are skipped.
        workers: how many at once, and where.

    Returns:
        Reason of each dimension of which a job failed twice.
    """
    from tqdm import tqdm

    places: queue.Queue[str] = queue.Queue()
    for place in range(workers.count):
        places.put(workers.gpus[place % len(workers.gpus)] if workers.gpus else "")
    left = [job for job in (_pending(job) for job in jobs) if job.items]
    failed: dict[str, str] = {}
    total = sum(len(job.items) for job in left)
    if not total:
        return {}
    with (
        ThreadPoolExecutor(workers.count) as pool,
        tqdm(total=total, desc="scoring", unit="video", file=sys.stderr, mininterval=1) as bar,
    ):
        try:
            running = {pool.submit(_run_bundle, bundle, workers, places) for bundle in _bundles(left, workers.engine)}
            while running:
                done, running = wait(running, timeout=5, return_when=FIRST_COMPLETED)
                for future in done:
                    for dimension, reason in future.result().items():
                        failed[dimension] = reason
                        tqdm.write(f"{dimension} failed twice: {reason}", file=sys.stderr)
                bar.update(total - sum(len(_pending(job).items) for job in left) - bar.n)
        except BaseException:
            workers.stop.set()
            for future in running:
                future.cancel()
            raise
    return failed


def list_names(names: Sequence[str], most: int = 20) -> str:
    """Names for an error message, the first twenty and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def devices(device: str, count: int | None, engine: str = "official") -> Workers:
    """Where workers run: one a GPU on "cuda", on the CPU as many as asked for, by default one.

    Under torchrun each process is one worker, on the GPU of its ``LOCAL_RANK``.

    Raises:
        ConfigError: a GPU is asked for and there is none (for this rank), the count is below 1, or the device or engine
            unknown.
    """
    if engine not in ("official", "fast"):
        raise ConfigError(f"--engine must be official or fast, not {engine!r}.")
    if count is not None and count < 1:
        raise ConfigError(f"--workers must be at least 1, not {count}.")
    local = os.environ.get("LOCAL_RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    kind, _, number = device.partition(":")
    if device == "cpu":
        return Workers(count=count or 1, device="cpu", engine=engine)
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise ConfigError(f"--device must be cpu, cuda or cuda:NUMBER, not {device!r}.")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"There is no GPU here for --device {device}; leave it out or choose cpu.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if number:
        if int(number) >= len(names):
            raise ConfigError(f"There is no GPU {number} here for --device {device}; there are {len(names)}.")
        names = [names[int(number)]]
    elif local is not None:
        if int(local) >= len(names):
            raise ConfigError(
                f"torchrun started more processes than there are GPUs here ({len(names)}); give --nproc-per-node "
                f"{len(names)}, or --device cpu."
            )
        names = [names[int(local)]]
    return Workers(count=count or len(names), device="cuda", gpus=tuple(names), engine=engine)


def _pending(job: Job) -> Job:
    rows = read_parts(job.parts)
    left = [item for item in job.items if not is_result(job.dimension, rows.get(item.key))]
    return Job(dimension=job.dimension, items=left, parts=job.parts, name=job.name)


def _bundles(jobs: Sequence[Job], engine: str) -> list[list[Job]]:
    """Jobs that share a worker."""
    together: dict[str, list[Job]] = {}
    alone = []
    for job in jobs:
        if engine_of(job.dimension, engine) == "fast":
            together.setdefault(job.name, []).append(job)
        else:
            alone.append([job])
    return [*together.values(), *alone]


def _run_bundle(bundle: Sequence[Job], workers: Workers, places: queue.Queue[str]) -> dict[str, str]:
    """Why each dimension of a bundle failed twice, of those that did."""
    place = places.get()
    failed: dict[str, str] = {}
    try:
        bundle = [job for job in map(_pending, bundle) if job.items]  # another host may have been here
        if workers.stop.is_set() or not bundle:
            return {}
        lost = _score(bundle, workers, place, 1)
        for job in bundle:
            left = _pending(job)  # what a worker finished without a number would have none again
            if (
                job.dimension in lost
                and left.items
                and not workers.stop.is_set()
                and (again := _score([left], workers, place, 2))
            ):
                failed |= again
        return failed
    finally:
        places.put(place)


def _score(bundle: Sequence[Job], workers: Workers, gpu: str, attempt: int) -> dict[str, str]:
    """One try at a bundle in one worker; returns why each dimension failed that did."""
    tasks = []
    log = bundle[0].parts / f"{bundle[0].name}.log"
    with tempfile.TemporaryDirectory(prefix="tmd-eval-vbench-") as temporary:
        for job in bundle:
            job.parts.mkdir(parents=True, exist_ok=True)
            videos = []
            for place, item in enumerate(job.items):  # links in folders of their own: no name can meet another
                link = Path(temporary, "videos", job.dimension, f"{place:06d}", item.link)
                link.parent.mkdir(parents=True)
                link.symlink_to(item.path.absolute())
                video = {"key": item.key, "file": str(item.path.absolute()), "path": str(link), "prompt": item.prompt}
                videos.append({**video, "auxiliary_info": item.auxiliary})
            files = [str(weights.folder() / path) for path in weights_of(job.dimension)]
            results = str((job.parts / f"{job.name}.jsonl").absolute())  # the worker runs in another folder
            tasks.append({"dimension": job.dimension, "videos": videos, "results": results, "weights": files})
        request: dict[str, Any] = {"device": workers.device, "work": temporary}
        first = bundle[0].dimension
        if engine_of(first, workers.engine) == "fast":
            request |= {"action": "fast", "tasks": tasks}
        else:
            request |= {"action": ACTIONS.get(first, "score"), **tasks[0]}
        reply = _ask(request, gpu=gpu, log=log, append=attempt > 1, work=Path(temporary))
    if reply["ok"]:
        return {name: f"{reason} (log: {log})" for name, reason in reply.get("failed", {}).items()}
    reason = f"{reply['error']}: {reply['message']} (log: {log})"
    return {job.dimension: reason for job in bundle}


def _ask(
    request: dict[str, Any],
    *,
    timeout: float | None = None,
    gpu: str = "",
    log: Path | None = None,
    append: bool = False,
    work: Path | None = None,
) -> dict[str, Any]:
    """One request to a fresh worker; its output goes to the log."""
    with tempfile.TemporaryDirectory(prefix="tmd-eval-worker-") as temporary:
        folder = work or Path(temporary)
        ask, answer = Path(temporary, "request.json"), Path(temporary, "reply.json")
        ask.write_text(json.dumps(request))
        bert = folder / "bert-base-uncased"  # transformers looks for this name in the current folder first
        bert.symlink_to(weights.folder() / "bert-base-uncased")
        output = log or Path(temporary, "log")
        with output.open("ab" if append else "wb") as stream:
            done = subprocess.run(
                [str(environment.python()), "-I", str(WORKER), str(ask), str(answer)],
                cwd=folder, env=_environment(gpu), stdout=stream, stderr=stream, timeout=timeout,
            )  # fmt: skip
        if not answer.is_file():  # killed, or out of memory
            tail = (output.read_text(errors="replace").strip().splitlines() or ["no message"])[-1][:300]
            return {"ok": False, "error": f"worker ended with {done.returncode}", "message": tail}
        reply = dict(json.loads(answer.read_text()))
        if not reply["ok"]:
            with output.open("a") as file:
                file.write(reply["traceback"])
        return reply


def _environment(gpu: str = "") -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"  # for the programs VBench starts (wget, git); Python's sockets are refused anyway
    dropped = ("PYTHONPATH", "PYTHONHOME", "no_proxy", "NO_PROXY", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {
        **{k: v for k, v in os.environ.items() if k not in dropped},
        **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
        "VBENCH_CACHE_DIR": str(weights.folder()),
        "TORCH_HOME": str(weights.folder() / "torch"),
        "HF_HOME": str(home() / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **{name: nowhere for scheme in ("http", "https", "ftp", "all") for name in (f"{scheme}_proxy",)},
        **{name: nowhere for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
    }

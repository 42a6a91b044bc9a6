"""Starts VBench workers, one process and one dimension each, and checks what they send back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from students.errors import ConfigError, EnvironmentMissingError, IncompleteError, TmdError
from students.machine import home
from tmd_eval.vbench import environment
from tmd_eval.vbench.dimensions import DIMENSIONS, check_dimension

WORKER = Path(__file__).with_name("worker.py")


class Score(NamedTuple):
    """The score of one video."""

    video: str
    """File name."""
    value: float
    """On the scale of the official aggregate, 0 to 1."""
    extra: dict[str, Any]
    """What else the official package says about the video."""


def weights_folder() -> Path:
    """Where VBench looks for its weights (``VBENCH_CACHE_DIR`` of the worker)."""
    return home() / "vbench-weights"


def missing_weights(dimension: str) -> list[Path]:
    """The weight files a dimension needs that are not there."""
    return [path for name in DIMENSIONS[dimension].weights if not (path := weights_folder() / name).is_file()]


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


def diagnose() -> list[dict[str, Any]]:
    """What stands between each dimension and its score here.

    Returns:
        For each of the sixteen: dimension, importable, reason (of a failed import, else None), missing_weights (paths),
        ready.

    Raises:
        EnvironmentMissingError: there is no environment, or it is broken as a whole.
    """
    reply = _work({"action": "import", "dimensions": list(DIMENSIONS)}, timeout=600)
    if not reply["ok"]:
        raise EnvironmentMissingError(
            f"VBench's environment does not work ({reply['error']}: {reply['message']}); "
            f"run {environment.SETUP} --force."
        )
    rows = []
    for name in DIMENSIONS:
        reason, missing = reply["reasons"][name], [str(path) for path in missing_weights(name)]
        ready = reason is None and not missing
        rows.append(
            {
                "dimension": name, "importable": reason is None, "reason": reason, "missing_weights": missing,
                "ready": ready,
            }
        )  # fmt: skip
    return rows


def check_ready(dimension: str) -> None:
    """Fail before any work if a dimension cannot be scored here.

    Raises:
        ConfigError: no such dimension, or it needs what only VBench's own protocol gives.
        EnvironmentMissingError: the environment or weights are missing; names each file.
    """
    check_dimension(dimension)
    if DIMENSIONS[dimension].needs_prompts:
        raise ConfigError(f"{dimension} needs VBench's record of its own prompts, which tmd-eval cannot use yet.")
    environment.python()
    if missing := missing_weights(dimension):
        raise EnvironmentMissingError(
            f"{dimension} needs weights that are not here: {', '.join(map(str, missing))}; put the files there "
            "(tmd-eval fetches none yet), or choose --dimensions temporal_flickering, which needs none."
        )


def score(dimension: str, videos: Sequence[Path], *, device: str = "cpu") -> list[Score]:
    """Score videos in one dimension with the official package, in a process of its own, without network.

    Args:
        dimension: see :func:`check_ready`, which must have passed.
        videos: mp4 files with distinct names, checked to be readable.
        device: "cpu" or "cuda".

    Returns:
        One score a video, in the order given.

    Raises:
        IncompleteError: the package gave no score, or one that is not a number, for some videos; names them.
        TmdError: the package failed, or its aggregate is not the mean of its per-video values.
    """
    names = [path.name for path in videos]
    with tempfile.TemporaryDirectory(prefix="tmd-eval-vbench-") as temporary:
        clean = Path(temporary, "videos")
        clean.mkdir()
        for path in videos:  # links under the same names: nothing else in the user's folder reaches VBench
            (clean / path.name).symlink_to(path.absolute())
        work = Path(temporary, "work")
        request = {"action": "score", "dimension": dimension, "device": device}
        request |= {"videos": str(clean), "work": str(work), "full_info": str(full_info())}
        reply = _work(request)
    if not reply["ok"]:
        print(reply["traceback"], file=sys.stderr)
        raise TmdError(
            f"VBench could not score {dimension}: {reply['error']}: {reply['message']} "
            "(its traceback is above; tmd-eval vbench doctor checks the environment)."
        )
    rows = {Path(row["video_path"]).name: row for row in reply["rows"]}
    values = {name: float(row["video_results"]) for name, row in rows.items()}
    if lost := [name for name in names if not math.isfinite(values.get(name, math.nan))]:
        raise IncompleteError(f"VBench gave no {dimension} for {list_names(lost)}; nothing was recorded.")
    scale = DIMENSIONS[dimension].scale
    mean = math.fsum(values[name] for name in names) * scale / len(names)
    if not abs(mean - float(reply["aggregate"])) <= 1e-6:
        raise TmdError(
            f"VBench's {dimension} of {reply['aggregate']} is not the mean {mean} of its values per video, "
            "so tmd-eval does not know how to aggregate it; nothing was recorded."
        )
    extras = {n: {k: v for k, v in row.items() if k not in ("video_path", "video_results")} for n, row in rows.items()}
    return [Score(name, values[name] * scale, extras[name]) for name in names]


def list_names(names: Sequence[str], most: int = 20) -> str:
    """Names for an error message, the first twenty and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def official_version() -> str:
    """Version of the package in the environment, as pip recorded it."""
    found = metadata.distributions(name="vbench", path=[str(full_info().parents[1])])
    return next(iter(found)).version


def _work(request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """One request to a fresh worker; its output goes to our stderr only if it fails."""
    with tempfile.TemporaryDirectory(prefix="tmd-eval-worker-") as temporary:
        ask, answer = Path(temporary, "request.json"), Path(temporary, "reply.json")
        ask.write_text(json.dumps(request))
        command = [str(environment.python()), "-I", str(WORKER), str(ask), str(answer)]
        done = subprocess.run(
            command, cwd=temporary, env=_environment(), text=True, capture_output=True, timeout=timeout
        )
        if not answer.is_file():  # killed, or out of memory
            tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"ok": False, "error": f"worker ended with {done.returncode}", "message": tail, "traceback": ""}
        return dict(json.loads(answer.read_text()))


def _environment() -> dict[str, str]:
    cache = home()
    nowhere = "http://127.0.0.1:9"  # for the programs VBench starts (wget, git); Python's sockets are refused anyway
    return {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "no_proxy", "NO_PROXY")},
        "VBENCH_CACHE_DIR": str(weights_folder()),
        "TORCH_HOME": str(cache / "torch"),
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **{name: nowhere for scheme in ("http", "https", "ftp", "all") for name in (f"{scheme}_proxy",)},
        **{name: nowhere for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
    }

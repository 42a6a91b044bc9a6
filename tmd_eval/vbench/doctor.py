"""What stands between each dimension and its score on this machine, and what to do about it."""

from __future__ import annotations

from typing import Any

from tmd_eval.vbench import detectron, environment, long, runner, weights
from tmd_eval.vbench.dimensions import DIMENSIONS


def diagnose() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a dimension, and what VBench-Long lacks besides.

    Returns:
        The rows: dimension, importable, reason (of a failed import, else None), weights (file to its SHA-256),
        missing_weights (paths of files that are missing or wrong), weight_problems (file to what is wrong), device,
        ready, do (commands that help). VBench-Long: official_code (why the wheel's own does not import, else None) and
        problems (dimension to file to what is wrong).

    Raises:
        EnvironmentMissingError: there is no environment, or it is broken as a whole.
    """
    reasons = runner.import_problems()
    weights.prepare()
    device = _device()
    rows = []
    for name in DIMENSIONS:
        reason, wrong = reasons[name], weights.problems(name)
        good = [file.path for file in weights.needed([name]) if file.path not in wrong]
        rows.append(
            {
                "dimension": name, "importable": reason is None, "reason": reason,
                "weights": {path: weights.sha256(weights.folder() / path) for path in good},
                "missing_weights": [str(weights.folder() / path) for path in wrong], "weight_problems": wrong,
                "device": device, "ready": reason is None and not wrong, "do": _advice(reason, wrong),
            }
        )  # fmt: skip
    extra = {name: long.problems(name, "long") for name in long.BETWEEN}
    return rows, {"official_code": reasons["long"], "problems": {name: found for name, found in extra.items() if found}}


def _advice(reason: str | None, wrong: dict[str, str]) -> list[str]:
    advice = []
    if reason is not None and "detectron2" in reason and not detectron.installed():
        advice.append(f"{environment.SETUP} --detectron2 CHECKOUT, a clone of {detectron.REPOSITORY}")
    elif reason is not None:
        advice.append(f"{environment.SETUP} --force")
    if wrong:
        advice.append(f"{environment.SETUP} --fetch, or --weights DIR")
    if any("published" in text for text in wrong.values()):
        advice.append("or score with --unverified-weights, which is recorded")
    return advice


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return "cpu"

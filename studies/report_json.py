"""``report.json`` of an analysis, by the contract of all reports: ``tmd-eval rerun`` can check its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def report_json(
    preferences: Mapping[str, Any],
    analysis: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    device: str | None,
    packages: Mapping[str, str],
    audit: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One row a model: its preferences over each other model and, of three or more, over an average one.

    Args:
        preferences: content of preferences.json.
        analysis: from :func:`studies.analyze.analyze`.
        seeds: of the design.
        device: what computed it, as a person would name it.
        packages: name to version.
        audit: the study's audit log: at, action, and the command where there was one.

    Returns:
        The report. A study does not know the models' roles or step counts, so those fields are None.
    """
    rows = {model["name"]: _row(model) for model in preferences["models"]}
    for result in preferences["results"]:
        ends = {key: result[key] for key in ("value", "low", "high")}
        mirrored = {"value": 1 - ends["value"], "low": 1 - ends["high"], "high": 1 - ends["low"]}
        for name, other, figure in ((result["a"], result["b"], ends), (result["b"], result["a"], mirrored)):
            rows[name]["metrics"][f"{result['question']}, preferred to {other}"] = {**figure, "n": result["n_votes"]}
    for question, fitted in (analysis["ranking"] or {}).items():
        votes = sum(result["n_votes"] for result in preferences["results"] if result["question"] == question)
        for model in fitted["models"] if fitted else ():
            figure = {"value": model["win"], "low": model["low"], "high": model["high"], "n": votes}
            rows[model["model"]]["metrics"][f"{question}, preferred to an average other"] = figure
    raters = "simulated from a stated model, not people" if preferences["simulated"] else "people"
    return {
        "command": preferences["command"], "code_revision": preferences["code_revision"], "device": device,
        "packages": dict(packages), "created": preferences["created"], "seeds": list(seeds),
        "study": preferences["study"], "schedule_hash": preferences["schedule_hash"],
        "simulated": preferences["simulated"], "raters": raters, "raters_kept": preferences["raters"],
        "votes": preferences["votes"], "audit": [dict(line) for line in audit], "rows": list(rows.values()),
    }  # fmt: skip


def _row(model: Mapping[str, Any]) -> dict[str, Any]:
    unknown = dict.fromkeys(("role", "method", "m", "n", "h", "effective_nfe", "seconds_per_video"))
    return {"name": model["name"], "checkpoint_hash": model["checkpoint_hash"], **unknown, "metrics": {}}

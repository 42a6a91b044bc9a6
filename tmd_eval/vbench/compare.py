"""Two scored runs on the same prompts: differences, in points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from students.errors import IncompleteError
from tmd_eval.vbench import statistics
from tmd_eval.vbench.dimensions import DIMENSIONS
from tmd_eval.vbench.summary import read_record, read_sums

SAME = ("set", "rule", "frames", "height", "width", "fps", "texts", "samples_per_prompt")


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """B minus A of every dimension both runs have, and of the totals where both have all sixteen, in points.

    Args:
        a: scored run folder.
        b: another.

    Returns:
        ``a``, ``b``, ``differences`` (name to value, low, high, p_value, p_holm over the dimensions, n_prompts) and
        ``warnings`` about protocols that differ.

    Raises:
        ConfigError: a run has no scores.
        IncompleteError: no dimension in common, or no prompt.
    """
    records = [read_record(run) for run in (a, b)]
    both = set(records[0]["dimensions"]) & set(records[1]["dimensions"])  # rows of others may be of an earlier protocol
    sums_a, sums_b = ({k: one for k, one in read_sums(run).items() if k in both} for run in (a, b))
    found = statistics.differences(sums_a, sums_b)
    if not found:
        raise IncompleteError(f"{a} and {b} have no dimension with a common prompt; score both on the same prompts.")
    dimensions = {name: one.p_value for name, one in found.items() if name in DIMENSIONS}
    adjusted = statistics.holm(dimensions)
    rows = {}
    for name, one in found.items():
        rows[name] = {
            "value": 100 * one.value, "low": None if one.low is None else 100 * one.low,
            "high": None if one.high is None else 100 * one.high, "p_value": one.p_value,
            "p_holm": adjusted.get(name), "n_prompts": one.n_prompts,
        }  # fmt: skip
    protocols = [record["protocol"] for record in records]
    warnings = [
        f"{key} differs: {protocols[0].get(key)} and {protocols[1].get(key)}"
        for key in SAME if protocols[0].get(key) != protocols[1].get(key)
    ]  # fmt: skip
    filters = [bool((protocol.get("static_filter") or {}).get("applied")) for protocol in protocols]
    if "temporal_flickering" in dimensions and filters[0] != filters[1]:
        warnings.append(f"static_filter of temporal_flickering differs: {filters[0]} and {filters[1]}")
    if records[0]["version"] != records[1]["version"]:
        warnings.append(f"version differs: {records[0]['version']} and {records[1]['version']}")
    partial = [n for n in dimensions if any(r["dimensions"].get(n, {}).get("partial") for r in records)]
    if partial:
        warnings.append(f"partial in one run or both: {', '.join(partial)}")
    return {"a": str(a), "b": str(b), "differences": rows, "warnings": warnings}

"""``scores/summary.json`` and ``scores/vbench.json`` of a run: aggregates, intervals, totals, and the protocol."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from students.errors import ConfigError
from tmd_eval.files import write_json
from tmd_eval.scores import locked, merge_summary, write_rows
from tmd_eval.vbench import VERSION, plan, runner, statistics, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, FIRST_FRAMES, LONG_SECONDS, RULES, engine_of
from tmd_eval.vbench.plan import Facts
from tmd_eval.vbench.statistics import Sums
from tmd_eval.vbench.totals import Totals
from tmd_eval.vbench.videos import sha256

RECORD = Path("scores", "vbench.json")
SCORED_VIDEOS = Path("scores", "videos.json")
"""For each dimension the SHA-256 of its videos, by file name: scores of other videos never enter one total."""
PIECES = "pieces"
"""Key of a row's ``extra``: the pieces of VBench-Long, each of which counts once in its aggregates."""
FLICKER = "temporal_flickering"
TOTALS = Totals._fields
"""Names of the totals in summary.json: those that published rows have on the leaderboard."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What came of one dimension."""

    dimension: str
    """Its name."""
    rows: list[dict[str, Any]]
    """Rows of ``scores/{dimension}.jsonl``; none if it was not measured."""
    reason: str | None
    """Why it was not measured."""
    n: int
    """Videos that enter the average."""
    undetected: int
    """Videos of color that the official average leaves out, as no object with a colour was found in them."""
    missing: list[str]
    """Videos that the protocol wants and that are not there."""
    expected: int
    """Videos that the protocol asks for."""
    protocol: str
    """ "standard" or "custom"."""
    seconds: list[float] = field(default_factory=list)
    """Time of each video in its worker, loading the model not counted."""
    videos: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every video, by file name; candidates of the static filter are among them."""

    @property
    def partial(self) -> bool:
        """Whether fewer videos were scored than the protocol asks for."""
        return self.n + self.undetected < self.expected


def row_weights(dimension: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Weight of each video in the official aggregate of one process; 1 where no row states its own.

    Args:
        dimension: one of the sixteen.
        rows: of ``scores/{dimension}.jsonl``, ours (which state it) or anybody's.
    """
    key = PIECES if any(PIECES in row["extra"] for row in rows) else DIMENSIONS[dimension].weight
    if key is None or not any(key in row["extra"] for row in rows):
        return [1.0] * len(rows)
    stated = [row["extra"][key] for row in rows]
    return [float(len(value) if isinstance(value, list) else value) for value in stated]


def sums_of(dimension: str, rows: Sequence[Mapping[str, Any]]) -> Sums:
    """Sums per prompt of the rows of ``scores/{dimension}.jsonl``; the prompt of foreign rows is the name's."""
    return statistics.sums(
        [row["extra"].get("prompt") or row["video"].rpartition("-")[0] or row["video"] for row in rows],
        [row["value"] for row in rows],
        row_weights(dimension, rows),
    )


def read_sums(run: Path) -> dict[str, Sums]:
    """Sums of every VBench dimension that a run has scores of.

    Raises:
        ConfigError: none, or a file is broken.
    """
    found = {}
    for dimension in DIMENSIONS:
        path = run / "scores" / f"{dimension}.jsonl"
        if not path.is_file():
            continue
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[dimension] = sums_of(dimension, rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is broken ({error!r}); score the run again.") from error
    if not found:
        raise ConfigError(f"{run} has no scores of VBench; make them with: tmd-eval vbench --videos {run} --out {run}")
    return found


def read_record(run: Path) -> dict[str, Any]:
    """``scores/vbench.json`` of a run; without one, what ``summary.json`` says of VBench's dimensions.

    Raises:
        ConfigError: there is neither, or it is broken.
    """
    for path in (run / RECORD, run / "scores" / "summary.json"):
        if not path.is_file():
            continue
        try:
            found = dict(json.loads(path.read_text("utf-8")))
            if path.name == RECORD.name:
                return found
            dimensions = {k: {"partial": v["completeness"] < 1} for k, v in found.items() if k in DIMENSIONS}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is broken ({error!r}); score the run again.") from error
        return {"version": None, "protocol": {}, "dimensions": dimensions, "totals": None, "not_measured": {}}
    raise ConfigError(f"{run} has no scores; make them with: tmd-eval vbench --videos {run} --out {run}")


def write_summary(
    out: Path,
    scored: Mapping[str, Scored],
    *,
    folder: Path,
    engine: str,
    found: Mapping[Path, Facts],
    static_filter: Mapping[str, Any] | None,
    unverified: bool,
    device: str,
    rule: str = "vbench",
) -> dict[str, Any]:
    """Write the dimensions' rows, merge them into ``summary.json`` and write ``vbench.json``; returns the latter.

    Dimensions scored earlier stay, and count for the totals, if they are of the same protocol and the same videos.
    Another process may score other dimensions into the same run meanwhile.
    """
    by_rule = "" if rule == "vbench" else f"+{rule}"
    version = VERSION + ("" if engine == "official" else f"+{engine}") + by_rule
    protocol = _protocol(scored, folder, found, static_filter, rule)
    with locked(out):
        old = _earlier(out, {"version": version, "protocol": protocol})
        videos = _same_videos(out, old, scored, folder, found)
        if FLICKER not in scored and FLICKER in old.get("dimensions", {}):
            protocol["static_filter"] = old["protocol"]["static_filter"]
        dimensions: dict[str, Any] = dict(old.get("dimensions", {}))
        not_measured = {k: v for k, v in old.get("not_measured", {}).items() if k not in scored}
        entries = {}
        for name, one in scored.items():
            dimensions.pop(name, None)
            if one.reason is not None:
                not_measured[name] = one.reason
                (out / "scores" / f"{name}.jsonl").unlink(missing_ok=True)
                continue
            write_rows(out, name, one.rows)
            entries[name] = _entry(name, one, engine, rule, filtered=bool(static_filter))
            dimensions[name] = {
                **{key: entries[name][key] for key in ("n", "value", "low", "high")}, "partial": one.partial,
                "missing": len(one.missing), "undetected": one.undetected, "weights": entries[name]["weight_hashes"],
                "device": device, "unverified_weights": unverified, "videos_sha256": _digest(one.videos),
            }  # fmt: skip
        gone = [*not_measured, *TOTALS]
        whole = len(dimensions) == len(DIMENSIONS) and not any(d["partial"] for d in dimensions.values())
        totals = None
        if whole and protocol["set"] == "standard":
            totals = {
                key: {"value": value, "low": low, "high": high}
                for key, (value, low, high) in statistics.totals_intervals(read_sums(out)).items()
            }
            for key, total in totals.items():
                entries[key] = {
                    "n": sum(d["n"] for d in dimensions.values()), **total, "completeness": 1.0,
                    "metric_version": version, "weight_hashes": {},
                }  # fmt: skip
        _forget(out, [name for name in gone if name not in entries])
        merge_summary(out, entries)
        record = {
            "version": version, "package": runner.official_version(), "engine": engine, "device": device,
            "unverified_weights": unverified or any(d["unverified_weights"] for d in dimensions.values()),
            "protocol": protocol,
            "dimensions": {name: dimensions[name] for name in DIMENSIONS if name in dimensions},
            "totals": totals, "not_measured": not_measured,
        }  # fmt: skip
        write_json(out / SCORED_VIDEOS, {name: videos[name] for name in DIMENSIONS if name in dimensions})
        write_json(out / RECORD, record)
    return record


def _entry(name: str, one: Scored, engine: str, rule: str, *, filtered: bool) -> dict[str, Any]:
    """The entry of a dimension in ``summary.json``."""
    value, low, high = statistics.interval(sums_of(name, one.rows))
    unfiltered = name == FLICKER and one.protocol == "standard" and not filtered
    files = weights.hashes(name)
    if rule == "long" and name in FIRST_FRAMES:
        files |= weights.hashes(FIRST_FRAMES[name])
    return {
        "n": one.n, "value": value, "low": low, "high": high,
        "completeness": (one.n + one.undetected) / one.expected,
        "metric_version": VERSION
        + ("+fast" if engine_of(name, engine) == "fast" else "")
        + ("" if rule == "vbench" else f"+{rule}")
        + (" without static filter" if unfiltered else ""),
        "weight_hashes": files,
        **({"partial": True} if one.partial else {}),
    }  # fmt: skip


def _digest(videos: Mapping[str, str]) -> str:
    """SHA-256 over names and bytes of a dimension's videos."""
    return hashlib.sha256(json.dumps(sorted(videos.items()), ensure_ascii=False).encode()).hexdigest()


def _same_videos(
    out: Path, old: dict[str, Any], scored: Mapping[str, Scored], folder: Path, found: Mapping[Path, Facts]
) -> dict[str, Mapping[str, str]]:
    """The videos of each dimension; takes those that were scored on other videos out of ``old`` and of the run.

    A dimension is of other videos if a file of its names that lies in the folder now has other bytes, if nobody
    recorded its videos, or if a set of names of its own shares none with this one.
    """
    try:
        videos = dict(json.loads((out / SCORED_VIDEOS).read_text("utf-8")))
    except (OSError, ValueError):
        videos = {}
    now = {name: digest for one in scored.values() for name, digest in one.videos.items()}
    here = plan.listed(plan.locate(Path(folder))[1])
    custom = next(iter(scored.values())).protocol == "custom"

    def is_same(name: str) -> bool:
        before = videos.get(name, {})
        if _digest(before) != old["dimensions"][name].get("videos_sha256"):
            return False
        for file in before:
            if file not in now and file in here:
                facts = found.get(here[file])
                now[file] = facts.sha256 if facts else sha256(here[file])
        shared = [file for file in before if file in now]
        return all(before[file] == now[file] for file in shared) and (bool(shared) or not custom)

    if other := [name for name in old.get("dimensions", {}) if name not in scored and not is_same(name)]:
        print(
            f"dropped, as they were scored earlier on other videos (or none were recorded): {', '.join(other)}; score "
            "them again, which costs nothing where a video is the same",
            file=sys.stderr,
        )
        old["dimensions"] = {name: one for name, one in old["dimensions"].items() if name not in other}
        _forget(out, other)
        for name in other:
            (out / "scores" / f"{name}.jsonl").unlink(missing_ok=True)
    return {**videos, **{name: one.videos for name, one in scored.items()}}


def _protocol(
    scored: Mapping[str, Scored],
    folder: Path,
    found: Mapping[Path, Facts],
    static_filter: Mapping[str, Any] | None,
    rule: str,
) -> dict[str, Any]:
    """What was scored by which rules, as far as it can be known from the folder."""
    run, _ = plan.locate(Path(folder))
    config: dict[str, Any] = {}
    if run is not None and (run / "config.yaml").is_file():
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8")) or {}
    kind = next(iter(scored.values())).protocol
    _, place = plan.locate(Path(folder))
    whole = [facts for path, facts in found.items() if path.parent == place] or list(found.values())  # no pieces
    clip = Counter((f.frames, f.height, f.width, f.fps) for f in whole).most_common(1)[0][0]
    seconds = clip[0] / clip[3]
    if seconds >= LONG_SECONDS and rule == "vbench":
        print(
            f"warning: clips of {seconds:.2f} s; VBench's authors ask for VBench-Long from {LONG_SECONDS:g} s on, "
            "whose scores differ by points. This is plain VBench, and recorded as such; --protocol long is theirs.",
            file=sys.stderr,
        )
    if seconds < LONG_SECONDS and rule != "vbench":
        print(
            f"warning: clips of {seconds:.2f} s scored by VBench-Long, which its authors ask for from "
            f"{LONG_SECONDS:g} s on; this is recorded.",
            file=sys.stderr,
        )
    return {
        "set": kind,
        "rule": RULES[rule],
        "long_rule_applies": seconds >= LONG_SECONDS,
        "frames": clip[0], "height": clip[1], "width": clip[2], "fps": clip[3],
        "prompts": config.get("prompts"),
        "texts": config.get("texts", "original" if config else None),
        "seed": config.get("seed"),
        "seed_rule": config.get("seed_rule"),
        "samples_per_prompt": config.get("samples_per_prompt", 5 if kind == "standard" else None),
        "static_filter": dict(static_filter) if static_filter else {"applied": False},
    }  # fmt: skip


def _earlier(out: Path, same: Mapping[str, Any]) -> dict[str, Any]:
    """The earlier record, if its version and protocol are those of now but for the static filter."""
    try:
        old = dict(json.loads((out / RECORD).read_text("utf-8")))
    except (OSError, ValueError):
        return {}
    ignored = {"static_filter", "frames", "height", "width", "fps"}
    before, now = (
        {k: v for k, v in p.items() if k not in ignored} for p in (old.get("protocol", {}), same["protocol"])
    )
    return old if old.get("version") == same["version"] and before == now else {}


def _forget(out: Path, names: Sequence[str]) -> None:
    """Take entries that are no longer true out of the summary."""
    path = out / "scores" / "summary.json"
    if path.is_file():
        summary = json.loads(path.read_text("utf-8"))
        kept = {key: value for key, value in summary.items() if key not in names}
        if kept != summary:
            write_json(path, kept)

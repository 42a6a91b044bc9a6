"""The content of a matrix report: rows over seeds, differences, and what they say of a paper's claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from leaderboard.display import phrase
from leaderboard.effects import Estimate, Pool, Scores, blocked, difference, estimate, pooled, verdict
from leaderboard.models import Metric


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One line of a table: cells that differ in the seed only."""

    key: str
    """Names the row within the matrix."""
    name: str
    """Name people see."""
    sections: tuple[str, ...]
    """Parts of the matrix that show it."""
    budget: str | None
    """Label of its budget; None for the base model, which is shown under every one."""
    role: str
    """"teacher", "undistilled" or "student"."""
    method: str
    """Method of distillation as ``student.json`` says it; "teacher" where there is none."""
    m: int
    n: int | None
    h: int | None
    ablation: str | None
    """Label of the ablation, None for the method as it is."""
    baseline: str | None
    """Key of the row without the ablation, None where there is none."""
    effective_nfe: float | None
    forward_passes: float | None
    seconds_per_video: float | None
    """Median wall-clock seconds of one video."""
    seconds_range: tuple[float, float] | None = None
    """Fastest and slowest round, where rows were timed apart from the run."""
    training_minutes: float | None
    """Of all stages, a mean over seeds; None for the base model."""
    compute: float | None
    """Total training compute of all stages: block forwards plus twice the backwards, over L and all pairs."""
    student_updates: int | None
    """Updates of the student in the last stage."""
    iterations: tuple[int, ...] = ()
    """Of every stage."""
    seeds: tuple[int, ...]
    """Seeds that are done."""
    planned_seeds: int
    """Seeds that were asked for."""
    videos: int
    """Videos scored, over all seeds."""
    scores: dict[str, Scores]
    """Metrics over the seeds."""
    counts: dict[str, int]
    """Videos (over all seeds) that each metric rests on."""
    runs: tuple[Path, ...]
    """Run folder of each seed, for clips."""
    weights: tuple[str, ...] = ()
    """Hash of the weights that each run sampled."""
    devices: tuple[str, ...] = ()
    """What each run was made on."""
    pools: dict[str, Pool] = field(default_factory=dict)
    """Spread between seeds to use where it is larger than the row's own, by metric."""
    blocks: int | None = None
    """L."""

    @cached_property
    def metrics(self) -> list[Metric]:
        """Mean over seeds, with an interval over seeds and prompts."""
        found = []
        for name, scores in sorted(self.scores.items()):
            bounds = (0.0, 1.0) if name.startswith("alignment") else (0.0, float("inf"))
            value = estimate(scores, pool=self.pools.get(name), bounds=bounds)
            found.append(
                Metric(
                    name=name, value=value.value, low=value.low, high=value.high, n=self._n(name),
                    completeness=1.0, metric_version="", weight_hashes={},
                )
            )  # fmt: skip
        return found

    def _n(self, name: str) -> int:
        """Videos a metric rests on: of all seeds, or of one for the distances, which depend on it."""
        whole = name.startswith("frechet") and self.scores[name].prompts is None
        return self.counts[name] // (len(self.seeds) or 1) if whole else self.counts[name]

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def flags(self) -> list[str]:
        """What a reader must know first."""
        lacking = self.planned_seeds - len(self.seeds)
        flags = [f"{len(self.seeds)} of {self.planned_seeds} seeds"] if lacking > 0 else []
        return flags + (["one seed"] if self.role == "student" and self.planned_seeds == 1 else [])


@dataclass(frozen=True, kw_only=True)
class MatrixClaim:
    """A claim and the two rows that decide it."""

    claim: str
    source: str
    metric: str
    direction: Literal["higher", "lower", "same"]
    margin: float | None
    a: str
    """Key of the row the claim is about."""
    b: str
    """Key of the row it is compared with."""
    names: tuple[str, str]
    """What the two rows are called, also where they are not there yet."""
    note: str = ""
    """How the authors of the experiment read the outcome."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A claim with its verdict."""

    claim: MatrixClaim
    verdict: str
    reason: str
    """Why it is undecided, else empty."""
    effect: Estimate | None
    """Metric of a minus that of b."""
    n: int
    """Prompts that both rows were scored on."""
    seeds: int
    """Seeds of the row with fewer (a row that needs no training does not count)."""

    def to_json(self) -> dict[str, Any]:
        """The claim as report.json holds it."""
        effect = self.effect
        return {
            "claim": self.claim.claim,
            "source": self.claim.source,
            "verdict": self.verdict,
            "effect": effect and effect.value,
            "low": effect and effect.low,
            "high": effect and effect.high,
            "n": self.n,
            "seeds": self.seeds,
            "metric": self.claim.metric,
            "direction": self.claim.direction,
            "margin": self.claim.margin,
            "a": self.claim.names[0],
            "b": self.claim.names[1],
            "rows": [self.claim.a, self.claim.b],
            "reason": self.reason,
            "note": self.claim.note,
        }


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The tuning of one method."""

    method: str
    rows: tuple[tuple[str, dict[str, float] | None, bool], ...]
    """Settings, metrics (None: failed or not there) and whether they were chosen."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """An iteration of a training against one forward pass of the teacher on as many pairs."""

    name: str
    seconds: float
    measured: float
    """As a multiple of the teacher's forward."""
    counted: float
    """What counting block forwards and twice the backwards predicts."""
    device: str


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Everything a matrix report shows."""

    title: str
    command: str
    experiment: dict[str, str]
    """File and sha256 of the experiment."""
    code_revision: str
    device: str
    packages: dict[str, str]
    rows: tuple[MatrixRow, ...]
    claims: tuple[MatrixClaim, ...]
    sections: tuple[str, ...]
    """Parts of the matrix, in the order of the file."""
    budgets: tuple[str, ...]
    """Labels, the default first."""
    headline: str
    """Metric of the figures."""
    prompts: str
    """How rows were scored, in words."""
    timing: str
    """How seconds a video were measured, in words."""
    tuning: str
    """Protocol of the tuning in words."""
    ranked_by: tuple[str, ...]
    """Metrics that ranked the trials."""
    trials: tuple[Trials, ...]
    steps: tuple[StepTime, ...]
    missing: tuple[str, ...]
    """What is not there, a sentence each."""
    notes: tuple[str, ...]
    """How the authors of the experiment read it as a whole."""
    pooled: bool
    """Whether the spread between seeds is taken from all rows together."""
    imported: int = 0
    """Runs among the rows' that were taken in as records: scored elsewhere, their videos and weights are not here."""

    @cached_property
    def by_key(self) -> dict[str, MatrixRow]:
        return {row.key: row for row in self.rows}

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """Spread between seeds by metric, where it is pooled."""
        if not self.pooled:
            return {}
        rows = {row.runs or row.key: row for row in self.rows}.values()  # two budgets may come to the same students
        names = {name for row in rows for name in row.scores}
        found = {name: pooled([row.scores[name] for row in rows if name in row.scores]) for name in names}
        return {name: pool for name, pool in found.items() if pool is not None}

    @cached_property
    def blocks(self) -> dict[tuple[str, str], Pool]:
        """Noise of a difference at one seed by family and metric, where the spread is pooled."""
        families: dict[tuple[str, str], list[Scores]] = {}
        for row in self.rows if self.pooled else ():
            for name, scores in row.scores.items():
                if scores.family:
                    families.setdefault((scores.family, name), []).append(scores)
        found = {key: blocked(members) for key, members in families.items()}
        return {key: block for key, block in found.items() if block is not None}

    @cached_property
    def decisions(self) -> list[Decision]:
        """Every claim with its verdict."""
        return [self._decide(claim) for claim in self.claims]

    def difference(self, row: MatrixRow, metric: str) -> Estimate | None:
        """A row minus its baseline in a metric, None where there is no such pair."""
        other = self.by_key.get(row.baseline or "")
        if other is None or metric not in row.scores or metric not in other.scores:
            return None
        return self._difference(row.scores[metric], other.scores[metric], metric)

    def _difference(self, a: Scores, b: Scores, metric: str) -> Estimate:
        block = self.blocks.get((a.family, metric)) if a.family == b.family else None
        return difference(a, b, pool=self.pools.get(metric), block=block)

    def _decide(self, claim: MatrixClaim) -> Decision:
        a, b = self.by_key.get(claim.a), self.by_key.get(claim.b)
        if a is None or b is None or claim.metric not in a.scores or claim.metric not in b.scores:
            number = 0 if a is None or claim.metric not in a.scores else 1
            there = (a, b)[number] is not None
            state = "not measured in every seed" if there else "not measured yet"
            reason = f"{state}: {phrase(claim.metric)} of {claim.names[number]}"
            return Decision(claim=claim, verdict="undecided", reason=reason, effect=None, n=0, seeds=0)
        effect = self._difference(a.scores[claim.metric], b.scores[claim.metric], claim.metric)
        found, reason = verdict(effect, claim.direction, claim.margin)
        trained = [len(row.seeds) for row in (a, b) if row.role == "student"] or [len(a.seeds), len(b.seeds)]
        n = min(_prompts(a, claim.metric), _prompts(b, claim.metric))
        return Decision(claim=claim, verdict=found, reason=reason, effect=effect, n=n, seeds=min(trained))


def _prompts(row: MatrixRow, metric: str) -> int:
    """Prompts a metric rests on; those of a whole set rest on all that the row has."""
    table = row.scores[metric].prompts
    if table is not None:
        return table.shape[1]
    tables = [scores.prompts.shape[1] for scores in row.scores.values() if scores.prompts is not None]
    return max(tables, default=row.counts[metric] // max(len(row.seeds), 1))


def report_json(matrix: Matrix) -> dict[str, Any]:
    """The content of report.json, a contract: other programs and ``tmd-eval rerun`` read it."""
    differences = [(row, name, matrix.difference(row, name)) for row in matrix.rows for name in sorted(row.scores)]
    return {
        "command": matrix.command,
        "code_revision": matrix.code_revision,
        "device": matrix.device,
        "seeds": sorted({seed for row in matrix.rows for seed in row.seeds}),
        "experiment": matrix.experiment,
        "rows": [_row_json(row) for row in matrix.rows],
        "claims": [decision.to_json() for decision in matrix.decisions],
        "differences": [
            {
                "row": row.key,
                "from": row.baseline,
                "metric": name,
                "value": effect.value,
                "low": effect.low,
                "high": effect.high,
            }
            for row, name, effect in differences
            if effect is not None
        ],
        "trials": [
            {"method": trials.method, "settings": settings, "metrics": metrics, "chosen": chosen}
            for trials in matrix.trials
            for settings, metrics, chosen in trials.rows
        ],
        "steps": [asdict(step) for step in matrix.steps],
        "packages": matrix.packages,
        "imported": matrix.imported,
        "pooled": matrix.pooled,
        "missing": list(matrix.missing),
        "notes": list(matrix.notes),
    }


def _values(row: MatrixRow, number: int) -> dict[str, float]:
    """Every metric of one seed."""
    return {name: float(scores.values[number]) for name, scores in sorted(row.scores.items())}


def _row_json(row: MatrixRow) -> dict[str, Any]:
    fields = ("name", "role", "method", "m", "n", "h", "effective_nfe", "seconds_per_video")
    more = ("budget", "ablation", "forward_passes", "training_minutes", "compute", "student_updates")
    return {
        "key": row.key,
        **{key: getattr(row, key) for key in (*fields, *more)},
        "runs": [
            {"cell": run.name, "seed": seed, "weights": weights, "device": device, "values": _values(row, number)}
            for number, (run, seed, weights, device) in enumerate(
                zip(row.runs, row.seeds, row.weights, row.devices, strict=False)
            )
        ],
        "seconds_range": row.seconds_range,
        "sections": list(row.sections),
        "iterations": list(row.iterations),
        "seeds": list(row.seeds),
        "metrics": {
            metric.name: {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}
            for metric in row.metrics
        },
    }

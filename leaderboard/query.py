"""Rows of the database, filtered and sorted."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, func, select

from leaderboard import published
from leaderboard.checks import DIMENSIONS
from leaderboard.database import reading
from leaderboard.errors import LeaderboardError
from leaderboard.models import Claim, Latency, Preference, Reported, Result, Thumbnail, VideoScore


def load(db_url: str | None, *, rows: Iterable[int] | None = None) -> list[Result]:
    """Results with their metrics, by id.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        rows: ids to take; all by default.

    Raises:
        LeaderboardError: an id does not exist, or the database cannot be opened.
    """
    with reading(db_url) as session:
        found = list(session.scalars(select(Result).order_by(Result.id)))
    if rows is None:
        return found
    wanted = set(rows)
    if missing := sorted(wanted - {result.id for result in found}):
        raise LeaderboardError(f"The database has no row {missing[0]}; see them with: tmd-eval leaderboard show.")
    return [result for result in found if result.id in wanted]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What stands in the database beside results and published figures."""

    latencies: list[Latency]
    preferences: list[Preference]
    claims: list[Claim]
    thumbnails: dict[int, list[Thumbnail]]
    """By result id."""
    with_videos: frozenset[int]
    """Ids of the results whose videos' scores are here."""


def load_evidence(db_url: str | None) -> Evidence:
    """Latency, preferences, claims and thumbnails, each in the order in which it was recorded."""
    with reading(db_url) as session:
        thumbnails: dict[int, list[Thumbnail]] = {}
        for thumbnail in session.scalars(select(Thumbnail).order_by(Thumbnail.result_id, Thumbnail.position)):
            thumbnails.setdefault(thumbnail.result_id, []).append(thumbnail)
        some = exists().where(VideoScore.result_id == Result.id)
        return Evidence(
            latencies=list(session.scalars(select(Latency).order_by(Latency.id))),
            preferences=list(session.scalars(select(Preference).order_by(Preference.id))),
            claims=list(session.scalars(select(Claim).order_by(Claim.id))),
            thumbnails=thumbnails,
            with_videos=frozenset(session.scalars(select(Result.id).where(some))),
        )


def prompt_means(db_url: str | None, rows: Iterable[int]) -> dict[str, dict[int, dict[int, float]]]:
    """Mean score over the videos of each prompt, by metric, result id and prompt.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        rows: ids of the results.
    """
    keys = (VideoScore.name, VideoScore.result_id, VideoScore.prompt)
    found: dict[str, dict[int, dict[int, float]]] = {}
    with reading(db_url) as session:
        query = select(*keys, func.avg(VideoScore.value)).where(VideoScore.result_id.in_(list(rows))).group_by(*keys)
        for name, result, prompt, mean in session.execute(query):
            found.setdefault(name, {}).setdefault(result, {})[prompt] = float(mean)
    return found


def load_reported(db_url: str | None) -> list[Reported]:
    """Published figures, by id: sources in the order in which they came in."""
    with reading(db_url) as session:
        return list(session.scalars(select(Reported).order_by(Reported.id)))


def measured_dict(row: Result) -> dict[str, Any]:
    """A measured row with the fields of a published one (:func:`reported_dict`)."""
    known = row.to_dict() | {"note": None, "formula": None}
    return {field: known[field] for field in FIELDS}


def reported_dict(row: Reported) -> dict[str, Any]:
    """A published row with the fields of a measured one (``Result.to_dict``), None where it says nothing.

    Scores are shares of 1, as everywhere in the database. ``formula`` holds what the formulas give for it.
    """
    branches = {True: 2, False: 1, None: None}[row.guided]
    passes = None if branches is None or row.effective_nfe is None else branches * row.effective_nfe
    nothing = dict.fromkeys(("low", "high", "n", "completeness", "metric_version", "weight_hashes"))
    expected = published.formula(row)
    known: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "name": published.name(row),
        "role": "teacher" if row.method == "teacher" else "student",
        "base": row.teacher,
        "forward_passes": passes,
        **{key: getattr(row, key) for key in ("method", "m", "n", "h", "blocks", "effective_nfe")},
        "note": row.note,
        "formula": {key: round(value / 100, 10) if key == "total" else value for key, value in expected.items()},
        "flags": published.flags(row),
        "completeness": sum(name in row.scores for name in DIMENSIONS) / len(DIMENSIONS),
        "metrics": {name: {"value": round(value / 100, 10), **nothing} for name, value in sorted(row.scores.items())},
    }
    return {field: known.get(field) for field in FIELDS}


FIELDS = (
    *(column.key for column in Result.__table__.columns if column.key != "key"),
    *("note", "formula", "flags", "completeness", "metrics"),
)
"""Fields of a row, measured or reported, in order."""
_CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|=|<|>)(.*)", re.S)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def show(db_url: str | None, *, where: Iterable[str] = (), sort: str | None = None) -> list[dict[str, Any]]:
    """Rows as plain values, measured ones first, then published ones: the two are never sorted into each other.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        where: conditions "FIELD=VALUE", or with !=, <, <=, >, >= in place of =; a field or a metric. "flags" takes one
            flag. Text is compared without regard to case.
        sort: a field or a metric, ascending, with a leading "-" descending; rows without it come last. Else by id.

    Raises:
        LeaderboardError: no such field or metric, a bad condition, or the database cannot be opened.
    """
    measured = [measured_dict(row) for row in load(db_url)]
    printed = [reported_dict(row) for row in load_reported(db_url)]
    metrics = {name for row in (*measured, *printed) for name in row["metrics"]}
    scalars = [field for field in FIELDS if field not in ("packages", "formula", "metrics")]

    def value_of(row: dict[str, Any], key: str) -> Any:
        return row["metrics"].get(key, {}).get("value") if key in metrics else row[key]

    tests = [_condition(condition, [*scalars, *sorted(metrics)]) for condition in where]
    groups = [
        [row for row in group if all(test(value_of(row, key)) for key, test in tests)] for group in (measured, printed)
    ]
    if sort:
        key = sort.removeprefix("-")
        _known(key, [*(field for field in scalars if field not in ("flags", "seeds")), *sorted(metrics)], "--sort")
        for i, group in enumerate(groups):
            present = [row for row in group if value_of(row, key) is not None]
            present.sort(key=lambda row: value_of(row, key), reverse=sort != key)
            groups[i] = present + [row for row in group if value_of(row, key) is None]
    return groups[0] + groups[1]


def _condition(text: str, options: list[str]) -> tuple[str, Callable[[Any], bool]]:
    """A field, and the test that its value must pass; numbers are compared as numbers."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise LeaderboardError(f"--where {text!r} is not FIELD=VALUE; write for example role=student or m<=2.")
    field, sign, wanted = match.groups()
    _known(field, options, "--where")

    def test(value: Any) -> bool:
        if isinstance(value, list):  # flags, seeds: one of them
            return (wanted in map(str, value)) == (sign == "=")
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return _COMPARE[sign](value, float(wanted))
            except ValueError:
                return sign == "!="
        if value is None:
            return (sign == "=") == (wanted in ("", "None")) if sign in ("=", "!=") else False
        return _COMPARE[sign](str(value).casefold(), wanted.casefold())

    return field, test


def _known(name: str, options: list[str], where: str) -> None:
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(options)}."
        raise LeaderboardError(f"{where} names {name!r}, which no row has; {hint}")

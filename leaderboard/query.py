"""Rows of the database, filtered and sorted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select

from leaderboard.database import reading
from leaderboard.errors import LeaderboardError
from leaderboard.models import Result


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


def show(
    db_url: str | None, *, where: Mapping[str, str] | None = None, sort: str | None = None
) -> list[dict[str, Any]]:
    """Rows as plain values (``Result.to_dict``).

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        where: field and the value its text must equal; "flags" takes one flag.
        sort: a field or a metric, ascending, with a leading "-" descending; rows without it come last. Else by id.

    Raises:
        LeaderboardError: no such field or metric, or the database cannot be opened.
    """
    rows = [result.to_dict() for result in load(db_url)]
    fields = [column.key for column in Result.__table__.columns if column.key != "key"] + ["flags"]
    for field, value in (where or {}).items():
        _known(field, fields, "--where")
        rows = [row for row in rows if (value in row["flags"] if field == "flags" else str(row[field]) == value)]
    if sort:
        key = sort.removeprefix("-")
        metrics = {name for row in rows for name in row["metrics"]}
        _known(key, [*(field for field in fields if field != "packages"), *sorted(metrics)], "--sort")

        def value_of(row: dict[str, Any]) -> Any:
            return row["metrics"].get(key, {}).get("value") if key in metrics else row[key]

        present = sorted((row for row in rows if value_of(row) is not None), key=value_of, reverse=sort != key)
        rows = present + [row for row in rows if value_of(row) is None]
    return rows


def _known(name: str, options: list[str], where: str) -> None:
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(options)}."
        raise LeaderboardError(f"{where} names {name!r}, which no row has; {hint}")

"""Published figures: reading them from CSV files, and whether each row agrees with itself.

A row is shown as it is printed. What contradicts itself is flagged, with what the formula gives beside it; what a
source leaves out is no contradiction.
"""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path
from typing import Any

from sqlalchemy import select

from leaderboard.checks import DIMENSIONS, finite, nearest, nfe_of, total_of
from leaderboard.database import writing
from leaderboard.errors import LeaderboardError
from leaderboard.models import Reported
from leaderboard.record import key_of

PUBLISHED_TITLE = "Few-step video models: the published figures"
"""Heading of the board of the shipped rows."""
BLOCKS = {"Wan2.1 1.3B": 30, "Wan2.1 14B": 40}
"""L, transformer blocks of the base models that rows with a flow head are made from."""
TOTAL_TOLERANCE = 0.0101
"""Percent. Three figures rounded to 0.01 explain up to 0.005 + (4 x 0.005 + 0.005) / 5 = 0.01."""
NFE_TOLERANCE = 0.0051
"""Rounding a printed NFE to 0.01 explains up to 0.005."""
COLUMNS = (
    *("teacher", "method", "source_table", "outer_steps_M", "inner_steps_N", "head_blocks_H", "effective_nfe"),
    *("cfg_doubled", "overall", "quality", "semantic", "note"),
)
"""Columns of a CSV file of published figures; any of VBench's dimensions may follow."""
IDENTITY = ("source", "teacher", "method", "m", "n", "h", "note")
"""What tells two rows apart; a corrected figure therefore replaces the old one."""


def name(row: Reported) -> str:
    """Base model, method and steps in one text."""
    return f"{row.teacher} {row.method}" + ("" if row.m is None else f", M = {row.m}")


def formula(row: Reported) -> dict[str, float]:
    """What the formulas give for a row: "total" from quality and semantic, "effective_nfe" from M, N, H and L."""
    found = {}
    if "quality" in row.scores and "semantic" in row.scores:
        found["total"] = total_of(row.scores["quality"], row.scores["semantic"])
    if row.m is not None and (nfe := nfe_of(row.m, row.n, row.h, row.blocks)) is not None:
        found["effective_nfe"] = nfe
    return found


def flags(row: Reported) -> list[str]:
    """ "total_mismatch" and "nfe_mismatch" where a row contradicts itself by more than rounding explains."""
    expected = formula(row)
    checks = (
        ("total_mismatch", row.scores.get("total"), expected.get("total"), TOTAL_TOLERANCE),
        ("nfe_mismatch", row.effective_nfe, expected.get("effective_nfe"), NFE_TOLERANCE),
    )
    return [
        flag
        for flag, printed, computed, tolerance in checks
        if printed is not None and computed is not None and abs(printed - computed) > tolerance
    ]


def import_published(db_url: str | None) -> dict[str, int]:
    """Load the figures shipped with this package; see :func:`import_csv`."""
    with resources.as_file(resources.files("leaderboard") / "published_results.csv") as path:
        return import_csv(db_url, path)


def import_csv(db_url: str | None, path: Path) -> dict[str, int]:
    """Load a CSV file of published figures, all of it or nothing.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        path: file with ``COLUMNS``.

    Returns:
        Numbers of rows: "added", "updated", "unchanged".

    Raises:
        LeaderboardError: the file cannot be read, lacks a column, or a line holds something impossible.
    """
    rows = read_csv(path)
    counts = dict.fromkeys(("added", "updated", "unchanged"), 0)
    with writing(db_url) as session:
        known = {row.key: row for row in session.scalars(select(Reported))}
        for values in rows:
            row = known.get(values["key"])
            if row is None:
                session.add(Reported(**values))
                counts["added"] += 1
                continue
            row.origin = None
            changed = {name: value for name, value in values.items() if getattr(row, name) != value}
            for name, value in changed.items():
                setattr(row, name, value)
            counts["updated" if changed else "unchanged"] += 1
    return counts


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as columns of ``models.Reported``; see :func:`import_csv`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, list(reader.fieldnames or []))
            rows = [_row(line, f"line {reader.line_num} of {path}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LeaderboardError(f"Cannot read {path} as CSV: {error}.") from error
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row["key"] in seen:
            raise LeaderboardError(
                f"Rows {seen[row['key']]} and {number} of {path} are the same result ({row['teacher']} {row['method']} "
                f"in {row['source']}); leave one out, or say in its note what differs."
            )
        seen[row["key"]] = number
    return rows


def _check_header(path: Path, names: list[str]) -> None:
    for name in names:
        if name not in (*COLUMNS, *DIMENSIONS):
            near = nearest(name, (*COLUMNS, *DIMENSIONS))
            hint = f"did you mean {near}?" if near else "there is no such column or dimension."
            raise LeaderboardError(f"{path} has a column {name!r}; {hint}")
    if missing := [name for name in COLUMNS if name not in names]:
        raise LeaderboardError(f"{path} lacks the column {missing[0]}; a file of results has {', '.join(COLUMNS)}.")


def _row(line: dict[str, Any], where: str) -> dict[str, Any]:
    if None in line or None in line.values():
        raise LeaderboardError(f"{where} has not as many cells as the header; put texts with commas into quotes.")
    cells = {name: text.strip() for name, text in line.items()}
    for name in ("teacher", "method", "source_table"):
        if not cells[name]:
            raise LeaderboardError(f"{where} leaves {name} empty; every row needs it.")
    if cells["cfg_doubled"] not in ("yes", "no", ""):
        raise LeaderboardError(f"{where} gives {cells['cfg_doubled']!r} as cfg_doubled; write yes, no or nothing.")
    names = {"overall": "total", "quality": "quality", "semantic": "semantic", **{name: name for name in DIMENSIONS}}
    scores = {
        name: value
        for column, name in names.items()
        if (value := _number(cells.get(column, ""), column, where, most=100)) is not None
    }
    values: dict[str, Any] = {
        "source": _source(cells["source_table"]),
        "teacher": cells["teacher"],
        "method": cells["method"],
        "m": _count(cells["outer_steps_M"], "outer_steps_M", where),
        "n": _count(cells["inner_steps_N"], "inner_steps_N", where),
        "h": _count(cells["head_blocks_H"], "head_blocks_H", where),
        "blocks": BLOCKS.get(cells["teacher"]),
        "effective_nfe": _number(cells["effective_nfe"], "effective_nfe", where),
        "guided": {"yes": True, "no": False, "": None}[cells["cfg_doubled"]],
        "scores": scores,
        "note": cells["note"],
    }
    values["key"] = key_of([values[name] for name in IDENTITY])
    return values


def _source(name: str) -> str:
    """ "tmd_table3" as "arXiv:2601.09881 Table 3"; any other text as it is."""
    number = name.removeprefix("tmd_table")
    return f"arXiv:2601.09881 Table {number}" if name != number and number.isdigit() else name


def _number(text: str, name: str, where: str, most: float | None = None) -> float | None:
    if not text:
        return None
    try:
        value = finite(text)
    except ValueError:
        value = -1.0
    if value < 0 or (most is not None and value > most):
        limits = f"between 0 and {most:g}" if most is not None else "of at least 0"
        raise LeaderboardError(f"{where} gives {text!r} as {name}; write a number {limits}, or nothing.")
    return value


def _count(text: str, name: str, where: str) -> int | None:
    if text and (not text.isascii() or not text.isdigit() or int(text) < 1):
        raise LeaderboardError(f"{where} gives {text!r} as {name}; write a whole number from 1, or nothing.")
    return int(text) if text else None

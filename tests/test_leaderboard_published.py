"""Published figures: the shipped rows, what they contradict, and files that must be refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leaderboard.checks import nfe_of, total_of
from leaderboard.errors import LeaderboardError
from leaderboard.published import COLUMNS, import_csv, import_published, read_csv
from leaderboard.query import load_reported, show
from leaderboard.record import record_run
from tests.test_leaderboard import TEACHER, make_run
from tmd_eval.cli import app

SHIPPED = Path(__file__).parents[1] / "leaderboard" / "published_results.csv"
ROW = dict(
    zip(
        COLUMNS,
        ["Wan2.1 1.3B", "TMD-N2H5", "t", "2", "2", "5", "2.33", "no", "84.68", "85.71", "80.55", ""],
        strict=True,
    )
)


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    db = str(tmp_path_factory.mktemp("published") / "r.db")
    assert import_published(db) == {"added": 75, "updated": 0, "unchanged": 0}
    assert import_published(db) == {"added": 0, "updated": 0, "unchanged": 75}
    return db


def test_every_printed_row_is_a_row(published: str) -> None:
    rows = show(published)
    with SHIPPED.open() as file:
        printed = list(csv.DictReader(file))
    assert len(rows) == len(printed) == 75
    tables = [int(row["source"].rsplit(" ", 1)[1]) for row in rows if row["source"].startswith("arXiv:2601.09881")]
    assert [tables.count(table) for table in range(1, 12)] == [19, 10, 4, 4, 4, 4, 0, 0, 4, 4, 5]
    twice = [row["source"] for row in rows if row["name"] == "Wan2.1 1.3B TMD-N2H5, M = 2"]
    assert twice == ["arXiv:2601.09881 Table 1"]
    assert {row["completeness"] for row in rows} == {0.0, 1 / 16} and {row["n"] for row in rows} == {None, 2, 4}
    for row, line in zip(rows, printed, strict=True):
        for column in ("overall", "quality", "semantic", "subject_consistency", "multiple_objects"):
            shown = row["metrics"].get("total" if column == "overall" else column)
            assert (shown and round(100 * shown["value"], 2)) == (float(line[column]) if line[column] else None)


def test_what_the_tables_contradict(published: str) -> None:
    flagged = show(published, where=["flags=total_mismatch"])
    assert [(row["name"], row["source"]) for row in flagged] == [
        ("Wan2.1 1.3B DMD2-v, M = 4", "arXiv:2601.09881 Table 1"),
        ("Wan2.1 1.3B DMD2-v shift 5, M = 4", "arXiv:2601.09881 Table 11"),
    ]
    assert flagged[0]["formula"]["total"] == pytest.approx((4 * 0.8603 + 0.7987) / 5)
    assert show(published, where=["flags=nfe_mismatch"]) == []
    assert all(row["flags"] in ([], ["total_mismatch"]) for row in show(published))


def test_forward_passes_count_guidance_and_nfe_does_not(published: str) -> None:
    rows = {row["name"]: row for row in show(published, where=["source=arXiv:2601.09881 Table 2"])}
    teacher, student = rows["Wan2.1 14B teacher, M = 50"], rows["Wan2.1 14B TMD-N4H5, M = 1"]
    assert (teacher["effective_nfe"], teacher["forward_passes"], teacher["role"]) == (50, 100, "teacher")
    assert (student["effective_nfe"], student["forward_passes"], student["blocks"]) == (1.38, 1.38, 40)
    assert student["formula"]["effective_nfe"] == 1.375


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, []),
        ({"overall": "84.69"}, ["total_mismatch"]),
        ({"overall": "84.688"}, []),  # 84.678 + 0.01
        ({"effective_nfe": "2.34"}, ["nfe_mismatch"]),
        ({"effective_nfe": "2.338"}, []),
        ({"effective_nfe": "4.67", "overall": "80"}, ["total_mismatch", "nfe_mismatch"]),
        ({"teacher": "Wan2.1 14B", "effective_nfe": "2.25"}, []),
        ({"teacher": "Wan2.1 14B"}, ["nfe_mismatch"]),
        ({"teacher": "another", "effective_nfe": "9"}, []),  # nobody knows its L
        ({"inner_steps_N": "", "head_blocks_H": "", "effective_nfe": "2"}, []),
        ({"inner_steps_N": "", "head_blocks_H": "", "effective_nfe": "4", "cfg_doubled": "yes"}, ["nfe_mismatch"]),
        ({"semantic": "", "overall": "10"}, []),  # nothing to contradict
        ({"effective_nfe": ""}, []),
    ],
)
def test_flags(tmp_path: Path, changes: dict[str, str], flags: list[str]) -> None:
    db = str(tmp_path / "r.db")
    import_csv(db, write(tmp_path / "a.csv", {**ROW, **changes}))
    assert [row["flags"] for row in show(db)] == [flags]


def test_formulas() -> None:
    assert total_of(85.71, 80.55) == pytest.approx(84.678)
    assert (nfe_of(4), nfe_of(2, 2, 5, 30), nfe_of(2, 2, 5)) == (4.0, pytest.approx(7 / 3), None)


def test_a_corrected_figure_replaces_the_old_one_and_dimensions_count(tmp_path: Path) -> None:
    db, dimensions = str(tmp_path / "r.db"), {"subject_consistency": "96.5", "scene": "40"}
    import_csv(db, write(tmp_path / "a.csv", ROW))
    again = write(tmp_path / "a.csv", {**ROW, "quality": "85.72", **dimensions}, {**ROW, "note": "second seed"})
    assert import_csv(db, again) == {"added": 1, "updated": 1, "unchanged": 0}
    first, second = show(db)
    assert first["metrics"]["quality"]["value"] == 0.8572 and first["metrics"]["scene"]["value"] == 0.4
    assert (first["completeness"], second["completeness"], second["note"]) == (2 / 16, 0.0, "second seed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overall": "-57.17"}, r"line 2 of .*a\.csv gives '-57.17' as overall; write a number between 0 and 100"),
        ({"quality": "nan"}, "'nan' as quality"),
        ({"semantic": "inf"}, "'inf' as semantic"),
        ({"overall": "high"}, "'high' as overall"),
        ({"outer_steps_M": "0"}, "'0' as outer_steps_M; write a whole number from 1"),
        ({"inner_steps_N": "2.5"}, "'2.5' as inner_steps_N"),
        ({"cfg_doubled": "maybe"}, "'maybe' as cfg_doubled"),
        ({"method": " "}, "leaves method empty"),
        ({"imaging_qualty": "60"}, "column 'imaging_qualty'; did you mean imaging_quality"),
        ({"xyzzy": "60"}, "column 'xyzzy'; there is no such column"),
    ],
)
def test_impossible_lines_are_refused_and_nothing_is_loaded(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    db = str(tmp_path / "r.db")
    extra = {name: "" for name in changes if name not in ROW}
    path = write(tmp_path / "a.csv", {**ROW, **changes}, {**ROW, **extra, "note": "fine"})
    with pytest.raises(LeaderboardError, match=message):
        import_csv(db, path)
    assert load_reported(db) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, message in [
        (b"\xff\xfe\x00", "as CSV"),
        (b"", "lacks the column teacher"),
        (b"teacher,method\na,b\n", "lacks the column source_table"),
        ((",".join(COLUMNS) + "\na,b,c\n").encode(), "not as many cells"),
        ((",".join(COLUMNS) + "\n" + ",".join(ROW.values()) + ",more\n").encode(), "not as many cells"),
    ]:
        path.write_bytes(content)
        with pytest.raises(LeaderboardError, match=message):
            read_csv(path)
    with pytest.raises(LeaderboardError, match=r"Rows 1 and 2 of .* are the same result"):
        read_csv(write(path, ROW, ROW))
    with pytest.raises(LeaderboardError, match="Cannot read"):
        read_csv(tmp_path / "absent.csv")


def call(*words: str) -> Any:
    result = CliRunner().invoke(app, ["leaderboard", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_measured_and_reported_rows_are_never_sorted_into_each_other(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, TEACHER, prompts=1))
    assert json.loads(call("import", "published", "--db", db, "--json"))["added"] == 75
    rows = json.loads(call("show", "--db", db, "--sort=-total", "--json"))
    assert [row["source"] == "measured" for row in rows] == [True] + [False] * 75
    totals = [row["metrics"]["total"]["value"] for row in rows[1:] if "total" in row["metrics"]]
    assert totals == sorted(totals, reverse=True)
    assert len({tuple(row) for row in rows}) == 1  # every row has the same fields
    few = json.loads(call("show", "--db", db, "--where", "effective_nfe<2", "--where", "total >= 0.84", "--json"))
    assert [row["name"] for row in few] == ["Wan2.1 14B TMD-N4H5, M = 1"]
    table = call("show", "--db", db, "--where", "flags=total_mismatch")
    assert table.count("total_mismatch (formula: 0.84798)") == 2

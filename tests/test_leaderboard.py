"""The leaderboard: recording runs, the database and its migration, and the report, down to its bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from typer.testing import CliRunner

from leaderboard.database import database_url, open_engine, reading, writing
from leaderboard.display import ordered, primary, ranks
from leaderboard.errors import LeaderboardError
from leaderboard.models import Base, Metric, Result
from leaderboard.query import load, show
from leaderboard.record import record_run
from leaderboard.report import build_report
from leaderboard.stats import intervals_apart, rank_ranges
from students.micro.world import FPS, make_clip
from tmd_eval.commands.leaderboard import app
from tmd_eval.video import write_video

HOSTILE = "a <script>alert('&amp;')</script> | ```../../etc``` \"quoted\""
TEACHER, UNDISTILLED, STUDENT = "micro teacher, 50 steps", "micro undistilled, 2 steps", "TMD-N2H2, M = 2"
"""Names the rows get when nobody names them."""
MODELS: dict[str, dict[str, Any]] = {
    TEACHER: {
        "role": "teacher", "method": "teacher", "m": 50, "n": None, "h": None,
        "effective_nfe": 50.0, "forward_passes": 100.0, "guidance": 2.0,
    },
    UNDISTILLED: {
        "role": "undistilled", "method": "teacher", "m": 2, "n": None, "h": None,
        "effective_nfe": 2.0, "forward_passes": 4.0, "guidance": 2.0,
    },
    STUDENT: {
        "role": "student", "method": "tmd", "m": 2, "n": 2, "h": 2,
        "effective_nfe": 2.4, "forward_passes": 2.4, "guidance": 1.0,
    },
}  # fmt: skip
JOINT = {TEACHER: 0.91, UNDISTILLED: 0.22, STUDENT: 0.84}
PROMPTS = 4


def make_run(
    root: Path, name: str, *, prompts: int = PROMPTS, completeness: float = 1.0, caption: str | None = None
) -> Path:
    """A run folder as ``tmd-eval generate`` and the micro judges leave it, with real rendered clips."""
    run = root / name.replace(" ", "")
    (run / "videos").mkdir(parents=True)
    (run / "scores").mkdir()
    rows = []
    for line in range(prompts):
        prompt, clip = make_clip((3, line), held_out=True)
        prompt = caption if caption and line == 1 else prompt
        frames = np.rint(clip * 255).astype(np.uint8)
        video = f"{line:05d}-0.mp4"
        digest = write_video(run / "videos" / video, frames, FPS, lossless=True)
        rows.append(
            {
                "video": video, "prompt": prompt, "text": prompt, "line": line, "index": 0, "seed": 100_000 * line,
                "sampler": "s", "checkpoint_hash": "c" * 64, "key": "k" * 64, "frames": 9, "height": 32, "width": 32,
                "fps": 8, "sha256": digest, "seconds": [0.5, 0.1, 0.2, 0.3, 0.4][line % 5],
            }
        )  # fmt: skip
    rows = rows[::-1]  # the order of finishing is not the order of the prompts
    (run / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "command": f"tmd-eval generate --ckpt '{name}'", "code_revision": "0123456789" * 4, "device": "a CPU",
        "packages": {"torch": "2.14.1", "diffusers": "0.42.1"}, "created": "2026-11-20T10:00:00+00:00",
        "checkpoint": {
            **MODELS[name], "blocks": 10, "sampler": "Algorithm 1", "text_length": 16, "name": "folder",
            "ref": f"out/{name}", "hash": hashlib.sha256(name.encode()).hexdigest(),
            "base": {"ref": "micro", "hash": "b" * 64, "revision": None},
        },
        "prompts": {"name": "micro", "sha256": "d" * 64, "count": prompts}, "samples_per_prompt": 1, "limit": None,
        "seed": 7, "size": [32, 32], "frames": 9, "fps": 8, "dtype": "float32", "batch_size": 16,
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    joint = JOINT[name]
    values = {
        "alignment_joint": (joint, joint - 0.03, joint + 0.03),
        "alignment_shape": (0.95, 0.9, 1.0),
        "frechet": (4.0 / joint, 3.5 / joint, 4.5 / joint),
        "frechet_real": (0.9, 0.8, 1.0),
        "diversity": (1.04, 0.98, 1.1),
    }
    entry = {"completeness": completeness, "metric_version": "micro-judge-1", "weight_hashes": {}}
    summary = {
        key: {"n": 4, "value": value, "low": low, "high": high, **entry} for key, (value, low, high) in values.items()
    }
    (run / "scores" / "summary.json").write_text(json.dumps(summary))
    return run


def edit(path: Path, **changes: Any) -> None:
    """Change top-level keys of a YAML or JSON file."""
    values = yaml.safe_load(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """A database with three recorded runs, and their folders."""
    root = tmp_path_factory.mktemp("board")
    runs = {name: make_run(root, name) for name in MODELS}
    db = str(root / "results.db")
    for run in runs.values():
        record_run(db, run)
    return db, runs


# Recording


def test_a_row_holds_what_the_run_says(board: tuple[str, dict[str, Path]]) -> None:
    db, runs = board
    row = next(r for r in load(db) if r.name == STUDENT)
    assert (row.role, row.method, row.m, row.n, row.h, row.blocks) == ("student", "tmd", 2, 2, 2, 10)
    assert (row.effective_nfe, row.forward_passes, row.guidance) == (2.4, 2.4, 1.0)
    assert (row.height, row.width, row.frames, row.fps, row.dtype) == (32, 32, 9, 8.0, "float32")
    assert row.seconds_per_video == pytest.approx(0.25)  # the median of 0.5, 0.1, 0.2, 0.3
    assert row.seeds == [7] and row.videos == PROMPTS and row.batch_size == 16
    assert row.created.isoformat() == "2026-11-20T10:00:00+00:00"
    assert row.base == "micro, sha256 " + "b" * 64
    manifest = (runs[STUDENT] / "manifest.jsonl").read_bytes()
    assert row.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    joint = row.metric("alignment_joint")
    assert joint is not None and (joint.value, joint.n, joint.metric_version) == (0.84, 4, "micro-judge-1")
    assert row.flags == [] and row.source == "measured"


def test_recording_again_updates_the_same_row(tmp_path: Path) -> None:
    run, db = make_run(tmp_path, TEACHER), str(tmp_path / "r.db")
    first = record_run(db, run)
    (run / "scores" / "summary.json").write_text(
        json.dumps(
            {
                "alignment_joint": {
                    "n": 4, "value": 0.5, "low": 0.4, "high": 0.6, "completeness": 1, "metric_version": "2",
                    "weight_hashes": {"a.pth": "f" * 64},
                }
            }
        )
    )  # fmt: skip
    assert record_run(db, run, name="Renamed") == first
    (row,) = load(db)
    assert row.name == "Renamed"
    assert [(m.name, m.value, m.weight_hashes) for m in row.metrics] == [("alignment_joint", 0.5, {"a.pth": "f" * 64})]
    with reading(db) as session:
        assert session.scalar(select(func.count()).select_from(Metric)) == 1


def test_an_unfinished_run_fills_in_its_row_and_another_run_gets_its_own(tmp_path: Path) -> None:
    run, db = make_run(tmp_path, TEACHER), str(tmp_path / "r.db")
    manifest = (run / "manifest.jsonl").read_text()
    (run / "scores" / "summary.json").rename(tmp_path / "kept.json")
    (run / "manifest.jsonl").write_text("".join(manifest.splitlines(keepends=True)[:2]) + '{"video": "half')
    first = record_run(db, run)
    assert load(db)[0].flags == ["incomplete", "unscored"]
    (tmp_path / "kept.json").rename(run / "scores" / "summary.json")
    (run / "manifest.jsonl").write_text(manifest)
    assert record_run(db, run) == first
    assert load(db)[0].flags == []
    edit(run / "config.yaml", created="2026-11-21T10:00:00+00:00", code_revision="0" * 40 + "+changes")
    assert record_run(db, run) != first
    assert [row.flags for row in load(db)] == [[], ["modified code"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
        (lambda run: (run / "manifest.jsonl").unlink(), "no manifest.jsonl"),
        (lambda run: (run / "manifest.jsonl").write_text("[]\n"), "Line 1 of"),
        (lambda run: edit(run / "config.yaml", checkpoint=None), "no section 'checkpoint'"),
        (lambda run: edit(run / "config.yaml", device=None), "does not state 'device'"),
        (lambda run: edit(run / "config.yaml", frames="nine"), "'nine' as 'frames', which must be int"),
        (lambda run: edit(run / "config.yaml", size=[32]), r"size \[32\]"),
        (lambda run: edit(run / "config.yaml", created="today"), "'today' as 'created'"),
        (lambda run: (run / "config.yaml").write_text("a: [b"), "not YAML"),
        (lambda run: (run / "scores" / "summary.json").write_text('{"joint": {"value": 1}}'), "score the run again"),
        (lambda run: (run / "scores" / "summary.json").write_text("{"), "score the run again"),
    ],
)
def test_a_damaged_run_is_refused_in_one_sentence(tmp_path: Path, damage: Any, message: str) -> None:
    run = make_run(tmp_path, TEACHER, prompts=1)
    damage(run)
    with pytest.raises(LeaderboardError, match=message) as error:
        record_run(str(tmp_path / "r.db"), run)
    assert error.value.exit_code == 2


def test_a_score_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, TEACHER, prompts=1)
    entry = {"n": 1, "value": float("nan"), "completeness": 1, "metric_version": "1", "weight_hashes": {}}
    (run / "scores" / "summary.json").write_text(json.dumps({"frechet": entry}))
    with pytest.raises(LeaderboardError, match="nan is not a finite number"):
        record_run(str(tmp_path / "r.db"), run)


# Database


def test_the_migration_makes_exactly_the_models(tmp_path: Path) -> None:
    engine = open_engine(str(tmp_path / "r.db"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        settings = [connection.execute(text(f"PRAGMA {p}")).scalar() for p in ("journal_mode", "foreign_keys")]
        assert settings == ["wal", 1]
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 10000
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1  # NORMAL
    engine.dispose()


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    db = tmp_path / "r.db"
    open_engine(str(db)).dispose()
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LeaderboardError, match=r"schema 9999.*upgrade tmd-eval"):
        load(str(db))
    with sqlite3.connect(db) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMD_EVAL_DB", raising=False)
    assert database_url() == "sqlite:///tmd-eval.db"
    monkeypatch.setenv("TMD_EVAL_DB", "other.db")
    assert database_url() == "sqlite:///other.db"
    assert database_url("postgresql://u@h/d") == "postgresql+psycopg://u@h/d"
    (tmp_path / "text.db").write_text("no database, " * 100)
    for bad in ("mysql://h/d", "nonsense://", str(tmp_path / "no" / "r.db"), str(tmp_path / "text.db")):
        with pytest.raises(LeaderboardError):
            load(bad)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, TEACHER, prompts=1))
    with pytest.raises(RuntimeError), writing(db) as session:
        session.delete(session.scalars(select(Result)).one())
        session.flush()
        raise RuntimeError("killed")
    assert len(load(db)) == 1 and len(load(db)[0].metrics) == 5


def test_processes_that_open_and_record_at_once_all_succeed(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    runs = []
    for i in range(4):
        run = make_run(tmp_path / str(i), TEACHER, prompts=1)
        edit(run / "config.yaml", seed=i)
        runs.append(run)
    code = "import sys; from pathlib import Path; from leaderboard.record import record_run; "
    code += "[record_run(sys.argv[1], Path(sys.argv[2])) for _ in range(5)]"
    processes = [subprocess.Popen([sys.executable, "-c", code, db, str(run)]) for run in runs]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert sorted(row.seeds for row in load(db)) == [[0], [1], [2], [3]]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a fresh PostgreSQL cluster on a socket of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL server, or no psycopg")
    binaries, folder = found[-1].parent, Path(f"/tmp/tmd-eval-pg-{os.getpid()}")
    folder.mkdir()
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        shutil.chown(folder, "postgres")
    data, quiet = folder / "data", {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*user, binaries / "initdb", "-D", data, "-A", "trust", "-U", "tmd", "-N"], **quiet)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    pg_ctl = [*user, binaries / "pg_ctl", "-D", data]
    subprocess.run([*pg_ctl, "-w", "-l", folder / "log", "-o", options, "start"], **quiet)
    yield f"postgresql://tmd@/postgres?host={folder}"
    subprocess.run([*pg_ctl, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


def test_postgresql_keeps_the_same_rows(postgres: str, board: tuple[str, dict[str, Path]]) -> None:
    db, runs = board
    first = [record_run(postgres, run) for run in runs.values()]
    assert [record_run(postgres, run) for run in runs.values()] == first
    drop = lambda rows: [{k: v for k, v in row.items() if k != "id"} for row in rows]  # noqa: E731
    assert drop(show(postgres, sort="name")) == drop(show(db, sort="name"))
    engine = open_engine(postgres)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_postgresql_takes_everything_in_and_gives_it_back(postgres: str, tmp_path: Path) -> None:
    import psycopg

    from leaderboard.bundle import export_bundle, import_bundle
    from leaderboard.query import prompt_means
    from tests.test_leaderboard_site import make_board

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE other")
    other = postgres.replace("/postgres?", "/other?")
    db = make_board(tmp_path)
    export_bundle(db, tmp_path / "all.zip")
    copy = str(tmp_path / "sqlite.db")
    for address in (other, copy):
        assert import_bundle(address, tmp_path / "all.zip") == {"added": 87, "unchanged": 0, "kept": 0}
        assert import_bundle(address, tmp_path / "all.zip") == {"added": 0, "unchanged": 87, "kept": 0}
    assert show(other) == show(copy) and len(show(other)) == 81
    ids = [row.id for row in load(copy)]
    assert prompt_means(other, ids)["alignment_joint"].keys() == prompt_means(copy, ids)["alignment_joint"].keys()
    export_bundle(other, tmp_path / "back.zip")
    export_bundle(copy, tmp_path / "copy.zip")
    assert (tmp_path / "back.zip").read_bytes() == (tmp_path / "copy.zip").read_bytes()


# Ranks


def test_ranks_are_ranges_where_intervals_overlap() -> None:
    low, high = [0.90, 0.85, 0.10, 0.91], [0.95, 0.92, 0.20, 0.91]
    assert rank_ranges(low, high).tolist() == [[1, 3], [1, 3], [4, 4], [1, 3]]
    assert rank_ranges(low, high, higher_is_better=False).tolist() == [[2, 4], [2, 4], [1, 1], [2, 4]]
    assert intervals_apart((0, 1), (2, 3)) and intervals_apart((2, 3), (0, 1)) and not intervals_apart((0, 2), (2, 3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.randoms())
def test_rank_ranges_hold_the_true_rank(pairs: list[tuple[float, float]], random: Any) -> None:
    ends = [(min(pair), max(pair)) for pair in pairs]
    truth = [random.uniform(low, high) for low, high in ends]
    ranges = rank_ranges(*zip(*ends, strict=True)).tolist()
    for value, (best, worst) in zip(truth, ranges, strict=True):
        assert best <= 1 + sum(other > value for other in truth) and worst >= sum(other >= value for other in truth)
    order = list(range(len(ends)))
    random.shuffle(order)
    shuffled = rank_ranges(*zip(*(ends[i] for i in order), strict=True)).tolist()
    assert shuffled == [ranges[i] for i in order]


def test_an_incomplete_row_is_shown_flagged_and_never_ranked(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, UNDISTILLED, prompts=1))
    record_run(db, make_run(tmp_path, TEACHER, prompts=1, completeness=0.99))  # the better one
    rows = load(db)
    by = primary([])
    assert by is None
    page = build_report(db, tmp_path / "report", command="c", clips={}).read_text()
    assert page.count("incomplete</span>") == 2  # in the table and under provenance
    table = (tmp_path / "report" / "leaderboard.md").read_text()
    assert re.search(rf"^\| 1 \| {UNDISTILLED} \|.*\n\| \u2013 \| {TEACHER} \(incomplete\) \|", table, re.M)
    svg = (tmp_path / "report" / "figures" / "quality.svg").read_text()
    assert f">{UNDISTILLED}<" in svg and f">{TEACHER}<" not in svg
    from leaderboard.display import displays

    by = primary(displays(rows))
    assert by is not None and [row.name for row in ordered(rows, by)] == [UNDISTILLED, TEACHER]
    assert list(ranks(rows, by).values()) == ["1"]


# Report


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_report_json_is_the_contract(board: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    db, _ = board
    build_report(db, tmp_path / "report", command="tmd-eval quickstart")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report) == ["command", "code_revision", "device", "seeds", "rows"]
    assert (report["command"], report["device"], report["seeds"]) == ("tmd-eval quickstart", "a CPU", [7])
    assert [row["name"] for row in report["rows"]] == [TEACHER, STUDENT, UNDISTILLED]
    student = report["rows"][1]
    assert " ".join(student) == "name role method m n h effective_nfe seconds_per_video metrics"
    assert student["metrics"]["alignment_joint"] == {"value": 0.84, "low": 0.84 - 0.03, "high": 0.84 + 0.03, "n": 4}


def test_the_same_database_gives_the_same_bytes(board: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    db, _ = board
    build_report(db, tmp_path / "a", command="c")
    code = "import sys; from pathlib import Path; from leaderboard.report import build_report; "
    code += "build_report(sys.argv[1], Path(sys.argv[2]), command='c')"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, db, str(tmp_path / "b")], check=True, env=environment)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    names = ["fidelity.png", "fidelity.svg", "quality.png", "quality.svg"]
    assert list(first) == [*(f"figures/{n}" for n in names), "index.html", "leaderboard.md", "report.json"]
    assert first == second


class _Page(HTMLParser):
    """What a page loads and what its elements are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.loads += [str(values[key]) for key in ("src", "href", "srcset", "data", "action") if key in values]
        self.ids += [str(values["id"])] if "id" in values else []


def test_the_page_is_self_contained(board: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    db, _ = board
    source = build_report(db, tmp_path / "report", command="c").read_text()
    page = _Page(source)
    assert page.loads and all(load.startswith(("data:", "#")) for load in page.loads)
    assert "http:" not in source and "https:" not in source and "@import" not in source
    assert len(page.ids) == len(set(page.ids))
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 3 * PROMPTS * 2 and page.tags.count("svg") == 2
    assert len(source) < 1_500_000
    for name in MODELS:  # the numbers and where they come from
        assert f"out/{name}" in source and hashlib.sha256(name.encode()).hexdigest() in source
    for fact in (
        "84.0",
        "[81.0, 87.0]",
        "n = 4",
        "100 (50\u00d72)",
        "real vs real 0.900",
        "d" * 64,
        "prefers-color-scheme",
    ):
        assert fact in source
    assert re.search(r"The student is <strong>above</strong> the undistilled model, intervals apart", source)
    assert str(tmp_path) not in source  # no path of this machine


def test_the_sheet_shows_the_first_prompts_that_all_rows_share(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    runs = [make_run(tmp_path, TEACHER, prompts=3), make_run(tmp_path, STUDENT, prompts=5)]
    ids = [record_run(db, run) for run in runs]
    (runs[1] / "videos" / "00001-0.mp4").unlink()
    captions = [make_clip((3, line), held_out=True)[0] for line in range(5)]
    page = build_report(db, tmp_path / "a", command="c").read_text()
    shown = re.findall(r'<span class="line">\d+</span>(.*?)</figcaption>', page)
    assert shown == [captions[0], captions[2]]
    assert "The first 2 of the 2 prompts that all 2 models share" in page
    one = build_report(db, tmp_path / "b", command="c", clips={ids[1]: runs[1]}).read_text()
    assert _Page(one).tags.count("img") == 2 * 4
    assert "<img" not in build_report(db, tmp_path / "c", command="c", clips={}).read_text()
    (runs[0] / "videos" / "00000-0.mp4").write_bytes(b"no video")
    with pytest.raises(LeaderboardError, match=r"00000-0\.mp4"):
        build_report(db, tmp_path / "d", command="c")
    assert not (tmp_path / "d").exists()


def test_clips_keep_their_pixels(board: tuple[str, dict[str, Path]]) -> None:
    import base64
    import io

    from PIL import Image

    from leaderboard.clips import contact_sheet
    from tmd_eval.video import read_video

    db, runs = board
    row = next(r for r in load(db) if r.name == TEACHER)
    sheet = contact_sheet([row], {row.id: runs[TEACHER]})
    assert sheet is not None and sheet.common == PROMPTS
    frames, _ = read_video(runs[TEACHER] / "videos" / "00000-0.mp4")
    clip = sheet.rows[0][1][0]
    moving = Image.open(io.BytesIO(base64.b64decode(clip.moving.split(",")[1])))
    assert (moving.n_frames, moving.size, moving.info["loop"]) == (len(frames), (32, 32), 0)
    for i in range(len(frames)):
        moving.seek(i)
        assert np.array_equal(np.asarray(moving.convert("RGB")), frames[i])
        assert moving.info["duration"] == 1000 / FPS
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(clip.strip.split(",")[1]))))
    assert np.array_equal(strip, np.concatenate([frames[i] for i in (0, 1, 3, 4)], axis=1))


def test_large_clips_are_scaled_down_and_the_page_stays_small(
    board: tuple[str, dict[str, Path]], tmp_path: Path
) -> None:
    from leaderboard.clips import BUDGET, LARGEST, MOVING, contact_sheet

    run = tmp_path / "run"
    (run / "videos").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (24, 240, 416, 3), dtype=np.uint8)  # the worst to compress
    lines = []
    for line in range(2):
        write_video(run / "videos" / f"{line}.mp4", noise, 16, lossless=False)
        lines.append(json.dumps({"video": f"{line}.mp4", "prompt": str(line), "line": line, "index": 0}) + "\n")
    (run / "manifest.jsonl").write_text("".join(lines))
    row = load(board[0])[0]
    sheet = contact_sheet([row], {row.id: run})
    assert sheet is not None
    clips = [clip for _, row_clips in sheet.rows for clip in row_clips]
    assert all(clip.width == LARGEST and clip.height == round(240 * LARGEST / 416) for clip in clips)
    assert sum(len(c.moving) + len(c.strip) for c in clips) <= BUDGET or len(clips) == 1
    assert MOVING < 24


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose name, prompt, command and title try to break out of their places."""
    root = tmp_path_factory.mktemp("hostile")
    db = str(root / "r.db")
    record_run(db, make_run(root, STUDENT, caption=HOSTILE), name=f"TMD $x_$ {HOSTILE}")
    record_run(db, make_run(root, TEACHER, caption=HOSTILE))
    return build_report(db, root / "report", title=HOSTILE, command=HOSTILE)


def test_hostile_text_stays_text(hostile: Path) -> None:
    page = _Page(hostile.read_text())
    assert page.tags.count("script") == 1  # our own
    table = (hostile.parent / "leaderboard.md").read_text()
    assert "<script>" not in table.replace(f"    {HOSTILE}", "")  # the command stands in a code block
    row = next(line for line in table.splitlines() if line.startswith("|") and "TMD" in line and "2.4" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 15  # 14 columns
    assert json.loads((hostile.parent / "report.json").read_text())["command"] == HOSTILE


def test_a_browser_shows_the_page_without_errors(hostile: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium on this machine")
        pytest.skip("no chromium on this machine")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path}", hostile.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    assert _Page(done.stdout).tags.count("button") == 14  # the script made every heading of the first table a button


def test_rows_on_other_prompts_are_kept_apart(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, TEACHER, prompts=1))
    other = make_run(tmp_path, STUDENT, prompts=1)
    edit(other / "config.yaml", prompts={"name": "my prompts.txt", "sha256": "e" * 64, "count": 1})
    record_run(db, other)
    page = build_report(db, tmp_path / "report", command="c").read_text()
    assert page.count('class="group"') == 2
    names = sorted(path.name for path in (tmp_path / "report" / "figures").glob("*.svg"))
    assert names == [f"{slug}-{kind}.svg" for slug in ("micro", "my-prompts-txt") for kind in ("fidelity", "quality")]


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(LeaderboardError, match="no rows"):
        build_report(str(tmp_path / "r.db"), tmp_path / "report", command="c")
    assert not (tmp_path / "report").exists()


# Commands


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_add_show_build(tmp_path: Path) -> None:
    db, run = str(tmp_path / "r.db"), make_run(tmp_path, TEACHER, prompts=1)
    assert json.loads(call("add", str(run), "--db", db, "--json")) == {"row": 1}
    assert call("add", str(run), "--name", "Base", "--db", db) == "row 1\n"
    assert call("build", "--out", str(tmp_path / "report"), "--db", db) == f"{tmp_path}/report/index.html\n"
    assert "Base" in (tmp_path / "report" / "index.html").read_text()


def test_show_filters_and_sorts(board: tuple[str, dict[str, Path]]) -> None:
    db, _ = board
    names = lambda *arguments: [r["name"] for r in json.loads(call("show", "--db", db, "--json", *arguments))]  # noqa: E731
    assert names() == list(MODELS)
    assert names("--sort=-alignment_joint") == [TEACHER, STUDENT, UNDISTILLED]
    assert names("--sort", "frechet") == [TEACHER, STUDENT, UNDISTILLED]
    assert names("--sort", "n") == [STUDENT, TEACHER, UNDISTILLED]  # rows without N last
    assert names("--where", "role=student", "--where", "m=2") == [STUDENT]
    assert names("--where", "role=STUDENT", "--where", "m=2") == [STUDENT]  # whatever the case
    assert names("--where", "flags=incomplete") == []
    assert call("show", "--db", db, "--where", "m=77").startswith("no row meets every --where")
    table = call("show", "--db", db).splitlines()
    assert len(table) == 4 and "0.840 [0.810, 0.870]" in table[3]
    for bad in (["--where", "rule=student"], ["--sort", "joint"], ["--where", "role"]):
        with pytest.raises(LeaderboardError):
            call("show", "--db", db, *bad)


def test_show_json_is_frozen(board: tuple[str, dict[str, Path]]) -> None:
    row = json.loads(call("show", "--db", board[0], "--json"))[0]
    assert " ".join(row) == (
        "id source name role method m n h blocks effective_nfe forward_passes guidance sampler base checkpoint "
        "checkpoint_hash prompts_name prompts_sha256 prompts_count samples_per_prompt seeds height width frames fps "
        "dtype videos seconds_per_video batch_size device code_revision packages command created manifest_sha256 "
        "run origin note formula flags completeness metrics"
    )
    assert " ".join(row["metrics"]["frechet"]) == "value low high n completeness metric_version weight_hashes"
    assert row["flags"] == [] and row["source"] == "measured"


def test_the_room_imports_no_other_room() -> None:
    code = "import sys, leaderboard.report, leaderboard.record, leaderboard.figures, leaderboard.clips\n"
    code += "rooms = {'torch', 'diffusers', 'students', 'tmd_eval', 'studies'}\nprint(rooms & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

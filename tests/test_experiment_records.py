"""Records: cells that leave a machine and come to another with their scores, and what a run there still has to do."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from students.errors import ConfigError
from students.spec import StudentSpec
from tests.test_experiment_run import finished, in_process, world  # noqa: F401  # fixtures
from tmd_eval.cli import app
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import load_plan
from tmd_eval.experiment.plan import load, make_plan
from tmd_eval.experiment.records import ENDING, export_records, import_records
from tmd_eval.experiment.run import Options, run
from tmd_eval.experiment.times import _stand_in, time_rows


@pytest.fixture(scope="module")
def records(world: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    to = tmp_path_factory.mktemp("records") / "cells"
    loaded = load(world / "experiment.yaml", finished)
    written = export_records(loaded, make_plan(loaded, finished), finished, to)
    assert len(written) == 6 == len(list(to.iterdir()))
    return to


@pytest.fixture
def taken(world: Path, finished: Path, records: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A fresh folder that holds the records and the measured steps, and nothing else."""
    out = tmp_path / "elsewhere"
    shutil.copytree(finished / "measured", out / "measured")
    found = import_records(world / "experiment.yaml", out, records)
    assert len(found.taken) == 6 and not found.there and not found.foreign
    return out


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def altered(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    files = contents(path)
    change(files)
    with tarfile.open(path, "w:xz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_a_run_with_records_does_nothing_and_reports_the_same(world: Path, finished: Path, taken: Path):  # noqa: F811
    outcome = run(Options(file=world / "experiment.yaml", out=taken))
    assert outcome.made == 0 and not (taken / "train").exists() and not list(taken.glob("cells/*/videos"))
    here, there = (json.loads((out / "report" / "report.json").read_text()) for out in (taken, finished))
    assert (here.pop("imported"), there.pop("imported")) == (6, 0)
    for report in (here, there):
        del report["command"]
    assert here["experiment"].pop("state") != "" != there["experiment"].pop("state")
    assert here == there  # rows, intervals, claims, training minutes, weights
    page, original = ((out / "report" / "index.html").read_text() for out in (taken, finished))
    assert page.count("data:image/webp") == original.count("data:image/webp") > 0
    assert "6 cells were made on another machine" in page and "made on another machine" not in original


def test_stills_are_the_frames_of_the_videos(finished: Path, taken: Path):  # noqa: F811
    from leaderboard.matrix_sheets import sheet_clips, still

    name = load_plan(finished).cells[0].name
    clips = sheet_clips(finished / "cells" / name)
    assert clips == sheet_clips(taken / "cells" / name)
    for _, video in clips:
        frames = [still(out / "cells" / name, video).tobytes() for out in (finished, taken)]
        assert frames[0] == frames[1]


def test_deleting_an_imported_cell_makes_that_cell_and_its_student_again(world: Path, taken: Path):  # noqa: F811
    options = Options(file=world / "experiment.yaml", out=taken)
    run(options)
    plan = load_plan(taken)
    cell = next(cell for cell in plan.cells if cell.seed == 1 and cell.row["ablation"] == "n1")
    shutil.rmtree(taken / "cells" / cell.name)
    left = {key for key, state in store.states(taken, plan.jobs).items() if state != "done"}
    assert left == set(cell.jobs) and len(left) == 4  # two stages, videos, scores
    before = {path: path.stat().st_mtime_ns for path in taken.glob("cells/*/scores/*")}
    assert run(options).made == 4
    assert len(list((taken / "cells" / cell.name / "videos").iterdir())) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())  # the others stay as they came
    assert run(options).made == 0


def test_rows_whose_weights_are_elsewhere_are_timed_untrained(world: Path, finished: Path, taken: Path):  # noqa: F811
    """The stand-in runs as many blocks as the student whose place it takes."""
    file = world / "experiment.yaml"
    times = time_rows(file, taken, repeats=2, batch=1)
    loaded = load(file, finished)
    rows = {cell.row: cell for cell in reversed(loaded.cells)}
    assert set(times["cells"]) == {cell.name for cell in rows.values()}
    assert {name for name, cell in times["cells"].items() if not cell["untrained"]} == {
        cell.name for cell in rows.values() if not cell.trainings
    }
    for number, cell in enumerate(rows.values()):
        if cell.trainings:
            checkpoint = store.training_record(finished, cell.name, cell.trainings[-1].name)
            stand_in = StudentSpec.from_file(_stand_in(cell, loaded.base, taken / str(number)) / "student.json")
            assert checkpoint is not None
            found = json.loads(stand_in.to_json())
            assert {k: v for k, v in found.items() if k != "training"} == {
                k: v for k, v in checkpoint.items() if k != "training"
            }


def test_records_are_written_once_and_taken_in_once(world: Path, finished: Path, records: Path, taken: Path):  # noqa: F811
    file = world / "experiment.yaml"
    loaded = load(file, finished)
    assert export_records(loaded, make_plan(loaded, finished), finished, records) == []
    found = import_records(file, taken, records)
    assert not found.taken and len(found.there) == 6


def test_a_damaged_record_is_written_again(world: Path, finished: Path, records: Path, tmp_path: Path):  # noqa: F811
    to = Path(shutil.copytree(records, tmp_path / "cells"))
    damaged = min(to.iterdir())
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:20])
    loaded = load(world / "experiment.yaml", finished)
    assert export_records(loaded, make_plan(loaded, finished), finished, to) == [damaged]
    assert damaged.read_bytes() == whole


def test_an_imported_cell_is_exported_as_it_came(world: Path, records: Path, taken: Path, tmp_path: Path):  # noqa: F811
    loaded = load(world / "experiment.yaml", taken)
    export_records(loaded, make_plan(loaded, taken), taken, tmp_path / "again")
    for path in records.iterdir():
        assert contents(path) == contents(tmp_path / "again" / path.name)


def test_a_record_tells_no_video_apart_and_holds_none(records: Path):
    for path in records.iterdir():
        files = contents(path)
        assert {"record.json", "config.yaml", "manifest.jsonl", "scores/summary.json"} <= set(files)
        assert not any(name.endswith(".mp4") for name in files)
        assert b"sha256" not in files["manifest.jsonl"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: files.update({"../evil": b""}), "it holds '../evil'"),
        (lambda files: files.update({"scores/../../evil.json": b""}), "it holds 'scores/"),
        (lambda files: files.update({"record.json": b"[]"}), "its record.json is no object"),
        (lambda files: files.pop("record.json"), "not a whole record"),
        (lambda files: files.update({"record.json": b'{"cell": "another", "scored": {}}'}), "named after"),
        (lambda files: files.update({"record.json": files["record.json"].replace(b"micro", b"old")}), "move it away"),
        (lambda files: files.pop("config.yaml"), "it has no config.yaml"),
        (lambda files: files.pop("manifest.jsonl"), "it has no manifest.jsonl"),
    ],
)
def test_a_record_is_not_trusted(
    world: Path, records: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], object], told: str  # noqa: F811
):  # fmt: skip
    source, out = tmp_path / "records", tmp_path / "out"
    source.mkdir()
    path = source / next(records.glob("tmd-*")).name
    shutil.copy(next(records.glob("tmd-*")), path)
    altered(path, change)
    with pytest.raises(ConfigError, match=r"move it away|named after") as caught:
        import_records(world / "experiment.yaml", out, source)
    assert told in str(caught.value)
    assert not list(tmp_path.rglob("evil*")) and not list(out.glob("cells/*"))


def test_damage_and_strangers_are_told(world: Path, records: Path, tmp_path: Path):  # noqa: F811
    source = Path(shutil.copytree(records, tmp_path / "records"))
    (source / f"tmd-m9-s0-0123456789ab{ENDING}").write_bytes(b"of another experiment, never opened")
    command = ["experiment", "import", str(world / "experiment.yaml"), "--out", str(tmp_path / "out"), "--from"]
    told = CliRunner().invoke(app, [*command, str(source)], catch_exceptions=False).stdout
    assert "6 cells taken in, 0 there before" in told and "1 records belong to no cell" in told
    path = next(records.glob("tmd-*"))
    (source / path.name).write_bytes(path.read_bytes()[:-100])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="not a whole record"):
        import_records(world / "experiment.yaml", tmp_path / "out", source)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="experiment export"):
        import_records(world / "experiment.yaml", tmp_path / "out", empty)
    with pytest.raises(ConfigError, match="holds no finished cell yet"):
        loaded = load(world / "experiment.yaml", empty)
        export_records(loaded, make_plan(loaded, empty), empty, tmp_path / "to")

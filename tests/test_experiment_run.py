"""An experiment from end to end on a tiny model: what is done is kept, what is missing is made, and nothing else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from students.checkpoint import Checkpoint
from students.errors import ConfigError, IncompleteError, TmdError
from students.trainer_state import NonFiniteError
from tests.test_json_output import shape
from tests.tiny import tiny_pipeline
from tmd_eval.cli import app
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment import measure, worker
from tmd_eval.experiment import run as running
from tmd_eval.experiment.dry import dry_run
from tmd_eval.experiment.jobs import Job, load_plan
from tmd_eval.experiment.run import Options, run
from tmd_eval.experiment.runner import Progress, Runner
from tmd_eval.experiment.table import cell_state, summary, text
from tmd_eval.experiment.times import time_rows
from tmd_eval.files import write_json

STAGE1 = {
    "out": "runs/s1",
    "student": {"h": 2},
    "data": {"kind": "micro", "clips": 4},
    "method": {"name": "tm_mf", "m": 2, "n": 2, "guidance": 1.5},
    "batch": 2,
    "iterations": 1,
}
STAGE2 = {
    "base_config": "s1.yaml",
    "parent": "runs/s1/checkpoint",
    "method": {"name": "tmd_stage2", "m": 2, "n": 2, "guidance": 1.5},
}
EXPERIMENT = {
    "title": "Tiny",
    "evaluation": {"num_prompts": 2, "samples_per_prompt": 1, "batch_size": 2},
    "untrained": [{"m": 1}],
    "methods": {
        "tmd": {
            "label": "TMD",
            "stages": [{"name": "stage1", "preset": "s1.yaml"}, {"name": "stage2", "preset": "s2.yaml"}],
        }
    },
    "budgets": {"updates": {"student_updates": 1, "label": "One update"}},
    "ablations": {"n1": {"methods": "tmd", "label": "N = 1 at sampling", "sample": {"n": 1}}},
    "sections": [
        {
            "name": "Main",
            "seeds": [0, 1],
            "cells": [{"methods": "tmd", "m": 2, "n": 2, "h": 2, "ablations": [None, "n1"]}],
        }
    ],
    "claims": [
        {
            "claim": "Recurrence helps",
            "source": "arXiv:2601.09881 Figure 14",
            "metric": "alignment_color",
            "a": {"method": "tmd", "m": 2},
            "b": {"method": "tmd", "m": 2, "ablation": "n1"},
        }
    ],
}


class InProcess:
    """Stands in for the runner: the same jobs by the same function, without processes."""

    perform: Callable[[Path, Job, str], None] = staticmethod(worker.perform)

    def __init__(self, out: Path, *, command: str, **_: Any) -> None:
        self.out, self.command, self.progress = out, command, Progress()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, jobs: Iterable[Job], *, done: Callable[[Job], None] = lambda job: None) -> Progress:
        progress = self.progress
        for job in jobs:
            if {*progress.failed, *progress.blocked} & set(job.after):
                progress.blocked.append(job.id)
                continue
            try:
                with store.job_lock(self.out, job.id):
                    self.perform(self.out, job, self.command)
            except TmdError as error:
                progress.failed[job.id] = str(error)
                worker.note_failure(self.out, job, str(error))
                continue
            progress.finished.append(job.id)
            done(job)
        return progress


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "Runner", InProcess)
    monkeypatch.setattr(measure, "CLIPS", 4)
    monkeypatch.setattr(measure, "ITERATIONS", 6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, presets and the experiment; data are cached in it, too."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny_pipeline(folder / "base")
    facts = json.loads((base / "base.json").read_text())
    (base / "base.json").write_text(json.dumps({**facts, "frames": 5, "guidance": 1.5}))
    cached = {**STAGE1, "data": {**STAGE1["data"], "cache": str(folder / "cache")}}  # type: ignore[dict-item]
    (folder / "s1.yaml").write_text(yaml.safe_dump(cached))
    (folder / "s2.yaml").write_text(yaml.safe_dump(STAGE2))
    write(folder)
    return folder


def write(folder: Path, name: str = "experiment", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "base": str(folder / "base"), **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "Runner", InProcess)
        patch.setattr(measure, "CLIPS", 4)
        patch.setattr(measure, "ITERATIONS", 6)
        outcome = run(Options(file=world / "experiment.yaml", out=out))
    assert outcome.report is not None and outcome.made == len(outcome.plan.jobs) == 3 + 4 + 2 * 6
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def times(out: Path) -> dict[str, int]:
    """When every result was last written."""
    kept = [*out.glob("train/*/checkpoint/*"), *out.glob("cells/*/videos/*"), *out.glob("cells/*/scores/*")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in kept}


def changed(before: dict[str, int], out: Path) -> set[str]:
    """Cells and trainings with new files."""
    return {"/".join(Path(name).parts[:2]) for name, when in times(out).items() if before.get(name) != when}


def test_the_report_states_rows_claims_and_the_command(world: Path, finished: Path):
    report = json.loads((finished / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"base undistilled, 1 step", "TMD-N2H2, M = 2", "TMD-N2H2, M = 2 (N = 1 at sampling)"}
    student = rows["TMD-N2H2, M = 2"]
    assert (student["role"], student["m"], student["n"], student["h"]) == ("student", 2, 2, 2)
    assert student["effective_nfe"] == pytest.approx(2 * 1.5)
    assert rows["TMD-N2H2, M = 2 (N = 1 at sampling)"]["effective_nfe"] == 2.0
    assert student["seeds"] == [0, 1] and student["student_updates"] == 1 and student["training_minutes"] >= 0
    assert student["metrics"]["alignment_color"]["n"] == 4
    assert [run["seed"] for run in student["runs"]] == [0, 1] and all(
        len(run["weights"]) == 64 for run in student["runs"]
    )
    (claim,) = report["claims"]
    assert set(claim) >= {"claim", "source", "verdict", "effect", "low", "high", "n", "seeds"}
    assert claim["verdict"] in ("holds", "does not hold", "undecided") and (claim["n"], claim["seeds"]) == (2, 2)
    assert report["command"] == f"tmd-eval experiment run {world / 'experiment.yaml'} --out {finished}"
    assert report["missing"] == [] and report["seeds"] == [0, 1]
    page = (finished / "report" / "index.html").read_text()
    assert "Recurrence helps" in page and str(finished / "cells") not in page


def test_the_cells_are_recorded_with_their_seeds(finished: Path):
    from leaderboard.query import load_evidence, show

    rows = show(f"sqlite:///{finished / 'tmd-eval.db'}")
    assert len(rows) == 6
    assert "TMD-N2H2, M = 2, seed 1" in {row["name"] for row in rows}
    report = json.loads((finished / "report" / "report.json").read_text())
    claims = load_evidence(f"sqlite:///{finished / 'tmd-eval.db'}").claims
    assert [claim.claim for claim in claims] == [claim["claim"] for claim in report["claims"]]
    assert {claim.report for claim in claims} == {"experiment"}  # named after its file


def test_both_ablations_share_one_training(finished: Path):
    plan = load_plan(finished)
    assert len([job for job in plan.jobs.values() if job.kind == "train"]) == 4  # two stages, two seeds
    assert len(list((finished / "train").iterdir())) == 4
    assert not list(finished.glob("train/*/state/*"))  # a finished training needs no state


def test_a_rerun_does_nothing(world: Path, copy: Path):
    before, page = times(copy), (copy / "report" / "index.html").stat().st_mtime_ns
    start = time.perf_counter()
    outcome = run(Options(file=world / "experiment.yaml", out=copy))
    assert outcome.made == 0 and changed(before, copy) == set()
    assert (copy / "report" / "index.html").stat().st_mtime_ns == page
    assert time.process_time() and time.perf_counter() - start < 60  # seconds on an idle core


def test_a_report_that_shows_something_else_is_written_again(world: Path, copy: Path):
    """As after a run that was killed before its report, or a cell that could not be made again."""
    options, page = Options(file=world / "experiment.yaml", out=copy), copy / "report" / "index.html"
    state = json.loads((copy / "report" / "report.json").read_text())["experiment"]["state"]
    plan = load_plan(copy)
    worker.note_failure(copy, plan.jobs[plan.cells[-1].jobs[-1]], "told elsewhere")  # cleared as the run begins
    write_json(copy / "report" / "report.json", {"experiment": {"state": "of an older one"}})
    before = page.stat().st_mtime_ns
    assert run(options).made == 0 and page.stat().st_mtime_ns != before
    assert json.loads((copy / "report" / "report.json").read_text())["experiment"]["state"] == state


def test_deleting_any_one_cell_makes_exactly_that_cell_again(world: Path, copy: Path):
    before = times(copy)
    plan = load_plan(copy)
    for name in [cell.name for cell in plan.cells]:
        folder = copy / "cells" / name
        aside = folder.rename(copy / "aside")
        left = [key for key, state in store.states(copy, plan.jobs).items() if state != "done"]
        assert left == [f"generate-{name}", f"score-{name}"]
        aside.rename(folder)
    name = plan.cells[-1].name
    shutil.rmtree(copy / "cells" / name)
    assert run(Options(file=world / "experiment.yaml", out=copy)).made == 2
    assert changed(before, copy) == {f"cells/{name}"}


def test_a_missing_video_is_made_again_and_only_it(world: Path, copy: Path):
    before = times(copy)
    (cell,) = copy.glob("cells/*-n1-s0-*")
    (cell / "videos" / "00001-0.mp4").unlink()
    assert run(Options(file=world / "experiment.yaml", out=copy)).made == 2
    assert changed(before, copy) == {f"cells/{cell.name}"}
    assert (cell / "videos" / "00000-0.mp4").stat().st_mtime_ns == before[f"cells/{cell.name}/videos/00000-0.mp4"]


def test_a_deleted_training_takes_along_what_rests_on_it(copy: Path):
    plan = load_plan(copy)
    (second,) = [key for key, job in plan.jobs.items() if key.startswith("train-s2-s1-")]
    shutil.rmtree(store.folder(copy, plan.jobs[second]))
    left = {key for key, state in store.states(copy, plan.jobs).items() if state != "done"}
    on_it = {key for cell in plan.cells if second in cell.jobs for key in cell.jobs[2:]}
    assert left == {second} | on_it and len(on_it) == 4  # two cells


def test_a_failure_stays_alone_is_told_and_tried_again(world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch):
    plan = load_plan(copy)
    (first,) = [job for key, job in plan.jobs.items() if key.startswith("train-s1-s1-")]
    shutil.rmtree(copy / "train")
    shutil.rmtree(copy / "cells")

    def perform(out: Path, job: Job, command: str) -> None:
        if job.id == first.id:
            raise ConfigError("the loss is not finite")
        worker.perform(out, job, command)

    monkeypatch.setattr(InProcess, "perform", staticmethod(perform))
    options = Options(file=world / "experiment.yaml", out=copy)
    with pytest.raises(IncompleteError, match="the loss is not finite") as caught:
        run(options)
    assert caught.value.exit_code == 3 and str(store.log_file(copy, first)) in str(caught.value)
    states = store.states(copy, plan.jobs)
    assert states[first.id] == "failed"
    by_seed = {(cell.seed, cell_state(plan, cell, states)) for cell in plan.cells if cell.row["method"] == "tmd"}
    assert by_seed == {(0, "done"), (1, "failed")}
    shown = summary(copy, plan)
    assert shown["failures"][0]["error"] == "the loss is not finite" and "failed: train-s1-s1" in text(shown)
    report = json.loads((copy / "report" / "report.json").read_text())
    assert len(report["missing"]) == 2 and "the loss is not finite" in report["missing"][0]
    assert report["claims"][0]["verdict"] == "undecided"  # one seed is left
    monkeypatch.setattr(InProcess, "perform", staticmethod(worker.perform))
    assert run(options).made == 2 + 2 * 2
    assert not list((copy / "logs").glob("*.failed"))


def test_dry_run_writes_nothing_and_estimates_from_measured_steps(world: Path, finished: Path, tmp_path: Path):
    command = ["experiment", "run", str(world / "experiment.yaml"), "--dry-run", "--json", "--out"]
    fresh = CliRunner().invoke(app, [*command, str(tmp_path / "fresh")], catch_exceptions=False)
    plan = json.loads(fresh.stdout)
    assert plan["seconds"] is None and plan["jobs"] == {"measure": 3, "train": 4, "generate": 6, "score": 6}
    assert not (tmp_path / "fresh").exists()
    measured = tmp_path / "measured"
    shutil.copytree(finished / "measured", measured / "measured")
    known = json.loads(CliRunner().invoke(app, [*command, str(measured)], catch_exceptions=False).stdout)
    assert known["seconds"] > 0 and known["jobs"]["measure"] == 0
    assert sorted(path.name for path in measured.iterdir()) == ["measured"]


def test_status_and_report_commands(world: Path, finished: Path, tmp_path: Path):
    call = ["--out", str(finished)]
    status = CliRunner().invoke(app, ["experiment", "status", str(world / "experiment.yaml"), *call, "--json"])
    assert json.loads(status.stdout)["cells"] == {"done": 6}
    shown = CliRunner().invoke(app, ["experiment", "status", str(world / "experiment.yaml"), *call])
    assert "6 of 6    cells done" in shown.stdout
    to = tmp_path / "report"
    made = CliRunner().invoke(
        app, ["experiment", "report", str(world / "experiment.yaml"), *call, "--to", str(to), "--json"]
    )
    assert json.loads(made.stdout)["missing"] == []
    assert (to / "index.html").read_bytes() == (finished / "report" / "index.html").read_bytes()
    absent = CliRunner().invoke(
        app, ["experiment", "status", str(world / "experiment.yaml"), "--out", str(tmp_path / "no")]
    )
    assert isinstance(absent.exception, ConfigError) and "holds no experiment yet" in str(absent.exception)
    assert CliRunner().invoke(app, ["experiment", "status", str(world / "experiment.yaml")]).exit_code != 0  # no out


def test_every_row_is_timed_in_turn_and_the_report_shows_it(
    world: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, int | None, int | None, int]] = []
    sample = Checkpoint.sample

    def spy(self: Checkpoint, prompts: Any, seeds: Any, **settings: Any) -> Any:
        calls.append((self.settings(settings["m"])["role"], settings["m"], settings["n"], len(prompts)))
        return sample(self, prompts, seeds, **settings)

    monkeypatch.setattr(Checkpoint, "sample", spy)
    file, before = str(world / "experiment.yaml"), times(copy)
    call = ["experiment", "time", file, "--out", str(copy), "--repeats", "2", "--batch", "2", "--json"]
    made = CliRunner().invoke(app, call)
    assert made.exit_code == 0, made.output
    entry = dict.fromkeys(("median", "low", "high"), "number") | {"untrained": "bool"}
    assert set(map(str, shape(json.loads(made.stdout))["cells"].values())) == {str(entry)}
    assert calls[:3] == calls[3:6] == calls[6:] and len(calls) == 9  # one round to warm up, two more
    assert set(calls[:3]) == {("undistilled", 1, None, 2), ("student", None, None, 2), ("student", None, 1, 2)}
    assert times(copy) == before
    assert CliRunner().invoke(app, ["experiment", "report", file, "--out", str(copy)]).exit_code == 0
    report = json.loads((copy / "report" / "report.json").read_text())
    for row in report["rows"]:
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds_per_video"] <= high
    assert "measured apart from the run" in (copy / "report" / "index.html").read_text()
    assert run(Options(file=world / "experiment.yaml", out=copy)).made == 0
    with pytest.raises(ConfigError, match="at least 2 rounds"):
        time_rows(world / "experiment.yaml", copy, repeats=1)
    with pytest.raises(ConfigError, match="holds no finished cell"):
        time_rows(world / "experiment.yaml", tmp_path / "empty")
    with store.run_lock(copy), pytest.raises(ConfigError, match="Another tmd-eval"):
        time_rows(world / "experiment.yaml", copy)


def test_json_outputs_are_frozen(world: Path, copy: Path):
    """Scripts read them; see also tests/test_json_output.py."""

    def call(*words: str) -> Any:
        file = str(world / "experiment.yaml")
        result = CliRunner().invoke(app, ["experiment", words[0], file, "--out", str(copy), *words[1:], "--json"])
        assert result.exit_code == 0, result.output
        return shape(json.loads(result.stdout))

    claim = {
        **dict.fromkeys(("claim", "source", "verdict", "metric", "direction", "a", "b", "reason", "note"), "text"),
        **dict.fromkeys(("effect", "low", "high", "n", "seeds"), "number"),
        "margin": "null",
        "rows": "list",
    }
    assert call("run") == {
        **{"out": "text", "cells": "number", "jobs": "number", "made": "number", "report": "text"},
        "claims": [claim],
    }
    assert call("report") == {"report": "text", "claims": [claim], "missing": "list"}
    assert call("status") == {
        **{"out": "text", "file": "text", "waiting_for_tuning": "list", "cells": {"done": "number"}},
        **{"jobs": {"done": "number"}, "sections": {"Main": {"done": "number"}}, "seconds_left": "number"},
        **{
            "failures": "list",
            "cell_states": [dict.fromkeys(("cell", "section", "state"), "text") | {"seed": "number"}],
        },
    }
    kinds = dict.fromkeys(("measure", "train", "generate", "score"), "number")
    assert call("run", "--dry-run") == {
        **{"out": "text", "cells": "number", "jobs": kinds, "workers": "number", "seconds": "number", "text": "text"},
        **{"waiting_for_tuning": "list", "sections": {"Main": dict.fromkeys(("cells", "jobs", "seconds"), "number")}},
    }


def test_limit_takes_the_first_cells(world: Path, finished: Path, tmp_path: Path):
    shutil.copytree(finished / "measured", tmp_path / "out" / "measured")
    outcome = run(Options(file=world / "experiment.yaml", out=tmp_path / "out", limit=1))
    assert [cell.row["method"] for cell in outcome.plan.cells] == ["base"]
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        Options(file=world / "experiment.yaml", out=tmp_path, limit=0)


def test_sections_share_a_matrix_among_machines(world: Path, finished: Path, tmp_path: Path):
    extra = {"name": "More", "seeds": [0], "cells": [{"methods": "tmd", "m": 1, "n": 2, "h": 2}]}
    main = {"name": "Main", "seeds": [0], "cells": [{"methods": "tmd", "m": 2, "n": 2, "h": 2}]}
    path = write(world, "shared", sections=[main, extra], untrained=[], claims=[], ablations={})
    options = Options(file=path, out=tmp_path / "out", sections=("More",))
    assert options.command.endswith("--section More")
    plan = dry_run(options)
    assert list(plan["sections"]) == ["More"] and plan["cells"] == 1
    assert dry_run(Options(file=path, out=tmp_path / "out"))["cells"] == 2
    with pytest.raises(ConfigError, match="has no section 'Mian'; it has: Main, More"):
        dry_run(Options(file=path, out=tmp_path / "out", sections=("Mian",)))


def test_the_tuning_decides_the_settings_of_the_matrix(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    trials = [{"set": {"optimiser.lr": rate}} for rate in (1e-4, 2e-4)]
    tuning = {"m": 2, "n": 2, "h": 2, "num_prompts": 2, "metrics": ["alignment_color"], "trials": {"tmd": trials}}
    section = {"name": "Main", "seeds": [0], "cells": [{"methods": "tmd", "m": 2, "n": 2, "h": 2}]}
    path = write(world, "tuned", tuning=tuning, sections=[section], untrained=[], claims=[], ablations={})

    def perform(out: Path, job: Job, command: str) -> None:
        worker.perform(out, job, command)
        if job.kind == "score" and "trial1" in job.name:  # the second trial wins
            place = store.folder(out, job) / "scores" / "summary.json"
            values = json.loads(place.read_text())
            values["alignment_color"]["value"] = 2.0
            place.write_text(json.dumps(values))

    monkeypatch.setattr(InProcess, "perform", staticmethod(perform))
    out = tmp_path / "out"
    shutil.copytree(finished / "measured", out / "measured")
    outcome = run(Options(file=path, out=out))
    tuned = json.loads((out / "tuning.json").read_text())
    assert tuned["chosen"]["tmd"]["set"] == {"optimiser.lr": 2e-4} and len(tuned["trials"]) == 2
    matrix = [cell for cell in outcome.plan.cells if cell.row["trial"] is None]
    rates = {outcome.plan.jobs[key].spec["config"]["optimiser"]["lr"] for key in matrix[0].jobs[:2]}
    assert rates == {2e-4} and not outcome.plan.waiting
    trial = next(out.glob("cells/*-trial0-*"))
    lines = {json.loads(line)["line"] for line in (trial / "manifest.jsonl").read_text().splitlines()}
    assert lines == {2, 3}  # captions after those of the matrix
    assert "2e-04" in (out / "report" / "index.html").read_text() or "0.0002" in (out / "report/index.html").read_text()


def tuned_by_rates(world: Path, name: str, *rates: float) -> Path:
    trials = [{"set": {"optimiser.lr": rate}} for rate in rates]
    tuning = {"m": 2, "n": 2, "h": 2, "num_prompts": 2, "metrics": ["alignment_color"], "trials": {"tmd": trials}}
    section = {"name": "Main", "seeds": [0], "cells": [{"methods": "tmd", "m": 2, "n": 2, "h": 2}]}
    return write(world, name, tuning=tuning, sections=[section], claims=[], ablations={})


def test_a_trial_that_diverges_has_lost_and_is_not_trained_again(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    import students.train

    trained: list[float] = []
    train = students.train.train

    def diverging(config: Any, **settings: Any) -> Any:
        trained.append(config.optimiser.lr)
        if config.optimiser.lr > 1:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            raise NonFiniteError("loss term tm_mf is not finite at iteration 1")
        return train(config, **settings)

    monkeypatch.setattr(students.train, "train", diverging)
    out = tmp_path / "out"
    shutil.copytree(finished / "measured", out / "measured")
    options = Options(file=tuned_by_rates(world, "diverging", 5.0, 1e-4), out=out)
    outcome = run(options)
    assert not outcome.left and trained.count(5.0) == 1
    tuned = json.loads((out / "tuning.json").read_text())
    assert tuned["chosen"]["tmd"]["set"] == {"optimiser.lr": 1e-4}
    assert "not finite" in tuned["trials"][0]["diverged"] and tuned["trials"][1]["diverged"] is None
    again = run(options)
    assert (again.made, again.there, trained.count(5.0)) == (0, len(again.plan.jobs) - 3, 1)  # 3 steps are measured
    lost = Options(file=tuned_by_rates(world, "lost", 6.0, 7.0), out=tmp_path / "lost")
    shutil.copytree(finished / "measured", lost.out / "measured")
    with pytest.raises(IncompleteError, match="every trial of tmd diverged"):
        run(lost)
    with pytest.raises(IncompleteError, match="every trial of tmd diverged"):
        run(lost)
    assert trained.count(6.0) == trained.count(7.0) == 1


def test_a_trial_that_fails_is_waited_for_and_decides_nothing(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    tried: list[str] = []

    def perform(out: Path, job: Job, command: str) -> None:
        if job.kind == "score" and "trial0" in job.name:
            tried.append(job.id)
            raise ConfigError("the disk is full")
        worker.perform(out, job, command)

    monkeypatch.setattr(InProcess, "perform", staticmethod(perform))
    options = Options(file=tuned_by_rates(world, "failing", 1e-4, 2e-4), out=tmp_path / "out")
    shutil.copytree(finished / "measured", options.out / "measured")
    with pytest.raises(IncompleteError, match="the disk is full"):
        run(options)
    assert len(tried) == 1 and load_plan(options.out).waiting == ("tmd",)
    assert (
        not (options.out / "tuning.json").is_file()
        or not json.loads((options.out / "tuning.json").read_text())["chosen"]
    )
    report = json.loads((options.out / "report" / "report.json").read_text())
    assert any("tmd waits for its tuning" in line for line in report["missing"])
    monkeypatch.setattr(InProcess, "perform", staticmethod(worker.perform))
    assert not run(options).left and not load_plan(options.out).waiting


def test_the_report_shows_all_that_is_there_whichever_part_was_run(world: Path, copy: Path):
    before = json.loads((copy / "report" / "report.json").read_text())
    assert run(Options(file=world / "experiment.yaml", out=copy, limit=1)).made == 0
    assert json.loads((copy / "report" / "report.json").read_text()) == before


def test_the_command_that_makes_it_again_can_be_pasted(tmp_path: Path):
    options = Options(file=Path("my file.yaml"), out=tmp_path / "a b", sections=("Part one",), limit=2)
    assert shlex.split(options.command)[3:] == [
        "my file.yaml", "--out", f"{tmp_path / 'a b'}", "--section", "Part one", "--limit", "2",
    ]  # fmt: skip


def test_the_time_budget_ends_a_run_with_its_state(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "Runner", Runner)
    options = Options(file=world / "experiment.yaml", out=tmp_path / "out", workers=1, budget_minutes=1e-9)
    with pytest.raises(IncompleteError, match="minutes are over, the state is saved"):
        run(options)
    assert load_plan(tmp_path / "out").jobs


def test_two_runs_do_not_share_a_folder(world: Path, tmp_path: Path):
    with store.run_lock(tmp_path), pytest.raises(ConfigError, match="Another tmd-eval runs the experiment"):
        run(Options(file=world / "experiment.yaml", out=tmp_path))


def bogus(name: str) -> Job:
    return Job(kind="measure", name=name, spec={"what": "sampling", "base": "/absent", "batch": 1})


@pytest.mark.parametrize("tunables", [None, "glibc.malloc.check=0"])
def test_a_worker_starts_with_one_thread_and_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tunables):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    before = dict(os.environ)
    with Runner(tmp_path, command="test", workers=1) as runner:
        runner.run([bogus("any")])
        worker = runner.slots[0]
        assert worker is not None
        found = Path(f"/proc/{worker.process.pid}/environ").read_text().split("\0")
    assert "OMP_NUM_THREADS=1" in found
    assert f"GLIBC_TUNABLES={tunables or 'glibc.malloc.hugetlb=1'}" in found
    assert dict(os.environ) == before


def test_real_workers_keep_failures_and_deaths_apart(tmp_path: Path):
    """One process: a job that fails, then one whose process is killed, then another process for the third."""

    def show(progress: Progress, ended: Job | None) -> None:
        busy = runner.slots[0]
        if "measure-killed" in progress.running and busy is not None:
            os.kill(busy.process.pid, signal.SIGKILL)

    with Runner(tmp_path, command="test", workers=1) as runner:  # one that dies while it has nothing to do
        runner.run([bogus("before")])
        idle = runner.slots[0]
        assert idle is not None
        os.kill(idle.process.pid, signal.SIGKILL)
        idle.process.join()
        assert set(runner.run([bogus("next")]).failed) == {"measure-before", "measure-next"}
    with (
        store.job_lock(tmp_path, "measure-killed"),  # its worker waits for this lock until it is killed
        Runner(tmp_path, command="test", workers=1, show=show) as runner,
    ):
        progress = runner.run([bogus("failing"), bogus("killed"), bogus("after")])
    assert set(progress.failed) == {"measure-failing", "measure-killed", "measure-after"}
    assert "There is no folder /absent" in progress.failed["measure-failing"]
    assert "the process died (exit code -9)" in progress.failed["measure-killed"]
    assert "There is no folder" in store.log_file(tmp_path, bogus("after")).read_text()
    assert store.failure(tmp_path, bogus("failing")) == progress.failed["measure-failing"]


def test_a_signal_to_the_whole_group_is_no_failure_of_a_job(tmp_path: Path):
    """As Slurm and systemd send it: the worker dies before the runner has looked."""

    def show(progress: Progress, ended: Job | None) -> None:
        busy = runner.slots[0]
        if "measure-killed" in progress.running and busy is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(busy.process.pid, signal.SIGKILL)

    with (
        store.job_lock(tmp_path, "measure-killed"),
        Runner(tmp_path, command="test", workers=1, show=show) as runner,
    ):
        progress = runner.run([bogus("killed")])
    assert progress.stopped == "interrupted" and not progress.failed
    assert store.failure(tmp_path, bogus("killed")) is None


@pytest.mark.slow
def test_kill_9_loses_nothing_and_leaves_no_process(world: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "tmd_eval.cli", "experiment", "run", str(world / "experiment.yaml")]
    words += ["--out", str(out), "--workers", "2"]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("train/s1-*/checkpoint/student.json")):
        time.sleep(0.1)
        assert first.poll() is None
    first.kill()
    first.wait()
    before = times(out)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = {name: when for name, when in times(out).items() if name in before}
    assert again == before

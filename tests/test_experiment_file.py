"""The experiment file: every mistake at once with its line, cells and their keys, budgets, the choice of settings."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from students.errors import ConfigError
from tmd_eval.experiment import plan, schema
from tmd_eval.experiment.budget import iterations_with_updates, iterations_within, student_updates
from tmd_eval.experiment.cells import Cell, Resolver
from tmd_eval.experiment.checks import load_experiment
from tmd_eval.experiment.lines import load, read
from tmd_eval.experiment.names import row_name
from tmd_eval.experiment.rows import Row, find
from tmd_eval.experiment.schema import Changes, Experiment, Selector
from tmd_eval.experiment.tuning import best_rank

EXAMPLES = Path(__file__).parents[1] / "examples"
L = 10

SMALL = """\
title: Small
methods:
  dmd2v:
    label: DMD2-v
    axes: {m: method.m}
    stages:
      - {name: kd, preset: micro_dmd2v_kd.yaml, m: 1, set: {method.trajectories: 2, iterations: 3}}
      - {name: distil, preset: micro_dmd2v.yaml}
  tmd:
    label: TMD
    stages:
      - {name: stage1, preset: micro_tmd_n2h2_stage1.yaml}
      - {name: stage2, preset: micro_tmd_n2h2_stage2.yaml}
budgets:
  updates: {student_updates: 7}
  compute: {like: {method: tmd, n: 2, h: 2}}
ablations:
  no_rollout: {methods: tmd, label: no rollout, stages: {stage2: {method.rollout: false}}}
  n1: {methods: tmd, label: N = 1, sample: {n: 1}}
  kd: {methods: dmd2v, label: KD, add: kd}
sections:
  - name: Main
    seeds: [0, 1]
    budgets: [updates, compute]
    cells:
      - {methods: dmd2v, m: [1, 2]}
      - {methods: tmd, m: 2, n: 2, h: 2}
  - name: Ablations
    seeds: [0]
    cells:
      - {methods: tmd, m: 2, n: 2, h: 2, ablations: [no_rollout, n1]}
      - {methods: dmd2v, m: 2, ablations: kd}
"""


def write(folder: Path, text: str = SMALL, **changes: Any) -> Path:
    """An experiment file; changes replace top-level parts."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | changes, sort_keys=False) if changes else text)
    return path


def resolver(path: Path) -> Resolver:
    experiment, source = load_experiment(path)
    return Resolver(experiment, source, blocks=L, base_hash="base")


def cells(path: Path) -> list[Cell]:
    made = resolver(path)
    found = made.matrix({})
    made.source.check()
    return found


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        made = resolver(path)
        made.trials(), made.matrix({})
        made.source.check()
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("name", ["micro_matrix.yaml", "micro_matrix_smoke.yaml"])
def test_the_examples_are_right(name: str):
    made = resolver(EXAMPLES / name)
    found = [*made.trials(), *made.matrix({})]
    made.source.check()
    rows = dict.fromkeys(cell.row for cell in found if cell.row.trial is None)
    for claim in made.experiment.claims:
        assert find(claim.a, rows, made.experiment) != find(claim.b, rows, made.experiment)


def test_the_files_of_the_manual_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manual = (EXAMPLES.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    smallest, own = (block.partition("```")[0] for block in manual.split("```yaml\n")[1:])
    (tmp_path / "smallest.yaml").write_text(smallest)
    assert {cell.row.ablation for cell in cells(tmp_path / "smallest.yaml")} == {None, "no_gan"}
    monkeypatch.chdir(EXAMPLES.parent)
    smoke = yaml.safe_load((EXAMPLES / "micro_matrix_smoke.yaml").read_text(encoding="utf-8"))
    smoke["methods"] |= yaml.safe_load(own)["methods"]
    del smoke["tuning"]
    smoke["sections"][0]["cells"].append({"methods": "consistency", "m": 2})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(smoke, sort_keys=False))
    assert any(cell.row.method == "consistency" for cell in cells(tmp_path / "own.yaml"))


def test_every_key_of_the_schema_stands_in_the_manual():
    manual = (EXAMPLES.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    parts = (schema.Experiment, schema.Evaluation, schema.Untrained, schema.Method, schema.Stage, schema.Budget)
    parts += (schema.Like, schema.Tuning, schema.Changes, schema.Ablation, schema.Section, schema.Block)
    for part in (*parts, schema.Claim, schema.Selector):
        for field in fields(part):
            assert field.name == "line" or f"`{field.name}`" in manual, (part, field.name)


def test_the_micro_matrix_is_what_the_issue_asks_for():
    made = resolver(EXAMPLES / "micro_matrix.yaml")
    experiment = made.experiment
    assert experiment.evaluation.num_prompts >= 1024
    seeds = {section.name: len(section.seeds) for section in experiment.sections}
    assert seeds["Main comparison"] == 3 and min(seeds.values()) >= 2
    main = [cell.row for cell in made.matrix({}) if cell.sections[0] == "Main comparison" and cell.row.budget]
    assert {(row.n, row.h) for row in main if row.method == "tmd"} == {(2, 2), (4, 2), (2, 4)}
    assert {row.m for row in main if row.method == "tmd"} == {1, 2}
    assert {row.m for row in main if row.method in ("dmd2v", "rcm")} == {1, 2, 4}
    assert len({len(trials) for trials in experiment.tuning.trials.values()}) == 1  # type: ignore[union-attr]
    lines = {line for cell in made.trials() for line in cell.settings["lines"]}
    assert min(lines) >= experiment.evaluation.num_prompts  # no caption of a trial is scored in a table


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path):
    text = (
        SMALL.replace("ablations: [no_rollout, n1]", "ablations: [no_rolout]")
        .replace("{methods: dmd2v, m: [1, 2]}", "{methods: dmd2v, m: [1, 2], n: 2}")
        .replace("{methods: tmd, m: 2, n: 2, h: 2}\n  - name", "{methods: tmd, m: 2, n: 2}\n  - name")
        .replace("add: kd}", "add: warm}")
        .replace("m: 2, ablations: kd}", "m: 2, ablations: n1}")
    )
    path = write(tmp_path, text)
    lines = text.splitlines()

    def line(part: str) -> int:
        return next(i for i, row in enumerate(lines, 1) if part in row)

    found = problems(path)
    assert found == [
        f"{line('warm')}: unknown stage (of dmd2v, ablation kd) warm; there are kd, distil.",
        f"{line('n: 2}')}: dmd2v has no N; put it in cells of its own.",
        f"{line('tmd, m: 2, n: 2}')}: tmd needs H; give h.",
        f"{line('no_rolout')}: unknown ablation no_rolout; there are no_rollout, n1, kd.",
        f"{line('ablations: n1')}: ablation n1 is for tmd, not for dmd2v.",
    ]


def test_wrong_keys_types_and_values_are_told_with_their_lines(tmp_path: Path):
    text = SMALL.replace("title: Small", "titel: Small\nevaluation: {num_prompts: many}")
    text = text.replace("seeds: [0]", "seeds: [0, 0]").replace("student_updates: 7", "student_updates: 0")
    found = problems(write(tmp_path, text))
    assert found[0] == "1: title is missing."
    assert found[1] == "1: unknown key titel; did you mean title?"
    assert found[2].startswith("2: evaluation.num_prompts must be a whole number")
    assert any("student_updates must be at least 1" in row for row in found)
    assert any("repeat" in row for row in found)


def test_mistakes_of_form_of_names_and_of_settings_are_told_in_one_go(tmp_path: Path):
    text = SMALL.replace("title: Small", "title: Small\nevaluation: {num_prompt: 3}")
    text = text.replace("method.rollout: false", "method.rolout: false").replace(
        "m: 2, ablations: kd}", "m: 2, ablations: x}"
    )
    found = problems(write(tmp_path, text))
    assert [row.partition(": ")[2][:40] for row in found] == [
        "unknown key evaluation.num_prompt; did y",
        "stage stage2: unknown key method.rolout;",
        "unknown ablation x; there are no_rollout",
    ]


def test_a_key_given_twice_and_a_file_that_is_no_yaml(tmp_path: Path):
    assert problems(write(tmp_path, SMALL + "title: Again\n"))[0].endswith("title is given twice; keep one.")
    with pytest.raises(ConfigError, match=r"experiment.yaml:3: this is not valid YAML"):
        load_experiment(write(tmp_path, "a: 1\nb: [1\n"))
    with pytest.raises(ConfigError, match="no experiment file"):
        load_experiment(tmp_path / "absent.yaml")


def test_what_only_resolved_settings_show_is_told_with_the_line_that_brings_it_in(tmp_path: Path):
    text = SMALL.replace("method.rollout: false", "method.rolout: false").replace(
        "m: 2, n: 2, h: 2}\n  - name", "m: 2, n: 2, h: 12}\n  - name"
    )
    text = text.replace("preset: micro_dmd2v.yaml", "preset: micro_dmd2w.yaml")
    lines = text.splitlines()

    def line(part: str) -> int:
        return next(i for i, row in enumerate(lines, 1) if part in row)

    found = problems(write(tmp_path, text))
    assert found[0].startswith(f"{line('dmd2w')}: stage distil: the preset micro_dmd2w.yaml does not exist")
    assert found[1].startswith(
        f"{line('rolout')}: stage stage2: unknown key method.rolout; did you mean method.rollout?"
    )
    assert found[2].startswith(f"{line('h: 12')}: stage stage1: ") and "H is 12" in found[2] and len(found) == 3


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("student_updates: 7", "student_updates: -7", "student_updates must be at least 1"),
        ("{student_updates: 7}", "{student_updates: 7, like: {method: tmd, n: 2, h: 2}}", "not both"),
        ("title: Small", "title: Small\nbase: /nowhere", None),
        ("method.trajectories: 2,", "seed: 5, method.trajectories: 2,", "seed is the runner's to set"),
        ("method.trajectories: 2,", "method.m: 3, method.trajectories: 2,", "method.m is M of dmd2v, which cells give"),
        ("method.rollout: false", "method.n: 4", "method.n is N of tmd, which cells give"),
        ("kd: {methods: dmd2v, label: KD, add: kd}", "kd: {methods: dmd2v, label: KD}", "ablation kd changes nothing"),
        ("label: KD, add: kd", "label: KD, sample: {n: 1}", "ablation kd samples with n, but dmd2v has no N"),
        ("m: [1, 2]}", "m: []}", "m is an empty list"),
        ("m: [1, 2]}", "m: [1, 0]}", "m must be at least 1, not 0"),
        ("budgets: [updates, compute]\n", "budgets: []\n", "budgets is an empty list"),
        ("name: Ablations", "name: Main", "two sections are called Main"),
        ("title: Small", "title: Small\nevaluation: {metric: alignment_jiont}", "did you mean alignment_joint?"),
        ("title: Small", "title: Small\nuntrained: [{m: [0, -2]}]", "m must be at least 1, not 0"),
        ("title: Small", "title: Small\nuntrained: [{m: [1, 2]}, {m: 2}]", "the base model at M = 2 is given twice"),
        ("title: Small", "title: Small\nuntrained: [{m: 1, samples_per_prompt: 1001}]", "must be at most 1000"),
        ("title: Small", "title: Small\n2026-02-31: 1", "the key 2026-02-31 cannot be read"),
        ("{method.rollout: false}", "{method.guidance: .inf}", "method.guidance is inf; give a finite number"),
        ("preset: micro_dmd2v.yaml}", "preset: micro_dmd2v.yaml, axes: {q: method.m}}", "axis q is unknown"),
        ("title: Small", "title: Small\nuntrained: [{m: 1, guidance: -3}]", "guidance must be at least 1, not -3"),
        ("title: Small", "title: Small\nevaluation: {samples_per_prompt: -1}", "must be at least 1, not -1"),
    ],
)
def test_contradictions_and_values_out_of_range_are_refused(tmp_path: Path, old: str, new: str, told: str | None):
    assert old in SMALL
    path = write(tmp_path, SMALL.replace(old, new, 1))
    if told is None:
        with pytest.raises(ConfigError, match=r"experiment.yaml:2: There is no folder /nowhere"):
            plan.load(path, tmp_path / "out")
    else:
        assert any(told in row for row in problems(path)), problems(path)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"metrics": ["alignment_joint", "frechett"]}, "did you mean frechet?"),
        ({"metrics": []}, "metrics must name at least one"),
        ({"num_prompts": -3}, "num_prompts must be at least 1, not -3"),
        ({"seed": -1}, "seed must lie in 0 to 9999"),
        ({"trials": {"dmd2v": [{}, {}], "tmd": [{}, {}]}}, "two trials of dmd2v are alike"),
        ({"trials": {"dmd2v": [], "tmd": []}}, "every method needs at least one trial"),
    ],
)
def test_a_tuning_that_says_nothing_is_refused(tmp_path: Path, part: dict[str, Any], told: str):
    tuning = {"m": 2, "n": 2, "h": 2, "trials": {"dmd2v": [{}], "tmd": [{}]}, **part}
    assert any(told in row for row in problems(write(tmp_path, tuning=tuning)))


def test_claims_that_nobody_can_decide_are_refused(tmp_path: Path):
    a, b = {"method": "tmd", "m": 2}, {"method": "dmd2v", "m": 2}
    claim = {"claim": "TMD wins", "source": "us", "metric": "alignment_joint", "a": a, "b": b}
    found = problems(write(tmp_path, claims=[claim, claim, {**claim, "claim": "other", "metric": "alignement"}]))
    assert any("two claims say “TMD wins” by the same source" in row for row in found)
    assert any("unknown metric alignement; did you mean alignment_" in row for row in found)
    path = write(tmp_path, claims=[{**claim, "b": a}], evaluation={"num_prompts": 100_000})
    with pytest.raises(ConfigError) as caught:
        plan.load(path, tmp_path / "out")
    assert "a and b are the same row" in str(caught.value)
    assert "held-out captions number" in str(caught.value) and str(caught.value).count(str(path)) == 2


def test_one_mistake_is_told_once(tmp_path: Path):
    found = problems(write(tmp_path, SMALL.replace("  tmd:\n    label: TMD\n", "  tmd:\n    lable: TMD\n")))
    assert [row.partition(": ")[2] for row in found] == [
        "methods.tmd.label is missing.", "unknown key methods.tmd.lable; did you mean label?",
    ]  # fmt: skip


NO_STAGE1 = "no_stage1: {methods: tmd, label: no stage 1, drop: stage1, stages: {stage2: {parent: null}}}"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{method.rollout: false}", "{method.rollout: true}", "no_rollout changes nothing of tmd at M = 2"),
        ("{method.rollout: false}", "{log_every: 3}", "no_rollout changes nothing of tmd at M = 2"),
        ("{method.rollout: false}", "{iterations: 50}", "iterations of stage stage2 come from the budget"),
        ("{method.rollout: false}", "{parent: null}", "parent of stage stage2 is the stage before it"),
        ("label: N = 1, sample: {n: 1}", "label: N = 1, sample: {n: 2}", "ablation n1 changes nothing of tmd"),
        ("label: KD, add: kd", "label: KD, drop: kd", "ablation kd changes nothing of dmd2v at M = 2"),
        ("sample: {n: 1}", "drop: stage1", "starts from a student trained"),
    ],
)
def test_an_ablation_that_does_nothing_or_what_it_cannot_is_refused(tmp_path: Path, old: str, new: str, told: str):
    """A row would be called ablated and be the one without."""
    assert old in SMALL
    text = SMALL.replace(old, new)
    place = next(i for i, row in enumerate(text.splitlines(), 1) if new in row)
    found = problems(write(tmp_path, text))
    assert len(found) == 1 and found[0].startswith(f"{place}: ") and told in found[0], found


def test_a_stage_can_be_left_out_where_the_next_one_starts_from_the_teacher(tmp_path: Path):
    text = SMALL.replace("  n1: {", f"  {NO_STAGE1}\n  n1: {{").replace("[no_rollout, n1]", "[no_stage1]")
    found = next(cell for cell in cells(write(tmp_path, text)) if cell.row.ablation == "no_stage1")
    assert [t.stage for t in found.trainings] == ["stage2"] and found.trainings[0].config.parent is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"budgets": 120}, ["budgets must hold `name: value` pairs, not 120."]),
        ({"ablations": 3}, ["ablations must hold `name: value` pairs, not 3."]),
        ({"claims": None}, ["claims is empty; fill it or leave it out."]),
        ({"evaluation": None}, ["evaluation is empty; fill it or leave it out."]),
        ({"evaluation": {"samples_per_prompt": 2000}}, ["samples_per_prompt must be at most 1000"]),
        ({"evaluation": {"samples_per_prompt": 1, "metric": "diversity"}}, ["diversity needs 2 videos a prompt"]),
        ({"budgets": {"u": {"student_updates": 7}, "c": {"like": {"method": "dmd2v", "n": 2}}}}, ["dmd2v has no N"]),
    ],
)
def test_parts_that_are_no_parts_and_values_that_cannot_be(tmp_path: Path, changes: dict[str, Any], told: list[str]):
    found = problems(write(tmp_path, **changes))
    for text in told:
        assert any(text in row for row in found), found


def test_a_date_that_is_none_and_a_setting_given_twice_in_two_spellings(tmp_path: Path):
    text = SMALL.replace("title: Small", "title: 2026-02-31").replace(
        "stage2: {method.rollout: false}", "stage2: {method.rollout: false, method: {rollout: true}}"
    )
    found = problems(write(tmp_path, text))
    assert found[0].startswith("1: title cannot be read (day is out of range for month); put it in quotes.")
    assert "gives a setting twice, dotted and nested" in found[1]
    merged = SMALL.replace(
        "stages: {stage2: {method.rollout: false}}", "stages: {stage2: {<<: *x, method.rollout: false}}"
    )
    merged = merged.replace("title: Small", "title: &t Small").replace(
        "label: N = 1, sample", "label: N = 1, stages: {stage2: &x {method.rollout: true}}, sample"
    )
    lines = merged.splitlines()
    here = next(i for i, row in enumerate(lines) if row.startswith("  no_rollout"))
    lines.insert(here + 1, lines.pop(here))  # the anchor first
    assert cells(write(tmp_path, "\n".join(lines) + "\n"))


def test_every_wrong_setting_of_a_place_and_of_every_stage_is_told(tmp_path: Path):
    text = SMALL.replace("{method.rollout: false}", "{method.rolout: false, optimiser.lrr: 1}").replace(
        "stages: {stage2", "stages: {stage1: {method.deltaa: 1}, stage2"
    )
    found = problems(write(tmp_path, text))
    assert [row.partition("unknown key ")[2].partition(";")[0] for row in found] == [
        "method.deltaa", "method.rolout", "optimiser.lrr",
    ]  # fmt: skip
    named = problems(write(tmp_path, SMALL.replace("axes: {m: method.m}", "axes: {m: method.mm}")))
    assert {int(row.partition(":")[0]) for row in named} == {3} or all("method.mm" in row for row in named)


def test_names_and_rows_of_claims_are_told_beside_other_mistakes(tmp_path: Path):
    claim = {"claim": "x", "source": "us", "metric": "alignment_joint", "b": {"method": "dmd2v", "m": 2}}
    wrong = [{"method": "tdm", "m": 2}, {"method": "tmd", "m": 2, "ablation": "n3"}, {"method": "tmd", "m": 4}]
    wrong += [{"method": "tmd", "m": 2, "budget": "b"}, {"method": "base", "m": 2, "budget": "updates"}]
    claims = [{**claim, "claim": f"{i}", "a": a} for i, a in enumerate(wrong)]
    found = "\n".join(problems(write(tmp_path, claims=claims, evaluation={"num_prompt": 3})))
    told = ("unknown method tdm; there are dmd2v, tmd", "unknown ablation n3; there are no_rollout", "unknown budget b")
    more = ("no cell of the matrix is {method: tmd, m: 4", "base has neither budget", "did you mean num_prompts")
    assert all(text in found for text in told + more), found


def test_a_tuning_needs_the_axes_of_its_methods(tmp_path: Path):
    found = problems(write(tmp_path, tuning={"m": 2, "trials": {"dmd2v": [{}], "tmd": [{}]}}))
    assert [row.partition(": ")[2] for row in found] == [
        "tuning needs h, as tmd has H.", "tuning needs n, as tmd has N.",
    ]  # fmt: skip
    whole = {"m": 2, "n": 2, "h": 2, "metrics": "diversity", "trials": {"dmd2v": [{}], "tmd": [{}]}}
    assert "diversity needs 2 videos a prompt" in problems(write(tmp_path, tuning=whole))[0]


def test_prompts_that_the_judges_cannot_read_are_refused_before_anything_runs(tmp_path: Path):
    (tmp_path / "cats.txt").write_text("a cat\n" * 4)
    for prompts, told in ((str(tmp_path / "cats.txt"), "Prompt 1 of"), ("vbench", "no captions of the micro world")):
        path = write(tmp_path, evaluation={"prompts": prompts, "num_prompts": 4})
        with pytest.raises(ConfigError, match=told):
            plan.load(path, tmp_path / "out")


def test_no_section_no_budget_and_an_alias_of_itself(tmp_path: Path):
    assert problems(write(tmp_path, sections=[])) and problems(write(tmp_path, budgets={}))
    with pytest.raises(ConfigError, match="alias that contains itself"):
        load_experiment(write(tmp_path, "title: &a [*a]\n"))


def test_names_that_look_alike_in_folders_are_different_rows(tmp_path: Path):
    rows = [Row(method="tmd", m=2, n=2, h=2, ablation=name) for name in (None, "качество", "скорость", "a b", "A-b")]
    assert len({row.key for row in rows}) == 5 and len({row.slug for row in rows}) == 2


def test_axes_win_over_the_settings_of_a_stage(tmp_path: Path):
    plain = {(cell.row, cell.seed): [t.config.method.m for t in cell.trainings] for cell in cells(write(tmp_path))}
    assert all(m == row.m for (row, _), found in plain.items() for m in found)


def test_a_method_without_the_stage_it_needs_is_refused(tmp_path: Path):
    text = SMALL.replace("      - {name: stage1, preset: micro_tmd_n2h2_stage1.yaml}\n", "")
    found = problems(write(tmp_path, text.replace("  no_rollout:", "  unused:").replace("[no_rollout, n1]", "n1")))
    assert all("stage stage2 (micro_tmd_n2h2_stage2.yaml) starts from a student trained" in row for row in found)
    swapped = SMALL.replace("stage1, preset: micro_tmd_n2h2_stage1", "stage1, preset: micro_dmd2v")
    assert any(
        "flow head" in row or "not from" in row or "unknown key" in row for row in problems(write(tmp_path, swapped))
    )


def test_a_claim_must_name_one_row(tmp_path: Path):
    made = resolver(write(tmp_path))
    rows = dict.fromkeys(cell.row for cell in made.matrix({}))
    assert find(Selector(method="tmd", m=2), rows, made.experiment).n == 2
    with pytest.raises(ConfigError, match="no cell of the matrix"):
        find(Selector(method="tmd", m=3), rows, made.experiment)
    several = dict.fromkeys([Row(method="tmd", m=2, n=n, h=2, budget="updates") for n in (2, 4)])
    with pytest.raises(ConfigError, match="fits 2 rows"):
        find(Selector(method="tmd", m=2), several, made.experiment)


def test_tuning_must_be_fair(tmp_path: Path):
    trial = {"stages": {"distil": {"method.guidance": 1.5}}}
    tuning = {"m": 2, "n": 2, "h": 2, "seed": 0, "trials": {"dmd2v": [trial, trial], "tmd": [{}]}}
    found = problems(write(tmp_path, tuning=tuning))
    assert any("as many trials, not dmd2v 2, tmd 1" in row for row in found)
    assert any("seed 0 of the tuning is also a cell's" in row for row in found)
    found = problems(write(tmp_path, tuning={**tuning, "seed": 9, "trials": {"dmd2v": [trial]}}))
    assert any("tmd has cells but no trials" in row for row in found)


def test_shared_stages_are_one_training(tmp_path: Path):
    by_row: dict[tuple[str | None, str | None, int], Cell] = {
        (cell.row.ablation, cell.row.budget, cell.seed): cell
        for cell in cells(write(tmp_path))
        if cell.row.method == "tmd"
    }
    plain, rollout = by_row[None, "updates", 0], by_row["no_rollout", "updates", 0]
    assert [t.stage for t in plain.trainings] == ["stage1", "stage2"]
    assert plain.trainings[0].key == rollout.trainings[0].key
    assert plain.trainings[1].key != rollout.trainings[1].key
    assert plain.trainings[1].parent == plain.trainings[0].key
    assert plain.trainings[0].key != by_row[None, "updates", 1].trainings[0].key
    sampled = by_row["n1", "updates", 0]
    assert [t.key for t in sampled.trainings] == [t.key for t in plain.trainings]
    assert sampled.key != plain.key and sampled.settings["n"] == 1
    same = by_row[None, "compute", 0]  # the reference of equal compute is the same training under both budgets
    assert same.name == plain.name


def test_other_times_at_sampling_need_no_training(tmp_path: Path):
    half = "  half: {methods: [tmd, dmd2v], label: half, sample: {times: [0.999, 0.5]}}\n"
    text = (
        SMALL.replace("  n1:", f"{half}  n1:")
        .replace("[no_rollout, n1]", "half")
        .replace("ablations: kd", "ablations: half")
    )
    chosen = [c for c in cells(write(tmp_path, text)) if (c.seed, c.row.m, c.row.budget) == (0, 2, "updates")]
    found = {(c.row.method, c.row.ablation): c for c in chosen}
    for method in ("tmd", "dmd2v"):
        plain, other = found[method, None], found[method, "half"]
        assert [t.key for t in plain.trainings] == [t.key for t in other.trainings] and plain.key != other.key
        assert other.settings["times"] == [0.999, 0.5] and "times" not in plain.settings  # keys of old cells stay
    (row,) = problems(write(tmp_path, text.replace("m: 2, ablations: half", "m: 1, ablations: half")))
    assert "ablation half samples at 2 times; give it cells of its own, of that M." in row
    for wrong in ("[0.5, 0.999]", "[]", "[1.5]", "[0.5, 0]", "half", "[true, a]"):
        (row,) = problems(write(tmp_path, text.replace("[0.999, 0.5]", wrong)))
        assert "times are falling numbers from at most 1 to above 0" in row


def test_a_stage_may_belong_to_some_m_and_ablations_add_it(tmp_path: Path):
    stages = {
        (c.row.m, c.row.ablation): [t.stage for t in c.trainings]
        for c in cells(write(tmp_path))
        if c.row.method == "dmd2v"
    }
    assert stages == {(1, None): ["kd", "distil"], (2, None): ["distil"], (2, "kd"): ["kd", "distil"]}


def test_equal_updates_and_equal_compute(tmp_path: Path):
    found = cells(write(tmp_path))
    reference = next(c for c in found if c.row.method == "tmd" and c.row.budget == "updates")
    budget = sum(t.config.cost(L).total for t in reference.trainings)
    for cell in found:
        last = cell.trainings[-1].config
        if cell.row.budget == "updates":
            assert student_updates(last) == 7
        else:
            total = sum(t.config.cost(L).total for t in cell.trainings)
            longer = replace(last, iterations=last.iterations + 1)
            more = total - last.cost(L).total + longer.cost(L).total
            assert total <= budget * (1 + 1e-6) < more


def test_equal_compute_is_that_of_the_tuned_reference(tmp_path: Path):
    def iterations(**tuned: Changes) -> int:
        found = resolver(write(tmp_path)).matrix(tuned)
        (cell,) = (c for c in found if (c.row.method, c.row.m, c.row.budget, c.seed) == ("dmd2v", 2, "compute", 0))
        return cell.trainings[-1].config.iterations

    plain = Changes(stages={"stage2": {"method.guidance": 1.0}})  # the teacher needs no second branch
    assert 0 < iterations(tmd=plain) < iterations()


def test_a_claim_on_the_base_model_means_its_own_guidance_unless_it_says_so(tmp_path: Path):
    made = resolver(write(tmp_path, untrained=[{"m": 1}, {"m": 1, "guidance": 3.0}]))
    rows = dict.fromkeys(cell.row for cell in made.matrix({}))
    assert find(Selector(method="base", m=1), rows, made.experiment).guidance is None
    assert find(Selector(method="base", m=1, guidance=3.0), rows, made.experiment).guidance == 3.0


def test_a_budget_that_the_first_stage_uses_up_is_refused(tmp_path: Path):
    text = SMALL.replace("like: {method: tmd, n: 2, h: 2}", "like: {method: dmd2v}").replace("m: [1, 2]}", "m: 2}")
    assert any("leaves tmd_stage2 no update" in row for row in problems(write(tmp_path, text)))


def test_iterations_of_a_budget(tmp_path: Path):
    config = next(c for c in cells(write(tmp_path)) if c.row.method == "dmd2v" and c.row.m == 2).trainings[-1].config
    assert iterations_with_updates(config, 3) == 15  # the student moves in every fifth
    ten = replace(config, iterations=10)
    assert iterations_within(config, ten.cost(L).total, L) == 10
    assert iterations_within(config, ten.cost(L).total * 0.999, L) == 9


def test_one_student_sampled_at_every_m(tmp_path: Path):
    rcm = {"label": "rCM", "axes": {}, "stages": [{"name": "distil", "preset": "micro_rcm.yaml"}]}
    section = {"name": "Main", "seeds": [0], "cells": [{"methods": "rcm", "m": [1, 2]}]}
    path = write(
        tmp_path, methods={"rcm": rcm}, sections=[section], budgets={"u": {"student_updates": 2}}, ablations={}
    )
    one, two = cells(path)
    assert one.trainings[0].key == two.trainings[0].key
    assert (one.settings["m"], two.settings["m"]) == (1, 2) and one.key != two.key


def test_names_of_rows(tmp_path: Path):
    experiment, _ = load_experiment(write(tmp_path))
    row = Row(method="tmd", m=2, n=2, h=2, ablation="no_rollout", budget="compute")
    assert row_name(experiment, row) == "TMD-N2H2, M = 2 (no rollout), compute"
    assert row_name(experiment, Row(method="base", m=50)) == "micro teacher, 50 steps"
    assert row_name(experiment, Row(method="base", m=1, guidance=2.0)) == "micro undistilled, 1 step, CFG 2"


def test_the_best_mean_rank_wins_and_failures_lose():
    good = {"alignment_joint": 0.5, "frechet": 10.0}
    more, less = {"alignment_joint": 0.6, "frechet": 30.0}, {"alignment_joint": 0.4, "frechet": 20.0}
    assert best_rank([more, less, good], ["alignment_joint", "frechet"]) == 2
    assert best_rank([None, good], ["alignment_joint"]) == 1
    assert best_rank([None, None], ["alignment_joint"]) is None
    assert best_rank([good, dict(good)], ["alignment_joint", "frechet"]) == 0
    tie = [{"a": 1.0, "frechet": 3.0}, {"a": 2.0, "frechet": 4.0}]
    assert best_rank(tie, ["a", "frechet"]) == 1 and best_rank(tie, ["frechet", "a"]) == 0


def test_reading_takes_single_values_for_lists_and_flattens_settings(tmp_path: Path):
    source = load(write(tmp_path))
    experiment = read(Experiment, source)
    assert experiment is not None and not source.problems
    assert experiment.ablations["no_rollout"].methods == ("tmd",)
    assert experiment.ablations["no_rollout"].stages == {"stage2": {"method.rollout": False}}

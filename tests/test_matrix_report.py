"""The page of a matrix: verdicts from the rows, differences from baselines, and nothing from outside the file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leaderboard.display import displays
from leaderboard.effects import Scores, difference
from leaderboard.errors import LeaderboardError
from leaderboard.matrix import Matrix, MatrixClaim, MatrixRow, StepTime, Trials, report_json
from leaderboard.matrix_figures import against_nfe, diversity_against
from leaderboard.matrix_report import build_matrix_report

PROMPTS = 200


def scores(level: float, seeds: int, number: int, *, spread: float = 0.01) -> Scores:
    rng = np.random.default_rng(number)
    hard = np.random.default_rng(99).uniform(-0.3, 0.3, PROMPTS)
    table = np.clip(
        level + hard[None] + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.05, (seeds, PROMPTS)), 0, 1
    )
    values = table.mean(axis=1)
    return Scores(values=values, ranges=np.stack([values - 0.03, values + 0.03], axis=1), prompts=table)


def whole(level: float, seeds: int, number: int, width: float) -> Scores:
    values = level + np.random.default_rng(number).normal(0, width / 3, seeds)
    return Scores(values=values, ranges=np.stack([values - width, values + width], axis=1), prompts=None)


def row(
    key: str, level: float, *, diversity: float = 0.9, seeds: int = 3, number: int = 0, **changes: Any
) -> MatrixRow:
    base = MatrixRow(
        key=key, name=key, sections=("Main",), budget="Equal updates", role="student", method="tmd", m=2, n=2, h=2,
        ablation=None, baseline=None, effective_nfe=2.4, forward_passes=2.4, seconds_per_video=0.02,
        training_minutes=5.0, compute=1000.0, student_updates=120, seeds=tuple(range(seeds)), planned_seeds=seeds,
        videos=PROMPTS * seeds,
        scores={
            "alignment_joint": scores(level, seeds, number),
            "frechet": whole(20.0, seeds, number, 1.0),
            "frechet_real": whole(1.0, seeds, number, 0.1),
            "diversity": whole(diversity, seeds, number, 0.05),
        },
        counts={name: PROMPTS * seeds for name in ("alignment_joint", "frechet", "frechet_real", "diversity")},
        runs=(), blocks=10,
    )  # fmt: skip
    return replace(base, **changes)


def claim(text: str, a: str, b: str, **changes: Any) -> MatrixClaim:
    made = MatrixClaim(
        claim=text, source="Table 1", metric="alignment_joint", direction="higher", margin=None, a=a, b=b, names=(a, b)
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    rows = (
        row("teacher", 0.8, seeds=1, role="teacher", method="teacher", budget=None, m=50, n=None, h=None,
            effective_nfe=50.0, training_minutes=None, compute=None, student_updates=None),
        row("TMD", 0.6, number=1),
        row("DMD2-v", 0.5, number=2, method="dmd2-v", n=None, h=None, effective_nfe=2.0),
        row("unshifted", 0.5, number=3, diversity=0.3, method="dmd2-v", n=None, h=None, effective_nfe=2.0,
            ablation="no shift of t_dmd", baseline="DMD2-v", sections=("Ablations",)),
        row("lonely", 0.7, number=4, seeds=1, planned_seeds=2),
    )  # fmt: skip
    claims = (
        claim("TMD beats DMD2-v", "TMD", "DMD2-v"),
        claim("DMD2-v beats TMD", "DMD2-v", "TMD"),
        claim("Scores stay the same", "unshifted", "DMD2-v", direction="same", margin=0.1),
        claim("Modes collapse", "unshifted", "DMD2-v", metric="diversity", direction="lower"),
        claim("One seed says nothing", "lonely", "DMD2-v", note="Too few <seeds>"),
        claim("<script>alert(1)</script>", "TMD", "absent"),
    )
    steps = (StepTime(name="micro_dmd2v", seconds=0.5, measured=10.0, counted=8.0, device="a test"),)
    trials = (Trials(method="TMD", rows=(("lr = 1e-4", {"alignment_joint": 0.5}, True), ("lr = 1", None, False))),)
    return Matrix(
        title="A matrix & more", command="tmd-eval experiment run x.yaml --out x",
        experiment={"file": "x.yaml", "sha256": "0" * 64}, code_revision="1" * 40, device="a test",
        packages={"numpy": "2"}, rows=rows, claims=claims, sections=("Main", "Ablations"), budgets=("Equal updates",),
        headline="alignment_joint",
        prompts="200 prompts", timing="measured somehow.", tuning="Not tuned.", ranked_by=("alignment_joint",),
        trials=trials, steps=steps, missing=("a cell is not there.",),
        notes=("Read this & that",), pooled=False,
    )  # fmt: skip


ALIGNMENT, DIVERSITY = (
    next(d for d in displays([row("any", 0.5)]) if d.name == name)  # type: ignore[list-item]  # rows have metrics
    for name in ("alignment_joint", "diversity")
)


def test_verdicts(matrix: Matrix):
    found = [(decision.verdict, bool(decision.reason)) for decision in matrix.decisions]
    assert found == [
        ("holds", False), ("does not hold", False), ("holds", False), ("holds", False), ("undecided", True),
        ("undecided", True),
    ]  # fmt: skip
    first, *_, alone, absent = matrix.decisions
    assert first.effect is not None and first.effect.value == pytest.approx(0.1, abs=0.03)
    assert (first.n, first.seeds, alone.seeds) == (PROMPTS, 3, 1)
    assert absent.effect is None and "absent" in absent.reason


def test_report_json_keeps_the_contract(matrix: Matrix):
    content = report_json(matrix)
    json.dumps(content, allow_nan=False)
    assert set(content) >= {"command", "code_revision", "device", "seeds", "rows", "claims"}
    for line in content["rows"]:
        assert set(line) >= {
            *("name", "role", "method", "m", "n", "h", "effective_nfe", "seconds_per_video", "metrics"),
            *("training_minutes", "compute", "student_updates", "seeds", "budget", "ablation"),
        }
        for metric in line["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] > 0
    assert content["claims"][1]["effect"] == pytest.approx(-content["claims"][0]["effect"])


def test_the_spread_between_seeds_widens_a_rows_interval(matrix: Matrix):
    metric = matrix.by_key["TMD"].metric("alignment_joint")
    one = difference(matrix.by_key["TMD"].scores["alignment_joint"], matrix.by_key["DMD2-v"].scores["alignment_joint"])
    assert metric is not None and metric.low is not None and one.over_seeds
    pooled = replace(matrix, pooled=True)
    assert set(pooled.pools) == {"alignment_joint", "frechet", "frechet_real", "diversity"}
    assert pooled.decisions[4].verdict == "holds"  # with the common spread a single seed can speak


def test_rows_of_one_family_are_compared_seed_by_seed(matrix: Matrix):
    """What a seed does to all ablations of a row does not blur their differences; other methods stay unpaired."""
    shift, noise = np.array([-0.1, 0.0, 0.1]), np.random.default_rng(8)

    def kin(key: str, level: float, family: str) -> MatrixRow:
        values = level + shift + noise.normal(0, 0.004, 3)
        found = Scores(
            values=values, ranges=np.stack([values, values], axis=1), prompts=None, family=family, numbers=(0, 1, 2)
        )
        return row(key, level, scores={"alignment_joint": found})

    rows = (*(kin(name, 0.5, "TMD") for name in "abc"), kin("better", 0.55, "TMD"), kin("other", 0.55, "DMD2-v"))
    claims = (claim("better", "better", "a"), claim("other", "other", "a"))
    family = replace(matrix, rows=rows, claims=claims, pooled=True)
    assert set(family.blocks) == {("TMD", "alignment_joint")}
    better, other = family.decisions
    assert (better.verdict, other.verdict) == ("holds", "undecided")
    apart = replace(matrix, rows=rows, claims=claims)
    assert not apart.blocks and apart.decisions[0].verdict == "undecided"
    values = report_json(family)["rows"][0]["runs"]
    assert values == []  # this matrix has no run folders
    runs = tuple(Path(f"cell{i}") for i in range(3))
    withruns = report_json(
        replace(family, rows=(replace(rows[0], runs=runs, weights=("x", "y", "z"), devices=("a", "b", "a")), *rows[1:]))
    )
    assert [run["values"]["alignment_joint"] for run in withruns["rows"][0]["runs"]] == pytest.approx(
        list(rows[0].scores["alignment_joint"].values)
    )


class Page(HTMLParser):
    """Collects links and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_escaped_and_repeatable(matrix: Matrix, tmp_path: Path):
    page = build_matrix_report(matrix, tmp_path / "report").read_text()
    parser = Page()
    parser.feed(page)
    assert parser.open == [] and all(link.startswith(("data:", "#")) for link in parser.links)
    assert not re.search(r"https?://", page)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "A matrix &amp; more" in page
    for part in (
        "Mode collapse",
        "no shift of t_dmd",
        "does not hold",
        "1 of 2 seeds",
        "micro_dmd2v",
        "1.25",
        "lr = 1e-4",
        "Read this &amp; that",
        "Too few &lt;seeds&gt;",
        "not measured yet: joint alignment of absent",
    ):
        assert part in page, part
    assert (tmp_path / "report" / "figures" / "diversity.png").stat().st_size > 0
    build_matrix_report(matrix, tmp_path / "again")
    for path in (tmp_path / "report").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "report")).read_bytes()


def test_the_collapse_is_named_with_both_differences(matrix: Matrix, tmp_path: Path):
    text = build_matrix_report(matrix, tmp_path).read_text()
    lost = matrix.difference(matrix.by_key["unshifted"], "diversity")
    assert lost is not None and lost.high < -0.4
    section = text[text.index('id="collapse"') :]
    assert "unshifted" in section[: section.index("</p>")]


def test_a_claim_about_one_group_of_diversity_stands_in_the_section_on_collapse(matrix: Matrix, tmp_path: Path):
    rows = tuple(
        replace(
            r,
            scores={**r.scores, "diversity_place": whole(level, 3, i, 0.05)},
            counts={**r.counts, "diversity_place": 600},
        )
        for i, (r, level) in enumerate((matrix.rows[key], level) for key, level in ((2, 0.9), (3, 0.4)))
    )
    told = claim("Places collapse", "unshifted", "DMD2-v", metric="diversity_place", direction="lower")
    text = build_matrix_report(replace(matrix, rows=rows, claims=(told,)), tmp_path).read_text()
    section = text[text.index('id="collapse"') :]
    assert re.search(r"“Places collapse”: holds \(\u22120\.\d+ \[[^]]+\] in diversity of place, Table 1\)", section)


def test_a_row_of_one_seed_is_said_to_cost_nothing_surely(matrix: Matrix, tmp_path: Path):
    lonely = tuple(
        row(r.key, 0.5, diversity=level, seeds=1, number=i, ablation=r.ablation, baseline=r.baseline)
        for i, (r, level) in enumerate((matrix.rows[key], level) for key, level in ((2, 0.9), (3, 0.3)))
    )
    text = build_matrix_report(replace(matrix, rows=lonely, claims=()), tmp_path).read_text()
    assert "No change measured here surely costs any." in text


def test_an_ablation_without_its_method_as_it_is_has_its_whole_name(matrix: Matrix, tmp_path: Path):
    rows = tuple(r for r in matrix.rows if r.key != "DMD2-v")
    shown = re.findall(r'<th scope="row" class="model( ablated)?">.*?<span>([^<]*)', build_matrix_report(
        replace(matrix, rows=rows, claims=()), tmp_path / "alone").read_text())  # fmt: skip
    assert ("", "unshifted") in shown and not any(indented for indented, _ in shown)
    whole_table = re.findall(
        r'<th scope="row" class="model( ablated)?">.*?</span><span>([^<]*)',
        build_matrix_report(matrix, tmp_path / "both").read_text(),
    )
    assert (" ablated", "no shift of t_dmd") in whole_table


def words(svg: str) -> list[str]:
    """Texts of a figure whose letters are letters, without ticks and digits in marks."""
    return [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if len(text) > 2]


def test_rows_that_differ_in_m_alone_share_a_line_and_a_label(matrix: Matrix):
    rows = [
        row(f"TMD, M = {m}", 0.3 * m, name=f"TMD, M = {m}", m=m, effective_nfe=1.2 * m, number=m) for m in (1, 2, 3)
    ]
    figure = against_nfe([matrix.rows[0], *rows], ALIGNMENT, name="joint")
    assert figure is not None
    assert words(figure.svg).count("TMD") == 1 and not any("M = " in text for text in words(figure.svg))
    assert all(r.name in figure.alt for r in rows)
    assert len(re.findall(r">[123]</text>", figure.svg)) >= 3


def test_names_in_the_figure_of_collapse_stand_where_diversity_surely_differs(matrix: Matrix):
    figure = diversity_against(matrix, ALIGNMENT, DIVERSITY, name="diversity")
    assert figure is not None
    shown = words(figure.svg)
    assert {"teacher", "unshifted", "DMD2-v", "TMD"} <= set(shown)
    assert shown.count("TMD") == 1 and shown.count("DMD2-v") == 2  # in the legend, and DMD2-v as the baseline
    same = replace(matrix, rows=tuple(r if r.key != "unshifted" else replace(r, scores=other(r)) for r in matrix.rows))
    calm = diversity_against(same, ALIGNMENT, DIVERSITY, name="diversity")
    assert calm is not None and "unshifted" not in words(calm.svg) and "unshifted" in calm.alt


def other(line: MatrixRow) -> dict[str, Scores]:
    return {**line.scores, "diversity": whole(0.9, 3, 7, 0.05)}


def test_an_empty_matrix_is_refused(matrix: Matrix, tmp_path: Path):
    with pytest.raises(LeaderboardError, match="nothing to report"):
        build_matrix_report(replace(matrix, rows=()), tmp_path)

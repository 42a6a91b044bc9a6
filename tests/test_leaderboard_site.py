"""The site: every page, its links and alt texts, its bytes, hostile text, and what it does in a browser."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from sqlalchemy import insert, select

from leaderboard.board import groups_of, slug
from leaderboard.checks import DIMENSIONS, QUALITY_DIMENSIONS, SEMANTIC_DIMENSIONS, total_of
from leaderboard.database import writing
from leaderboard.errors import LeaderboardError
from leaderboard.models import Metric, Result, VideoScore
from leaderboard.published import PUBLISHED_TITLE, import_published
from leaderboard.query import load
from leaderboard.record import IDENTITY, key_of, record_claims, record_latency, record_preferences, record_run
from leaderboard.run_folder import video_scores
from leaderboard.site import build_site
from leaderboard.stats import front_probability, on_front, paired_differences
from tests.test_leaderboard import HOSTILE, MODELS, STUDENT, TEACHER, UNDISTILLED, edit, files, make_run
from tests.test_leaderboard_record import CLAIM, HEAD, STUDY, TIMING, write
from tmd_eval.provenance import command_line
from tmd_eval.rerun import compare, figures

VBENCH = {"Wan teacher": ("teacher", "teacher", 50.0, 0.86), "Wan TMD": ("student", "tmd", 2.33, 0.84)}


def add_vbench(db: str) -> None:
    """Two rows with sixteen dimensions, and one that lacks a dimension."""
    rng = np.random.default_rng(0)
    with writing(db) as session:
        source = session.scalars(select(Result).order_by(Result.id)).first()
        assert source is not None
        common = {c.key: getattr(source, c.key) for c in Result.__table__.columns if c.key not in ("id", "key")}
        for name, (role, method, nfe, level) in [*VBENCH.items(), ("Partial", ("student", "rcm", 4.0, 0.9))]:
            row = Result(**{
                **common, "name": name, "role": role, "method": method, "effective_nfe": nfe,
                "forward_passes": nfe, "prompts_name": "vbench", "run": "", "seconds_per_video": nfe / 10,
            })  # fmt: skip
            values = {key: float(np.clip(level + rng.normal() / 30, 0, 1)) for key in DIMENSIONS}
            if name == "Partial":
                del values["scene"]
            else:
                means = [float(np.mean([values[k] for k in ks])) for ks in (QUALITY_DIMENSIONS, SEMANTIC_DIMENSIONS)]
                values |= {"quality": means[0], "semantic": means[1], "total": total_of(*means)}
            for key, value in values.items():
                row.metrics.append(
                    Metric(name=key, value=value, low=value - 0.01, high=value + 0.01, n=100, completeness=1.0,
                           metric_version="1", weight_hashes={})
                )  # fmt: skip
            row.key = key_of([getattr(row, column) for column in IDENTITY])
            session.add(row)


def add_videos(db: str) -> None:
    """Scores of single videos for the micro rows: the student half a step below the teacher on every prompt."""
    with writing(db) as session:
        for row in session.scalars(select(Result).where(Result.prompts_name == "micro")):
            level = {TEACHER: 0.9, STUDENT: 0.8, UNDISTILLED: 0.2}[row.name]
            rng = np.random.default_rng(len(row.name))
            session.execute(insert(VideoScore), [
                {"result_id": row.id, "name": "alignment_joint", "prompt": p, "sample": s,
                 "value": level + 0.1 * float(np.sin(p)) + 0.01 * float(rng.normal())}
                for p in range(30) for s in range(2)
            ])  # fmt: skip


def make_board(root: Path, *, hostile: bool = False) -> str:
    """A database with a bit of everything."""
    db = str(root / "r.db")
    for name in MODELS:
        run = make_run(root, name, caption=HOSTILE if hostile else None)
        record_run(db, run, name=f"{name} {HOSTILE}" if hostile else None)
    if not hostile:
        add_videos(db)
    add_vbench(db)
    weights = next(row.checkpoint_hash for row in load(db) if row.name.startswith(STUDENT))
    timing = {**TIMING, "checkpoint_hash": weights, "name": HOSTILE if hostile else STUDENT}
    record_latency(db, write(root / "latency.json", {**HEAD, "rows": [timing, {**timing, "batch": 4}]}))
    models = [{"name": STUDENT, "checkpoint_hash": weights}, {"name": TEACHER, "checkpoint_hash": None}]
    study = {**STUDY, "study": HOSTILE if hostile else "pilot", "models": models}
    record_preferences(db, write(root / "preferences.json", study))
    claims = [CLAIM, {**CLAIM, "claim": HOSTILE if hostile else "gated fusion helps", "verdict": "holds"}]
    record_claims(db, write(root / "matrix" / "report.json", {**HEAD, "rows": [], "claims": claims}).parent)
    if not hostile:
        import_published(db)
    return db


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_board(tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def site(board: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build_site(board, out, command="tmd-eval leaderboard build --out site")
    return out


class Page(HTMLParser):
    """What a page loads and refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.svgs: list[dict[str, str | None]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [str(values[key]) for key in ("href", "src", "srcset", "action", "data") if values.get(key)]
        self.ids += [str(values["id"])] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        if tag == "svg":
            self.svgs.append(values)


def check_folder(folder: Path) -> list[str]:
    """Broken or outward links, doubled ids, and pictures without a text, of all pages of a folder."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        page = Page(path)
        for link in page.links:
            target = (path.parent / unquote(link.split("#")[0])).resolve()
            inside = target.is_relative_to(folder.resolve()) and target.is_file()
            if not (link.startswith("data:") or (link.startswith("#") and link[1:] in page.ids) or inside):
                found.append(f"{path.name} refers to {link}")
        found += [f"{path.name} has the id {i} twice" for i in set(page.ids) if page.ids.count(i) > 1]
        found += [f"{path.name}: a picture without alt" for image in page.images if not image.get("alt")]
        found += [f"{path.name}: a figure without label" for svg in page.svgs if not svg.get("aria-label")]
        if re.search(r"https?:|@import", path.read_text()):
            found.append(f"{path.name} names an address")
    return found


def test_every_link_stays_inside_and_every_picture_has_a_text(site: Path) -> None:
    assert check_folder(site) == []
    names = {path.name for path in site.glob("*")}
    assert names == {
        "index.html", "compare.html", "preferences.html", "claims.html", "method.html", "models", "figures",
        "style.css", "site.css", "sort.js", "compare.js", "report.json", "files.json",
        "leaderboard.md", "leaderboard.csv", "leaderboard.json", "leaderboard.tex",
    }  # fmt: skip
    figures = sorted(path.name for path in (site / "figures").iterdir())
    assert len(figures) % 3 == 0 and {Path(name).suffix for name in figures} == {".svg", ".png", ".pdf"}
    for stem in ("micro-alignment-joint-nfe", "micro-frechet-seconds", "vbench-total-nfe", "vbench-quality-seconds",
                 "vbench-semantic-nfe", "vbench-dimensions", "vbench-radar", "preferences-1"):  # fmt: skip
        assert f"{stem}.pdf" in figures


def test_the_published_board_is_committed_as_it_is_built(tmp_path: Path) -> None:
    committed = Path(__file__).parents[1] / "reports" / "published"
    report = json.loads((committed / "report.json").read_text())
    assert report["command"] == "tmd-eval leaderboard build --published --out reports/published"
    assert check_folder(committed) == [] and len(report["rows"]) == 75
    db = str(tmp_path / "r.db")
    import_published(db)
    build_site(db, tmp_path / "again", title=PUBLISHED_TITLE, command=report["command"])
    fresh, old = files(tmp_path / "again"), files(committed)
    assert sorted(fresh) == sorted(old)
    text = [name for name in fresh if not name.startswith(("figures/", "index", "files.json"))]
    assert all(fresh[name] == old[name] for name in text)  # figures depend on matplotlib's version
    assert sum(map(len, old.values())) < 2_000_000
    pairs = list(compare(figures(committed), figures(tmp_path / "again")))  # as tmd-eval rerun does
    assert len(pairs) > 180 and all(pair["agrees"] and pair["allowed"] == 0 for pair in pairs)


def test_measured_and_reported_rows_share_no_table(site: Path) -> None:
    index = (site / "index.html").read_text()
    tables = re.findall(r"<table.*?</table>", index, re.S)
    measured = [table for table in tables if TEACHER in table or "Wan teacher" in table]
    assert measured and all("arXiv:2601.09881" not in table for table in measured)
    (printed,) = (table for table in tables if "Wan2.1 1.3B TMD-N2H5" in table)
    assert "Rank" not in printed and printed.count("formula 84.798") == 2
    assert "2 of 75 rows contradict themselves" in index


def test_a_row_that_lacks_a_dimension_is_shown_without_total_or_rank(site: Path) -> None:
    index = (site / "index.html").read_text()
    row = re.search(r"<tr[^>]*>(?:(?!</tr>).)*>Partial<.*?</tr>", index, re.S)
    assert row is not None
    cells = re.findall(r"<td.*?</td>", row[0], re.S)
    assert [re.sub("<.*?>", "", cell) for cell in cells[:4]] == ["\u2013"] * 4  # rank, total, quality, semantic
    page = next(site.glob("models/partial-*.html")).read_text()
    assert "not measured" in page and "93.8 %" in page  # 15 of 16


def test_paired_differences_are_on_the_pages(site: Path) -> None:
    page = next(site.glob("models/tmd-n2h2-m-2-*.html")).read_text()
    assert re.search(r"-(10\.\d|9\.\d)</td><td class=\"num\">\[-10\.\d, -9\.\d\]", page)
    compare = (site / "compare.html").read_text()
    assert compare.count("first higher") == 3  # sorted by rank, all apart
    for fact in ("tmd-eval generate --ckpt", "out/TMD-N2H2", "a CPU, batch 4", "prompt alignment: 60.0 %"):
        assert fact in page


def test_the_same_database_gives_the_same_site(board: str, site: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from leaderboard.site import build_site; "
    code += "build_site(sys.argv[1], Path(sys.argv[2]), command='tmd-eval leaderboard build --out site')"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, board, str(tmp_path)], check=True, env=environment)
    assert files(tmp_path) == files(site)


def test_exports_hold_every_row(site: Path) -> None:
    rows = json.loads((site / "leaderboard.json").read_text())
    assert len(rows) == 3 + 3 + 75 and not {"run", "id"} & set(rows[0])
    lines = list(csv.DictReader((site / "leaderboard.csv").open()))
    assert (
        len(lines) == len(rows) and float(lines[0]["alignment_joint"]) == rows[0]["metrics"]["alignment_joint"]["value"]
    )
    latex = (site / "leaderboard.tex").read_text()
    assert latex.count(r"\begin{tabular}") == 3 and r"total\_mismatch" in latex and "84.80" not in latex
    assert "| Wan2.1 1.3B TMD-N2H5 | 2 | 2 | 5 | 2.33 | 84.68 |" in (site / "leaderboard.md").read_text()
    report = json.loads((site / "report.json").read_text())
    assert len({row["name"] for row in report["rows"]}) == len(report["rows"]) == 81


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    db = make_board(tmp_path, hostile=True)
    out = tmp_path / "site"
    build_site(db, out, title=HOSTILE, command=HOSTILE)
    assert check_folder(out) == []
    for path in out.rglob("*.html"):
        text = path.read_text()
        assert "<script>alert" not in text
        assert Page(path).tags.count("script") == (3 if path.name == "compare.html" else 1)
    assert all(re.fullmatch(r"[a-z0-9.-]+", path.name) for path in (out / "models").iterdir())
    assert "<script>alert" not in (out / "leaderboard.md").read_text().replace(f"    {HOSTILE}", "")


def test_a_formula_in_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, TEACHER, prompts=1), name='=HYPERLINK("x")')
    build_site(db, tmp_path / "site", command="c", clips={})
    assert """'=HYPERLINK""" in (tmp_path / "site" / "leaderboard.csv").read_text()


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The page after its scripts ran, and the browser's log."""
    browser = shutil.which("chromium")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium on this machine")
        pytest.skip("no chromium on this machine")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def test_a_browser_compares_two_rows(site: Path, tmp_path: Path) -> None:
    page, log = browse(site / "compare.html", tmp_path)
    assert "CONSOLE" not in log
    assert 'form id="choose"' in page and "paired on 30 prompts" in page
    page, log = browse(site / "index.html", tmp_path)
    assert "CONSOLE" not in log and page.count('type="search"') == 1  # the long table has a filter


def test_pages_that_are_out_of_date_go_and_nothing_else_does(tmp_path: Path) -> None:
    db, out = str(tmp_path / "r.db"), tmp_path / "site"
    for name in (TEACHER, STUDENT, UNDISTILLED):
        record_run(db, make_run(tmp_path, name, prompts=1))
    build_site(db, out, command="c", clips={})
    pages = {row.name: next((out / "models").glob(f"{slug(row.name)}-{row.key[:8]}.html")) for row in load(db)}
    edited = next(page for name, page in pages.items() if name.startswith(UNDISTILLED))
    edited.write_text("mine now")
    (out / "models" / "notes.html").write_text("mine")
    (tmp_path / "outside.html").write_text("mine")
    listed = json.loads((out / "files.json").read_text())
    listed["files"]["../outside.html"] = hashlib.sha256(b"mine").hexdigest()
    (out / "files.json").write_text(json.dumps(listed))
    with writing(db) as session:
        for row in session.scalars(select(Result).where(Result.role != "teacher")):
            session.delete(row)
    build_site(db, out, command="c", clips={})
    gone = next(page for name, page in pages.items() if name.startswith(STUDENT))
    assert not gone.exists() and edited.read_text() == "mine now"
    assert (out / "models" / "notes.html").read_text() == (tmp_path / "outside.html").read_text() == "mine"
    before = files(out)
    build_site(db, out, command="c", clips={})
    assert files(out) == before
    (out / "files.json").write_text("[]")
    with pytest.raises(LeaderboardError, match="the list of what the last build wrote"):
        build_site(db, out, command="c", clips={})


def test_empty_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(LeaderboardError, match="leaderboard import published"):
        build_site(str(tmp_path / "r.db"), tmp_path / "site", command="c")
    record_run(str(tmp_path / "r.db"), make_run(tmp_path, TEACHER, prompts=1))
    with pytest.raises(LeaderboardError, match="no row 7"):
        build_site(str(tmp_path / "r.db"), tmp_path / "site", command="c", rows=[7])
    assert not (tmp_path / "site").exists()


# Statistics


@pytest.mark.parametrize("prompts", [5, 8, 16, 100])
def test_paired_intervals_of_few_prompts_cover_the_truth(prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    made = {(i, -i - 1): (dict(enumerate(rng.normal(0, 1, prompts))), dict.fromkeys(range(prompts), 0.0))
            for i in range(2000)}  # fmt: skip
    found = paired_differences(made)
    assert len(found) == 2000 and sum(difference.apart for difference in found.values()) < 0.075 * 2000
    four = {pair: ({p: a[p] for p in range(4)}, b) for pair, (a, b) in made.items()}
    assert paired_differences(four) == {}  # so few can agree by chance


def board_of(tmp_path: Path, *rows: dict[str, Any]) -> list[Result]:
    """The student's run, once for each change of its configuration."""
    db = str(tmp_path / "r.db")
    for number, changes in enumerate(rows):
        run = make_run(tmp_path / str(number), STUDENT)
        edit(run / "config.yaml", seed=number, **changes)
        record_run(db, run, name=f"row {number}")
    return load(db)


def test_only_rows_on_the_same_prompts_are_compared(tmp_path: Path) -> None:
    def prompts(name: str, letter: str, count: int) -> dict[str, Any]:
        return {"prompts": {"name": name, "sha256": letter * 64, "count": count}}

    many, few, other = (prompts("my.txt", letter, count) for letter, count in (("d", 4), ("e", 2), ("f", 4)))
    read = {"texts": {"name": "extended", "sha256": "9" * 64}}
    sampled = prompts("micro", "a", 3)
    rows = board_of(tmp_path, many, few, other, many | read, {}, sampled)
    groups = {group.name: [row.name for row in group.rows] for group in groups_of(rows)}
    assert groups == {
        "my.txt, 2 prompts": ["row 1"], "my.txt, 4 prompts (dddddddd)": ["row 0"],
        "my.txt, 4 prompts (ffffffff)": ["row 2"], "my.txt, read as extended 99999999": ["row 3"],
        "micro": ["row 4", "row 5"],  # in random order: fewer are a smaller sample of the same
    }  # fmt: skip


def test_a_student_is_judged_against_its_own_base_model(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    for name in MODELS:
        record_run(db, make_run(tmp_path, name))
    assert [len(group.comparisons) for group in groups_of(load(db))] == [1]
    larger = make_run(tmp_path / "larger", STUDENT)
    config = yaml.safe_load((larger / "config.yaml").read_text())
    edit(larger / "config.yaml", checkpoint={**config["checkpoint"], "base": {"ref": "14b", "hash": "c" * 64}}, seed=8)
    record_run(db, larger, name="larger")
    (group,) = groups_of(load(db))
    assert [comparison.student.name for comparison in group.comparisons] == [STUDENT]


def test_scores_of_unlike_scorers_are_told(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, STUDENT))
    run = make_run(tmp_path, TEACHER)
    summary = json.loads((run / "scores" / "summary.json").read_text())
    summary["frechet"] |= {"metric_version": "2", "weight_hashes": {"w.pt": "a" * 64}}
    (run / "scores" / "summary.json").write_text(json.dumps(summary))
    record_run(db, run)
    (group,) = groups_of(load(db))
    assert group.versions == {"Fréchet distance": ["2 w.pt aaaaaaaa", "micro-judge-1"]}
    page = build_site(db, tmp_path / "site", command="c").read_text()
    assert "Fréchet distance was scored by several versions" in page


def test_a_file_of_prompts_with_a_line_twice_can_be_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path, STUDENT)
    rows = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    twice = "".join(json.dumps({**row, "prompt": "the same"}) + "\n" for row in rows)
    (run / "manifest.jsonl").write_text(twice)
    scores = [{"video": row["video"], "value": 0.5} for row in rows]
    (run / "scores" / "alignment_joint.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    found = video_scores(run, ["alignment_joint"])
    assert sorted(row["sample"] for row in found) == [0, 1, 2, 3] and len({row["prompt"] for row in found}) == 1


def test_no_password_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tmd-eval", "leaderboard", "build", "--db", "postgresql://bob:s3cret@host/db"])
    assert command_line() == "tmd-eval leaderboard build --db postgresql://bob:***@host/db"
    for address in ("mysql://bob:s3cret@host/db", "postgres://bob:s3cret@host/db", "odd+x://bob:s3cret@h:port/db"):
        with pytest.raises(LeaderboardError) as caught:
            load(address)
        assert "s3cret" not in str(caught.value)


def test_paired_differences_agree_with_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.6, 0.2, 40), rng.normal(0.5, 0.2, 40)
    found = paired_differences(
        {(1, 2): (dict(enumerate(a)), dict(enumerate(b)) | {99: 5.0}), (1, 3): ({1: 1.0}, {1: 0.0})}
    )
    assert list(found) == [(1, 2)]  # one common prompt has no spread
    difference = found[1, 2]
    assert difference.value == pytest.approx(float((a - b).mean())) and difference.prompts == 40
    draws = [float((a - b)[rng.integers(0, 40, 40)].mean()) for _ in range(4000)]
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.015)
    mirrored = paired_differences({(2, 1): (dict(enumerate(b)), dict(enumerate(a)))})[2, 1]
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low), abs=1e-6
    )


def test_the_front_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        cost, score = rng.integers(1, 6, 12).astype(float), rng.integers(0, 6, 12).astype(float)
        wanted = [
            not any(
                (cost[j] <= cost[i] and score[j] > score[i]) or (cost[j] < cost[i] and score[j] >= score[i])
                for j in range(12)
            )
            for i in range(12)
        ]
        assert on_front(cost, score).tolist() == wanted


def test_the_front_is_as_sure_as_its_intervals() -> None:
    cost, value = [1, 2, 2, 4], np.array([0.5, 0.7, 0.69, 0.3])
    sure = front_probability(cost, value, value - 1e-4, value + 1e-4)
    assert sure.tolist() == [1.0, 1.0, 0.0, 0.0]
    unsure = front_probability(cost, value, value - 0.05, value + 0.05)
    assert unsure[0] > 0.99 and unsure[3] == 0 and unsure[1] + unsure[2] == pytest.approx(1)
    assert 0.55 < unsure[1] < 0.7  # P(N(0.01, 2 x 0.0255^2) > 0) = 0.61
    assert (
        front_probability(cost, -value, -value - 1e-4, -value + 1e-4, higher_is_better=False).tolist() == sure.tolist()
    )


def test_edit_is_used_for_other_prompt_sets(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    record_run(db, make_run(tmp_path, TEACHER, prompts=1))
    for i, name in enumerate(("a b", "a/b")):
        other = make_run(tmp_path / str(i), STUDENT, prompts=1)
        edit(other / "config.yaml", prompts={"name": name, "sha256": "e" * 64, "count": 1})
        record_run(db, other)
    build_site(db, tmp_path / "site", command="c", clips={})
    names = {path.name for path in (tmp_path / "site" / "figures").glob("a-b*nfe.svg")}
    assert {"a-b-alignment-joint-nfe.svg", "a-b-2-alignment-joint-nfe.svg"} <= names  # two sets, two slugs

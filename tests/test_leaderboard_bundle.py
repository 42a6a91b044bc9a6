"""Exchange between two labs: what a bundle carries, and what it cannot do."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leaderboard.bundle import export_bundle, import_bundle
from leaderboard.errors import LeaderboardError
from leaderboard.models import Claim, Latency, Preference, Reported, Thumbnail, VideoScore
from leaderboard.published import import_published
from leaderboard.query import load, show
from leaderboard.record import record_claims, record_latency, record_run
from leaderboard.site import build_site
from tests.test_leaderboard import STUDENT, TEACHER, edit, make_run
from tests.test_leaderboard_record import CLAIM, HEAD, TIMING, rows, write
from tests.test_leaderboard_site import check_folder, make_board
from tmd_eval.cli import app


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_board(tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def bundle(board: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "ours.zip"
    done = export_bundle(board, path, lab="Lab A")
    assert done["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and done["rows"] == 3 + 3 + 75 + 2 + 2 + 2
    return path


def plain(db: str) -> list[dict[str, Any]]:
    """Rows without what belongs to one database."""
    rows = [{k: v for k, v in row.items() if k not in ("id", "run", "origin")} for row in show(db, sort="name")]
    return [{**row, "flags": [flag for flag in row["flags"] if flag != "imported"]} for row in rows]


def test_two_labs_join_their_boards(board: str, bundle: Path, tmp_path: Path) -> None:
    db = str(tmp_path / "theirs.db")
    mine_alone = make_run(tmp_path, STUDENT, prompts=1)
    edit(mine_alone / "config.yaml", seed=9)
    record_run(db, mine_alone)
    assert import_bundle(db, bundle) == {"added": 87, "unchanged": 0, "kept": 0}
    assert import_bundle(db, bundle) == {"added": 0, "unchanged": 87, "kept": 0}
    assert [row for row in plain(db) if row["prompts_count"] != 1] == plain(board)
    assert len(rows(db, VideoScore)) == len(rows(board, VideoScore)) == 180
    (mine, *others) = load(db)
    assert mine.origin is None and mine.run and {row.run for row in others} == {""}
    assert all((row.origin or "").startswith("Lab A (sha256 ") for row in others)
    for table in (Latency, Preference, Claim, Reported):
        assert all(row.origin.startswith("Lab A (sha256 ") for row in rows(db, table))
    pictures = rows(db, Thumbnail)
    assert len(pictures) == 12 and all(picture.image.startswith(b"\x89PNG") for picture in pictures)
    build_site(db, tmp_path / "site", command="c")
    page = next((tmp_path / "site" / "models").glob("micro-teacher-*.html"))
    assert page.read_text().count('class="thumbnail"') == 4 and "Lab A" in page.read_text()
    for name, count in (("claims", 2), ("preferences", 2), ("index", 2 + 75)):
        shown = (tmp_path / "site" / f"{name}.html").read_text()
        assert shown.count("came in with Lab A (sha256") == count, name
    assert check_folder(tmp_path / "site") == []
    export_bundle(db, tmp_path / "on.zip")  # and the next lab gets the thumbnails too
    assert import_bundle(str(tmp_path / "third.db"), tmp_path / "on.zip")["added"] == 88
    assert len(rows(str(tmp_path / "third.db"), Thumbnail)) == 12 + 1


def test_what_is_recorded_here_is_ours_and_the_rest_stays_theirs(bundle: Path, tmp_path: Path) -> None:
    db = str(tmp_path / "theirs.db")
    import_bundle(db, bundle)
    report = rows(db, Claim)[0].report
    content = {**HEAD, "rows": [], "claims": [{**CLAIM, "claim": "ours alone"}, CLAIM]}
    record_claims(db, write(tmp_path / "report" / "report.json", content), name=report)
    theirs = {row.claim: row.origin for row in rows(db, Claim)}
    assert theirs[CLAIM["claim"]] is None and theirs.pop("ours alone") is None and len(theirs) == 2, "one is both labs'"
    shared = rows(db, Latency)[0]
    timing = {**TIMING, "checkpoint_hash": shared.checkpoint_hash, "batch": shared.batch}
    record_latency(db, write(tmp_path / "latency.json", {**HEAD, "rows": [timing]}))
    assert [row.origin is None for row in rows(db, Latency)] == [True, False]
    import_published(db)
    assert {row.origin for row in rows(db, Reported)} == {None}


def test_the_same_rows_give_the_same_bundle(board: str, bundle: Path, tmp_path: Path) -> None:
    export_bundle(board, tmp_path / "again.zip", lab="Lab A")
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()


def test_one_row_travels_alone(board: str, tmp_path: Path) -> None:
    teacher = next(row.id for row in load(board) if row.name == TEACHER)
    assert export_bundle(board, tmp_path / "one.zip", rows=[teacher])["rows"] == 1
    assert import_bundle(str(tmp_path / "r.db"), tmp_path / "one.zip")["added"] == 1
    assert [row.name for row in load(str(tmp_path / "r.db"))] == [TEACHER]
    with pytest.raises(LeaderboardError, match="no row 99"):
        export_bundle(board, tmp_path / "x.zip", rows=[99])
    with pytest.raises(LeaderboardError, match="nothing to export"):
        export_bundle(str(tmp_path / "empty.db"), tmp_path / "x.zip")


def repack(bundle: Path, out: Path, change: Callable[[dict[str, bytes]], None], *, rehash: bool = True) -> Path:
    """The bundle after a change of its files; with ``rehash`` the manifest is made to fit, as a forger would."""
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    if rehash and "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        manifest["files"] = {n: hashlib.sha256(d).hexdigest() for n, d in files.items() if n != "manifest.json"}
        files["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out


def rows_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        content = json.loads(files["rows.json"])
        change(content)
        files["rows.json"] = json.dumps(content).encode()

    return apply


def metric(name: str, **values: Any) -> Callable[[dict[str, bytes]], None]:
    return rows_changed(lambda content: content["results"][0]["metrics"][name].update(values))


@pytest.mark.parametrize(
    ("change", "rehash", "message"),
    [
        (metric("frechet", value=1.0), False, r"rows\.json was changed"),
        (lambda files: files.update({"../evil.py": b"x"}), True, r"'\.\./evil\.py', and no bundle has such a file"),
        (lambda files: files.update({"/etc/passwd": b"x"}), True, "no bundle has such a file"),
        (lambda files: files.update({"thumbnails/../../x.png": b"x"}), True, "no bundle has such a file"),
        (lambda files: files.update({f"thumbnails/{'0' * 64}-0.png": b"<svg/>"}), True, "is no picture"),
        (lambda files: files.update({f"thumbnails/{'0' * 64}-0.png": b"0" * 2**21}), True, "too large"),
        (lambda files: files.update({f"thumbnails/{'0' * 64}-0.png": b"x"}), False, "not those of its manifest"),
        (lambda files: files.pop("manifest.json"), True, "manifest.json"),
        (lambda files: files.pop("rows.json"), True, "lacks 'rows.json'"),
        (lambda files: files.update({"manifest.json": b'{"format": 2}'}), False, "has format 2"),
        (metric("frechet", value=-1.0), True, "frechet is -1.0, but it cannot be negative"),
        (metric("frechet", value=float("nan")), True, "NaN is not a finite number"),
        (metric("frechet", low=9.0, high=1.0), True, "ends are swapped"),
        (rows_changed(lambda c: c["results"][0]["metrics"].update(scen=c["results"][0]["metrics"]["frechet"])), True,
         "no dimension 'scen'; did you mean 'scene'"),
        (rows_changed(lambda c: c["results"][0].update(guidance=7.0)), True, "is not that of its content"),
        (rows_changed(lambda c: c["results"][0].update(m="2")), True, "m is '2', which is no int"),
        (rows_changed(lambda c: c["results"][0].update(seconds_per_video=-3)), True, "seconds_per_video is -3.0"),
        (rows_changed(lambda c: c["results"][0].pop("device")), True, "lacks 'device'"),
        (rows_changed(lambda c: c["results"][0].update(role="boss")), True, "the role 'boss'"),
        (rows_changed(lambda c: c["reported"][0]["scores"].update(total=184.0)), True, "outside 0 to 100"),
        (rows_changed(lambda c: c["claims"][0].update(verdict="maybe")), True, "'maybe' is none of"),
        (rows_changed(lambda c: c["latencies"][0]["seconds"]["total"].update(median=-1)), True, "never negative"),
        (rows_changed(lambda c: c["preferences"][0].update(value=60)), True, "between 0 and 1"),
        (rows_changed(lambda c: c.update(users=[])), True, "unknown kind 'users'"),
        (metric("frechet", low=None, high=9.0), True, "give both ends, or neither"),
        (metric("alignment_joint", value=84.0), True, "scores are between 0 and 1"),
        (rows_changed(lambda c: c["preferences"][0].update(low=0.1, high=None)), True, "give both ends, or neither"),
        (rows_changed(lambda c: c["results"][0].update(videos=2**70)), True, "is too large a number"),
        (rows_changed(lambda c: c["results"][0].update(video_scores={"x": [[1, 2**70, 1.0]]})), True, "too large"),
        (rows_changed(lambda c: c["results"][0].update(video_scores={"x": 2 * [[1, 0, 1.0]]})), True, "video twice"),
        (rows_changed(lambda c: c["results"][0].update(thumbnails=[{"prompt": "p", "file": "absent"}])), True,
         "names thumbnails that are not its own"),
        (rows_changed(lambda c: c["results"][0].update(thumbnails=5 * c["results"][0]["thumbnails"])), True,
         "names thumbnails that are not its own, or more than 4"),
    ],
)  # fmt: skip
def test_a_changed_or_impossible_bundle_is_refused_and_nothing_is_stored(
    bundle: Path, tmp_path: Path, change: Any, rehash: bool, message: str
) -> None:
    db = str(tmp_path / "r.db")
    bad = repack(bundle, tmp_path / "bad.zip", change, rehash=rehash)
    with pytest.raises(LeaderboardError, match=message):
        import_bundle(db, bad)
    assert load(db) == [] and show(db) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.zip", "r.db", "r.db-wal", "r.db-shm"}


def test_a_flipped_bit_anywhere_is_one_sentence_or_no_matter(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    refused = 0
    for place in range(0, len(whole), len(whole) // 30):
        (tmp_path / "flipped.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            import_bundle(str(tmp_path / "r.db"), tmp_path / "flipped.zip")
        except LeaderboardError:
            refused += 1
    assert refused >= 25


def test_numbers_of_a_bundle_are_stored_as_they_were_checked(bundle: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["latencies"][0]["seconds"] = {"total": {"median": "5", "p95": 6}, "text": None}
        entry = content["results"][0]["metrics"]["frechet"]
        content["results"][0]["metrics"] = {"frechet": entry, "total": {**entry, "value": 7.5}}

    db = str(tmp_path / "r.db")
    import_bundle(db, repack(bundle, tmp_path / "odd.zip", rows_changed(change)))
    assert {"total": {"median": 5.0, "p95": 6.0}} in [row.seconds for row in rows(db, Latency)]
    assert not [
        row for row in load(db) if row.metric("total") and not row.metric("scene")
    ]  # no total without its parts


def test_a_row_that_differs_is_kept_as_it_is_here(bundle: Path, tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    import_bundle(db, bundle)
    before = plain(db)
    forged = repack(bundle, tmp_path / "forged.zip", metric("frechet", value=0.5, low=0.4, high=0.6))
    assert import_bundle(db, forged) == {"added": 0, "unchanged": 86, "kept": 1}
    assert plain(db) == before


def test_the_senders_hash_is_compared(bundle: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    with pytest.raises(LeaderboardError, match="changed on its way"):
        import_bundle(str(tmp_path / "r.db"), bundle, sha256="0" * 64)
    assert import_bundle(str(tmp_path / "r.db"), bundle, sha256=digest.upper())["added"] == 87


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 half", b"text"):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(LeaderboardError, match="cannot be imported"):
            import_bundle(str(tmp_path / "r.db"), tmp_path / "a.zip")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("manifest.json", "[]")
    (tmp_path / "a.zip").write_bytes(packed.getvalue())
    with pytest.raises(LeaderboardError, match=r"cannot be imported|lacks"):
        import_bundle(str(tmp_path / "r.db"), tmp_path / "a.zip")
    with pytest.raises(LeaderboardError, match="Cannot read"):
        import_bundle(str(tmp_path / "r.db"), tmp_path / "absent.zip")


# Commands


def call(*words: str) -> str:
    result = CliRunner().invoke(app, ["leaderboard", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands(board: str, tmp_path: Path) -> None:
    out, db = str(tmp_path / "a.zip"), str(tmp_path / "r.db")
    done = json.loads(call("export", "--out", out, "--lab", "A", "--db", board, "--json"))
    assert list(done) == ["bundle", "rows", "sha256"]
    counts = json.loads(call("import", out, "--sha256", done["sha256"], "--db", db, "--json"))
    assert counts == {"added": 87, "unchanged": 0, "kept": 0}
    root = Path(board).parent
    assert json.loads(call("add", str(root / "latency.json"), "--db", db, "--json")) == {"rows": [1, 2]}
    assert call("add", str(root / "preferences.json"), "--db", db).startswith("2 rows of")
    assert json.loads(call("add", str(root / "matrix"), "--db", db, "--json")) == {"rows": [1, 2]}
    for words in (
        ["export", "--out", "a.tar"],
        ["import", "published", "--sha256", "0"],
        ["build", "--out", "x", "--published"],
    ):
        with pytest.raises(LeaderboardError):
            call(*words, "--db", db)


def test_the_live_page_shows_the_same_rows(board: str) -> None:
    from leaderboard.serve import boards, table

    assert boards(board) == ["Measured on micro", "Measured on vbench", "Reported elsewhere"]
    heads, found = table(board, "Measured on micro", "tmd")
    assert [row[heads.index("Model")] for row in found] == [STUDENT]
    assert found[0][heads.index("Joint alignment, %")] == "84.0 [81.0, 87.0]"
    heads, found = table(board, "Reported elsewhere", "rcm 14b")
    assert len(found) == 6 and {row[heads.index("Flags")] for row in found} == {""}
    assert table(board, "Measured on nothing", "") == (["Model"], [])


def test_the_live_page_answers(board: str) -> None:
    pytest.importorskip("gradio")
    import urllib.request

    from leaderboard.serve import page

    blocks = page(board)
    _, address, _ = blocks.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True)
    try:
        with urllib.request.urlopen(f"{address}config", timeout=30) as answer:
            config = json.loads(answer.read())
        assert config["title"] == "Leaderboard" and config["analytics_enabled"] is False
        labels = {component["props"].get("label") for component in config["components"]}
        assert {"Board", "Filter rows", "Rows"} <= labels
    finally:
        blocks.close()

"""The routes: blinding, tokens, refusals, leases, resuming, withdrawal; on SQLite, and the core again on PostgreSQL."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from leaderboard.database import open_engine
from leaderboard.errors import LeaderboardError
from studies import ballots
from studies.analyze import analyze_study
from studies.app import Server, build_app
from studies.clips import read_frames
from studies.clock import Clock
from studies.create import create_study, plan_study
from studies.database import Database
from studies.design import QUESTIONS
from studies.errors import SealedError, StudyError
from studies.export import export_study
from studies.models import VERSION_TABLE, Audit, Base, Rater, Sheet, Study, Trial, Vote
from studies.rehearse import Model, rehearse
from studies.schedule import ClipRef
from studies.serving import Serving, open_folder
from studies.simulate import Effects
from studies.unblind import unblind_study
from studies.video_sets import read_set
from studies.votes import Refused, read_ballot
from tests.studykit import MODELS, make_set, make_study, prompts

EVIL = '<img src=x onerror=alert(1)> & "quotes" ../../etc/passwd'


class Hand(Clock):
    """A clock set by hand."""

    def __init__(self) -> None:
        self.at = datetime(2027, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def wait(self, **passed: float) -> None:
        self.at += timedelta(**passed)


class Site:
    """A study with its app, and raters that come to it."""

    def __init__(self, folder: Path, db: str) -> None:
        self.folder, self.db, self.clock = open_folder(folder), db, Hand()
        self.server = Server(self.folder, db, self.clock)
        self.app = build_app(self.server)

    def rater(self, name: str | None = None, *, agree: bool = True) -> tuple[TestClient, dict[str, Any]]:
        client = TestClient(self.app, raise_server_exceptions=False)
        params = {} if name is None else {self.folder.serving.parameter: name}
        state = client.post("/api/enter", json={"params": params}).json()
        if agree and state["stage"] == "consent":
            state = client.post("/api/consent", json={"agree": True, "consent": state["consent"]}).json()
        return client, state

    def vote(self, client: TestClient, state: dict[str, Any], **changes: Any) -> Any:
        for side in ("left", "right"):
            assert client.get("/" + state["trial"][side]).status_code == 200
        self.clock.wait(seconds=2)
        return client.post(f"/api/trial/{state['trial']['token']}/vote", json=ballot(**changes))

    def finish(self, client: TestClient, state: dict[str, Any]) -> dict[str, Any]:
        while state["stage"] == "trial":
            state = self.vote(client, state).json()["next"]
        return state

    def rows(self, model: Any) -> list[Any]:
        with self.server.database.reading() as session:
            return list(session.scalars(select(model)))


def ballot(quality: str = "left", alignment: str = "right", watched: float = 1.0) -> dict[str, Any]:
    answers = dict(zip(QUESTIONS, (quality, alignment), strict=True))
    return {
        "answers": answers, "seconds": dict.fromkeys(QUESTIONS, 1.5), "watched": {"left": watched, "right": 1.0},
        "replays": 1, "slow": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study of one pair, four prompts (one of them hostile), two seeds: four raters of three votes and a catch."""
    folder = tmp_path_factory.mktemp("study")
    texts = [*prompts(3), EVIL]
    sets = {name: make_set(folder / name, texts, shade=shade) for shade, name in enumerate(MODELS[:2])}
    settings = {"name": "test", "seeds": 2, "trials_per_rater": 3, "catch_share": 0.34, "votes_per_item": 1}
    serving = Serving(completion_code="DONE-77", completion_url="https://example.org/?cc={code}")
    plan = plan_study(sets, settings, num_prompts=4, serving=serving)
    create_study(plan, folder / "study", str(folder / "votes.db"), command="test")
    return folder / "study", str(folder / "votes.db")


@pytest.fixture
def site(made: tuple[Path, str], tmp_path: Path) -> Site:
    shutil.copytree(made[0], tmp_path / "study")
    sqlite3.connect(made[1]).execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(made[1], tmp_path / "votes.db")
    return Site(tmp_path / "study", str(tmp_path / "votes.db"))


def test_a_whole_session(site: Site):
    client, state = site.rater("worker 1", agree=False)
    assert state["stage"] == "consent" and not site.rows(Rater), "nothing is stored before the consent"
    assert client.post("/api/consent", json={"agree": False, "consent": state["consent"]}).status_code == 422
    state = client.post("/api/consent", json={"agree": True, "consent": state["consent"]}).json()
    assert state["trial"]["practice"] and sorted(state["trial"]["questions"]) == sorted(QUESTIONS)
    answer = site.vote(client, state).json()
    assert answer["feedback"]["visual quality"] == {"expected": "left", "given": "left"}
    state = site.finish(client, answer["next"])
    assert state == {"stage": "done", "code": "DONE-77", "link": "https://example.org/?cc=DONE-77"}
    votes = site.rows(Vote)
    assert len(votes) == 5 and all(vote.schedule_hash == site.folder.schedule_hash for vote in votes)
    assert {vote.seconds_total for vote in votes} == {2.0} and all(vote.app_version for vote in votes)
    assert client.post("/api/state", json={}).json()["stage"] == "done"
    rater = site.rows(Rater)[0]
    assert "worker" not in rater.key_hash and len(rater.key_hash) == 64 and rater.consent_hash


def test_the_same_link_resumes_at_the_same_trial(site: Site):
    client, state = site.rater("worker")
    state = site.vote(client, state).json()["next"]
    resumed = site.rater("worker")[1]
    assert resumed["trial"] == state["trial"]
    site.clock.wait(days=3)
    other_day = site.rater("worker")[1]
    assert other_day["trial"] == state["trial"]
    # without an id, the cookie resumes
    nobody, first = site.rater()
    assert nobody.post("/api/enter", json={"params": {}}).json()["trial"] == first["trial"]


def test_votes_are_idempotent_and_conflicts_refused(site: Site):
    client, state = site.rater("worker")
    first = site.vote(client, state)
    url = f"/api/trial/{state['trial']['token']}/vote"
    second = client.post(url, json=ballot())
    assert (first.status_code, second.status_code) == (200, 200) and first.json() == second.json()
    conflict = client.post(url, json=ballot(quality="right"))
    assert (conflict.status_code, conflict.json()) == (409, {"error": "conflict"})
    votes = site.rows(Vote)
    assert [(vote.quality, vote.alignment) for vote in votes] == [("left", "right")]


def test_foreign_expired_and_forged_tokens(site: Site):
    one, state_one = site.rater("one")
    two, state_two = site.rater("two")
    stranger = TestClient(site.app)
    clip, vote = "/" + state_one["trial"]["left"], f"/api/trial/{state_one['trial']['token']}/vote"
    assert [client.get(clip).status_code for client in (one, two, stranger)] == [200, 403, 403]
    assert [client.post(vote, json=ballot()).status_code for client in (two, stranger)] == [403, 403]
    assert (
        one.get("/clip/nonsense").status_code == 404 and one.post("/api/trial/x/vote", json=ballot()).status_code == 404
    )
    site.vote(one, state_one)
    assert one.get(clip).status_code == 404, "a clip's token ends with its vote"
    ((name, cookie),) = one.cookies.items()
    stranger.cookies.set(name, cookie[:-1] + ("0" if cookie[-1] != "0" else "1"))
    assert stranger.post("/api/state", json={}).status_code == 403
    tokens = [state[side] for state in (state_one["trial"], state_two["trial"]) for side in ("token", "left", "right")]
    assert len(set(tokens)) == 6


def test_forged_watching_is_refused(site: Site):
    client, state = site.rater("worker")
    url = f"/api/trial/{state['trial']['token']}/vote"
    site.clock.wait(seconds=60)
    refused = client.post(url, json=ballot())
    assert (refused.status_code, refused.json()["error"]) == (422, "unwatched"), "no clip was fetched"
    client, state = site.rater("quick")
    url = f"/api/trial/{state['trial']['token']}/vote"
    for side in ("left", "right"):
        client.get("/" + state["trial"][side])
    site.clock.wait(seconds=0.4)
    assert client.post(url, json=ballot()).status_code == 422, "a clip of half a second cannot be over yet"
    site.clock.wait(seconds=0.1)
    assert client.post(url, json=ballot(watched=0.5)).status_code == 422
    assert client.post(url, json=ballot()).status_code == 200
    assert len(site.rows(Vote)) == 1


def test_malformed_votes_are_refused(site: Site):
    client, state = site.rater("worker")
    url = f"/api/trial/{state['trial']['token']}/vote"
    bodies: list[Any] = [
        {}, [], None, "x", ballot() | {"answers": {"visual quality": "left"}}, ballot(quality="tie"),
        ballot(quality="<b>"), ballot() | {"replays": -1}, ballot() | {"replays": True}, ballot() | {"slow": "no"},
        ballot() | {"seconds": {"visual quality": 1e999, "prompt alignment": 1}}, ballot(watched=1.5),
        ballot() | {"replays": 10**400},
    ]  # fmt: skip
    for body in bodies:
        answer = client.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()) == (422, {"error": "malformed"}), body
    assert client.post(url, content="{", headers={"content-type": "application/json"}).status_code == 422
    assert client.post(url, content="{}", headers={"content-type": "text/plain"}).status_code == 415
    assert not site.rows(Vote)
    half = client.post(
        "/api/enter", content=r'{"params": {"rater": "\ud800"}}', headers={"content-type": "application/json"}
    )
    assert (half.status_code, half.json()) == (422, {"error": "malformed"})


def test_ties_only_where_they_are_offered():
    assert read_ballot(ballot(quality="tie"), allow_ties=True).answers == ("tie", "right")
    with pytest.raises(Refused):
        read_ballot(ballot(quality="tie"), allow_ties=False)


def test_oversized_requests_and_closed_doors(site: Site):
    client, _ = site.rater("worker")
    big = json.dumps({"params": {"rater": "x" * 20_000}})
    assert client.post("/api/enter", content=big, headers={"content-type": "application/json"}).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from [b'{"params": {"rater": "'] + [b"x" * 4000] * 10 + [b'"}}']

    chunked = client.post("/api/enter", content=chunks(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413
    assert client.post("/api/enter", json={"params": {"rater": "x" * 300}}).status_code == 422
    for path in (
        "/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/info", "/gradio_api/proxy=http://x",
        "/file=/etc/passwd",
        "/clip/..%2f..%2fsealed.json", "/clip/../../sealed.json", "/sealed.json", "/static/..%2f..%2fsealed.json",
        "/gradio_api/queue/join", "/docs", "/openapi.json", "/monitoring", "/gradio_api/runs",
    ):  # fmt: skip
        assert client.get(path).status_code in (400, 403, 404, 405), path
        assert client.post(path, json={}).status_code in (403, 404, 405), path
    assert client.get("/?" + "x" * 5000).status_code == 414
    assert client.request("DELETE", "/api/state").status_code == 405


def test_nothing_a_rater_gets_tells_the_models_apart(site: Site):
    client, state = site.rater("worker")
    page, config = client.get("/"), client.get("/config")
    texts = [page.text, config.text, client.get("/api/texts").text]
    heads: dict[str, set[frozenset[tuple[str, str]]]] = {}
    sealed = json.loads((site.folder.path / "sealed.json").read_text())
    names = [*MODELS, *sealed["clips"], *(model["checkpoint_hash"] for model in sealed["models"]), "sealed", "secret"]
    while state["stage"] == "trial":
        texts.append(json.dumps(state))
        for side in ("left", "right"):
            clip = client.get("/" + state["trial"][side])
            assert clip.headers["content-disposition"] == 'inline; filename="clip.mp4"'
            token = state["trial"][side].removeprefix("clip/")
            assert clip.headers["etag"] == f'"{token}"' and "1970" in clip.headers["last-modified"]
            texts += [str(clip.headers), clip.content.decode("latin-1")]
            same = {k: v for k, v in clip.headers.items() if k not in ("etag", "content-length", "date")}
            heads.setdefault(side, set()).add(frozenset(same.items()))
        state = site.vote(client, state).json()["next"]
    assert all(len(found) == 1 for found in heads.values()) and heads["left"] == heads["right"]
    for text in texts:
        assert not [name for name in names if name in text and name != "secret"]
    for text in texts[:3]:
        assert "secret-" not in text and "onerror=alert" not in text
    assert page.headers["content-security-policy"].startswith("default-src 'self'")


def test_clips_answer_ranges_and_carry_no_metadata(site: Site):
    import av

    client, state = site.rater("worker")
    url = "/" + state["trial"]["left"]
    whole = client.get(url).content
    part = client.get(url, headers={"range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}" and "host" not in part.headers
    shapes = set()
    for path in (site.folder.path / "clips").iterdir():
        with av.open(str(path)) as container:
            assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands"}, container.metadata
            stream = container.streams.video[0]
            assert set(stream.metadata) <= {"language", "handler_name", "vendor_id"}
            shapes.add((stream.codec_context.name, stream.frames, stream.average_rate, stream.width, stream.height))
    assert len(shapes) == 1


def test_leases_return_what_the_silent_leave(site: Site):
    clients = [site.rater(f"worker {number}") for number in range(site.folder.raters)]
    assert all(state["stage"] == "trial" for _, state in clients)
    late, state = site.rater("latecomer")
    assert state["stage"] == "full"
    client, first = clients[0]
    while first["trial"]["practice"]:
        first = site.vote(client, first).json()["next"]
    first = site.vote(client, first).json()["next"]
    for number in range(1, site.folder.raters):
        site.finish(*clients[number])
    site.clock.wait(minutes=site.folder.lease_minutes + 1)
    state = late.post("/api/state", json={}).json()
    assert state["stage"] == "trial" and state["trial"]["practice"], "a newcomer practises first"
    assert site.finish(late, state)["stage"] == "done"
    gone = client.post(f"/api/trial/{first['trial']['token']}/vote", json=ballot())
    assert gone.status_code == 404
    assert client.post("/api/state", json={}).json()["stage"] == "done", "others did the rest"
    assert len([1 for row in site.rows(Audit) if row.action == "taken over"]) == 1
    assert sum(1 for _ in site.rows(Sheet) if _.finished) == site.folder.raters
    with site.server.database.reading() as session:
        mains = session.scalar(select(func.count()).select_from(Vote).join(Trial).where(Trial.kind == "main"))
    assert mains == site.folder.votes


def test_a_sheet_may_be_taken_over_again_and_again(site: Site, tmp_path: Path):
    site.vote(*site.rater("a"))  # one practice trial of two
    for number in range(1, site.folder.raters):
        site.finish(*site.rater(f"worker {number}"))
    for name in ("b", "c"):
        site.clock.wait(minutes=site.folder.lease_minutes + 1)
        site.vote(*site.rater(name))
    site.clock.wait(minutes=site.folder.lease_minutes + 1)
    last, state = site.rater("d")
    practised = 0
    while state["trial"]["practice"]:
        state = site.vote(last, state).json()["next"]
        practised += 1
    assert practised == 2, "what others left of their practice is not added"
    assert site.finish(last, state)["stage"] == "done"
    unblind_study(site.folder, site.db, reason="r", command="c")
    assert analyze_study(site.folder, site.db, tmp_path / "out", code_revision="r", command="c")["votes"] == 8
    export_study(site.folder, site.db, tmp_path / "open", command="c")
    sealed = json.loads((site.folder.path / "sealed.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "open" / "votes.jsonl").read_text().splitlines()]
    told = {(row["sheet"], row["position"]): (row["model_left"], row["model_right"]) for row in rows}
    voted = {vote.trial_id for vote in site.rows(Vote)}
    numbers = {sheet.id: sheet.number for sheet in site.rows(Sheet)}
    shown = {
        (numbers[trial.sheet_id], trial.position): tuple(
            MODELS[sealed["clips"][name]["model"]] for name in (trial.left, trial.right)
        )
        for trial in site.rows(Trial)
        if trial.id in voted
    }
    assert told == shown, "every vote is on the models that were shown, practice of newcomers too"


def test_nobody_is_done_while_a_sheet_may_come_free(site: Site):
    early, state = site.rater("early")
    site.vote(early, state)  # practice only
    site.clock.wait(minutes=site.folder.lease_minutes + 1)
    others = [site.rater(f"worker {number}") for number in range(1, site.folder.raters)]
    holder, state = others[0]
    while state["done"] == 0:
        state = site.vote(holder, state).json()["next"]
    newcomer, theirs = site.rater("newcomer")
    assert theirs["stage"] == "trial", "takes over what the early one left"
    assert early.post("/api/state", json={}).json() == {"stage": "full"}, "no code for a practice trial"
    site.clock.wait(minutes=site.folder.lease_minutes - 1)
    for client, _ in (*others[1:], (newcomer, theirs)):
        client.post("/api/state", json={})
    site.clock.wait(minutes=2)
    state = early.post("/api/state", json={}).json()
    assert state["stage"] == "trial", "takes over what the holder left"
    assert holder.post("/api/state", json={}).json() == {"stage": "full"}, "not done after one vote"
    site.finish(early, state)
    for client, _ in (*others[1:], (newcomer, theirs)):
        site.finish(client, client.post("/api/state", json={}).json())
    assert holder.post("/api/state", json={}).json()["stage"] == "done", "others did the rest"
    assert early.post("/api/state", json={}).json()["stage"] == "done"


def test_a_sheet_without_main_trials_left_is_closed_and_another_leased(site: Site):
    almost, state = site.rater("almost")
    while state["done"] < 2:
        state = site.vote(almost, state).json()["next"]
    with site.server.writing() as session:  # a swapped repeat is all that is left
        last = session.scalars(select(Trial).join(Sheet).where(Sheet.number == 0).order_by(Trial.position)).all()[-1]
        last.kind, last.repeat_of = "repeat", 2
    site.clock.wait(minutes=1)
    others = [site.rater(f"worker {number}") for number in range(1, site.folder.raters)]
    site.clock.wait(minutes=site.folder.lease_minutes + 1)
    for client, _ in others[1:]:
        client.post("/api/state", json={})
    newcomer, state = site.rater("newcomer")
    assert site.finish(newcomer, state)["stage"] == "done"
    rater = site.rows(Rater)[-1]
    kinds = {trial.id: trial.kind for trial in site.rows(Trial)}
    assert [kinds[vote.trial_id] for vote in site.rows(Vote) if vote.rater_id == rater.id].count("main") == 2
    assert [row.action for row in site.rows(Audit)] == ["created", "closed", "taken over"]
    assert almost.post("/api/state", json={}).json()["stage"] == "done"


def test_a_silent_rater_keeps_the_sheet_while_nobody_waits(site: Site):
    client, state = site.rater("worker")
    site.clock.wait(days=2)
    assert site.rater("another")[1]["stage"] == "trial", "a fresh sheet goes first"
    assert client.post("/api/state", json={}).json()["trial"] == state["trial"]


def test_withdrawal_marks_votes_and_frees_the_rest(site: Site):
    client, state = site.rater("worker")
    site.vote(client, state)
    assert client.post("/api/withdraw", json={}).json() == {"stage": "withdrawn"}
    assert [vote.withdrawn for vote in site.rows(Vote)] == [True]
    assert client.post("/api/state", json={}).json() == {"stage": "withdrawn"}
    assert client.post("/api/withdraw", json={}).status_code == 403
    assert "withdrawn" in [row.action for row in site.rows(Audit)]
    assert [sheet.lease_until <= site.clock.now() for sheet in site.rows(Sheet) if sheet.rater_id]


def test_platforms_bring_their_own_parameters(made: tuple[Path, str], tmp_path: Path):
    shutil.copytree(made[0], tmp_path / "study")
    content = json.loads((tmp_path / "study" / "study.json").read_text())

    def serve(**serving: Any) -> TestClient:
        content["serving"] = serving
        (tmp_path / "study" / "study.json").write_text(json.dumps(content))
        return TestClient(build_app(Server(open_folder(tmp_path / "study"), made[1])))

    stage = lambda client, **params: client.post("/api/enter", json={"params": params}).json()["stage"]  # noqa: E731
    prolific = serve(platform="prolific")
    assert stage(prolific) == "unknown" and stage(prolific, PROLIFIC_PID="p") == "consent"
    assert stage(prolific, workerId="p") == "unknown"
    mturk = serve(platform="mturk")
    assert stage(mturk, workerId="w", assignmentId="ASSIGNMENT_ID_NOT_AVAILABLE") == "preview"
    assert stage(mturk, workerId="w", assignmentId="a") == "consent"
    assert stage(serve(platform="none", rater_parameter="id"), id="w") == "consent"
    for bad in ({"platform": "x"}, {"unknown": 1}, {"completion_url": "javascript:alert(1)"}):
        with pytest.raises(StudyError):
            serve(**bad)
    with pytest.raises(StudyError, match="No texts"):
        serve(language="tlh")
    assert "frame-ancestors 'none'" in mturk.get("/").headers["content-security-policy"], "a HIT links to a new tab"
    with pytest.raises(StudyError, match="--completion-code"):
        plan_study({}, {}, serving=Serving(platform="mturk"))


def test_admin_needs_the_secret(site: Site):
    client, _ = site.rater("worker")
    assert client.get("/admin/status").status_code == 403
    assert client.get("/admin/status", headers={"authorization": "Bearer x"}).status_code == 403
    secret = site.folder.keys["admin"]
    shown = client.get("/admin/status", headers={"authorization": f"Bearer {secret}"})
    assert shown.json()["raters"]["consented"] == 1 and shown.headers["cache-control"] == "no-store"
    assert not [name for name in MODELS if name in shown.text]


def test_a_locked_database_is_a_polite_503_and_loses_nothing(site: Site):
    client, state = site.rater("worker")
    for side in ("left", "right"):
        client.get("/" + state["trial"][side])
    site.clock.wait(seconds=2)
    other = sqlite3.connect(site.db, isolation_level=None)
    with site.server.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=50")
        driver = connection.connection.driver_connection
    assert driver is not None
    other.execute("BEGIN IMMEDIATE")
    url = f"/api/trial/{state['trial']['token']}/vote"
    busy = client.post(url, json=ballot())
    assert (busy.status_code, busy.json()) == (503, {"error": "retry"}) and busy.headers["retry-after"]
    other.execute("ROLLBACK")
    assert client.post(url, json=ballot()).status_code == 200 and len(site.rows(Vote)) == 1


def test_the_clock_never_goes_back():
    wall = [1000.0]
    clock = Clock(datetime.fromtimestamp(2000, UTC), wall=lambda: wall[0])
    first = clock.now()
    assert first.timestamp() >= 2000
    wall[0] = 5000.0
    assert clock.now().timestamp() == 5000
    wall[0] = 10.0
    assert clock.now().timestamp() >= 5000


def test_threads_that_join_at_once_get_different_sheets(site: Site):
    found: list[str] = []

    def join(number: int) -> None:
        found.append(site.rater(f"worker {number}")[1]["stage"])

    threads = [threading.Thread(target=join, args=(number % 4,)) for number in range(8)]  # each rater in two tabs
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["trial"] * 8 and len(site.rows(Rater)) == 4
    holders = [sheet.rater_id for sheet in site.rows(Sheet) if sheet.rater_id]
    assert len(holders) == len(set(holders)) == 4


# The operator's side


def test_blind_until_unblinded(site: Site, tmp_path: Path):
    for number in range(site.folder.raters):
        site.finish(*site.rater(f"worker {number}"))
    args: dict[str, Any] = {"command": "test"}
    with pytest.raises(SealedError, match="study unblind"):
        analyze_study(site.folder, site.db, tmp_path / "out", code_revision="r", **args)
    with pytest.raises(SealedError):
        export_study(site.folder, site.db, tmp_path / "blind", backup=True, **args)
    blind = export_study(site.folder, site.db, tmp_path / "blind", **args)
    assert blind["blind"] and blind["rows"] == 2 * len(site.rows(Vote))
    sealed = json.loads((site.folder.path / "sealed.json").read_text())
    for file in blind["files"]:
        data = Path(file).read_bytes()
        for name in [*MODELS, *sealed["clips"], *(model["checkpoint_hash"] for model in sealed["models"])]:
            assert name.encode() not in data
    head = (tmp_path / "blind" / "votes.csv").read_text().splitlines()[0].split(",")
    assert not {"pair", "seed_left", "seed_right", "a_left", "model_left", "preferred_model", "correct"} & set(head)
    with pytest.raises(StudyError, match="--reason"):
        unblind_study(site.folder, site.db, reason=" ", **args)
    facts = unblind_study(site.folder, site.db, reason="all in", **args)
    assert facts["votes"] == facts["wanted"] == site.folder.votes
    preferences = analyze_study(site.folder, site.db, tmp_path / "out", code_revision="r", **args)
    assert [row["question"] for row in preferences["results"]] == list(QUESTIONS)
    for row, wins in zip(preferences["results"], (0, 1), strict=True):
        sides = [t["a_left"] for s in sealed["sheets"] for t in s["trials"] if t["kind"] == "main"]
        expected = (
            sum(sides) if wins == 0 else len(sides) - sum(sides)
        )  # all said left for quality, right for alignment
        assert (row["a"], row["b"], row["wins_a"]) == (*MODELS[:2], expected)
        assert row["n_votes"] == site.folder.votes and row["value"] == 0.5
    for name in ("preferences.json", "analysis.json", "report.md", "index.html", "preferences.svg", "preferences.png"):
        assert (tmp_path / "out" / name).stat().st_size
    html = (tmp_path / "out" / "index.html").read_text()
    assert MODELS[0] in html and "http" not in html.replace("https://example", "") and "<script" not in html
    assert 'src="data:image/svg+xml;base64,' in html and "preferences.svg" not in html, "nothing outside itself"
    with pytest.raises(StudyError, match="place of the database"):
        export_study(site.folder, site.db, Path(site.db).parent, backup=True, **args)
    assert not (Path(site.db).parent / "votes.csv").exists() and sqlite3.connect(site.db).execute(
        "SELECT 1 FROM studies"
    )
    open_export = export_study(site.folder, site.db, tmp_path / "open", backup=True, **args)
    assert not list((tmp_path / "open").glob(".tmp*"))
    import pandas as pd

    table = pd.read_parquet(tmp_path / "open" / "votes.parquet")
    assert len(table) == open_export["rows"] and set(table["model_left"]) == set(MODELS[:2])
    assert len(pd.read_csv(tmp_path / "open" / "votes.csv")) == len(table)
    assert set(table["seed_left"]) | set(table["seed_right"]) == {0, 1, 1000, 1001}, "from the sealed schedule"
    copied = sqlite3.connect(tmp_path / "open" / "votes.db").execute("SELECT count(*) FROM study_votes").fetchone()
    assert copied == (len(site.rows(Vote)),)
    actions = [row.action for row in site.rows(Audit)]
    assert actions == ["created", "exported", "unblinded", "analyzed", "exported"]
    from leaderboard.models import Preference

    engine = open_engine(site.db)
    with engine.connect() as connection:
        rows = connection.execute(select(Preference.question, Preference.simulated)).all()
    assert sorted(tuple(row) for row in rows) == [("prompt alignment", False), ("visual quality", False)]


def test_the_database_names_no_model_while_a_study_is_blind(tmp_path: Path):
    sets = {
        name: make_set(tmp_path / name, prompts(8), seeds=2, shade=i, frames=2) for i, name in enumerate(MODELS[:2])
    }
    settings = {"name": "s", "seeds": 2, "trials_per_rater": 4, "catch_share": 0.0, "votes_per_item": 1}
    plan, db = plan_study(sets, settings, num_prompts=8), str(tmp_path / "votes.db")
    command = f"study create --videos {MODELS[0]}=x --videos {MODELS[1]}=y"
    order: list[ClipRef] = []

    def listed(clips: Sequence[ClipRef]) -> Sequence[ClipRef]:
        order.extend(clips)
        return clips

    create_study(plan, tmp_path / "study", db, command=command, progress=listed)
    dump = "\n".join(sqlite3.connect(db).iterdump())
    assert "study_trials" in dump and not [name for name in MODELS if name in dump]
    database = Database(db)
    with database.reading() as session:
        assert {seed for row in session.execute(select(Trial.seed_left, Trial.seed_right)) for seed in row} == {None}
    first = {}
    for clip in order:
        if not clip.corrupted:
            first.setdefault((clip.prompt, clip.index), clip.model)
    assert set(first.values()) == {0, 1}, "times of the files do not tell the models apart"
    assert json.loads((tmp_path / "study" / "sealed.json").read_text())["command"] == command


def test_votes_after_unblinding_are_counted_and_said(site: Site, tmp_path: Path):
    site.finish(*site.rater("first"))
    unblind_study(site.folder, site.db, reason="to look", command="c")
    args: dict[str, Any] = {"code_revision": "r", "command": "c"}
    analyze_study(site.folder, site.db, tmp_path / "one", **args)
    site.finish(*site.rater("second"))
    analyze_study(site.folder, site.db, tmp_path / "two", **args)
    found = [json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("one", "two")]
    assert [analysis["votes_after_unblinding"] for analysis in found] == [0, 2]
    texts = [(tmp_path / name / "report.md").read_text() for name in ("one", "two")]
    sentence = "2 main votes were cast after the study was unblinded"
    assert "with 0 main votes cast after it" in texts[0] and sentence in texts[1] and sentence not in texts[0]


def test_a_changed_schedule_is_found_out(site: Site, tmp_path: Path):
    unblind_study(site.folder, site.db, reason="r", command="c")
    path = site.folder.path / "sealed.json"
    content = json.loads(path.read_text())
    content["design"]["exclusions"]["max_obvious_failures"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="was changed after"):
        analyze_study(site.folder, site.db, tmp_path, code_revision="r", command="c")


def test_rehearsal_finds_the_stated_preference_and_says_simulated(tmp_path: Path):
    study, db = make_study(
        tmp_path, models=3, count=8, votes_per_item=6, trials_per_rater=12, catch_share=0.25, frames=2,
        reference=None,
    )  # fmt: skip
    folder = open_folder(study)
    strengths = ({MODELS[0]: 2.0, MODELS[1]: 0.5}, {MODELS[2]: 2.0})
    model = Model(strengths=strengths, effects=Effects(prompt=0.3, item=0.3, rater=0.2), careless=0.2)
    facts = rehearse(folder, db, model, seed=1, command="c")
    assert facts["raters"] == folder.raters
    unblind_study(folder, db, reason="r", command="c")
    found = analyze_study(folder, db, tmp_path / "out", code_revision="r", command="c")
    assert found["simulated"] and found["votes"] + 0 <= folder.votes
    by = {(row["question"], row["a"], row["b"]): row["value"] for row in found["results"]}
    assert by["visual quality", MODELS[0], MODELS[2]] > 0.7 > 0.3 > by["prompt alignment", MODELS[0], MODELS[2]]
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert analysis["excluded_raters"] and analysis["ranking"]["visual quality"]["models"][0]["model"] == MODELS[0]
    assert analysis["self_consistency"]["visual quality"]["repeats"] > 0
    assert {row["variant"] for row in analysis["sensitivity"]} == {"all raters", "ties left out", "both"}
    assert analysis["votes_after_unblinding"] == 0, "simulated times run ahead of the clock"
    assert "simulated" in (tmp_path / "out" / "report.md").read_text()
    assert b"SIMULATED" in (tmp_path / "out" / "preferences.svg").read_bytes()
    with pytest.raises(StudyError, match="no model 'x'"):
        rehearse(folder, db, Model(strengths=({"x": 1.0}, {}), effects=Effects()), seed=1, command="c")


# Creating


def test_unequal_sets_are_refused_with_the_way_out(tmp_path: Path):
    a = make_set(tmp_path / "a", prompts(3))
    other_prompts = make_set(tmp_path / "b", [*prompts(2), "another"])
    longer = make_set(tmp_path / "c", prompts(3), frames=6)
    faster = make_set(tmp_path / "d", prompts(3), fps=16)
    larger = make_set(tmp_path / "e", prompts(3), side=32)
    settings = {"name": "s", "seeds": 2, "trials_per_rater": 2, "catch_share": 0.0}

    def make(other: Path, name: str = "s", **options: Any) -> dict[str, Any]:
        count = 2 if options.get("allow_unequal") else 3
        plan = plan_study({"a": a, "b": other}, settings | {"name": name}, num_prompts=count, **options)
        return create_study(plan, tmp_path / f"study-{name}", str(tmp_path / "db"), command="c")

    with pytest.raises(StudyError, match="--allow-unequal-prompts"):
        make(other_prompts)
    assert make(other_prompts, "p", allow_unequal=True)["prompts"] == 2
    for number, other in enumerate((longer, faster, larger)):
        with pytest.raises(StudyError, match="--conform"):
            make(other)
        made = make(other, f"c{number}", conform=True)
        study = json.loads((Path(made["folder"]) / "study.json").read_text())
        assert study["clip"]["seconds"] == (0.25 if other == faster else 0.5) and study["clip"]["fps"] == 8
        assert study["clip"]["height"] == 256
    (a / "videos" / "00001-0.mp4").unlink()
    with pytest.raises(StudyError, match=r"00001-0\.mp4 is missing"):
        make(longer, conform=True)
    with pytest.raises(StudyError, match="No video set"):
        make(tmp_path / "absent")
    with pytest.raises(StudyError, match="needs indices 0 to 2"):
        plan_study({"a": longer, "b": faster}, settings | {"seeds": 3}, num_prompts=3)


def test_creating_again_resumes_and_another_of_that_name_is_refused(tmp_path: Path):
    study, db = make_study(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (study / "clips").iterdir()}
    sets = {name: tmp_path / "one" / f"set{shade}" for shade, name in enumerate(MODELS[:2])}
    settings = {"name": "test", "seeds": 2, "trials_per_rater": 4, "catch_share": 0.25, "votes_per_item": 1}
    again = create_study(plan_study(sets, settings, num_prompts=4), study, db, command="c")
    assert {path: path.stat().st_mtime_ns for path in (study / "clips").iterdir()} == before
    (study / "clips" / next(iter(before)).name).unlink()
    assert create_study(plan_study(sets, settings, num_prompts=4), study, db, command="c") == again
    database = Database(db)
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Study)) == 1
    with pytest.raises(StudyError, match="another --name"):
        create_study(plan_study(sets, settings | {"seed": 9}, num_prompts=4), tmp_path / "two", db, command="c")
    with pytest.raises(StudyError, match="another --out"):
        create_study(
            plan_study(sets, settings | {"seed": 9}, num_prompts=4), study, str(tmp_path / "new.db"), command="c"
        )
    assert oct((study / "secret.json").stat().st_mode)[-3:] == oct((study / "sealed.json").stat().st_mode)[-3:] == "600"
    with pytest.raises(StudyError, match="name the database"):
        Server(open_folder(study), str(tmp_path / "empty.db"))


def test_a_corrected_command_keeps_no_clip_of_the_other_model(tmp_path: Path):
    from studies.video_sets import probe

    a, b = (make_set(tmp_path / name, prompts(3), shade=shade, frames=2) for shade, name in enumerate("ab"))
    settings = {"name": "s", "seeds": 2, "trials_per_rater": 2, "catch_share": 0.5}
    out, db = tmp_path / "study", str(tmp_path / "votes.db")

    def interrupted(clips: Sequence[ClipRef]) -> Iterator[ClipRef]:
        yield from clips
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_study(plan_study({"a": b, "b": a}, settings, num_prompts=3), out, db, command="c", progress=interrupted)
    create_study(plan_study({"a": a, "b": b}, settings, num_prompts=3), out, db, command="c")
    sealed = json.loads((out / "sealed.json").read_text())
    clean = {name: clip for name, clip in sealed["clips"].items() if not clip["corrupted"]}
    for name, clip in clean.items():
        shade = read_frames(out / "clips" / name, probe(out / "clips" / name))[0, -1, -1].mean()
        assert abs(shade - (60 + 40 * clip["model"])) < 10, "the clip shows the model that the schedule says"


def test_creating_again_changes_what_the_page_needs(tmp_path: Path):
    study, db = make_study(tmp_path, serving=Serving(completion_code="OLD"))
    sets = {name: tmp_path / f"set{shade}" for shade, name in enumerate(MODELS[:2])}
    settings = {"name": "test", "seeds": 2, "trials_per_rater": 4, "catch_share": 0.25, "votes_per_item": 1}
    before = open_folder(study)
    serving = Serving(platform="prolific", completion_code="NEW")
    create_study(plan_study(sets, settings, num_prompts=4, serving=serving), study, db, command="c")
    assert open_folder(study).serving == serving and open_folder(study).schedule_hash == before.schedule_hash
    with pytest.raises(StudyError, match="No texts"):
        plan_study(sets, settings, num_prompts=4, serving=Serving(language="absent.yaml"))


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (b"[]\n", "Line 1 of .* does not describe a video"),
        (b'{"video": "a", "prompt": "p", "index": 0, "line": null}\n', "Line 1 of .* does not describe a video"),
        (b'{"video": "a", "prompt": "p", "index": 1e999}\n', "Line 1 of .* does not describe a video"),
        (b'{"video": "a", "prompt": "p", "index": 0, "checkpoint_hash": []}\n', "Line 1 of .* does not describe"),
        (b'{"video": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_a_bad_manifest_is_one_sentence(manifest: bytes, sentence: str, tmp_path: Path):
    (tmp_path / "manifest.jsonl").write_bytes(manifest)
    with pytest.raises(StudyError, match=sentence):
        read_set("a", tmp_path)


def test_folders_of_named_videos_need_no_manifest(tmp_path: Path):
    for shade, name in enumerate("ab"):
        made = make_set(tmp_path / name, ["a dog runs", "two - cats"], shade=shade)
        for row in [json.loads(line) for line in (made / "manifest.jsonl").read_text().splitlines()]:
            (made / "videos" / row["video"]).rename(made / f"{row['prompt']}-{row['index']}.mp4")
        (made / "manifest.jsonl").unlink()
    settings = {"name": "s", "seeds": 2, "trials_per_rater": 2, "catch_share": 0.0}
    plan = plan_study({"a": tmp_path / "a", "b": tmp_path / "b"}, settings, num_prompts=2)
    assert set(plan.design.prompts) == {"a dog runs", "two - cats"}


def test_clips_show_what_was_made_and_spoiled_ones_do_not(tmp_path: Path):
    import numpy as np

    from studies.clips import make_clip
    from studies.video_sets import probe

    made = make_set(tmp_path / "set", prompts(1))
    source = made / "videos" / "00000-0.mp4"
    shape = probe(source)
    make_clip(source, tmp_path / "good.mp4", shape)
    make_clip(source, tmp_path / "bad.mp4", shape, spoiled=True)
    big = probe(tmp_path / "good.mp4")
    assert big == probe(tmp_path / "bad.mp4") and (big.height, big.frames) == (256, shape.frames)
    shown = [read_frames(tmp_path / name, big).astype(float) for name in ("good.mp4", "bad.mp4")]
    before = read_frames(source, shape).repeat(16, axis=1).repeat(16, axis=2).astype(float)
    assert np.abs(shown[0] - before).mean() < 4 < 20 < np.abs(shown[1] - before).mean()


# Database


def test_models_and_migrations_agree_and_leave_the_leaderboard_alone(tmp_path: Path):
    db = str(tmp_path / "shared.db")
    open_engine(db).dispose()
    database = Database(db)
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": VERSION_TABLE,
                "include_object": lambda item, name, kind, *_: kind != "table" or name.startswith("stud"),
            },
        )
        assert compare_metadata(context, Base.metadata) == []
    with database.writing() as session:
        session.connection().exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    database.close()
    open_engine(db).dispose()
    with pytest.raises(LeaderboardError, match="9999"):
        Database(db)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a fresh PostgreSQL cluster on a socket of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or importlib.util.find_spec("psycopg") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no PostgreSQL server, or no psycopg")
        pytest.skip("no PostgreSQL server, or no psycopg")
    binaries, folder = found[-1].parent, Path(f"/tmp/tmd-eval-study-pg-{os.getpid()}")
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


def test_postgresql_carries_a_whole_study(postgres: str, tmp_path: Path):
    study, _ = make_study(tmp_path, db=postgres, votes_per_item=2)
    site = Site(study, postgres)
    raters = [site.rater(f"worker {number}") for number in range(site.folder.raters)]
    assert site.rater("late")[1]["stage"] == "full"
    client, state = raters[0]
    first = site.vote(client, state)
    url = f"/api/trial/{state['trial']['token']}/vote"
    assert client.post(url, json=ballot()).json() == first.json()
    assert client.post(url, json=ballot(quality="right")).status_code == 409
    found: list[str] = []

    def go_on(client: TestClient) -> None:
        found.append(site.finish(client, client.post("/api/state", json={}).json())["stage"])

    threads = [threading.Thread(target=go_on, args=(client,)) for client, _ in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["done"] * len(raters)
    unblind_study(site.folder, postgres, reason="r", command="c")
    preferences = analyze_study(site.folder, postgres, tmp_path / "out", code_revision="r", command="c")
    assert preferences["votes"] == site.folder.votes
    with site.server.database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": VERSION_TABLE,
                "include_object": lambda item, name, kind, *_: kind != "table" or name.startswith("stud"),
            },
        )
        assert compare_metadata(context, Base.metadata) == []
    site.server.database.close()


def test_on_postgresql_one_rater_locks_one_sheet(postgres: str, tmp_path: Path):
    study, _ = make_study(tmp_path, db=postgres, name="race")
    site = Site(study, postgres)
    client, state = site.rater("back again")
    while state["done"] == 0:
        state = site.vote(client, state).json()["next"]
    now, lease = site.clock.now(), site.server.lease
    with site.server.writing() as session:
        other = ballots.consent(session, site.server.study_id, "o" * 64, "x", now)
        held = session.scalars(select(Sheet).where(Sheet.rater_id.is_not(None), Sheet.study_id == other.study_id)).one()
        held.rater_id = other.id
    with site.server.writing() as one, site.server.writing() as two:
        voted = select(Rater).join(Vote).where(Rater.study_id == site.server.study_id).distinct()
        assert ballots.standing(one, one.scalars(voted).one(), now, lease).trial
        fresh = ballots.consent(two, site.server.study_id, "f" * 64, "x", now)
        assert ballots.standing(two, fresh, now, lease).trial, "the others' sheets are not locked"
    with pytest.raises(StudyError, match="pg_dump"):
        export_study(site.folder, postgres, tmp_path / "out", command="c", backup=True)
    assert not (tmp_path / "out").exists() and "exported" not in [row.action for row in site.rows(Audit)]
    site.server.database.close()

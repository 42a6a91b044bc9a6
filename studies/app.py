"""The server: FastAPI routes for entering, consent, trials, clips and votes, with the Gradio page mounted beside them.

Every route checks who asks (a signed cookie) and what it may see (one-time tokens); Gradio only draws.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from studies import ballots, identity
from studies.clock import Clock
from studies.database import Database, find_study
from studies.design import QUESTIONS
from studies.errors import DatabaseUnusableError, StudyError
from studies.guard import Guard
from studies.models import Audit, Rater, Sheet, Trial, Vote
from studies.page import mount_page
from studies.serving import PREVIEW, StudyFolder
from studies.status import study_status
from studies.texts import consent_hash, load_texts
from studies.votes import Refused, cast, read_ballot

COOKIE_DAYS = 60


class Server:
    """What the routes share: the study, its database, texts and clock.

    Args:
        folder: the study's folder.
        db: database URL or path.
        clock: source of time.

    Raises:
        StudyError: the database does not hold the study, or the texts are bad.
        LeaderboardError: the database cannot be opened.
    """

    def __init__(self, folder: StudyFolder, db: str | None = None, clock: Clock | None = None) -> None:
        self.folder = folder
        self.database = Database(db)
        self.texts = load_texts(folder.serving.language)
        self.consent = consent_hash(self.texts)
        self.lease = timedelta(minutes=folder.lease_minutes)
        with self.database.reading() as session:
            study = find_study(session, folder.name, folder.schedule_hash, self.database.shown)
            self.study_id = study.id
            latest = [
                session.scalar(select(func.max(Vote.created)).where(Vote.study_id == study.id)),
                session.scalar(select(func.max(Trial.issued)).join(Sheet).where(Sheet.study_id == study.id)),
            ]
            longest = select(Trial.sheet_id, func.count()).join(Sheet).where(Sheet.study_id == study.id)
            rows = session.execute(longest.where(Trial.kind != "practice").group_by(Trial.sheet_id)).all()
            practice = longest.where(Trial.kind == "practice", Trial.position >= 0).group_by(Trial.sheet_id)
            self.trials = max(count for _, count in rows)
            self.practice = max((count for _, count in session.execute(practice)), default=0)
            _all_there(session, study.id, folder.path / "clips")
        self.clock = clock or Clock(max((moment for moment in latest if moment), default=None))

    def writing(self) -> AbstractContextManager[Session]:
        """A writing transaction."""
        return self.database.writing()

    def audit(self, action: str, detail: dict[str, Any]) -> None:
        """Write a line of the audit log."""
        with self.writing() as session:
            session.add(Audit(study_id=self.study_id, at=self.clock.now(), action=action, detail=detail))

    def rater(self, session: Session, key_hash: str) -> Rater:
        """The rater, locked.

        Raises:
            Refused: 403, unknown or withdrawn.
        """
        rater = ballots.find_rater(session, self.study_id, key_hash, lock=True)
        if rater is None or rater.withdrawn is not None:
            raise Refused(403, "foreign")
        return rater

    def state(self, session: Session, key_hash: str) -> dict[str, Any]:
        """What the page shows whoever has this hash now."""
        return self.place(session, ballots.find_rater(session, self.study_id, key_hash, lock=True))

    def place(self, session: Session, rater: Rater | None) -> dict[str, Any]:
        """What the page shows a rater now; None is one who has not consented yet."""
        serving = self.folder.serving
        if rater is None:
            return {"stage": "consent", "consent": self.consent, "contact": serving.contact, "trials": self.trials}
        if rater.withdrawn is not None:
            return {"stage": "withdrawn"}
        at = ballots.standing(session, rater, self.clock.now(), self.lease)
        if at.trial is None:
            if not at.finished:
                return {"stage": "full"}
            return {"stage": "done", "code": serving.completion_code, "link": serving.link}
        order = QUESTIONS if rater.first_question == QUESTIONS[0] else QUESTIONS[::-1]
        every = self.folder.break_every
        return {
            "stage": "trial", "done": at.done, "total": at.total, "practice": self.practice,
            "trial": {
                "token": at.trial.token, "left": f"clip/{at.trial.token_left}", "right": f"clip/{at.trial.token_right}",
                "prompt": at.trial.prompt, "practice": at.trial.kind == "practice", "questions": order,
                "ties": self.folder.allow_ties, "min_watched": self.folder.min_watched,
                "frame": 1 / self.folder.clip_fps, "width": self.folder.clip_width, "height": self.folder.clip_height,
            },
            "break": bool(every and at.done and at.done % every == 0),
        }  # fmt: skip


def _all_there(session: Session, study_id: int, clips: Path) -> None:
    """Refuse to start with clips missing: raters would get stuck at them.

    Raises:
        StudyError: a clip that a trial shows is not in the folder.
    """
    query = select(Trial.left, Trial.right).join(Sheet).where(Sheet.study_id == study_id)
    missing = {name for row in session.execute(query) for name in row} - {path.name for path in clips.glob("*.mp4")}
    if missing:
        raise StudyError(
            f"{len(missing)} clips are missing in {clips}, such as {min(missing)}; run the command that created the "
            "study again, it makes what is missing."
        )


async def _body(request: Request) -> Any:
    """The JSON body; only JSON, so that no foreign page's form can post."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(415, "malformed")
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(422, "malformed") from error


async def _who(request: Request) -> str:
    """The rater's hash, from the signed cookie; async, so that it takes no turn in the pool of threads."""
    folder: StudyFolder = request.app.state.study
    key_hash = identity.unsign(folder.keys["cookies"], request.cookies.get(identity.cookie_name(folder.schedule_hash)))
    if key_hash is None:
        raise Refused(403, "foreign")
    return key_hash


Body = Annotated[Any, Depends(_body)]
Who = Annotated[str, Depends(_who)]


def build_app(server: Server) -> FastAPI:
    """The whole application.

    Args:
        server: what the routes share.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    folder = server.folder

    app.state.study = folder

    @app.get("/api/texts")
    def texts() -> dict[str, Any]:
        return server.texts

    @app.post("/api/enter")
    def enter(request: Request, response: Response, body: Body) -> dict[str, Any]:
        params = body.get("params") if isinstance(body, dict) else None
        if not isinstance(params, dict):
            raise Refused(422, "malformed")
        if params.get(PREVIEW[0]) == PREVIEW[1]:
            return {"stage": "preview"}
        given = params.get(folder.serving.parameter)
        if given is not None and (not isinstance(given, str) or not 0 < len(given) <= identity.LONGEST_ID):
            raise Refused(422, "malformed")
        key_hash = identity.unsign(
            folder.keys["cookies"], request.cookies.get(identity.cookie_name(folder.schedule_hash))
        )
        if given is not None:
            try:
                key_hash = identity.rater_hash(folder.keys["raters"], folder.name, given)
            except UnicodeEncodeError as error:  # half of a character: no platform's id
                raise Refused(422, "malformed") from error
        elif folder.serving.platform != "none":
            return {"stage": "unknown"}
        elif key_hash is None:
            key_hash = identity.rater_hash(folder.keys["raters"], folder.name, identity.anonymous())
        with server.writing() as session:
            state = server.state(session, key_hash)
        response.set_cookie(
            identity.cookie_name(folder.schedule_hash), identity.sign(folder.keys["cookies"], key_hash),
            max_age=COOKIE_DAYS * 86400, httponly=True, samesite="lax", secure=request.url.scheme == "https",
        )  # fmt: skip
        return state

    @app.post("/api/consent")
    def agree(key_hash: Who, body: Body) -> dict[str, Any]:
        if not isinstance(body, dict) or body.get("agree") is not True or body.get("consent") != server.consent:
            raise Refused(422, "malformed")
        for attempt in (1, 2):
            try:
                with server.writing() as session:
                    rater = ballots.consent(session, server.study_id, key_hash, server.consent, server.clock.now())
                    return server.place(session, rater)
            except IntegrityError:  # PostgreSQL: the rater's other tab agreed at the same moment
                if attempt == 2:
                    raise
        raise AssertionError

    @app.post("/api/state")
    def state(key_hash: Who) -> dict[str, Any]:
        with server.writing() as session:
            return server.state(session, key_hash)

    @app.post("/api/trial/{token}/vote")
    def vote(token: str, key_hash: Who, body: Body) -> dict[str, Any]:
        ballot = read_ballot(body, allow_ties=folder.allow_ties)
        with server.writing() as session:
            rater = server.rater(session, key_hash)
            trial = cast(session, folder, rater, token, ballot, server.clock.now())
            answer: dict[str, Any] = {"next": server.place(session, rater)}
            if trial.kind == "practice":
                pairs = zip(QUESTIONS, trial.answers, ballot.answers, strict=True)
                answer["feedback"] = {question: {"expected": right, "given": given} for question, right, given in pairs}
            return answer

    @app.post("/api/withdraw")
    def withdraw(key_hash: Who) -> dict[str, Any]:
        with server.writing() as session:
            ballots.withdraw(session, server.rater(session, key_hash), server.clock.now())
        return {"stage": "withdrawn"}

    @app.get("/clip/{token}")
    def clip(token: str, key_hash: Who) -> Response:
        columns = (Trial.id, Trial.left, Trial.right, Trial.token_left, Trial.fetched_left, Trial.fetched_right)
        query = (
            select(*columns, Rater.key_hash, Vote.trial_id.label("voted"))
            .join(Rater, Rater.id == Trial.rater_id)
            .outerjoin(Vote, Vote.trial_id == Trial.id)
            .where(or_(Trial.token_left == token, Trial.token_right == token))
        )
        with server.database.reading() as session:
            row = session.execute(query).one_or_none()
        if row is None or row.voted is not None:
            raise Refused(404, "expired")
        if row.key_hash != key_hash:
            raise Refused(403, "foreign")
        side = "left" if row.token_left == token else "right"
        path = folder.path / "clips" / getattr(row, side)
        if not path.is_file():  # gone since the start; the page says so and asks again
            return JSONResponse({"error": "retry"}, status_code=503, headers={"retry-after": "2"})
        if not getattr(row, f"fetched_{side}"):
            # A mark lost in a power cut costs the rater a second look, so it need not wait for the disk.
            with server.database.writing(synced=False) as session:
                session.execute(update(Trial).where(Trial.id == row.id).values({f"fetched_{side}": True}))
        # Constant or per-token headers: the usual ones come from the file's time and size and would group by model.
        headers = {
            "cache-control": "private, no-store", "content-disposition": 'inline; filename="clip.mp4"',
            "etag": f'"{token}"', "last-modified": "Thu, 01 Jan 1970 00:00:00 GMT",
        }  # fmt: skip
        return FileResponse(path, media_type="video/mp4", headers=headers)

    @app.get("/admin/status")
    def status(request: Request) -> dict[str, Any]:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {folder.keys['admin']}".encode()):
            raise Refused(403, "foreign")
        with server.database.reading() as session:
            return study_status(session, server.study_id, server.clock.now())

    @app.exception_handler(DatabaseUnusableError)
    @app.exception_handler(DBAPIError)
    def busy(request: Request, error: Exception) -> JSONResponse:
        """Locked for long, out of space, database gone: the page keeps the answer and tries again."""
        return JSONResponse({"error": "retry"}, status_code=503, headers={"retry-after": "2"})

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": error.reason}, status_code=error.status)

    app = mount_page(app, server.texts)
    app.add_middleware(Guard)
    return app


def serve(server: Server, host: str, port: int) -> None:
    """Serve until interrupted; no access log, for addresses and tokens are nobody's business.

    Args:
        server: from :class:`Server`.
        host: address to listen on.
        port: port; behind TLS a proxy on the same machine may set X-Forwarded-Proto.

    Raises:
        StudyError: the address or port cannot be had.
    """
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise StudyError(f"Cannot listen on {host}, port {port} ({error}); choose another --port or --host.") from error
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.audit("served", {"host": host, "port": port, "at": datetime.now(UTC).isoformat(timespec="seconds")})
        config = uvicorn.Config(
            build_app(server), access_log=False, log_level="warning", server_header=False, date_header=True,
            timeout_keep_alive=30,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])

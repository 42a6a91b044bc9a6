"""``study simulate``: a rehearsal in which simulated raters vote through the same leases and checks as people.

The study is marked as simulated for good, and every output says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from studies import ballots, identity
from studies.database import Database, find_study
from studies.design import QUESTIONS
from studies.errors import StudyError
from studies.models import Audit, Rater, Sheet, Study, Trial, Vote
from studies.serving import StudyFolder
from studies.simulate import Effects
from studies.tally import Sealed, read_sealed
from studies.votes import Ballot, cast


@dataclass(frozen=True, kw_only=True)
class Model:
    """The stated model of the raters."""

    strengths: tuple[Mapping[str, float], Mapping[str, float]]
    """Log-odds by name of the model, for visual quality and for prompt alignment; 0 where not named."""
    effects: Effects
    """Spreads of prompt, item and rater effects, and the lean to the left."""
    lapse: float = 0.02
    """Share of trials that a good rater answers at random."""
    careless: float = 0.05
    """Share of raters who answer everything at random."""

    def __post_init__(self) -> None:
        for name in ("lapse", "careless"):
            if not 0 <= getattr(self, name) <= 1:
                raise StudyError(f"{name} must lie in 0 to 1, not {getattr(self, name)}.")


def rehearse(folder: StudyFolder, db: str | None, model: Model, *, seed: int, command: str) -> dict[str, Any]:
    """Fill every free sheet of a study with the votes of simulated raters.

    Args:
        folder: the study's folder.
        db: database URL or path.
        model: of the raters.
        seed: of everything random.
        command: the command line, for the audit log.

    Returns:
        study, and the raters and votes added.

    Raises:
        StudyError: people have voted in it, or a named model is none of the study's.
    """
    database = Database(db)
    try:
        with database.writing() as session:
            study = find_study(session, folder.name, folder.schedule_hash, database.shown)
            voted = session.scalar(select(func.count()).select_from(Vote).where(Vote.study_id == study.id))
            if voted and not study.simulated:
                raise StudyError(
                    f"{voted} votes of people are in the study {folder.name!r}; create another to rehearse."
                )
            sealed = read_sealed(folder.path, study)
            names = [item["name"] for item in sealed.models]
            for name in {*model.strengths[0], *model.strengths[1]} - set(names):
                raise StudyError(f"The study has no model {name!r}; it has {', '.join(names)}.")
            study.simulated = True
            free = session.scalar(
                select(func.count()).select_from(Sheet).where(Sheet.study_id == study.id, Sheet.rater_id.is_(None))
            )
            detail = {"command": command, "seed": seed, "free_sheets": free}
            session.add(Audit(study_id=study.id, at=datetime.now(UTC), action="simulated", detail=detail))
            study_id = study.id
        rng = np.random.default_rng(seed)
        crowd = _Crowd(model, sealed, rng)
        added = votes = 0
        for number in range(free or 0):
            with database.writing() as session:
                votes += _vote_all(session, folder, session.get_one(Study, study_id), crowd, number)
                added += 1
    finally:
        database.close()
    return {"study": folder.name, "raters": added, "votes": votes}


class _Crowd:
    """Latent effects, drawn once and shared by all raters."""

    def __init__(self, model: Model, sealed: Sealed, rng: np.random.Generator) -> None:
        self.model, self.sealed, self.rng = model, sealed, rng
        self._drawn: dict[tuple[Any, ...], float] = {}
        self.names = [item["name"] for item in sealed.models]

    def effect(self, spread: float, *key: Any) -> float:
        """A normal effect, the same whenever it is asked for again."""
        if key not in self._drawn:
            self._drawn[key] = float(self.rng.normal())
        return spread * self._drawn[key]

    def answer(self, plan: Mapping[str, Any], question: int, rater: int, careless: bool) -> str:
        """A rater's answer to one question of a trial of the sealed schedule."""
        effects, rng = self.model.effects, self.rng
        if careless or rng.random() < self.model.lapse:
            return str(rng.choice(["left", "right"]))
        if plan["answers"][question] is not None:
            return str(plan["answers"][question])
        logit = effects.side
        if plan["pair"] is not None:
            a, b = (self.names[model] for model in self.sealed.pairs[plan["pair"]])
            strengths = self.model.strengths[question]
            where = (question, plan["pair"], plan["prompt"])
            first = plan["left"] if plan["a_left"] else plan["right"]
            lean = strengths.get(a, 0.0) - strengths.get(b, 0.0) + self.effect(effects.prompt, "prompt", *where)
            lean += self.effect(effects.item, "item", *where, first["index"])
            lean += self.effect(effects.rater, "rater", question, plan["pair"], rater)
            logit += lean if plan["a_left"] else -lean
        return "left" if rng.random() < 1 / (1 + np.exp(-logit)) else "right"


def _vote_all(session: Session, folder: StudyFolder, study: Study, crowd: _Crowd, number: int) -> int:
    """One simulated rater takes a sheet and answers all of it, by the ordinary way."""
    rng = crowd.rng
    now = max(filter(None, (datetime.now(UTC), study.unblinded)))
    careless = bool(rng.random() < crowd.model.careless)
    count = session.scalar(select(func.count()).select_from(Rater).where(Rater.study_id == study.id)) or 0
    key = identity.rater_hash(folder.keys["raters"], folder.name, f"simulated {count}")
    rater = ballots.consent(session, study.id, key, "simulated", now)
    votes = 0
    while True:
        at = ballots.standing(session, rater, now, timedelta(minutes=folder.lease_minutes))
        if at.trial is None:
            return votes
        trial: Trial = at.trial
        trial.fetched_left = trial.fetched_right = True
        sheet = session.get_one(Sheet, trial.sheet_id)
        plan = crowd.sealed.planned(sheet.number, trial)
        seconds = [float(rng.lognormal(0.6, 0.5)) for _ in QUESTIONS]
        now += timedelta(seconds=folder.clip_seconds + 0.5 + sum(seconds))
        answers = [crowd.answer(plan, question, number, careless) for question in range(len(QUESTIONS))]
        ballot = Ballot(
            answers=(answers[0], answers[1]), seconds=(seconds[0], sum(seconds)), watched=(1.0, 1.0),
            replays=int(rng.poisson(0.2)), slow=False,
        )  # fmt: skip
        cast(session, folder, rater, str(trial.token), ballot, now)
        votes += 1

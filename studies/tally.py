"""Votes with what the sealed schedule says about them; only analysis and unblinded exports come here."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from studies.design import QUESTIONS, ExclusionRules
from studies.errors import SealedError, StudyError
from studies.files import read_json
from studies.models import Rater, Sheet, Study, Trial, Vote


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One vote of one rater, unblinded."""

    rater: str
    """Keyed hash of the rater."""
    kind: str
    sheet: int
    position: int
    pair: int | None
    prompt: str
    prompt_id: int | None
    """Place of the prompt in the design; None for practice prompts from outside."""
    index_a: int | None
    """Sample index of the clip of the pair's first model."""
    index_b: int | None
    a_left: bool | None
    choices: tuple[str, str]
    """left, right or tie, by question."""
    correct: tuple[str | None, str | None]
    """Right answers, for obvious and practice trials."""
    repeat_of: int | None
    """Position of the trial in the same sheet that this one repeats."""
    seconds: tuple[float, float]
    """From the unlocking of the answers to each choice."""
    seconds_total: float
    watched: tuple[float, float]
    replays: int
    slow: bool
    first_question: str
    seeds: tuple[int | None, int | None]
    """Left, right."""
    models: tuple[int, int]
    """Model of the left and of the right clip."""
    schedule_hash: str
    app_version: str
    created: datetime

    def outcome(self, question: int) -> float | None:
        """1 where the pair's first model was preferred, 0 where the second, one half for a tie."""
        if self.a_left is None:
            return None
        choice = self.choices[question]
        return 0.5 if choice == "tie" else float((choice == "left") == self.a_left)


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """The sealed schedule."""

    design: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    """name and checkpoint_hash."""
    pairs: Sequence[tuple[int, int]]
    sheets: Sequence[Mapping[str, Any]]
    clips: Mapping[str, Mapping[str, Any]]
    """What each clip shows and the seed that it was sampled with, by its random name."""
    rules: ExclusionRules
    command: str | None
    """The command that created the study; in the audit log it would name the models in order."""

    def planned(self, sheet: int, trial: Trial) -> Mapping[str, Any]:
        """The schedule's trial that a row of the database stands for.

        Practice that a newcomer repeats has a new position; each practice trial of a sheet has another prompt.
        """
        trials: Sequence[Mapping[str, Any]] = self.sheets[sheet]["trials"]
        if trial.kind != "practice":
            return trials[trial.position]
        return next(plan for plan in trials if plan["kind"] == "practice" and plan["prompt"] == trial.prompt)


def open_sealed(folder: Path, study: Study) -> Sealed:
    """Read the sealed schedule of an unblinded study, checking it against its hash; see :func:`read_sealed`.

    Raises:
        SealedError: the study is still blind.
    """
    if study.unblinded is None:
        raise SealedError(
            f"The study {study.name!r} is blind: win rates would tempt one to stop early or to drop raters. When the "
            f"votes are in: tmd-eval study unblind {folder} --reason '...'; it goes into the audit log."
        )
    return read_sealed(folder, study)


def read_sealed(folder: Path, study: Study) -> Sealed:
    """Read the sealed schedule whether or not the study is blind: for code that shows nothing of it.

    Raises:
        StudyError: the file is missing or is not what was hashed.
    """
    content = read_json(folder / "sealed.json", "sealed schedule")
    hashed = {key: content[key] for key in ("design", "sheets", "clips")}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    if digest != study.schedule_hash:
        raise StudyError(
            f"{folder / 'sealed.json'} was changed after the study was created (hash {digest[:12]}, not "
            f"{study.schedule_hash[:12]}); restore it from a copy."
        )
    design = content["design"]
    count, first = len(design["models"]), design["reference"]
    if first is None:
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    else:
        chosen = design["models"].index(first)
        pairs = [(chosen, other) for other in range(count) if other != chosen]
    return Sealed(
        design=design,
        models=content["models"],
        pairs=pairs,
        sheets=content["sheets"],
        clips=content["clips"],
        rules=ExclusionRules(**design["exclusions"]),
        command=content.get("command"),
    )


def load_answers(session: Session, study: Study, sealed: Sealed) -> list[Answered]:
    """All votes that count, in the order they came; withdrawn raters are left out, practice is kept with its kind."""
    rows = session.execute(
        select(Vote, Trial, Sheet.number, Rater.key_hash)
        .join(Trial, Trial.id == Vote.trial_id)
        .join(Sheet, Sheet.id == Trial.sheet_id)
        .join(Rater, Rater.id == Vote.rater_id)
        .where(Vote.study_id == study.id, Vote.withdrawn.is_(False))
        .order_by(Vote.created, Vote.trial_id)
    ).all()
    ids = {prompt: place for place, prompt in enumerate(sealed.design["prompts"])}
    found = []
    for vote, trial, sheet, rater in rows:
        plan = sealed.planned(sheet, trial)
        left, right, a_left = plan["left"], plan["right"], plan["a_left"]
        a, b = (left, right) if a_left else (right, left)
        found.append(
            Answered(
                rater=rater, kind=trial.kind, sheet=sheet, position=trial.position, pair=plan["pair"],
                prompt=trial.prompt, prompt_id=ids.get(trial.prompt), a_left=a_left,
                index_a=None if a_left is None else a["index"], index_b=None if a_left is None else b["index"],
                choices=(vote.quality, vote.alignment), correct=(trial.answers[0], trial.answers[1]),
                repeat_of=trial.repeat_of, seconds=(vote.seconds_quality, vote.seconds_alignment),
                seconds_total=vote.seconds_total, watched=(vote.watched_left, vote.watched_right),
                replays=vote.replays, slow=vote.slow, first_question=vote.first_question,
                models=(left["model"], right["model"]),
                seeds=(sealed.clips[trial.left]["seed"], sealed.clips[trial.right]["seed"]),
                schedule_hash=vote.schedule_hash, app_version=vote.app_version, created=vote.created,
            )
        )  # fmt: skip
    return found


def excluded_raters(answers: Sequence[Answered], rules: ExclusionRules) -> dict[str, str]:
    """The raters that the rules fixed in the design leave out, with the rule that did.

    Args:
        answers: all votes that count.
        rules: from the sealed design.
    """
    by_rater: dict[str, list[Answered]] = defaultdict(list)
    for answer in answers:
        if answer.kind != "practice":
            by_rater[answer.rater].append(answer)
    out = {}
    for rater, mine in sorted(by_rater.items()):
        obvious = [answer.choices == answer.correct for answer in mine if answer.kind == "obvious"]
        failures = len(obvious) - sum(obvious)
        if len(obvious) >= rules.min_obvious_trials and failures > rules.max_obvious_failures:
            out[rater] = f"failed {failures} of {len(obvious)} obvious trials"
            continue
        mains = [answer for answer in mine if answer.kind == "main"]
        if len(mains) < rules.min_votes:
            continue
        sides = [choice for answer in mains for choice in answer.choices]
        same = max(sides.count("left"), sides.count("right")) / len(sides)
        seconds = median(max(answer.seconds) for answer in mains)
        if same > rules.max_same_side:
            out[rater] = f"{same:.0%} of the answers on one side"
        elif seconds < rules.min_median_seconds:
            out[rater] = f"median of {seconds:.2f} s to answer"
    return out


def self_consistency(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Share of swapped repeats on which a rater preferred the same clip again, by question."""
    first = {(answer.rater, answer.sheet, answer.position): answer for answer in answers if answer.kind == "main"}
    same: dict[str, list[bool]] = {question: [] for question in QUESTIONS}
    for answer in answers:
        before = first.get((answer.rater, answer.sheet, -1 if answer.repeat_of is None else answer.repeat_of))
        if answer.kind == "repeat" and before is not None:
            for number, question in enumerate(QUESTIONS):
                same[question].append(answer.outcome(number) == before.outcome(number))
    return {
        question: {"repeats": len(hits), "same": sum(hits), "share": sum(hits) / len(hits) if hits else None}
        for question, hits in same.items()
    }

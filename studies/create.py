"""``study create``: from video sets to a study folder and its rows in the database.

``STUDY/study.json`` is what serving needs and names no model; ``STUDY/sealed.json`` is the whole schedule with the
models, hashed, and the command; ``STUDY/secret.json`` holds the keys; ``STUDY/clips/`` the clips under random names,
made in a random order, so that neither names nor times of the files tell the models apart.
"""

from __future__ import annotations

import hmac
import json
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from studies.clips import digest_of, make_clip, scale_of
from studies.database import Database
from studies.design import Design, draw_prompts
from studies.errors import StudyError
from studies.files import read_json, write_json
from studies.models import Audit, Sheet, Study, Trial
from studies.schedule import ClipRef, build_schedule, schedule_hash
from studies.schedule import Sheet as PlannedSheet
from studies.serving import Serving
from studies.texts import load_texts
from studies.video_sets import VideoSet, common_prompts, common_shape, probe, read_set

Progress = Callable[[Sequence[ClipRef]], Iterable[ClipRef]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study before any clip is encoded."""

    design: Design
    sets: tuple[VideoSet, ...]
    sheets: tuple[PlannedSheet, ...]
    serving: Serving
    conform: bool

    @property
    def clips(self) -> list[ClipRef]:
        """Every clip that any trial shows, each once, in a stable order."""
        shown = {clip for sheet in self.sheets for trial in sheet.trials for clip in (trial.left, trial.right)}
        return sorted(shown, key=lambda clip: (clip.prompt, clip.index, clip.model, clip.corrupted))


def plan_study(
    videos: Mapping[str, Path],
    settings: Mapping[str, Any],
    *,
    prompts: Sequence[str] | None = None,
    num_prompts: int = 60,
    serving: Serving | None = None,
    allow_unequal: bool = False,
    conform: bool = False,
) -> Plan:
    """Read the sets, draw the prompts and lay out the schedule.

    Args:
        videos: folder by name of the model.
        settings: fields of :class:`Design` but for models and prompts.
        prompts: the prompts to use; by default ``num_prompts`` drawn from those that the sets share.
        num_prompts: how many to draw from what the sets share.
        serving: what the page needs.
        allow_unequal: see :func:`common_prompts`.
        conform: see :func:`common_shape`.

    Raises:
        StudyError: the design, a set, or what the page needs is bad; the sentence says how to mend it.
    """
    serving = serving or Serving()
    load_texts(serving.language)
    if serving.platform == "mturk" and not serving.completion_code:
        raise StudyError(
            "MTurk's workers hand in a code in the HIT that led them here; give one with --completion-code."
        )
    sets = tuple(read_set(name, folder) for name, folder in videos.items())
    if len(sets) < 2:
        raise StudyError("A study compares two or more video sets; give --videos NAME=FOLDER for each.")
    seeds = int(settings.get("seeds", Design.seeds))
    common = common_prompts(sets, seeds, allow_unequal=allow_unequal)
    if prompts is None:
        drawn = draw_prompts(common, num_prompts, int(settings.get("seed", Design.seed)))
    else:
        drawn = tuple(dict.fromkeys(prompts))
        for prompt in drawn:
            if prompt not in common:
                raise StudyError(f"The sets do not all have {seeds} videos of the prompt {prompt[:80]!r}; take it out.")
    design = Design(models=tuple(videos), prompts=drawn, **settings)
    sheets = build_schedule(design, [prompt for prompt in common if prompt not in set(drawn)])
    return Plan(design=design, sets=sets, sheets=sheets, serving=serving, conform=conform)


def create_study(plan: Plan, out: Path, db: str | None, *, command: str, progress: Progress = iter) -> dict[str, Any]:
    """Encode the clips, seal the schedule and enter the study into the database.

    The same command again resumes, or makes lost clips anew; what ``serving`` says then replaces what study.json said.

    Args:
        plan: from :func:`plan_study`.
        out: the study's folder.
        db: database URL or path.
        command: the command line; it goes into the sealed schedule, since it names the models in order.
        progress: wraps the clips while they are encoded.

    Returns:
        name, schedule_hash, raters, votes, trials_per_rater, prompts, clips, folder.

    Raises:
        StudyError: a clip is bad, the folder or the name is taken by another study, or the disk is full.
    """
    design = plan.design
    database = Database(db)
    try:
        with database.reading() as session:
            taken = session.scalars(select(Study.schedule_hash).where(Study.name == design.name)).one_or_none()
        known = read_json(out / "study.json", "study")["schedule_hash"] if (out / "study.json").exists() else None
        if taken is not None and taken != known:
            raise StudyError(f"{database.shown} has a study {design.name!r} already; choose another --name.")
        sources = {clip: _source(plan, clip) for clip in plan.clips}
        shape = common_shape(
            [(design.models[clip.model], probe(source)) for clip, source in sources.items()], conform=plan.conform
        )
        (out / "clips").mkdir(parents=True, exist_ok=True)
        keys = _keys(out)
        names: dict[ClipRef, str] = {}
        facts: dict[str, Any] = {}
        order = list(sources)
        random.Random(keys["clips"]).shuffle(order)
        for clip in progress(order):
            digest = digest_of(sources[clip])
            names[clip] = _name(keys["clips"], clip, str(shape), digest)
            make_clip(sources[clip], out / "clips" / names[clip], shape, spoiled=clip.corrupted)
            facts[names[clip]] = {**asdict(clip), "seed": _seed(plan, clip), "source_sha256": digest}
        digest = schedule_hash(design, plan.sheets, facts)
        if known is not None and known != digest:
            raise StudyError(
                f"{out} holds another study (schedule {known[:12]}), or one that another version of tmd-eval laid out; "
                "choose another --out."
            )
        created = datetime.now(UTC)
        models = [{"name": item.name, "checkpoint_hash": item.checkpoint_hash} for item in plan.sets]
        if known is None:
            sealed = {
                "schedule_hash": digest, "design": asdict(design), "models": models, "clips": facts,
                "sheets": [asdict(sheet) for sheet in plan.sheets], "command": command,
            }  # fmt: skip
            write_json(out / "sealed.json", sealed, private=True)
            write_json(out / "study.json", _public(plan, digest, created, shape))
        else:
            public = read_json(out / "study.json", "study")
            write_json(out / "study.json", {**public, "serving": asdict(plan.serving)})
        if taken is None:
            _enter(database, plan, digest, created, names)
    finally:
        database.close()
    return {
        "study": design.name, "folder": str(out), "schedule_hash": digest, "raters": len(plan.sheets),
        "votes": design.votes, "trials_per_rater": design.trials_per_rater, "prompts": len(design.prompts),
        "clips": len(sources), "database": database.shown,
    }  # fmt: skip


def _source(plan: Plan, clip: ClipRef) -> Path:
    return plan.sets[clip.model].videos[clip.prompt][clip.index].path


def _seed(plan: Plan, clip: ClipRef) -> int | None:
    return plan.sets[clip.model].videos[clip.prompt][clip.index].seed


def _keys(out: Path) -> dict[str, str]:
    """The study's secrets: made once, readable by the owner only."""
    path = out / "secret.json"
    if not path.exists():
        write_json(path, {key: secrets.token_hex(32) for key in ("clips", "raters", "cookies", "admin")}, private=True)
    return dict(read_json(path, "keys of the study"))


def _name(key: str, clip: ClipRef, shape: str, digest: str) -> str:
    """A clip's random name: another source, or another shape, has another."""
    text = json.dumps([asdict(clip), shape, digest], sort_keys=True)
    return hmac.new(bytes.fromhex(key), text.encode(), "sha256").hexdigest()[:32] + ".mp4"


def _public(plan: Plan, digest: str, created: datetime, shape: Any) -> dict[str, Any]:
    """What serving needs; nothing in it differs between the models."""
    design = plan.design
    return {
        "name": design.name,
        "schedule_hash": digest,
        "created": created.isoformat(timespec="seconds"),
        "models": len(design.models),
        "prompts": len(design.prompts),
        "votes": design.votes,
        "raters": len(plan.sheets),
        "allow_ties": design.allow_ties,
        "break_every": design.break_every,
        "lease_minutes": design.lease_minutes,
        "min_watched": design.min_watched,
        "clip": {
            "seconds": float(shape.frames / shape.fps),
            "fps": float(shape.fps),
            "height": shape.height * scale_of(shape) // 2 * 2,
            "width": shape.width * scale_of(shape) // 2 * 2,
        },
        "serving": asdict(plan.serving),
    }


def _enter(database: Database, plan: Plan, digest: str, created: datetime, names: Mapping[ClipRef, str]) -> None:
    """Write the study, its sheets and trials in one transaction; nothing in it names a model."""
    with database.writing() as session:
        study = Study(name=plan.design.name, schedule_hash=digest, created=created)
        session.add(study)
        session.flush()
        sheets = [
            Sheet(study_id=study.id, number=number, first_question=sheet.first_question)
            for number, sheet in enumerate(plan.sheets)
        ]
        session.add_all(sheets)
        session.flush()
        rows = [
            {
                "sheet_id": row.id, "position": position, "kind": trial.kind, "prompt": trial.prompt,
                "item": None if trial.kind != "main" else f"{trial.pair}:{plan.design.prompts.index(trial.prompt)}",
                "left": names[trial.left], "right": names[trial.right],
                "answers": list(trial.answers), "repeat_of": trial.repeat_of,
            }
            for row, sheet in zip(sheets, plan.sheets, strict=True)
            for position, trial in enumerate(sheet.trials)
        ]  # fmt: skip
        session.execute(insert(Trial), rows)
        detail = {"schedule_hash": digest, "votes": plan.design.votes}
        session.add(Audit(study_id=study.id, at=created, action="created", detail=detail))

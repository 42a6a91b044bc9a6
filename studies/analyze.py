"""``study analyze``: from votes to win rates with intervals, agreement, sensitivity and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select

from leaderboard.record import record_preferences
from studies.compare import LARGE, arrays, estimate
from studies.database import Database, find_study
from studies.design import QUESTIONS
from studies.errors import NotEnoughVotesError
from studies.files import write_atomic, write_json
from studies.models import Audit
from studies.ranking import agreement, bradley_terry
from studies.serving import StudyFolder
from studies.tally import Answered, Sealed, excluded_raters, load_answers, open_sealed, self_consistency
from studies.wins import holm

LEADING = ("question", "a", "b", "wins_a", "wins_b", "ties", "value", "low", "high", "p_value", "p_holm")
COUNTS = ("n_votes", "n_prompts", "n_raters", "method")


def analyze(answers: Sequence[Answered], sealed: Sealed) -> dict[str, Any]:
    """Every number of a study; pure.

    Args:
        answers: all votes that count, from :func:`load_answers`.
        sealed: the sealed schedule.

    Returns:
        ``results``: one per pair and question, led by the headline; ``ranking``, ``agreement``,
        ``self_consistency``, ``position_bias``, ``excluded_raters``, ``sensitivity``.

    Raises:
        NotEnoughVotesError: no main vote of a rater that the rules keep.
    """
    excluded = excluded_raters(answers, sealed.rules)
    kept = [answer for answer in answers if answer.rater not in excluded]
    mains = [answer for answer in kept if answer.kind == "main"]
    if not mains:
        raise NotEnoughVotesError("There is no vote to analyse yet; see tmd-eval study status.")
    results = _results(kept, sealed)
    for result, adjusted in zip(results, holm([result["p_value"] for result in results]), strict=True):
        result["p_holm"] = adjusted
    ranking, agreements, bias = {}, {}, {}
    for number, question in enumerate(QUESTIONS):
        data = arrays(kept, number)
        if len(sealed.models) > 2:
            a, b = (np.array([sealed.pairs[pair][place] for pair in data["pairs"]]) for place in (0, 1))
            fitted = bradley_terry(data["y"], a, b, data["side"], data["prompts"], data["raters"], len(sealed.models))
            ranking[question] = None if fitted is None else _named(fitted, sealed)
        agreements[question] = agreement(data["y"], data["items"], data["raters"])
        bias[question] = _bias(mains, kept, number)
    return {
        "results": results,
        "ranking": ranking or None,
        "agreement": agreements,
        "self_consistency": self_consistency(kept),
        "position_bias": bias,
        "excluded_raters": {rater[:12]: reason for rater, reason in excluded.items()},
        "sensitivity": _sensitivity(answers, kept, sealed),
        "small_design": any(result["small_design"] for result in results),
        "raters": len({answer.rater for answer in mains}),
        "votes": len(mains),
    }


def analyze_study(
    folder: StudyFolder,
    db: str | None,
    out: Path,
    *,
    command: str,
    code_revision: str,
    device: str | None = None,
    packages: Mapping[str, str] | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    record: bool = True,
) -> dict[str, Any]:
    """Analyse an unblinded study; write preferences, analysis and report as JSON, report.md, index.html and the figure.

    Args:
        folder: the study's folder.
        db: database URL or path with the votes; the results go into its leaderboard tables too.
        out: folder of the files.
        command: the command line.
        code_revision: of the analysing code.
        device: what computes, as a person would name it.
        packages: name to version, of what the numbers depend on.
        now: source of the time.
        record: whether to write the leaderboard's rows.

    Returns:
        What preferences.json holds.

    Raises:
        SealedError: the study is still blind.
        NotEnoughVotesError: nothing to analyse.
    """
    from studies.figure import draw
    from studies.html import page
    from studies.report import markdown
    from studies.report_json import report_json

    database = Database(db)
    try:
        with database.writing() as session:
            study = find_study(session, folder.name, folder.schedule_hash, database.shown)
            sealed = open_sealed(folder.path, study)
            answers = load_answers(session, study, sealed)
            detail = {"command": command, "votes": len(answers)}
            session.add(Audit(study_id=study.id, at=now(), action="analyzed", detail=detail))
            unblinded, simulated = study.unblinded, study.simulated
            log = session.scalars(select(Audit).where(Audit.study_id == study.id).order_by(Audit.id)).all()
            models = [line.detail["command"] for line in log if line.action == "simulated"]
            audit = [
                {"at": line.at.isoformat(timespec="seconds"), "action": line.action, "command": said}
                for line in log
                if (said := line.detail.get("command") or (line.action == "created" and sealed.command))
            ]
    finally:
        database.close()
    analysis = analyze(answers, sealed)
    head = {
        "study": folder.name, "schedule_hash": folder.schedule_hash, "simulated": simulated,
        "command": command, "code_revision": code_revision, "created": now().isoformat(timespec="seconds"),
        "raters": analysis["raters"], "votes": analysis["votes"], "wanted_votes": folder.votes,
        "excluded_raters": len(analysis["excluded_raters"]), "models": list(sealed.models),
    }  # fmt: skip
    leading = [{key: result[key] for key in (*LEADING, *COUNTS)} for result in analysis["results"]]
    preferences = {**head, "results": leading}
    extra = {
        "unblinded": None if unblinded is None else unblinded.isoformat(timespec="seconds"),
        "votes_after_unblinding": sum(
            answer.kind == "main" and unblinded is not None and answer.created > unblinded for answer in answers
        ),
        "simulated_by": models,
        "exclusion_rules": asdict(sealed.rules),
        "design": {key: value for key, value in sealed.design.items() if key not in ("exclusions", "prompts")},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "preferences.json", preferences)
    write_json(out / "analysis.json", {**head, **extra, **{k: v for k, v in analysis.items() if k not in head}})
    report = report_json(
        preferences, analysis, seeds=[sealed.design["seed"]], device=device, packages=packages or {}, audit=audit
    )
    write_json(out / "report.json", report)
    figures = draw(preferences)
    for ending, data in figures.items():
        write_atomic(out / f"preferences.{ending}", data)
    text = markdown(preferences, {**analysis, **extra})
    write_atomic(out / "report.md", text)
    write_atomic(out / "index.html", page(text, title=f"Preference study {folder.name}", figure=figures["svg"]))
    if record:
        record_preferences(db, out / "preferences.json")
    return preferences


def _results(answers: Sequence[Answered], sealed: Sealed, *, drop_ties: bool = False, draws: int = 4000) -> list[Any]:
    results = []
    for number, question in enumerate(QUESTIONS):
        for pair, (a, b) in enumerate(sealed.pairs):
            data = arrays([answer for answer in answers if answer.pair == pair], number)
            keep = data["y"] != 0.5 if drop_ties else np.full(len(data["y"]), True)
            if not keep.any():
                continue
            columns = (data[key][keep] for key in ("y", "side", "prompts", "raters"))
            names = {"question": question, "a": sealed.models[a]["name"], "b": sealed.models[b]["name"]}
            results.append({**names, **estimate(*columns, draws=draws)})
    return results


def _sensitivity(everyone: Sequence[Answered], kept: Sequence[Answered], sealed: Sealed) -> list[dict[str, Any]]:
    """The headline again with every rater, and with ties left out instead of counted half."""
    variants = {"all raters": (everyone, False), "ties left out": (kept, True), "both": (everyone, True)}
    rows = []
    for name, (answers, drop_ties) in variants.items():
        for result in _results(answers, sealed, drop_ties=drop_ties, draws=1000):
            wanted = ("question", "a", "b", "value", "low", "high", "p_value", "n_votes", "n_raters")
            rows.append({"variant": name, **{key: result[key] for key in wanted}})
    return rows


def _bias(mains: Sequence[Answered], kept: Sequence[Answered], number: int) -> dict[str, Any]:
    """Share of left among decided answers; on identical clips it is bias and nothing else."""

    def share(answers: Sequence[Answered]) -> dict[str, Any]:
        sides = [answer.choices[number] for answer in answers if answer.choices[number] != "tie"]
        return {"n": len(sides), "left": sides.count("left") / len(sides) if sides else None}

    return {"main": share(mains), "identical": share([answer for answer in kept if answer.kind == "identical"])}


def _named(fitted: dict[str, Any], sealed: Sealed) -> dict[str, Any]:
    names = [model["name"] for model in sealed.models]
    models = [{"model": name, **row} for name, row in zip(names, fitted["models"], strict=True)]
    pairs = [{**row, "a": names[row["a"]], "b": names[row["b"]]} for row in fitted["pairs"]]
    return {**fitted, "models": sorted(models, key=lambda row: -row["win"]), "pairs": pairs}


SMALL_NOTE = (
    f"Small design (below {LARGE['prompts']} prompts, {LARGE['votes']} votes or {LARGE['raters']} raters a pair): the "
    "clustered test may reject too often (it is anti-conservative with few clusters), and the prompt-level permutation "
    "does not see that raters differ. The larger of both p-values leads, with the wider ends of the clustered and the "
    "two-way bootstrap interval."
)
"""What every output of a small study says."""

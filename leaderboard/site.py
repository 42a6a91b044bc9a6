"""The site: an index, a page for each model, a comparison of any two, preferences, claims, and what each number means.

Plain files that open from a disk and refer to nothing outside their folder. The same database gives the same bytes.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from leaderboard import checks, dimension_figures, display, exports, figures, published, reported_board
from leaderboard.board import Group, Pair, columns, groups_of, main_device, paired_rows, pairs_of, reference, slug
from leaderboard.clips import Sheet, contact_sheet
from leaderboard.display import Display
from leaderboard.errors import LeaderboardError
from leaderboard.figures import Figure
from leaderboard.marks import family
from leaderboard.models import Latency, Preference, Reported, Result, Thumbnail
from leaderboard.page import SiteFolder, environment
from leaderboard.query import (
    Evidence,
    load,
    load_evidence,
    load_reported,
    measured_dict,
    prompt_means,
    reported_dict,
)
from leaderboard.report import report_json

SHEET = 8
"""Models side by side on the index, at most."""
MODEL_SHEETS = 60
"""Model pages with moving clips, at most; the best rows of each group come first."""
COMPARABLE = 400
"""Rows that the comparison page offers, at most."""


@dataclass(frozen=True, kw_only=True)
class ModelPage:
    """What stands on the page of one measured row."""

    row: Result
    group: Group
    slug: str
    pairs: list[Pair] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    thumbnails: list[tuple[str, str]] = field(default_factory=list)
    """Prompt and data URI."""
    sheet: Sheet | None = None


def build_site(
    db_url: str | None,
    out: Path,
    *,
    title: str = "Leaderboard",
    command: str,
    rows: Iterable[int] | None = None,
    clips: Mapping[int, Path] | None = None,
) -> Path:
    """Write the site; files of an older one in the folder are replaced, and those that are out of date deleted.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        out: the folder, made when missing.
        title: heading of the pages.
        command: command line that makes the site again.
        rows: ids of the measured rows to show; all by default. Published rows are always shown.
        clips: run folder by row id; by default those recorded, where they still exist. Empty: no clips.

    Returns:
        Path of index.html.

    Raises:
        LeaderboardError: nothing to show, an unknown id, or a clip that cannot be read,
            or the folder's list of files is damaged.
    """
    folder = SiteFolder(out)
    results, reported, evidence = load(db_url, rows=rows), load_reported(db_url), load_evidence(db_url)
    if not (results or reported or evidence.claims or evidence.preferences or evidence.latencies):
        raise LeaderboardError(
            "There is nothing to report: the database has no rows; record some with leaderboard add, or load the "
            "published ones with leaderboard import published."
        )
    if clips is None:
        clips = {row.id: Path(row.run) for row in results if row.run and (Path(row.run) / "manifest.jsonl").is_file()}
    groups = [_complete(group, db_url, evidence, clips) for group in groups_of(results)]
    models = reported_board.models(reported)
    drawn = reported_board.reported_figures(reported)
    studies = [
        (study, found, dimension_figures.preferences(found, name=f"preferences-{i}"))
        for i, (study, found) in enumerate(_by_study(evidence.preferences).items(), 1)
    ]
    pages = {page.row.id: page for page in _model_pages(groups, evidence, clips)}
    shown = [row for group in groups for row in group.rows]
    every = [figure for group in groups for figure in (*group.figures, *([group.radar] if group.radar else []))]
    every += [*drawn, *(figure for _, _, figure in studies if figure)]
    table = [*map(measured_dict, results), *map(reported_dict, reported)]

    templates = _templates()
    templates.globals |= {
        "title": title,
        "command": command,
        "groups": groups,
        "pages": pages,
        "reported": reported_board.ordered(reported),
        "reported_models": models,
        "reported_page": {row.id: model for model in models for row in model.rows},
        "flagged": [row for row in reported if published.flags(row)],
        "disagreements": reported_board.disagreements(reported),
        "reported_figures": drawn,
        "studies": studies,
        "claims": evidence.claims,
        "latencies": evidence.latencies,
        "results": shown,
        "metrics": {metric.name for row in shown for metric in row.metrics},
        "devices": sorted({row.device for row in shown}),
        "revisions": sorted({row.code_revision for row in shown}),
    }
    for figure in every:
        for ending, content in (("svg", figure.svg), ("png", figure.png), ("pdf", figure.pdf)):
            folder.write(f"figures/{figure.name}.{ending}", content)
    for model_page in pages.values():
        html = templates.get_template("site_model.html.j2").render(page=model_page, row=model_page.row)
        folder.write(f"models/{model_page.slug}.html", html)
    for model in models:
        html = templates.get_template("site_reported.html.j2").render(model=model)
        folder.write(f"models/{model.slug}.html", html)
    rows_to_compare = Markup(_comparable(groups, reported, pages))  # JSON without <, see there
    filled = {"compare": True, "preferences": studies, "claims": evidence.claims, "method": True}
    for name in (name for name, content in filled.items() if content):
        html = templates.get_template(f"site_{name}.html.j2").render(comparable=rows_to_compare)
        folder.write(f"{name}.html", html)
    for name in ("style.css", "site.css", "sort.js", "compare.js"):
        folder.write(name, str(templates.globals["asset"](name)))  # type: ignore[operator]
    folder.write("leaderboard.md", templates.get_template("leaderboard.md.j2").render())
    folder.write("leaderboard.csv", exports.as_csv(table))
    folder.write("leaderboard.json", exports.as_json(table))
    folder.write("leaderboard.tex", exports.as_latex(groups, reported))
    summary = report_json(shown, command=command)
    summary["rows"] += _contracts(reported)
    folder.write("report.json", exports.by_lines(summary))
    folder.write("index.html", templates.get_template("site_index.html.j2").render())
    folder.finish()
    return out / "index.html"


def _templates() -> Environment:
    templates = environment()
    templates.globals |= {
        "quality_dimensions": checks.QUALITY_DIMENSIONS,
        "dimensions": checks.DIMENSIONS,
        "formula": published.formula,
        "flags_of": published.flags,
        "name_of": published.name,
        "family": family,
    }
    templates.filters |= {"points": _points, "gigabytes": lambda value: f"{value / 2**30:.2f}"}
    return templates


def _points(value: float, shown: Display | None) -> str:
    """A signed difference: percent points for shares, three digits otherwise."""
    if shown is None or shown.share:
        return f"{100 * value:+.1f}"
    return f"{value:+#.3g}"


def _complete(group: Group, db_url: str | None, evidence: Evidence, clips: Mapping[int, Path]) -> Group:
    """The group with its figures, pairs and contact sheet."""
    compared = paired_rows(group, evidence.with_videos)
    having = [row for row in group.rows if row.id in clips][:SHEET]
    teachers = [row for row in group.rows if row.role == "teacher" and row.id in clips][:1]
    beside = [
        *having[: SHEET - len(teachers)],
        *(row for row in teachers if row not in having[: SHEET - len(teachers)]),
    ]
    rows = dimension_figures.dimension_rows(group.rows)
    dots = dimension_figures.dots(rows, name=f"{group.slug}-dimensions")
    return replace(
        group,
        figures=[*_figures(group, evidence), *([dots] if dots else [])],
        radar=dimension_figures.radar(rows, name=f"{group.slug}-radar"),
        pairs=pairs_of(compared, prompt_means(db_url, [row.id for row in compared])) if len(compared) > 1 else [],
        sheet=contact_sheet(columns(beside), clips),
    )


def _figures(group: Group, evidence: Evidence) -> list[Figure]:
    """Each main metric against effective NFE, then against time on the device with most rows."""
    by_name = {shown.name: shown for shown in group.displays}
    names = [name for name in checks.TOTALS if name in by_name]
    names = names or [shown.name for shown in [group.primary] if shown] + [n for n in display.FIDELITY if n in by_name]
    times, device = _times(group, evidence)
    drawn = []
    for suffix in ("nfe", "seconds"):
        for name in names:
            shown = by_name[name]
            real = reference(group.rows) if name in display.FIDELITY else None
            stem = f"{group.slug}-{slug(name)}-{suffix}"
            if suffix == "nfe":
                drawn.append(figures.against(figures.points_of(group.rows, shown), shown, name=stem, real=real))
            elif device and len(times) > 1:
                points = figures.points_of(group.rows, shown, lambda row: times.get(row.id))
                axis = figures.latency_axis(device)
                drawn.append(figures.against(points, shown, name=stem, axis=axis, real=real))
    return [figure for figure in drawn if figure is not None]


def _times(group: Group, evidence: Evidence) -> tuple[dict[int, float], str | None]:
    """Seconds a video by id, and the device: as ``tmd-eval latency`` timed two rows or more, else as the runs did."""
    measured: dict[str, dict[int, float]] = {}
    for latency in evidence.latencies:
        for row in group.rows:
            same = (row.checkpoint_hash, row.m, row.n) == (latency.checkpoint_hash, latency.m, latency.n)
            if same and latency.batch == 1 and row.guidance == latency.guidance:
                measured.setdefault(latency.device, {})[row.id] = latency.seconds["total"]["median"]
    device = min(measured, key=lambda name: (-len(measured[name]), name), default=None)
    if device is not None and len(measured[device]) > 1:
        return measured[device], device
    device = main_device(group.rows)
    return {
        row.id: row.seconds_per_video for row in group.rows if row.device == device and row.seconds_per_video
    }, device


def _by_study(rows: Sequence[Preference]) -> dict[str, list[Preference]]:
    """Results by study; two of one name that differ in design or kind of rater are two."""
    found: dict[tuple[str, str, bool], list[Preference]] = {}
    for row in rows:
        found.setdefault((row.study, row.schedule_hash, row.simulated), []).append(row)
    names = Counter(study for study, _, _ in found)
    return {
        study if names[study] == 1 else f"{study}, design {design[:8]}{', simulated' if simulated else ''}": group
        for (study, design, simulated), group in found.items()
    }


def _model_pages(groups: Sequence[Group], evidence: Evidence, clips: Mapping[int, Path]) -> Iterator[ModelPage]:
    left = MODEL_SHEETS
    for group in groups:
        teacher = next((row for row in group.rows if row.role == "teacher" and row.id in clips), None)
        undistilled = [row for row in group.rows if row.role == "undistilled" and row.id in clips]
        for row in group.rows:
            sheet = None
            if row.id in clips and left:
                left -= 1
                same = next((other for other in undistilled if other.m == row.m and other is not row), None)
                beside = [row, *(other for other in (teacher, same) if other is not None and other is not row)]
                sheet = contact_sheet(beside, clips, prompts=2, budget=400_000)
            yield ModelPage(
                row=row,
                group=group,
                slug=f"{slug(row.name)}-{row.key[:8]}",
                pairs=[pair for pair in group.pairs if row in (pair.a, pair.b)],
                latencies=[x for x in evidence.latencies if _same(x, row)],
                preferences=[x for x in evidence.preferences if _judged(x, row, group.rows)],
                thumbnails=[] if sheet else [_thumbnail(x) for x in evidence.thumbnails.get(row.id, [])],
                sheet=sheet,
            )


def _same(latency: Latency, row: Result) -> bool:
    return latency.checkpoint_hash is not None and (
        (latency.checkpoint_hash, latency.m, latency.n) == (row.checkpoint_hash, row.m, row.n)
    )


def _judged(preference: Preference, row: Result, rows: Sequence[Result]) -> bool:
    """Whether a preference is about a row: by its weights, and by name where rows sample the same weights."""
    if row.checkpoint_hash is None:
        return False
    alone = sum(other.checkpoint_hash == row.checkpoint_hash for other in rows) == 1
    sides = ((preference.a, preference.a_hash), (preference.b, preference.b_hash))
    return any(digest == row.checkpoint_hash and (alone or name == row.name) for name, digest in sides)


def _thumbnail(thumbnail: Thumbnail) -> tuple[str, str]:
    kind = "png" if thumbnail.image.startswith(b"\x89PNG") else "webp"
    return thumbnail.prompt, f"data:image/{kind};base64,{b64encode(thumbnail.image).decode()}"


def _comparable(groups: Sequence[Group], reported: Sequence[Reported], pages: Mapping[int, ModelPage]) -> str:
    """Data of the comparison page: rows and paired differences, as JSON that is safe inside a script element."""
    rows: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, Any]] = {}
    chosen = [(row, group) for group in groups for row in group.rows][:COMPARABLE]
    index = {row.id: f"m{row.id}" for row, _ in chosen}
    for row, group in chosen:
        for shown in group.displays:
            metrics.setdefault(shown.name, {"label": shown.label, "share": shown.share, "better": shown.better})
        rows.append(
            {
                "key": index[row.id], "name": row.name, "group": f"Measured on {group.name}",
                "page": f"models/{pages[row.id].slug}.html", "nfe": row.effective_nfe, "passes": row.forward_passes,
                "seconds": row.seconds_per_video, "device": row.device, "ranked": row.ranked,
                "metrics": {m.name: [m.value, m.low, m.high, m.n] for m in row.metrics if m.name != display.REAL},
            }
        )  # fmt: skip
    for entry in reported[: COMPARABLE - len(rows)]:
        values = reported_dict(entry)
        for name in entry.scores:
            label = dimension_figures.LABELS.get(name, name.capitalize())
            metrics.setdefault(name, {"label": label, "share": True, "better": "higher"})
        scores = {name: [metric["value"], None, None, None] for name, metric in values["metrics"].items()}
        rows.append(
            {
                "key": f"r{entry.id}", "name": f"{published.name(entry)} ({entry.source})",
                "group": "Reported elsewhere", "page": None, "nfe": entry.effective_nfe,
                "passes": values["forward_passes"], "seconds": None, "device": None, "ranked": True, "metrics": scores,
            }
        )  # fmt: skip
    pairs = {
        f"{index[pair.a.id]} {index[pair.b.id]}": {
            name: [round(x, 6) for x in (d.value, d.low, d.high)] + [d.prompts] for name, d in pair.differences.items()
        }
        for group in groups
        for pair in group.pairs
        if pair.a.id in index and pair.b.id in index
    }
    text = json.dumps({"rows": rows, "metrics": metrics, "pairs": pairs}, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _contracts(rows: Sequence[Reported]) -> list[dict[str, Any]]:
    """Published rows as report.json has rows, with source and flags; the name says the source, and is made unique."""
    found: list[dict[str, Any]] = []
    names: Counter[str] = Counter()
    for row in rows:
        values = reported_dict(row)
        name = f"{values['name']} ({row.source})"
        names[name] += 1
        kept = {key: values[key] for key in ("role", "method", "m", "n", "h", "effective_nfe", "seconds_per_video")}
        metrics = {
            metric: {key: entry[key] for key in ("value", "low", "high", "n")}
            for metric, entry in values["metrics"].items()
        }
        number = f", row {names[name]}" if names[name] > 1 else ""
        found.append(
            {"name": name + number, **kept, "metrics": metrics, "source": row.source, "flags": values["flags"]}
        )
    return found

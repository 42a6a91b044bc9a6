"""From rows to a board: what is compared with what, ranks, the Pareto front, and differences of pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from leaderboard import display
from leaderboard.clips import Sheet
from leaderboard.display import Display
from leaderboard.figures import Figure
from leaderboard.models import Metric, Result
from leaderboard.stats import Difference, front_probability, intervals_apart, paired_differences

CARDS = 6
"""Comparisons of a student with the undistilled model shown as cards, at most."""
PAIRED = 16
"""Rows that are compared with each other prompt by prompt, at most: 120 pairs."""
SAMPLED = frozenset({"micro"})
"""Sets whose prompts are in random order: fewer of them are a smaller sample of the same, not another test."""
Means = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Mean score by metric, result id and prompt."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student beside the undistilled model at the same M, and the teacher, in one metric."""

    student: Result
    undistilled: Result
    teacher: Result | None
    verdict: str
    """"above", "below" or "not apart": where the student's interval lies."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two rows, compared prompt by prompt in every metric whose videos' scores both have."""

    a: Result
    b: Result
    differences: dict[str, Difference]
    """a minus b by metric."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows on one prompt set: only these are compared with each other."""

    name: str
    slug: str
    rows: list[Result]
    displays: list[Display]
    primary: Display | None
    ranks: dict[int, str]
    front: dict[int, float]
    """By id: share of resampled boards on whose Pareto front (effective NFE, primary metric) the row is."""
    comparisons: list[Comparison]
    pairs: list[Pair] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    radar: Figure | None = None
    sheet: Sheet | None = None

    @property
    def versions(self) -> dict[str, list[str]]:
        """Scores that came of several versions of a scorer or its weights, by label."""
        found: dict[str, set[tuple[str, str]]] = {}
        for row in self.rows:
            for metric in row.metrics:
                weights = " ".join(f"{name} {digest[:8]}" for name, digest in sorted(metric.weight_hashes.items()))
                found.setdefault(metric.name, set()).add((metric.metric_version, weights))
        return {
            shown.label: sorted(" ".join(filter(None, version)) for version in found[shown.name])
            for shown in self.displays
            if len(found.get(shown.name, ())) > 1
        }

    @property
    def headlines(self) -> list[Display]:
        return [shown for shown in self.displays if shown.headline]

    @property
    def details(self) -> list[Display]:
        return [shown for shown in self.displays if not shown.headline]


def groups_of(results: Sequence[Result]) -> list[Group]:
    """One group for each set of prompts, by name: the same name with other prompts is another set, unless sampled."""
    sets: dict[tuple[str, str], list[Result]] = {}
    for row in sorted(results, key=lambda row: (row.prompts_name, -row.prompts_count, row.prompts_sha256)):
        sampled = row.prompts_name in SAMPLED
        sets.setdefault((row.prompts_name, "" if sampled else row.prompts_sha256), []).append(row)
    names = _set_names({key: rows[0].prompts_count for key, rows in sets.items()})
    slugs = _slugs(names.values())
    order = {row.id: place for place, row in enumerate(results)}
    return [
        _group(sorted(rows, key=lambda row: order[row.id]), names[key], slugs[names[key]]) for key, rows in sets.items()
    ]


def _set_names(counts: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], str]:
    """What each (name, hash) of prompts is called: the name, with number and hash where these tell sets apart."""
    names = Counter(name for name, _ in counts)
    numbers = Counter((name, count) for (name, _), count in counts.items())
    return {
        (name, sha): name
        if names[name] == 1
        else f"{name}, {count} prompts" + (f" ({sha[:8]})" if numbers[name, count] > 1 else "")
        for (name, sha), count in counts.items()
    }


def _group(results: list[Result], name: str, slug: str) -> Group:
    shown = display.displays(results)
    primary = display.primary(shown)
    rows = display.ordered(results, primary)
    return Group(
        name=name,
        slug=slug,
        rows=rows,
        displays=shown,
        primary=primary,
        ranks=display.ranks(rows, primary),
        front=_front(rows, primary),
        comparisons=_comparisons(rows, primary),
    )


def slug(text: str) -> str:
    """Lower-case letters, figures and hyphens: safe as a file name and in HTML.

    >>> slug("TMD-N2H2, M = 2")
    'tmd-n2h2-m-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "x"


def _slugs(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        first = slug(name) if name.isascii() or slug(name) != "x" else "prompts"
        taken, number = set(found.values()), 1
        candidate = first
        while candidate in taken:
            number += 1
            candidate = f"{first}-{number}"
        found[name] = candidate
    return found


def columns(rows: Sequence[Result]) -> list[Result]:
    """Order of a contact sheet: teacher, students, undistilled, each from many to few evaluations."""
    order = {"teacher": 0, "student": 1, "undistilled": 2}
    return sorted(rows, key=lambda row: (order[row.role], -(row.effective_nfe or 0), row.name, row.id))


def reference(rows: Sequence[Result]) -> Metric | None:
    """Real against real at the largest n among the complete rows."""
    found = [metric for row in rows if row.ranked and (metric := row.metric(display.REAL)) is not None]
    return max(found, key=lambda metric: metric.n, default=None)


def main_device(rows: Sequence[Result]) -> str | None:
    """The device that most rows with a time were sampled on: times are compared within one device only."""
    counts = Counter(row.device for row in rows if row.ranked and row.seconds_per_video)
    return min(counts, key=lambda device: (-counts[device], device), default=None)


def _front(rows: Sequence[Result], primary: Display | None) -> dict[int, float]:
    if primary is None:
        return {}
    found = [
        (row.id, row.effective_nfe, metric.value, metric.low, metric.high)
        for row in rows
        if row.ranked and row.effective_nfe and (metric := row.metric(primary.name)) and metric.low is not None
    ]
    if len(found) < 2:
        return {}
    ids, cost, value, low, high = zip(*found, strict=True)
    shares = front_probability(cost, value, low, high, higher_is_better=primary.better != "lower")
    return dict(zip(ids, shares.tolist(), strict=True))


def _comparisons(rows: Sequence[Result], primary: Display | None) -> list[Comparison]:
    if primary is None:
        return []
    scored = [row for row in rows if row.ranked and row.metric(primary.name) is not None]
    teachers = [row for row in scored if row.role == "teacher"]
    undistilled: dict[int | None, list[Result]] = {}
    for row in scored:
        if row.role == "undistilled":
            undistilled.setdefault(row.m, []).append(row)
    found: list[Comparison] = []
    for student in (row for row in scored if row.role == "student"):
        teacher = next((row for row in teachers if same_base(student, row)), None)
        for other in (row for row in undistilled.get(student.m, []) if same_base(student, row)):
            a, b = student.metric(primary.name), other.metric(primary.name)
            if a is None or b is None or None in (a.low, a.high, b.low, b.high):
                continue
            apart = intervals_apart((a.low or 0.0, a.high or 0.0), (b.low or 0.0, b.high or 0.0))
            verdict = "not apart" if not apart else "above" if a.value > b.value else "below"
            found.append(Comparison(student=student, undistilled=other, teacher=teacher, verdict=verdict))
            if len(found) == CARDS:
                return found
    return found


def same_base(a: Result, b: Result) -> bool:
    """Whether two rows have one base model: by the hash of its weights, where both state it, else by its name."""
    parts = [(row.base or "").rpartition("sha256 ") for row in (a, b)]
    return parts[0][2] == parts[1][2] if parts[0][1] and parts[1][1] else a.base == b.base


def paired_rows(group: Group, having: Iterable[int]) -> list[Result]:
    """The rows to compare prompt by prompt: the best of those that have videos' scores, and the teachers.

    Args:
        group: the board.
        having: ids of the results whose videos' scores are in the database.
    """
    ids = set(having)
    scored = [row for row in group.rows if row.id in ids and row.ranked]
    teachers = [row for row in scored if row.role == "teacher"][:2]
    return [row for row in scored if row in teachers or row in scored[: PAIRED - len(teachers)]]


def pairs_of(rows: Sequence[Result], means: Means) -> list[Pair]:
    """Every pair of rows with its differences, in the order of the rows."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    differences: dict[tuple[int, int], dict[str, Difference]] = {}
    for metric, by_result in sorted(means.items()):
        found = paired_differences(
            {(a.id, b.id): (by_result[a.id], by_result[b.id]) for a, b in pairs if {a.id, b.id} <= by_result.keys()}
        )
        for pair, difference in found.items():
            differences.setdefault(pair, {})[metric] = difference
    return [Pair(a=a, b=b, differences=differences[a.id, b.id]) for a, b in pairs if differences.get((a.id, b.id))]

"""How numbers are shown: labels, units and directions of metrics, and their text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from leaderboard.models import Metric, Result
from leaderboard.stats import rank_ranges

NONE = "\u2013"  # en dash


@dataclass(frozen=True, kw_only=True)
class Display:
    """How one metric is shown."""

    name: str
    """Key in the database and in report.json."""
    label: str
    """Heading."""
    share: bool = True
    """True: 0 to 1, shown as percent; False: shown as it is."""
    better: str = "higher"
    """"higher", "lower" or "" where neither end is better."""
    headline: bool = False
    """Shown in the main table; the others stand in the table of details."""

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")

    def number(self, value: float | None) -> str:
        """The value alone: percent with one decimal (no sign, the heading has it), else three significant digits."""
        if value is None or not math.isfinite(value):
            return NONE
        if self.share:
            return f"{100 * value:.1f}"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"

    def interval(self, metric: Metric) -> str:
        """The interval in brackets, or nothing where there is none."""
        if metric.low is None or metric.high is None:
            return ""
        return f"[{self.number(metric.low)}, {self.number(metric.high)}]"

    @property
    def phrase(self) -> str:
        """The heading inside a sentence: "joint alignment", but "Fréchet distance"."""
        return self.label if self.label.startswith("Fréchet") else self.label[:1].lower() + self.label[1:]

    @property
    def unit(self) -> str:
        return "%" if self.share else ""


QUALITY = ("total", "alignment_joint")
"""Metrics that can rank rows and fill the quality figure, best choice first."""
FIDELITY = ("frechet",)
"""Metrics of the fidelity figure, best choice first."""
REAL = "frechet_real"
"""Fréchet distance of real clips to other real clips at the same n: the least a model can hope for, shown in the cell
of the distance rather than in a column of its own."""

_KNOWN = (
    Display(name="total", label="Total", headline=True),
    Display(name="quality", label="Quality", headline=True),
    Display(name="semantic", label="Semantic", headline=True),
    Display(name="alignment_joint", label="Joint alignment", headline=True),
    Display(name="frechet", label="Fréchet distance", share=False, better="lower", headline=True),
    Display(name="diversity", label="Diversity (real = 1)", share=False, better="", headline=True),
    *(
        Display(name=f"alignment_{name}", label=label)
        for name, label in {
            "color": "Colour",
            "shape": "Shape",
            "direction": "Direction",
            "speed": "Speed",
            "background": "Background",
            "count": "Object count",
            "color2": "2nd colour",
            "shape2": "2nd shape",
            "relation": "Relation",
        }.items()
    ),
    *(
        Display(name=f"diversity_{name}", label=f"Diversity of {name}", share=False, better="")
        for name in ("place", "size", "motion", "background", "phase")
    ),
    *(
        Display(name=f"diversity_{name.lower()}", label=f"Diversity ({name} distance)", share=False, better="")
        for name in ("DINO", "CLIP")
    ),
)


def phrase(name: str) -> str:
    """What a metric is called inside a sentence."""
    return next((shown.phrase for shown in _KNOWN if shown.name == name), name.replace("_", " "))


def lower_is_better(name: str) -> bool:
    """Whether small values of a metric are good, as of distances."""
    return any(shown.name == name and shown.better == "lower" for shown in _KNOWN)


def displays(results: Iterable[Result]) -> list[Display]:
    """How to show every metric that the results have: known ones first, then the others by name.

    A metric nobody knows is taken for a share (as VBench's dimensions are) while all its values lie in 0 to 1. With at
    most four metrics in all, every one is a headline.
    """
    values: dict[str, list[float]] = {}
    for result in results:
        for metric in result.metrics:
            if metric.name != REAL:
                values.setdefault(metric.name, []).append(metric.value)
    found = [display for display in _KNOWN if display.name in values]
    for name in sorted(set(values) - {display.name for display in found}):
        label = name.replace("_", " ").capitalize()
        found.append(Display(name=name, label=label, share=all(0 <= value <= 1 for value in values[name])))
    if len(found) <= 4:
        found = [replace(display, headline=True) for display in found]
    return found


def primary(shown: Iterable[Display]) -> Display | None:
    """The metric that ranks: the first of ``QUALITY`` there is, else the first share."""
    by_name = {display.name: display for display in shown}
    for name in QUALITY:
        if name in by_name:
            return by_name[name]
    return next((display for display in by_name.values() if display.share), None)


def ordered(results: Iterable[Result], by: Display | None) -> list[Result]:
    """Ranked rows first, best first; then the others; ties by name and id, so that the order is always the same."""

    def key(result: Result) -> tuple[bool, float, str, int]:
        metric = result.metric(by.name) if by else None
        value = metric.value if metric else -math.inf
        sign = 1 if by and by.better == "lower" else -1
        return not (result.ranked and metric), sign * value, result.name, result.id

    return sorted(results, key=key)


def ranks(results: list[Result], by: Display | None) -> dict[int, str]:
    """Rank of each ranked row by id, as a range where intervals overlap ("1", "2-3"); none without an interval."""
    if by is None:
        return {}
    candidates = [
        (result.id, metric.low, metric.high)
        for result in results
        if result.ranked and (metric := result.metric(by.name)) and metric.low is not None and metric.high is not None
    ]
    if not candidates:
        return {}
    ids, low, high = zip(*candidates, strict=True)
    ranges = rank_ranges(low, high, higher_is_better=by.better != "lower").tolist()
    return {row: f"{a}" if a == b else f"{a}\u2013{b}" for row, (a, b) in zip(ids, ranges, strict=True)}


METHODS = {"tmd": "TMD", "tm-mf": "TM-MF", "dmd2-v": "DMD2-v", "rcm": "rCM", "kd": "KD"}
"""Methods with a marker of their own, and how they are written."""


def method_key(method: str) -> str:
    """A method's name as ``METHODS`` has it: lower case, with hyphens."""
    return method.lower().replace("_", "-").replace(" ", "-")


def method_label(method: str) -> str:
    """A method as people write it."""
    return METHODS.get(method_key(method), method)


def default_name(*, role: str, method: str, base: str, m: int | None, n: int | None, h: int | None) -> str:
    """The name of a row nobody named: the paper's for students (M said separately), the base model's otherwise.

    >>> default_name(role="student", method="tmd", base="micro", m=2, n=4, h=5)
    'TMD-N4H5, M = 2'
    >>> default_name(role="undistilled", method="teacher", base="Wan-AI/Wan2.1-T2V-1.3B", m=2, n=None, h=None)
    'Wan2.1-T2V-1.3B undistilled, 2 steps'
    """
    if role == "student":
        head = f"-N{n}H{h}" if n is not None and h is not None else ""
        return method_label(method) + head + (f", M = {m}" if m is not None else "")
    steps = "" if m is None else f", {m} step{'s' if m != 1 else ''}"
    return f"{base.rstrip('/').rsplit('/', 1)[-1]} {role}{steps}"


def count(value: float | int | None) -> str:
    """A number of steps or evaluations, without needless decimals: 50, 1.25."""
    return NONE if value is None else f"{value:.4g}"


def passes(result: Result) -> str:
    """Forward passes; under guidance also as NFE × 2, as the paper prints it."""
    if result.forward_passes is None:
        return NONE
    guided = result.effective_nfe is not None and result.forward_passes == 2 * result.effective_nfe
    return count(result.forward_passes) + (f" ({count(result.effective_nfe)}\u00d72)" if guided else "")


def short(revision: str) -> str:
    """A revision with its commit cut to 12 figures.

    >>> short("0123456789abcdef0123456789abcdef01234567+changes")
    '0123456789ab+changes'
    """
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", revision)


def seconds(value: float | None) -> str:
    """Seconds with three significant digits: 0.0123, 4.56, 181."""
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"

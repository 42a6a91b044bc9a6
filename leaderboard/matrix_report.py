"""The report of a matrix: index.html (one self-contained file), matrix.md, report.json and figures.

The same content gives the same bytes: nothing in a report says when it was built.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaderboard import display
from leaderboard.display import Display
from leaderboard.effects import Estimate
from leaderboard.errors import LeaderboardError
from leaderboard.figures import Figure
from leaderboard.matrix import Decision, Matrix, MatrixRow, report_json
from leaderboard.matrix_figures import against_nfe, diversity_against
from leaderboard.matrix_sheets import row_sheets
from leaderboard.page import environment, write_file

DIVERSITY = "diversity"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the page: the rows of a section under one budget."""

    heading: str
    note: str
    rows: list[MatrixRow]
    figures: list[Figure]
    ablations: bool
    """Whether it shows ablations, each below the method as it is."""

    @property
    def indented(self) -> set[str]:
        """Keys of the ablations whose method as it is stands above them."""
        keys = {row.key for row in self.rows}
        return {row.key for row in self.rows if self.ablations and row.ablation and row.baseline in keys}


def build_matrix_report(matrix: Matrix, out: Path) -> Path:
    """Write a report folder; files of an older report in it are replaced.

    Args:
        matrix: the content.
        out: the folder, made when missing.

    Returns:
        Path of index.html.

    Raises:
        LeaderboardError: no rows, or a clip that cannot be read.
    """
    if not matrix.rows:
        raise LeaderboardError("There is nothing to report yet: no cell of the matrix is finished.")
    shown = display.displays(matrix.rows)  # type: ignore[arg-type]  # rows have metrics, as results do
    by_name = {d.name: d for d in shown}
    headlines = [d for d in shown if d.headline]
    headline = by_name.get(matrix.headline) or headlines[0]
    tables = _tables(matrix, headline, by_name.get("frechet"))
    collapse = (
        diversity_against(matrix, headline, by_name[DIVERSITY], name="diversity") if DIVERSITY in by_name else None
    )
    context = {
        "matrix": matrix,
        "tables": tables,
        "headlines": headlines,
        "details": [d for d in shown if not d.headline],
        "headline": headline,
        "collapse": collapse,
        "diversity": by_name.get(DIVERSITY),
        "lowest": _least_diverse(matrix),
        "sheets": row_sheets(matrix.rows),
        "decisions": matrix.decisions,
        "verdicts": {name: sum(d.verdict == name for d in matrix.decisions) for name in VERDICTS},
        "forest": _forest(matrix.decisions),
        "spread": [d for d in matrix.decisions if d.claim.metric.startswith(DIVERSITY) and d.effect],
        "shown": by_name,
        "effect": _effect,
        "signed": _signed,
        "phrase": display.phrase,
    }
    templates = environment()
    page = templates.get_template("matrix.html.j2").render(context)
    text = templates.get_template("matrix.md.j2").render(context)
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(exist_ok=True)
    drawn = [figure for table in tables for figure in table.figures] + ([collapse] if collapse else [])
    for figure in drawn:
        write_file(out / "figures" / f"{figure.name}.svg", figure.svg)
        write_file(out / "figures" / f"{figure.name}.png", figure.png)
    content = json.dumps(report_json(matrix), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(out / "matrix.md", text)
    write_file(out / "index.html", page)
    write_file(out / "report.json", content)  # last: it holds the state that the whole report shows
    return out / "index.html"


VERDICTS = ("holds", "does not hold", "undecided")


def _tables(matrix: Matrix, headline: Display, frechet: Display | None) -> list[Table]:
    tables = []
    base = [row for row in matrix.rows if row.budget is None]
    there = {section for row in matrix.rows for section in row.sections}
    sections = [section for section in matrix.sections if section in there]
    for section in sections:
        used = {row.budget for row in matrix.rows if section in row.sections}
        budgets: list[str | None] = [budget for budget in matrix.budgets if budget in used]
        for budget in budgets or [None]:  # no student is there yet: the base model alone
            own = [row for row in matrix.rows if section in row.sections and row.budget == budget and row.budget]
            ablations = 2 * sum(row.ablation is not None for row in own) > len(own)
            first = section == sections[0]
            rows = _with_baselines(matrix, own) if ablations else [*(base if first else []), *own]
            name = re.sub(r"[^a-z0-9]+", "-", f"{section} {budget or ''}".lower()).strip("-")[:60]
            metrics = [d for d in (headline, frechet) if d is not None and not ablations]
            drawn = [against_nfe(rows, d, name=f"{name}-{d.name.replace('_', '-')}") for d in metrics]
            tables.append(
                Table(
                    heading=section if len(budgets) < 2 else f"{section}: {budget}",
                    note=budget or "",
                    rows=rows,
                    figures=[figure for figure in drawn if figure is not None],
                    ablations=ablations,
                )
            )
    return tables


def _with_baselines(matrix: Matrix, own: list[MatrixRow]) -> list[MatrixRow]:
    """Each ablation under the method as it is, which may stand in another section."""
    keys: dict[str, None] = {}
    for row in own:
        if row.baseline in matrix.by_key:
            keys[str(row.baseline)] = None
        keys[row.key] = None
    rows = [matrix.by_key[key] for key in keys]
    return sorted(rows, key=lambda row: list(keys).index(row.baseline if row.baseline in keys else row.key))


def _least_diverse(matrix: Matrix) -> list[tuple[MatrixRow, Estimate]]:
    """Ablations that surely lose diversity against the method as it is, the most first; three at most."""
    first = matrix.budgets[:1]  # of rows that differ in the budget alone, one will do
    found = [(row, matrix.difference(row, DIVERSITY)) for row in matrix.rows if row.ablation and row.budget in first]
    lost = [(row, effect) for row, effect in found if effect is not None and effect.over_seeds and effect.high < 0]
    return sorted(lost, key=lambda pair: pair[1].value)[:3]


def _signed(shown: Display, value: float) -> str:
    """A difference with its sign, in percentage points for shares."""
    return ("\u2212" if value < 0 else "+") + shown.number(abs(value))


def _effect(shown: Display, effect: Estimate) -> str:
    """A difference with its interval."""
    return f"{_signed(shown, effect.value)} [{_signed(shown, effect.low)}, {_signed(shown, effect.high)}]"


def _forest(decisions: list[Decision]) -> list[dict[str, Any] | None]:
    """The bars of all claims; those of one metric have one scale."""
    reach: dict[str, float] = {}
    for decision in decisions:
        if decision.effect is not None:
            name, effect = decision.claim.metric, decision.effect
            reach[name] = max(reach.get(name, 1e-12), abs(effect.low), abs(effect.high))
    return [_bar(decision.effect, 1.1 * reach.get(decision.claim.metric, 1.0)) for decision in decisions]


def _bar(effect: Estimate | None, reach: float) -> dict[str, Any] | None:
    """Where an interval lies against 0, in percent of a bar that reaches as far on both sides."""
    if effect is None:
        return None

    def place(value: float) -> float:
        return round(50 + 50 * value / reach, 2)

    low, high = place(effect.low), place(effect.high)
    return {"low": low, "width": round(max(high - low, 0.5), 2), "value": place(effect.value)}

"""The tables of a board for other programs: CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leaderboard import display, published
from leaderboard.board import Group
from leaderboard.models import Reported
from leaderboard.query import FIELDS

_LEFT_OUT = frozenset({"run", "id"})
"""Fields that mean nothing outside this database: a path of this machine, and a number."""
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "\u2013": "--", "\u00d7": r"$\times$", "\n": " ",
    }
)  # fmt: skip


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as ``query.show`` gives them, as a JSON list with one row a line."""
    return _list({key: value for key, value in row.items() if key not in _LEFT_OUT} for row in rows) + "\n"


def by_lines(content: Mapping[str, Any]) -> str:
    """A JSON object with a line for each entry, and one for each of its ``rows``.

    Indenting everything would take ``json``'s slow encoder: ten seconds for a large board.
    """
    lines = [f"{json.dumps(key)}: {_list(value) if key == 'rows' else _json(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _list(rows: Iterable[Any]) -> str:
    return "[\n" + ",\n".join(map(_json, rows)) + "\n]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as ``query.show`` gives them, one line each: settings, then value, low, high and n of every metric.

    A cell that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    metrics = sorted({name for row in rows for name in row["metrics"]})
    fields = [field for field in FIELDS if field not in {*_LEFT_OUT, "packages", "formula", "metrics"}]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("value", "low", "high", "n")
    heads = (name if part == "value" else f"{name}_{part}" for name in metrics for part in parts)
    writer.writerow([*fields, *map(_no_formula, heads)])
    for row in rows:
        cells = [row[field] for field in fields]
        cells = [" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells]
        cells += [row["metrics"].get(name, {}).get(part) for name in metrics for part in parts]
        writer.writerow(map(_no_formula, cells))
    return out.getvalue()


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell and cell[0] in "=+-@\t\r" else cell


def as_latex(groups: Sequence[Group], reported: Sequence[Reported]) -> str:
    r"""Tables for a paper (needs \usepackage{booktabs}): each group, then the published figures."""
    tables = []
    for group in groups:
        heads = ["Rank", "Model", "NFE", "Passes", "s/video"]
        heads += [shown.label + (" (%)" if shown.share else "") for shown in group.headlines]
        lines = []
        for row in group.rows:
            cells = [group.ranks.get(row.id, display.NONE), row.name, display.count(row.effective_nfe)]
            cells += [display.count(row.forward_passes), display.seconds(row.seconds_per_video)]
            for shown in group.headlines:
                metric = row.metric(shown.name)
                cells.append(
                    f"{shown.number(metric.value)} {shown.interval(metric)}".strip() if metric else display.NONE
                )
            lines.append(cells)
        caption = f"Measured on prompts {group.name}; 95 % intervals over prompts, ranks as ranges."
        tables.append(_table(caption, heads, lines, left=2))
    if reported:
        lines = [
            [
                *(published.name(row), row.source, display.count(row.effective_nfe)),
                *(
                    f"{row.scores[key]:.2f}" if key in row.scores else display.NONE
                    for key in ("total", "quality", "semantic")
                ),
                ", ".join(published.flags(row)),
            ]
            for row in reported
        ]
        heads = ["Model", "Source", "NFE", "Total (%)", "Quality (%)", "Semantic (%)", "Flags"]
        tables.append(_table("As printed elsewhere; nothing of it was measured here.", heads, lines, left=2))
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def _table(caption: str, heads: list[str], lines: list[list[str]], *, left: int) -> str:
    rows = [" & ".join(str(cell).translate(_LATEX) for cell in line) + r" \\" for line in [heads, *lines]]
    body = [rows[0], r"\midrule", *rows[1:]]
    columns = "l" * left + "r" * (len(heads) - left)
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{caption.translate(_LATEX)}}}",
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}",
            r"\end{table}", "",
        ]
    )  # fmt: skip

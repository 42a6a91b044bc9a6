"""A live page on the database: the same rows as the site, read anew at every look."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from leaderboard import display
from leaderboard.board import Group, groups_of
from leaderboard.errors import LeaderboardError
from leaderboard.published import flags
from leaderboard.query import load, load_reported
from leaderboard.reported_board import ordered

if TYPE_CHECKING:
    import gradio

REPORTED = "Reported elsewhere"
MEASURED = "Measured on "


class ServeError(LeaderboardError):
    """Gradio is missing."""

    exit_code = 4


def boards(db_url: str | None) -> list[str]:
    """Names of the tables there are: one a prompt set, then the published rows."""
    names = [MEASURED + group.name for group in groups_of(load(db_url))]
    return names + ([REPORTED] if load_reported(db_url) else [])


def table(db_url: str | None, board: str, search: str) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of one table.

    Args:
        db_url: database URL or path.
        board: one of ``boards``.
        search: words that a row must all contain, in any case.
    """
    if board == REPORTED:
        heads = ["Model", "M", "N", "H", "Effective NFE", "Total, %", "Quality, %", "Semantic, %", "Source", "Flags"]
        rows = [
            [
                *(f"{row.teacher} {row.method}", row.m, row.n, row.h, row.effective_nfe),
                *(row.scores.get(key) for key in ("total", "quality", "semantic")),
                *(row.source, ", ".join(flags(row))),
            ]
            for row in ordered(load_reported(db_url))
        ]
    else:
        found = [group for group in groups_of(load(db_url)) if MEASURED + group.name == board]
        heads, rows = _measured(found[0]) if found else (["Model"], [])
    words = search.lower().split()
    return heads, [row for row in rows if all(word in " ".join(map(str, row)).lower() for word in words)]


def _measured(group: Group) -> tuple[list[str], list[list[Any]]]:
    heads = ["Rank", "Model", "Method", "M", "N", "H", "Effective NFE", "Seconds / video"]
    heads += [shown.label + (", %" if shown.share else "") for shown in group.headlines] + ["Device", "Flags"]
    rows = []
    for row in group.rows:
        cells = [group.ranks.get(row.id, display.NONE), row.name, display.method_label(row.method)]
        cells += [display.count(value) for value in (row.m, row.n, row.h, row.effective_nfe)]
        cells.append(display.seconds(row.seconds_per_video))
        for shown in group.headlines:
            metric = row.metric(shown.name)
            cells.append(f"{shown.number(metric.value)} {shown.interval(metric)}".strip() if metric else display.NONE)
        rows.append([*cells, row.device, ", ".join(row.flags)])
    return heads, rows


def widths(heads: list[str], rows: list[list[Any]]) -> list[int]:
    """Pixels of each column, so that no heading breaks inside a word; long texts wrap from 320 on."""
    cells = [max([len(head) + 3, *(len(str(row[n])) for row in rows)]) for n, head in enumerate(heads)]
    return [min(320, 40 + 8 * count) for count in cells]


def page(db_url: str | None) -> gradio.Blocks:
    """The Gradio page.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.

    Raises:
        LeaderboardError: the database cannot be opened.
        ServeError: Gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ServeError("The live page needs Gradio: pip install 'tmd-eval[study]'.") from error
    first = boards(db_url)

    def look(board: str | None, search: str) -> Any:
        heads, rows = table(db_url, board or "", search or "")
        return gradio.Dataframe(headers=heads, value=rows, interactive=False, column_widths=widths(heads, rows))

    def refresh() -> Any:
        return gradio.Dropdown(choices=boards(db_url))

    with gradio.Blocks(title="Leaderboard", analytics_enabled=False) as blocks:
        gradio.Markdown("# Leaderboard\nBrackets are 95 % intervals over prompts; ranks are ranges where they overlap.")
        with gradio.Row():
            board = gradio.Dropdown(choices=first, value=first[0] if first else None, label="Board")
            search = gradio.Textbox(label="Filter rows", placeholder="for example: rCM 14B")
        frame = gradio.Dataframe(interactive=False, wrap=True, datatype="str", label="Rows")
        for change in (board.change, search.change, blocks.load):
            change(look, [board, search], frame)
        blocks.load(refresh, None, board)
    return blocks

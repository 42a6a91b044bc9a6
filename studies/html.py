"""The Markdown report as a page that opens from ``file://`` and refers to nothing outside itself."""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape, unescape

STYLE = """
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff; max-width: 1100px;
  margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; } h3 { font-size: 1.05em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid #dde2e7; white-space: nowrap; }
img { max-width: 760px; width: 100%; } code { overflow-wrap: anywhere; font-size: .9em; }
"""


def page(markdown: str, *, title: str, figure: bytes, lang: str = "en") -> str:
    """Turn what :func:`studies.report.markdown` writes into HTML; everything else stays text.

    Args:
        markdown: headings, paragraphs, lists, tables, one figure, bold and code.
        title: of the page.
        figure: what the figure shows, as SVG; it becomes a part of the page.
        lang: language of the text.
    """
    blocks = [_block(block.split("\n"), figure) for block in re.split(r"\n{2,}", markdown.strip())]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(blocks)
    top = f'<!doctype html>\n<html lang="{lang}"><head>{head}<style>{STYLE}</style></head>\n'
    return f"{top}<body>\n{body}\n</body></html>\n"


def _block(lines: list[str], figure: bytes) -> str:
    first = lines[0]
    if heading := re.fullmatch(r"(#+) (.*)", first):
        rank = len(heading[1])
        return f"<h{rank}>{_inline(heading[2])}</h{rank}>"
    if image := re.fullmatch(r"!\[(.*)\]\(\w+\.png\)", first):
        data = b64encode(figure).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(image[1])}">'
    if first.startswith("| "):
        head, *rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in [first, *lines[2:]]]
        cells = "".join(f"<th>{_inline(cell.strip())}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell.strip())}</td>" for cell in row) + "</tr>" for row in rows)
        return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    if first.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _inline(text: str) -> str:
    safe = escape(unescape(text.replace("\\|", "|")))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", safe)

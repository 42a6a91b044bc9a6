"""What all pages share: templates with their filters, and files that are written whole or not at all."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leaderboard import display


def environment() -> Environment:
    """Templates with the filters that all pages share; HTML is escaped."""
    templates = Environment(
        loader=PackageLoader("leaderboard"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def asset(name: str) -> Markup:
        return Markup(templates.loader.get_source(templates, name)[0])  # type: ignore[union-attr]

    templates.globals |= {
        "asset": asset,
        "count": display.count,
        "passes": display.passes,
        "NONE": display.NONE,
        "REAL": display.REAL,
        "METHODS": display.METHODS,
        "method_key": display.method_key,
        "method_label": display.method_label,
    }
    templates.filters |= {
        "seconds": display.seconds,
        "short": display.short,
        "cell": _cell,
        "inline": lambda figure: Markup(figure.inline),
    }
    return templates


def _cell(text: object) -> str:
    """Text for a cell of a Markdown table: no pipes, no line breaks, no HTML."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", plain)


def write_file(path: Path, content: str | bytes) -> None:
    """Under a temporary name, then renamed: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

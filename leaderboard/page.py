"""What all pages share: templates with their filters, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leaderboard import display
from leaderboard.errors import LeaderboardError

MANIFEST = "files.json"
"""What the last build of a site wrote: SHA-256 by path. The next build deletes by it, and nothing else."""


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


class SiteFolder:
    """A folder that is built again and again: what an earlier build wrote and this one did not is deleted at the end.

    Only a file that is listed in the folder's ``MANIFEST`` and still has the bytes that were written goes; whatever
    somebody else put there, or changed, stays.
    """

    def __init__(self, root: Path) -> None:
        """Read what the last build wrote.

        Args:
            root: the folder, made when missing.

        Raises:
            LeaderboardError: the list of files is damaged, or the folder cannot be made.
        """
        self.root = root
        self._written: dict[str, str] = {}
        try:
            self._before = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
            if not all(isinstance(text, str) for item in self._before.items() for text in item):
                raise TypeError("a path or a hash is no text")
        except FileNotFoundError:
            self._before = {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LeaderboardError(
                f"{root / MANIFEST}, the list of what the last build wrote, cannot be read ({error}); delete it, or "
                "build into an empty folder."
            ) from error

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file, whole or not at all.

        Args:
            name: path inside the folder, with forward slashes.
            content: its bytes, or text to encode as UTF-8.
        """
        data = content.encode() if isinstance(content, str) else content
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
        self._written[name] = hashlib.sha256(data).hexdigest()

    def finish(self) -> None:
        """Delete what is out of date and write the list of files."""
        root = self.root.resolve()
        for name in sorted(self._before.keys() - self._written.keys()):
            path = self.root / name
            inside = path.resolve().is_relative_to(root)
            if inside and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self._before[name]:
                path.unlink()
        content = json.dumps({"files": dict(sorted(self._written.items()))}, indent=1)
        write_file(self.root / MANIFEST, content + "\n")

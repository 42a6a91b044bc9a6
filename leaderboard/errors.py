"""The one error of this room: something the user can mend, and what its sentence must not show."""

from __future__ import annotations

import re


class LeaderboardError(ValueError):
    """A bad run folder, database or request; the message alone says what to do."""

    exit_code = 2


def without_password(text: str) -> str:
    """A text with the passwords of addresses in it left out.

    >>> without_password("tmd-eval leaderboard build --db postgresql://bob:secret@host/db")
    'tmd-eval leaderboard build --db postgresql://bob:***@host/db'
    """
    return re.sub(r"(://[^\s:/@]*):[^\s/]*@", r"\1:***@", text)

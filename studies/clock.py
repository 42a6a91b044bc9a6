"""A clock that never goes backwards, so that leases and watch times survive a machine whose clock is set back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """UTC, at least as late as everything seen before.

    Args:
        floor: the latest time in the database, from before a restart; None for none.
        wall: source of the time, seconds since 1970.
    """

    def __init__(self, floor: datetime | None = None, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._monotonic = time.monotonic()
        self._latest = max(wall(), floor.timestamp() if floor else 0.0)
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """The time now: the wall clock's where it went on, else as much later as really passed."""
        with self._lock:
            monotonic = time.monotonic()
            passed = self._latest + max(0.0, monotonic - self._monotonic)
            self._latest, self._monotonic = max(self._wall(), passed), monotonic
            return datetime.fromtimestamp(self._latest, UTC)

"""The one error of this room: something the user can mend."""


class LeaderboardError(ValueError):
    """A bad run folder, database or request; the message alone says what to do."""

    exit_code = 2

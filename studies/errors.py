"""Errors of this room: something the user can mend, with the exit code the command line gives it."""


class StudyError(ValueError):
    """A bad design, video set, study folder or database; the message alone says what to do."""

    exit_code = 2


class SealedError(StudyError):
    """Asked for what only an unblinded study shows; nothing is unblinded on the way."""


class NotEnoughVotesError(StudyError):
    """The study has no votes to analyse yet."""

    exit_code = 3


class DatabaseUnusableError(StudyError):
    """The database is locked for long, full, damaged or gone; what was being written was not, the rest is kept."""

    exit_code = 1

"""Errors a user can mend, each with the exit code of the command that meets it."""


class TmdError(Exception):
    """Base of all errors whose message alone tells the user what to do; printed without a traceback."""

    exit_code = 1


class ConfigError(TmdError, ValueError):
    """Bad usage, configuration, checkpoint or input file."""

    exit_code = 2


class IncompleteError(TmdError):
    """Some of the expected items (videos, scores) are missing."""

    exit_code = 3


class EnvironmentMissingError(TmdError):
    """Weights, a managed environment, a device or a driver is missing."""

    exit_code = 4


class QualityGateError(TmdError):
    """The result is below the threshold the user asked for."""

    exit_code = 5

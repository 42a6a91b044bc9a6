"""What the page needs besides the design: language, recruiting platform, completion; may be edited in study.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from studies.errors import StudyError
from studies.files import read_json

Platform = Literal["none", "prolific", "mturk"]

PARAMETERS: dict[str, str] = {"none": "rater", "prolific": "PROLIFIC_PID", "mturk": "workerId"}
"""The query parameter that carries the rater's id on each platform."""
PREVIEW = ("assignmentId", "ASSIGNMENT_ID_NOT_AVAILABLE")
"""How MTurk marks a worker who only looks."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How raters come and go; not part of the schedule's hash."""

    platform: Platform = "none"
    """Where raters come from: sets the name of the query parameter with their id. The page refuses frames, so workers
    of MTurk open it in a new tab from a HIT of the survey-link kind, and hand in the completion code there."""
    rater_parameter: str | None = None
    """Query parameter with the rater's id; None for the platform's own name."""
    completion_code: str | None = None
    """Shown at the end, after all votes are stored."""
    completion_url: str | None = None
    """Link offered at the end; ``{code}`` in it is replaced."""
    language: str = "en"
    """Texts of the page: a name in ``studies/texts`` or the path of a YAML file."""
    contact: str = ""
    """Whom raters can write to; shown with the consent."""

    def __post_init__(self) -> None:
        if self.platform not in PARAMETERS:
            raise StudyError(f"platform must be one of {', '.join(PARAMETERS)}, not {self.platform!r}.")
        if self.rater_parameter is not None and not re.fullmatch(r"\w{1,64}", self.rater_parameter):
            raise StudyError(f"rater_parameter must be 1 to 64 letters or digits, not {self.rater_parameter!r}.")
        if self.completion_url is not None and not re.match(r"https?://", self.completion_url):
            raise StudyError(f"completion_url must start with http:// or https://, not {self.completion_url!r}.")

    @property
    def parameter(self) -> str:
        """Query parameter with the rater's id."""
        return self.rater_parameter or PARAMETERS[self.platform]

    @property
    def link(self) -> str | None:
        """The completion link with its code."""
        if self.completion_url is None:
            return None
        return self.completion_url.replace("{code}", self.completion_code or "")


@dataclass(frozen=True, kw_only=True)
class StudyFolder:
    """A study's folder as serving reads it; the sealed schedule stays shut."""

    path: Path
    name: str
    schedule_hash: str
    allow_ties: bool
    break_every: int
    lease_minutes: float
    min_watched: float
    clip_seconds: float
    """Length of every clip."""
    clip_fps: float
    clip_height: int
    clip_width: int
    raters: int
    """Sheets of the schedule."""
    votes: int
    """Main votes wanted."""
    serving: Serving
    keys: Mapping[str, str]
    """Secrets: ``raters``, ``cookies``, ``admin``, ``clips``."""


def open_folder(path: Path) -> StudyFolder:
    """Read study.json and the keys of a study's folder.

    Raises:
        StudyError: it is no study, or a file was edited into something else.
    """
    content = read_json(path / "study.json", "study")
    keys = read_json(path / "secret.json", "keys of the study")
    try:
        serving = _serving(content["serving"])
        return StudyFolder(
            path=path, name=content["name"], schedule_hash=content["schedule_hash"],
            allow_ties=bool(content["allow_ties"]), break_every=int(content["break_every"]),
            lease_minutes=float(content["lease_minutes"]), min_watched=float(content["min_watched"]),
            clip_seconds=float(content["clip"]["seconds"]), clip_fps=float(content["clip"]["fps"]),
            clip_height=int(content["clip"]["height"]), clip_width=int(content["clip"]["width"]),
            raters=int(content["raters"]), votes=int(content["votes"]), serving=serving, keys=keys,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise StudyError(f"{path / 'study.json'} lacks {error}; restore it from a copy.") from error


def _serving(content: Mapping[str, Any]) -> Serving:
    known = {field.name for field in fields(Serving)}
    for key in content:
        if key not in known:
            raise StudyError(f"study.json has an unknown serving key {key!r}; known are {', '.join(sorted(known))}.")
    return Serving(**content)

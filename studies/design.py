"""The design of a study: what is compared, on what, by how many, and which raters will be left out.

Everything here is fixed and hashed before the first vote.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from studies.errors import StudyError

QUESTIONS = ("visual quality", "prompt alignment")
"""The two independent questions of every trial, as preferences.json names them."""


@dataclass(frozen=True, kw_only=True)
class ExclusionRules:
    """Which raters the headline analysis leaves out; the sensitivity analysis keeps them."""

    max_obvious_failures: int = 1
    """Obvious catch trials that a rater may answer wrongly; a trial fails when either question is wrong."""
    min_obvious_trials: int = 2
    """Fewer obvious trials than this never exclude a rater: one slip is no pattern."""
    max_same_side: float = 0.95
    """Largest share of one side among a rater's answers, with at least ``min_votes`` votes."""
    min_median_seconds: float = 0.0
    """Smallest median time a rater takes to answer after both clips were watched; 0 asks for none."""
    min_votes: int = 10
    """Votes below which the side and time rules do not speak."""

    def __post_init__(self) -> None:
        _at_least("max_obvious_failures", self.max_obvious_failures, 0)
        _at_least("min_obvious_trials", self.min_obvious_trials, 1)
        _at_least("min_votes", self.min_votes, 1)
        if not 0.5 <= self.max_same_side <= 1:
            raise StudyError(f"max_same_side must lie in 0.5 to 1, not {self.max_same_side}.")
        if not self.min_median_seconds >= 0:
            raise StudyError(f"min_median_seconds must be 0 or more, not {self.min_median_seconds}.")


@dataclass(frozen=True, kw_only=True)
class Design:
    """All that decides the schedule besides the clips themselves."""

    name: str
    """Name of the study, unique in its database: letters, digits, ``-`` and ``_``."""
    models: tuple[str, ...]
    """Names of the compared models, two or more; only the sealed schedule and the analysis hold them."""
    prompts: tuple[str, ...]
    """The prompts shown, without repeats."""
    reference: str | None = None
    """Model that is compared with each of the others; None compares all pairs."""
    seeds: int = 5
    """Videos a model and prompt."""
    seed_pairing: Literal["matched", "independent"] = "matched"
    """matched: both clips of a trial have the same index; independent: a random permutation pairs them."""
    votes_per_item: int = 2
    """Votes on each (pair, prompt, seed)."""
    trials_per_rater: int = 20
    """Trials of one rater, catch trials included, practice not."""
    catch_share: float = 0.1
    """Share of catch trials: two obvious ones, then swapped repeats and identical clips in turn."""
    practice_trials: int = 2
    """Practice trials, 0 to 2: a corrupted clip, then a clip of another prompt; answered with feedback."""
    allow_ties: bool = False
    """Offer "no difference" beside left and right."""
    spacing: int = 3
    """A prompt does not come back within this many trials, where the sheet allows it."""
    break_every: int = 15
    """Trials between two suggested breaks; 0 for none."""
    lease_minutes: float = 20.0
    """A rater silent for this long may lose the unanswered trials to another."""
    min_watched: float = 0.95
    """Share of each clip that must have been watched before answers count, 0 to 1."""
    seed: int = 0
    """Seed of the draws, sides and orders."""
    exclusions: ExclusionRules = field(default_factory=ExclusionRules)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.name):
            raise StudyError(
                f"The study's name {self.name!r} must be 1 to 64 letters, digits, - or _, the first no mark."
            )
        if len(self.models) < 2 or len(set(self.models)) < len(self.models) or not all(self.models):
            raise StudyError(f"A study needs two or more models of different names, not {list(self.models)}.")
        if self.reference is not None and self.reference not in self.models:
            raise StudyError(f"The reference {self.reference!r} is none of the models {list(self.models)}.")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise StudyError("A study needs one or more prompts, each once.")
        if self.seed_pairing not in ("matched", "independent"):
            raise StudyError(f"seed_pairing must be matched or independent, not {self.seed_pairing!r}.")
        for name, least in (("seeds", 1), ("votes_per_item", 1), ("trials_per_rater", 1), ("spacing", 0)):
            _at_least(name, getattr(self, name), least)
        _at_least("break_every", self.break_every, 0)
        if not 0 <= self.catch_share <= 0.5:
            raise StudyError(f"catch_share must lie in 0 to 0.5, not {self.catch_share}.")
        if self.practice_trials not in (0, 1, 2):
            raise StudyError(f"practice_trials must be 0, 1 or 2, not {self.practice_trials}.")
        if not 1 <= self.lease_minutes <= 24 * 60:
            raise StudyError(f"lease_minutes must lie in 1 to 1440, not {self.lease_minutes}.")
        if not 0 < self.min_watched <= 1:
            raise StudyError(f"min_watched must lie above 0 and up to 1, not {self.min_watched}.")
        if self.main_trials > len(self.pairs) * len(self.prompts):
            raise StudyError(
                f"A rater would see a pair on the same prompt twice: {self.main_trials} trials, but only "
                f"{len(self.pairs)} pairs x {len(self.prompts)} prompts; lower trials_per_rater."
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Indices of the models of each pair (a, b); a is the reference where there is one."""
        count = len(self.models)
        if self.reference is not None:
            first = self.models.index(self.reference)
            return tuple((first, other) for other in range(count) if other != first)
        return tuple((a, b) for a in range(count) for b in range(a + 1, count))

    @property
    def catch_trials(self) -> int:
        """Catch trials of each rater."""
        return round(self.catch_share * self.trials_per_rater)

    @property
    def main_trials(self) -> int:
        """Most trials of a rater that count."""
        return self.trials_per_rater - self.catch_trials

    @property
    def votes(self) -> int:
        """Votes of the whole study, catch and practice trials left out."""
        return len(self.pairs) * len(self.prompts) * self.seeds * self.votes_per_item

    @property
    def raters(self) -> int:
        """Raters that the study needs."""
        return -(-self.votes // self.main_trials)


def draw_prompts(common: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw prompts by seed, the same on every machine, kept in the order of the sets.

    Args:
        common: prompts that all sets have.
        count: how many to draw, at least 1.
        seed: of the draw.

    Raises:
        StudyError: there are fewer than ``count``.
    """
    _at_least("num_prompts", count, 1)
    if count > len(common):
        raise StudyError(
            f"The sets share {len(common)} prompts, fewer than the {count} asked for; lower --num-prompts."
        )
    drawn = set(random.Random(f"prompts {seed}").sample(range(len(common)), count))
    return tuple(prompt for place, prompt in enumerate(common) if place in drawn)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StudyError(f"{name} must be a whole number of at least {least}, not {value!r}.")

"""``study power``: what preference a design can detect, by simulation with prompt, item and rater effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from studies.compare import headline_p, is_small
from studies.errors import StudyError
from studies.logit import clustered_logit
from studies.simulate import Effects, balanced_layout, simulate_votes
from studies.wins import sign_flip

GRID = (0.5, 0.52, 0.54, 0.56, 0.58, 0.60, 0.62, 0.64, 0.66, 0.68, 0.70)
"""True preferences that are simulated."""


@dataclass(frozen=True, kw_only=True)
class PowerDesign:
    """A design for one pair, as far as power depends on it."""

    prompts: int = 60
    seeds: int = 5
    votes_per_item: int = 2
    raters: int = 30
    level: float = 0.05
    """Level of the test; divide it by the number of tests to plan for Holm."""
    simulations: int = 400
    """Simulated studies a preference."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "raters"):
            if getattr(self, name) < 2:
                raise StudyError(f"{name} must be at least 2, not {getattr(self, name)}.")
        for name in ("seeds", "votes_per_item"):
            if getattr(self, name) < 1:
                raise StudyError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.simulations < 50:
            raise StudyError(f"simulations must be at least 50, not {self.simulations}.")
        if not 0 < self.level < 1:
            raise StudyError(f"level must lie between 0 and 1, not {self.level}.")
        if self.raters > self.votes:
            raise StudyError(f"{self.raters} raters for {self.votes} votes leave some without one; lower --raters.")

    @property
    def votes(self) -> int:
        """Votes on the pair."""
        return self.prompts * self.seeds * self.votes_per_item

    @property
    def small(self) -> bool:
        """Whether the larger p of two tests leads, as in the analysis."""
        return is_small(prompts=self.prompts, votes=self.votes, raters=self.raters)


def power(
    design: PowerDesign,
    effects: Effects,
    *,
    preferences: Sequence[float] = GRID,
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> dict[str, Any]:
    """Share of simulated studies whose headline test rejects "no preference", by true preference.

    Args:
        design: the design.
        effects: spreads of the random effects.
        preferences: true preferences, 0.5 or more.
        progress: wraps the preferences.

    Returns:
        ``rows`` with preference, power and its Monte Carlo error; ``detectable``: the preference at which power
        reaches 80 % (between grid points by interpolation), None where none does; ``independent``: what an exact
        sign test on as many independent votes would detect; ``design_effect`` at 50 %.
    """
    layout = balanced_layout(design.prompts, design.seeds, design.votes_per_item, design.raters)
    side = np.where(layout.a_left, 0.5, -0.5)
    columns = np.column_stack([np.ones(design.votes), side])
    rows, ratios = [], []
    for place, preference in enumerate(progress(preferences)):
        beta = effects.beta(preference)
        rng = np.random.default_rng([design.seed, place])
        rejected = 0
        for _ in range(design.simulations):
            y = simulate_votes(layout, beta, effects, rng)
            fit = clustered_logit(y, columns, layout.prompts, layout.raters)
            clustered = None if fit is None else fit.interval(np.array([1.0, 0.0]))[3]
            needed = design.small or fit is None
            permutation = sign_flip(y, layout.prompts, draws=999) if needed else 0.0
            rejected += headline_p(clustered, permutation, y, layout.raters, small=design.small) < design.level
            if preference == 0.5 and fit is not None:
                rate = float(y.mean())
                ratios.append(float(fit.covariance[0, 0]) * design.votes * rate * (1 - rate))
        share = rejected / design.simulations
        error = float(np.sqrt(max(share * (1 - share), 1 / design.simulations) / design.simulations))
        rows.append({"preference": preference, "power": share, "error": error})
    return {
        **asdict(design), **asdict(effects), "votes": design.votes,
        "test": "larger p of clustered logit and permutation" if design.small else "clustered logit",
        "rows": rows, "detectable": _crossing(rows, 0.8), "independent": _independent(design.votes, design.level),
        "design_effect": float(np.mean(ratios)) if ratios else None,
    }  # fmt: skip


def _crossing(rows: Sequence[dict[str, Any]], target: float) -> float | None:
    for before, after in pairwise(rows):
        if before["power"] < target <= after["power"]:
            part = (target - before["power"]) / (after["power"] - before["power"])
            return float(before["preference"] + part * (after["preference"] - before["preference"]))
    return None


def _independent(n: int, level: float) -> float | None:
    """Smallest preference that an exact sign test on n independent votes detects with 80 % power."""
    critical = stats.binom.ppf(1 - level / 2, n, 0.5)
    for preference in np.arange(0.505, 1.0, 0.005):
        if stats.binom.sf(critical, n, preference) >= 0.8:
            return float(round(preference, 3))
    return None

"""Raters from a stated model: for testing the statistics, for power, and for rehearsing a study.

logit P(A wins) = beta + u_prompt + w_item + r_rater + side (1 if A stands left, else -1), with normal u, w, r. The
effects of prompts and raters lean towards A or B, so they make votes on a prompt, and votes of a rater, alike.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from studies.errors import StudyError
from studies.schedule import balanced_sides

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Standard deviations of the random effects and the side bias, all in log-odds."""

    prompt: float = 0.8
    """Of prompts: some suit A, some B."""
    item: float = 0.8
    """Of single clip pairs within a prompt."""
    rater: float = 0.4
    """Of raters: some like A's look, some B's."""
    side: float = 0.0
    """Lean towards the left clip."""

    def __post_init__(self) -> None:
        for name in ("prompt", "item", "rater"):
            if not 0 <= getattr(self, name) <= 10:
                raise StudyError(f"The spread of {name} effects must lie in 0 to 10, not {getattr(self, name)}.")

    @property
    def total(self) -> float:
        """Standard deviation of all effects together."""
        return float(np.sqrt(self.prompt**2 + self.item**2 + self.rater**2))

    def preference(self, beta: float) -> float:
        """The share of votes that A wins on average over prompts, items, raters and both sides."""

        def at(z: float, side: float) -> float:
            return float(stats.norm.pdf(z) / (1 + np.exp(-(beta + side + self.total * z))))

        return sum(integrate.quad(at, -9, 9, args=(side,))[0] for side in (self.side, -self.side)) / 2

    def beta(self, preference: float) -> float:
        """The log-odds that give a preference, 0.02 to 0.98; see :meth:`preference`."""
        if not 0.02 <= preference <= 0.98:
            raise StudyError(f"A simulated preference must lie in 0.02 to 0.98, not {preference}.")
        return float(optimize.brentq(lambda beta: self.preference(beta) - preference, -40, 40))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who votes on what, as arrays of n votes on one pair."""

    prompts: Ints
    items: Ints
    """Clip pair of each vote: prompt and seed."""
    raters: Ints
    a_left: NDArray[np.bool_]


def balanced_layout(prompts: int, seeds: int, votes_per_item: int, raters: int) -> Layout:
    """The votes on one pair of a balanced study: each rater votes on as many different prompts as the others.

    Sides are balanced within items, prompts and raters, as those of the served schedule are.

    Args:
        prompts: number of prompts.
        seeds: clips a prompt and model.
        votes_per_item: votes on each clip pair.
        raters: number of raters.
    """
    n = prompts * seeds * votes_per_item
    vote = np.arange(n)
    prompt, round_ = vote % prompts, vote // prompts
    item = prompt * seeds + (round_ + prompt) % seeds
    # Raters take votes in turn, so that each meets other prompts in every round.
    rater = (vote + round_ // max(1, raters // np.gcd(prompts, raters))) % raters
    sides = balanced_sides(
        range(n),
        items=[lambda vote: int(item[vote]), lambda vote: int(prompt[vote]), lambda vote: 0],
        sheets=[lambda vote: int(rater[vote])],
        rng=random.Random(0),
    )
    return Layout(prompts=prompt, items=item, raters=rater, a_left=np.array(sides))


def simulate_votes(layout: Layout, beta: float, effects: Effects, rng: np.random.Generator) -> Floats:
    """Outcomes of one simulated study: 1 where A wins, shape (n,).

    Args:
        layout: who votes on what.
        beta: log-odds of A at a typical prompt, clip and rater.
        effects: the random effects.
        rng: source of everything random.
    """
    logit = beta + effects.side * np.where(layout.a_left, 1.0, -1.0)
    for ids, spread in ((layout.prompts, effects.prompt), (layout.items, effects.item), (layout.raters, effects.rater)):
        logit = logit + spread * rng.standard_normal(int(ids.max()) + 1)[ids]
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.float64)

"""Logit with standard errors clustered by prompt and by rater: the headline of every comparison.

Votes on one prompt are alike, and so are votes of one rater; a plain binomial test takes them for independent and then
finds differences where there are none in 14 to 26 % of studies instead of 5 %. Here V = V_prompt + V_rater -
V_(prompt, rater) (Cameron, Gelbach and Miller 2011, Eq. 2.11), each part a sandwich with its factor G / (G - 1), and
the quantiles are those of t with (smaller number of clusters - 1) degrees of freedom. Where that difference is smaller
than the larger of the one-way parts, the larger one is taken: a second source of variation cannot make a mean surer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEPS = 50
"""Newton steps before a fit counts as separated."""
LARGEST = 30.0
"""Log-odds beyond which a coefficient has run away: some prediction is perfect."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients with their clustered covariance."""

    beta: Floats
    """Shape (K,), log-odds."""
    covariance: Floats
    """Shape (K, K)."""
    degrees: int
    """Degrees of freedom: smaller number of clusters minus 1."""

    def interval(self, contrast: Floats, level: float = 0.95) -> tuple[float, float, float, float]:
        """Log-odds of a contrast, its interval's ends, and the two-sided p-value against 0.

        Args:
            contrast: shape (K,).
            level: of the interval, 0 to 1.
        """
        value = float(contrast @ self.beta)
        error = math.sqrt(max(0.0, float(contrast @ self.covariance @ contrast)))
        width = float(stats.t.ppf((1 + level) / 2, self.degrees)) * error
        p = float(value == 0)
        if error > 0:
            p = float(2 * stats.t.sf(abs(value) / error, self.degrees))
        return value, value - width, value + width, p


def clustered_logit(y: Floats, x: Floats, prompts: Ints, raters: Ints) -> Fit | None:
    """Fit by maximum likelihood (Newton) and compute the two-way clustered covariance.

    Args:
        y: outcomes, shape (n,), 0 to 1; a tie is one half.
        x: design, shape (n, K).
        prompts: prompt of each vote, shape (n,), any whole numbers.
        raters: rater of each vote, shape (n,).

    Returns:
        The fit, or None where it has no finite solution: separated votes, or columns that hang together.
    """
    beta = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-x @ beta))
        information = (x * (p * (1 - p))[:, None]).T @ x
        try:
            step = np.linalg.solve(information, x.T @ (y - p))
        except np.linalg.LinAlgError:
            return None
        beta = beta + step
        if not np.all(np.abs(beta) < LARGEST):
            return None
        if np.max(np.abs(step)) < 1e-12:
            break
    else:
        return None
    p = 1 / (1 + np.exp(-x @ beta))
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
    scores = x * (y - p)[:, None]
    both = np.unique(np.stack([prompts, raters]), axis=1, return_inverse=True)[1].reshape(-1)
    by_prompt, by_rater, by_both = (bread @ _meat(scores, groups) @ bread for groups in (prompts, raters, both))
    degrees = max(1, min(len(np.unique(prompts)), len(np.unique(raters))) - 1)
    return Fit(beta=beta, covariance=_floor(by_prompt + by_rater - by_both, by_prompt, by_rater), degrees=degrees)


def _meat(scores: Floats, groups: Ints) -> Floats:
    """Sum of outer products of the clusters' scores, times G / (G - 1)."""
    labels, inverse = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(labels), scores.shape[1]))
    np.add.at(sums, inverse.reshape(-1), scores)
    return sums.T @ sums * (len(labels) / max(1, len(labels) - 1))


def _floor(two_way: Floats, by_prompt: Floats, by_rater: Floats) -> Floats:
    """The two-way covariance, no variance of a coefficient below the larger one-way one."""
    least = np.maximum(np.diag(by_prompt), np.diag(by_rater))
    return two_way + np.diag(np.maximum(0.0, least - np.diag(two_way)))


def expit(value: float) -> float:
    """Probability of log-odds.

    >>> expit(0.0)
    0.5
    """
    return float(1 / (1 + np.exp(-value)))

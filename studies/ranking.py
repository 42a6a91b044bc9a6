"""Three or more models: Bradley-Terry strengths with clustered intervals, and agreement between raters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.logit import clustered_logit, expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def bradley_terry(
    y: Floats, a: Ints, b: Ints, side: Floats, prompts: Ints, raters: Ints, models: int
) -> dict[str, Any] | None:
    """Fit logit P(a wins) = s_a - s_b + c side by the clustered logit; strengths sum to 0.

    Args:
        y: outcomes for a, shape (n,), 0 to 1.
        a: index of the first model of each vote.
        b: index of the second.
        side: +1/2 where a stands left, -1/2 else.
        prompts: prompt of each vote.
        raters: rater of each vote.
        models: number of models, 3 or more.

    Returns:
        ``models``: for each its strength in log-odds and ``win``: the modelled share of votes against an average of
        the others, with ``low`` and ``high``; ``pairs``: observed and modelled rate of each pair (they differ where
        preferences are not transitive). None where there is no finite fit.
    """
    rows = np.arange(len(y))
    full = np.zeros((len(y), models))
    full[rows, a] += 1.0
    full[rows, b] -= 1.0
    fit = clustered_logit(y, np.column_stack([full[:, 1:], side]), prompts, raters)
    if fit is None:
        return None
    strengths = np.concatenate([[0.0], fit.beta[:-1]])
    listed = []
    for model in range(models):
        contrast = np.full(models, -1.0 / (models - 1))
        contrast[model] = 1.0  # against the mean of the others
        value, low, high, p = fit.interval(np.append(contrast[1:], 0.0))
        listed.append(
            {
                "strength": float(strengths[model] - strengths.mean()),
                "win": expit(value), "low": expit(low), "high": expit(high), "p_value": p,
            }
        )  # fmt: skip
    pairs = []
    for first, second in sorted({(int(i), int(j)) for i, j in zip(a, b, strict=True)}):
        mine = (a == first) & (b == second)
        modelled = expit(float(strengths[first] - strengths[second]))
        pairs.append({"a": first, "b": second, "observed": float(y[mine].mean()), "modelled": modelled})
    return {"models": listed, "pairs": pairs, "side_log_odds": float(fit.beta[-1])}


def agreement(y: Floats, items: Ints, raters: Ints) -> dict[str, Any]:
    """Krippendorff's alpha (nominal) and raw agreement of raters on the same item.

    Args:
        y: outcomes, shape (n,): 0, one half or 1.
        items: item of each vote.
        raters: rater of each vote.
    """
    import krippendorff

    item_labels, i = np.unique(items, return_inverse=True)
    rater_labels, r = np.unique(raters, return_inverse=True)
    table = np.full((len(rater_labels), len(item_labels)), np.nan)
    table[r.reshape(-1), i.reshape(-1)] = y
    shared = table[:, np.sum(~np.isnan(table), axis=0) >= 2]
    alpha = None
    if shared.shape[1] and len(np.unique(shared[~np.isnan(shared)])) > 1:
        alpha = float(krippendorff.alpha(shared, level_of_measurement="nominal"))
    same = pairs = 0
    for column in shared.T:
        votes = column[~np.isnan(column)]
        counts = np.unique(votes, return_counts=True)[1]
        same += int(np.sum(counts * (counts - 1)))
        pairs += len(votes) * (len(votes) - 1)
    return {
        "alpha": alpha,
        "agreement": same / pairs if pairs else None,
        "items_with_two_or_more_votes": shared.shape[1],
    }

"""One pair on one question: the estimate that leads, and everything a sceptical reader asks for beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from studies.logit import Fit, clustered_logit, expit
from studies.tally import Answered
from studies.wins import clopper_pearson, sign_flip, two_way_bootstrap, wilson

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LARGE = {"prompts": 60, "votes": 600, "raters": 30}
"""Studies below any of these are small: there the clustered test was not shown to hold its level. Votes and raters
may fall short by a tenth, so that a few excluded raters do not change the method."""
SHORTFALL = 0.9
LOGIT = "logit clustered by prompt and rater, with a side term; t interval"
CAUTIOUS = (
    "larger p of the logit clustered by prompt and rater and of the prompt-level sign-flip permutation; wider ends of "
    "the clustered and the two-way bootstrap interval (small design)"
)
SEPARATED = (
    "all votes on a side agree: larger p of the sign-flip permutations of prompts and of raters; Clopper-Pearson on "
    "the clusters"
)


def is_small(*, prompts: int, votes: int, raters: int) -> bool:
    """Whether a pair's study is too small for the clustered test alone; see :data:`LARGE`."""
    return prompts < LARGE["prompts"] or votes < SHORTFALL * LARGE["votes"] or raters < SHORTFALL * LARGE["raters"]


def headline_p(clustered: float | None, permutation: float, y: Floats, raters: Ints, *, small: bool) -> float:
    """The p-value that leads.

    In small studies neither test is enough: with few clusters the clustered one rejects too often, and flipping prompts
    takes no notice of raters who lean alike on all of them.

    Args:
        clustered: of the clustered logit; None where it has no finite fit.
        permutation: of the prompt-level sign-flip.
        y: outcomes, shape (n,).
        raters: rater of each vote.
        small: from :func:`is_small`.
    """
    if clustered is None:
        return max(permutation, sign_flip(y, raters))
    return max(clustered, permutation) if small else clustered


def arrays(answers: Sequence[Answered], question: int) -> dict[str, Any]:
    """Main votes on one question as arrays: y, side (+-1/2), prompts, raters, items."""
    mains = [answer for answer in answers if answer.kind == "main"]
    raters = {rater: place for place, rater in enumerate(sorted({answer.rater for answer in mains}))}
    items = sorted({(answer.pair, answer.prompt_id, answer.index_a) for answer in mains}, key=str)
    item_ids = {item: place for place, item in enumerate(items)}
    return {
        "y": np.array([answer.outcome(question) for answer in mains], np.float64),
        "side": np.array([0.5 if answer.a_left else -0.5 for answer in mains], np.float64),
        "prompts": np.array([answer.prompt_id for answer in mains], np.int64),
        "raters": np.array([raters[answer.rater] for answer in mains], np.int64),
        "items": np.array([item_ids[answer.pair, answer.prompt_id, answer.index_a] for answer in mains], np.int64),
        "pairs": np.array([answer.pair for answer in mains], np.int64),
    }


def estimate(y: Floats, side: Floats, prompts: Ints, raters: Ints, *, draws: int = 4000) -> dict[str, Any]:
    """Preference for a, with the method that suits the size of the study leading.

    Args:
        y: outcomes for a, shape (n,), n above 0: 1, 0, or one half for a tie.
        side: +1/2 where a stood left, -1/2 else.
        prompts: prompt of each vote.
        raters: rater of each vote.
        draws: resamples of permutation and bootstrap.

    Returns:
        value, low, high, p_value and method of the headline, then counts, plain and clustered alternatives.
    """
    n, wins = len(y), float(y.sum())
    rate = wins / n
    sizes = {"prompts": len(np.unique(prompts)), "votes": n, "raters": len(np.unique(raters))}
    small = is_small(**sizes)
    balanced = len(np.unique(side)) > 1
    columns = [np.ones(n), side] if balanced else [np.ones(n)]
    fit = clustered_logit(y, np.column_stack(columns), prompts, raters)
    logit = side_effect = None
    if fit is not None:
        log_odds, bottom, top, p = fit.interval(np.eye(len(columns))[0])
        logit = {"value": expit(log_odds), "low": expit(bottom), "high": expit(top), "p_value": p}
        if balanced:
            lean = fit.interval(np.array([0.0, 1.0]))
            side_effect = dict(zip(("log_odds", "low", "high", "p_value"), lean, strict=True))
    permutation = sign_flip(y, prompts, draws=2 * draws + 1)
    bootstrap = two_way_bootstrap(y, prompts, raters, draws=draws)
    p_value = headline_p(None if logit is None else logit["p_value"], permutation, y, raters, small=small)
    lead: dict[str, Any] = {"value": rate, "p_value": p_value}
    if logit is None:
        clusters = min(sizes["prompts"], sizes["raters"])
        low, high = clopper_pearson(rate * clusters, clusters)
        lead |= {"low": low, "high": high, "method": SEPARATED}
    elif small:
        low, high = min(bootstrap[0], logit["low"]), max(bootstrap[1], logit["high"])
        lead |= {"low": low, "high": high, "method": CAUTIOUS}
    else:
        lead = {**logit, "method": LOGIT}
    wins_a, wins_b = int(np.sum(y == 1)), int(np.sum(y == 0))
    plain = float(stats.binomtest(wins_a, wins_a + wins_b).pvalue) if wins_a + wins_b else 1.0  # the sign test: no ties
    return {
        **lead,
        "wins_a": wins_a, "wins_b": wins_b, "ties": int(np.sum(y == 0.5)),
        "n_votes": n, "n_prompts": sizes["prompts"], "n_raters": sizes["raters"], "small_design": small,
        "rate": rate, "wilson": wilson(wins, n), "clopper_pearson": clopper_pearson(wins, n),
        "plain_binomial_p": plain, "logit": logit, "permutation_p": permutation, "bootstrap": bootstrap,
        "side_effect": side_effect, "design_effect": _design_effect(fit, rate, n),
    }  # fmt: skip


def _design_effect(fit: Fit | None, rate: float, n: int) -> float | None:
    """Clustered variance of the preference over that of independent votes: how many votes are worth one."""
    if fit is None or not 0 < rate < 1:
        return None
    return float(fit.covariance[0, 0] * n * rate * (1 - rate))

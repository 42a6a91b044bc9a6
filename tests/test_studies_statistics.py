"""The statistics of votes: against statsmodels and choix, against simulated nulls, and mirrored exactly."""

from __future__ import annotations

import math
from typing import Any

import choix
import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from studies.compare import CAUTIOUS, LOGIT, SEPARATED, estimate, headline_p, is_small
from studies.errors import StudyError
from studies.logit import clustered_logit, expit
from studies.power import PowerDesign, power
from studies.ranking import agreement, bradley_terry
from studies.simulate import Effects, Layout, balanced_layout, simulate_votes
from studies.wins import clopper_pearson, holm, sign_flip, two_way_bootstrap, wilson

EFFECTS = Effects(prompt=0.8, item=0.8, rater=0.4, side=0.2)


def study(seed: int = 0, beta: float = 0.4, **sizes: int) -> tuple[Any, Any, Layout]:
    layout = balanced_layout(**{"prompts": 20, "seeds": 3, "votes_per_item": 3, "raters": 12} | sizes)
    y = simulate_votes(layout, beta, EFFECTS, np.random.default_rng(seed))
    return y, np.where(layout.a_left, 0.5, -0.5), layout


# Oracles


def test_clustered_logit_agrees_with_statsmodels():
    for seed in range(5):
        y, side, layout = study(seed)
        x = np.column_stack([np.ones(len(y)), side])
        fit = clustered_logit(y, x, layout.prompts, layout.raters)
        groups = np.column_stack([layout.prompts, layout.raters])
        model = sm.GLM(y, x, family=sm.families.Binomial())
        theirs = model.fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
        assert fit is not None and np.allclose(fit.beta, theirs.params, atol=1e-8)
        one_way = [
            model.fit(cov_type="cluster", cov_kwds={"groups": g, "use_correction": False}).cov_params()
            for g in (layout.prompts, layout.raters, np.unique(groups, axis=0, return_inverse=True)[1].reshape(-1))
        ]
        counts = [len(np.unique(g)) for g in (layout.prompts, layout.raters)]
        counts.append(len(np.unique(groups, axis=0)))
        parts = [v * g / (g - 1) for v, g in zip(one_way, counts, strict=True)]
        expected = parts[0] + parts[1] - parts[2]
        floor = np.maximum(np.diag(parts[0]), np.diag(parts[1]))
        expected += np.diag(np.maximum(0, floor - np.diag(expected)))
        assert np.allclose(fit.covariance, expected, rtol=1e-6)
        assert fit.degrees == 11


def test_intervals_of_shares_and_holm_agree_with_statsmodels():
    for wins, n in [(210, 300), (0, 12), (12, 12), (1, 40), (30, 60)]:
        assert wilson(wins, n) == pytest.approx(proportion_confint(wins, n, method="wilson"), abs=1e-12)
        assert clopper_pearson(wins, n) == pytest.approx(proportion_confint(wins, n, method="beta"), abs=1e-12)
    values = [0.04, 0.01, 0.03, 0.6, 0.01, 0.0]
    assert holm(values) == pytest.approx(list(multipletests(values, method="holm")[1]))


def test_bradley_terry_agrees_with_choix():
    rng = np.random.default_rng(3)
    strengths = np.array([0.0, 0.7, -0.4])
    pairs = np.array([(0, 1), (0, 2), (1, 2)])[rng.integers(0, 3, 1500)]
    a, b = pairs.T
    y = (rng.random(1500) < 1 / (1 + np.exp(strengths[b] - strengths[a]))).astype(float)
    side = np.where(rng.random(1500) < 0.5, 0.5, -0.5)
    fitted = bradley_terry(y, a, b, side, rng.integers(0, 60, 1500), rng.integers(0, 30, 1500), 3)
    theirs = choix.opt_pairwise(3, [(i, j) if won else (j, i) for i, j, won in zip(a, b, y, strict=True)])
    assert fitted is not None
    ours = [row["strength"] for row in fitted["models"]]
    assert np.allclose(ours, theirs - theirs.mean(), atol=0.01)  # ours has a side term besides
    assert all(row["low"] < row["win"] < row["high"] for row in fitted["models"])
    for row in fitted["pairs"]:
        assert abs(row["observed"] - row["modelled"]) < 0.05
    # a relabelling of the models relabels the strengths
    again = bradley_terry(y, 2 - a, 2 - b, side, np.arange(1500) % 60, np.arange(1500) % 30, 3)
    assert again is not None and np.allclose([row["strength"] for row in again["models"]], ours[::-1], atol=1e-9)


def test_sign_flip_agrees_with_counting_all_flips():
    y, _, layout = study(prompts=10, beta=0.5)
    means = np.array([np.sum(y[layout.prompts == p] - 0.5) for p in range(10)])
    everything = [abs(sum(m * (1 if flips >> i & 1 else -1) for i, m in enumerate(means))) for flips in range(1024)]
    assert sign_flip(y, layout.prompts) == np.mean(np.array(everything) >= abs(means.sum()) - 1e-9)
    y, _, layout = study(prompts=40, beta=0.15)
    means = np.array([np.mean(y[layout.prompts == p]) - 0.5 for p in range(40)])
    theirs = stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=9999, rng=1).pvalue
    assert sign_flip(y, layout.prompts) == pytest.approx(theirs, abs=0.02)


def test_agreement_of_known_tables():
    items, raters = np.repeat(np.arange(10), 2), np.tile([0, 1], 10)
    y = np.repeat([1.0, 0.0], 10)
    assert agreement(y, items, raters)["alpha"] == pytest.approx(1)
    # one disagreement in ten: alpha = 1 - (n - 1) * observed / expected pairs of unlike values
    y[1] = 0.0
    ones, zeros = int(y.sum()), int(len(y) - y.sum())
    expected = 1 - (len(y) - 1) * 2 / (2 * ones * zeros)
    found = agreement(y, items, raters)
    assert found["alpha"] == pytest.approx(expected) and found["agreement"] == pytest.approx(0.9)
    assert agreement(y[:1], items[:1], raters[:1]) == {
        "alpha": None, "agreement": None, "items_with_two_or_more_votes": 0,
    }  # fmt: skip


# Symmetry


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([-1.5, 0.0, 0.3, 2.5]), st.booleans())
def test_swapping_the_models_mirrors_everything(seed: int, beta: float, ties: bool):
    y, side, layout = study(seed, beta, prompts=15, raters=8)
    if ties:
        y = np.where(np.arange(len(y)) % 7 == 0, 0.5, y)
    ours = estimate(y, side, layout.prompts, layout.raters, draws=200)
    theirs = estimate(1 - y, -side, layout.prompts, layout.raters, draws=200)
    assert theirs["value"] == pytest.approx(1 - ours["value"], abs=1e-12)
    assert (theirs["wins_a"], theirs["wins_b"], theirs["ties"]) == (ours["wins_b"], ours["wins_a"], ours["ties"])
    assert theirs["p_value"] == pytest.approx(ours["p_value"], abs=1e-12)
    assert (theirs["low"], theirs["high"]) == pytest.approx((1 - ours["high"], 1 - ours["low"]), abs=1e-9)
    assert theirs["design_effect"] == pytest.approx(ours["design_effect"], rel=1e-9)
    assert theirs["plain_binomial_p"] == ours["plain_binomial_p"]
    order = np.random.default_rng(seed).permutation(len(y))
    mixed = estimate(y[order], side[order], layout.prompts[order], layout.raters[order], draws=200)
    assert mixed["value"] == pytest.approx(ours["value"]) and mixed["p_value"] == pytest.approx(ours["p_value"])


def test_side_bias_is_found_and_taken_out():
    layout = balanced_layout(60, 5, 2, 30)
    y = simulate_votes(layout, 0.0, Effects(prompt=0.3, item=0.3, rater=0.2, side=1.0), np.random.default_rng(1))
    found = estimate(y, np.where(layout.a_left, 0.5, -0.5), layout.prompts, layout.raters)
    assert found["method"] == LOGIT and found["low"] < 0.5 < found["high"]
    assert found["side_effect"]["low"] > 1.0 and found["side_effect"]["p_value"] < 1e-6


# Levels and coverage


def nulls(effects: Effects, layout: Layout, runs: int, beta: float, seed: int) -> tuple[float, float]:
    """Share of simulated studies that reject 50 %, and whose interval covers the truth."""
    side = np.where(layout.a_left, 0.5, -0.5)
    x = np.column_stack([np.ones(len(side)), side])
    truth, rng = effects.preference(beta), np.random.default_rng(seed)
    rejected = covered = 0
    for _ in range(runs):
        fit = clustered_logit(simulate_votes(layout, beta, effects, rng), x, layout.prompts, layout.raters)
        assert fit is not None
        _, low, high, p = fit.interval(np.array([1.0, 0.0]))
        rejected += p < 0.05
        covered += expit(low) <= truth <= expit(high)
    return rejected / runs, covered / runs


def test_the_smallest_large_design_holds_its_level():
    """60 prompts, 600 votes, 30 raters; Monte Carlo error of a rate of 5 % in 2,000 runs: 0.5 points."""
    rejected, covered = nulls(EFFECTS, balanced_layout(60, 5, 2, 30), 2000, 0.0, 1)
    print(f"rejected {rejected:.4f}, covered {covered:.4f}")
    assert rejected <= 0.07 and 0.93 <= covered <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(60, 5, 2, 30), (60, 3, 3, 27), (60, 5, 3, 30), (60, 5, 4, 60), (100, 3, 2, 40), (60, 5, 3, 90)]
)
@pytest.mark.parametrize(
    ("effects", "beta"),
    [(EFFECTS, 0.0), (EFFECTS, 0.6), (Effects(prompt=0.4, item=0.4, rater=0.8), 0.0), (Effects(prompt=1.2), 1.0)],
)
def test_larger_designs_hold_theirs(sizes: tuple[int, int, int, int], effects: Effects, beta: float):
    rejected, covered = nulls(effects, balanced_layout(*sizes), 2000, beta, 2)
    print(f"\n{sizes} {effects} beta {beta}: rejected {rejected:.4f}, covered {covered:.4f} (+- 0.005)")
    assert 0.93 <= covered <= 0.97
    assert beta or rejected <= 0.07


def test_votes_taken_as_independent_would_not():
    """What the clustering is for: the plain binomial test rejects several times too often on the same nulls."""
    layout, rng = balanced_layout(60, 5, 2, 30), np.random.default_rng(4)
    wins = np.array([simulate_votes(layout, 0.0, EFFECTS, rng).sum() for _ in range(400)])
    assert np.mean(np.abs(wins - 300) / math.sqrt(150) > 1.96) > 0.12


def test_the_bootstrap_covers_and_is_conservative():
    layout, rng, hits = balanced_layout(30, 2, 3, 15), np.random.default_rng(5), 0
    for _ in range(150):
        low, high = two_way_bootstrap(
            simulate_votes(layout, 0.0, EFFECTS, rng), layout.prompts, layout.raters, draws=300
        )
        hits += low <= 0.5 <= high
    assert hits / 150 >= 0.93


# Which method leads


def test_small_designs_lead_with_the_more_cautious_of_two():
    larger = set()
    for seed in range(6):
        y, side, layout = study(seed)
        found = estimate(y, side, layout.prompts, layout.raters, draws=500)
        assert found["small_design"] and found["method"] == CAUTIOUS
        both = {"clustered": found["logit"]["p_value"], "permutation": found["permutation_p"]}
        assert found["p_value"] == max(both.values())
        larger.add(max(both, key=lambda name: both[name]))
        for low, high in (found["bootstrap"], (found["logit"]["low"], found["logit"]["high"])):
            assert found["low"] <= low and high <= found["high"]
    assert larger == {"clustered", "permutation"}, "neither alone would do"


def test_few_raters_do_not_pass_for_many():
    """10 raters who differ: flipping whole prompts takes no notice of them, and rejects true nulls by the dozen."""
    layout, rng = balanced_layout(60, 5, 2, 10), np.random.default_rng(6)
    x = np.column_stack([np.ones(600), np.where(layout.a_left, 0.5, -0.5)])
    rejected = {"permutation": 0, "headline": 0}
    for _ in range(100):
        y = simulate_votes(layout, 0.0, Effects(prompt=0.4, item=0.4, rater=0.8), rng)
        fit = clustered_logit(y, x, layout.prompts, layout.raters)
        assert fit is not None
        permutation = sign_flip(y, layout.prompts, draws=999)
        p = headline_p(fit.interval(np.array([1.0, 0.0]))[3], permutation, y, layout.raters, small=True)
        rejected["permutation"] += permutation < 0.05
        rejected["headline"] += p < 0.05
    assert rejected["permutation"] > 30 and rejected["headline"] < 20
    two = estimate(np.ones(40), np.tile([0.5, -0.5], 20), np.arange(40) % 20, np.arange(40) // 20)
    assert two["method"] == SEPARATED and two["p_value"] == 0.5, "two raters who agree prove little"


def test_the_plain_test_leaves_ties_out():
    y, side = np.array([1, 1, 1, 0.5, 0]), np.array([0.5, -0.5, 0.5, -0.5, 0.5])
    found = [estimate(one, side, np.arange(5), np.arange(5), draws=50)["plain_binomial_p"] for one in (y, 1 - y)]
    assert found == [stats.binomtest(3, 4).pvalue] * 2
    assert estimate(np.full(5, 0.5), side, np.arange(5), np.arange(5), draws=50)["plain_binomial_p"] == 1


def test_votes_that_all_agree_have_an_interval_too():
    layout = balanced_layout(60, 5, 2, 30)
    side = np.where(layout.a_left, 0.5, -0.5)
    found = estimate(np.ones(600), side, layout.prompts, layout.raters)
    assert found["method"] == SEPARATED and found["value"] == found["high"] == 1
    assert 0.8 < found["low"] < 0.9, "as sure as 30 clusters allow, not 600 votes"
    assert found["p_value"] < 0.001 and found["design_effect"] is None
    all_left = estimate(layout.a_left.astype(float), side, layout.prompts, layout.raters)
    assert all_left["value"] == pytest.approx(0.5) and all_left["low"] <= 0.5 <= all_left["high"]


# Simulation and power


def test_stated_preferences_are_what_simulated_raters_have():
    layout = balanced_layout(400, 2, 2, 400)
    beta = EFFECTS.beta(0.63)
    assert EFFECTS.preference(beta) == pytest.approx(0.63) and EFFECTS.preference(0.0) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    rate = np.mean([simulate_votes(layout, beta, EFFECTS, rng).mean() for _ in range(20)])
    assert rate == pytest.approx(0.63, abs=0.01)
    with pytest.raises(StudyError, match=r"0\.99"):
        EFFECTS.beta(0.99)


@pytest.mark.parametrize("sizes", [(60, 5, 2, 30), (60, 3, 3, 27), (20, 3, 3, 12), (13, 1, 3, 5)])
def test_simulated_sides_are_balanced_as_served_ones_are(sizes: tuple[int, int, int, int]):
    layout = balanced_layout(*sizes)
    sides = np.where(layout.a_left, 1, -1)
    for ids in (layout.items, layout.prompts, layout.raters):
        counts = np.bincount(ids)
        assert np.array_equal(np.abs(np.bincount(ids, weights=sides)), counts % 2)


def test_power_and_analysis_call_the_same_designs_small():
    for prompts, seeds, votes, raters in [
        (60, 5, 2, 30),
        (60, 3, 3, 27),
        (60, 3, 3, 26),
        (59, 5, 3, 40),
        (60, 2, 4, 40),
    ]:
        design = PowerDesign(prompts=prompts, seeds=seeds, votes_per_item=votes, raters=raters)
        y, side, layout = study(1, prompts=prompts, seeds=seeds, votes_per_item=votes, raters=raters)
        found = estimate(y, side, layout.prompts, layout.raters, draws=20)
        assert design.small == found["small_design"] == is_small(prompts=prompts, votes=len(y), raters=raters)
    assert not PowerDesign(seeds=3, votes_per_item=3, raters=27).small


def test_power_of_independent_votes_is_the_textbook_one():
    none = Effects(prompt=0.0, item=0.0, rater=0.0)
    design = PowerDesign(prompts=100, seeds=3, votes_per_item=2, raters=60, simulations=200)
    found = power(design, none, preferences=(0.5, 0.56, 0.62))
    by = {row["preference"]: row["power"] for row in found["rows"]}
    assert by[0.5] <= 0.1 and by[0.62] > 0.99
    expected = stats.norm.cdf(0.06 * math.sqrt(600) / math.sqrt(0.56 * 0.44) - 1.96)
    assert by[0.56] == pytest.approx(expected, abs=0.1)
    assert found["design_effect"] == pytest.approx(1, abs=0.25)
    assert 0.55 < found["independent"] < 0.57


def test_power_falls_with_the_spread_of_prompts():
    design = PowerDesign(simulations=100)
    found = power(design, EFFECTS, preferences=(0.5, 0.58, 0.66))
    assert found["design_effect"] > 1.5 and found["test"] == "clustered logit"
    assert found["detectable"] is not None and found["detectable"] > found["independent"] + 0.01
    small = PowerDesign(prompts=20, seeds=1, votes_per_item=2, raters=10, simulations=50)
    assert power(small, EFFECTS, preferences=(0.5,))["test"] == "larger p of clustered logit and permutation"
    with pytest.raises(StudyError, match="lower --raters"):
        PowerDesign(prompts=2, seeds=1, votes_per_item=1, raters=9)

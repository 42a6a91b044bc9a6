"""The design and its schedule: exact balance, no repeats, catch trials, one hash, the same on every machine."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.design import Design, ExclusionRules, draw_prompts
from studies.errors import StudyError
from studies.schedule import Sheet, balanced_sides, build_schedule, schedule_hash


def design(**settings: Any) -> Design:
    basic: dict[str, Any] = {"name": "s", "models": ("a", "b"), "prompts": tuple(f"p{i}" for i in range(12))}
    return Design(**basic | {"trials_per_rater": 10} | settings)


designs = st.builds(
    lambda models, prompts, seeds, votes, trials, catch, pairing, seed: Design(
        name="s", models=tuple("abcd"[:models]), prompts=tuple(f"p{i}" for i in range(prompts)), seeds=seeds,
        votes_per_item=votes, trials_per_rater=min(trials, prompts), catch_share=catch, seed_pairing=pairing, seed=seed,
    ),
    st.integers(2, 4), st.integers(3, 14), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20),
    st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from(["matched", "independent"]), st.integers(0, 99),
)  # fmt: skip


def balance(sheets: tuple[Sheet, ...], key: Any) -> None:
    """Every group has model a left as often as right, to one where its size is odd."""
    sides: dict[Hashable, Counter[bool]] = defaultdict(Counter)
    for number, sheet in enumerate(sheets):
        for trial in sheet.trials:
            if trial.kind == "main":
                sides[key(number, trial)][bool(trial.a_left)] += 1
    for count in sides.values():
        assert abs(count[True] - count[False]) == sum(count.values()) % 2


@settings(max_examples=60, deadline=None)
@given(designs)
def test_every_schedule_is_exact(plan: Design):
    sheets = build_schedule(plan, ["spare one", "spare two"])
    mains = [(number, trial) for number, sheet in enumerate(sheets) for trial in sheet.trials if trial.kind == "main"]
    assert len(sheets) == plan.raters and len(mains) == plan.votes
    votes = Counter((t.pair, t.prompt, (t.left if t.a_left else t.right).index) for _, t in mains)
    assert set(votes.values()) == {plan.votes_per_item}
    assert len(votes) == len(plan.pairs) * len(plan.prompts) * plan.seeds
    balance(
        sheets, lambda number, trial: (trial.pair, trial.prompt, (trial.left if trial.a_left else trial.right).index)
    )
    balance(sheets, lambda number, trial: (trial.pair, trial.prompt))
    balance(sheets, lambda number, trial: trial.pair)
    balance(sheets, lambda number, trial: number)
    balance(sheets, lambda number, trial: (number, trial.pair))
    for sheet in sheets:
        seen = [(trial.pair, trial.prompt) for trial in sheet.trials if trial.kind == "main"]
        assert len(set(seen)) == len(seen) <= plan.main_trials
        shares = Counter(pair for pair, _ in seen)
        assert max(shares.values()) - min(shares[pair] for pair in range(len(plan.pairs))) <= 1
        for trial in sheet.trials:
            if trial.kind == "main":
                models = (trial.left.model, trial.right.model)
                assert plan.pairs[trial.pair or 0] == (models if trial.a_left else models[::-1])
                assert plan.seed_pairing == "independent" or trial.left.index == trial.right.index
    sizes = [len(sheet.trials) for sheet in sheets]
    assert max(sizes) - min(sizes) <= 1
    firsts = Counter(sheet.first_question for sheet in sheets)
    assert abs(firsts["visual quality"] - firsts["prompt alignment"]) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)), max_size=60))
def test_balanced_sides_of_any_nested_families(places: list[tuple[int, int, int, int]]):
    items = [lambda p: (p[0], p[1]), lambda p: p[0]]
    sheets = [lambda p: (p[2], p[3]), lambda p: p[2]]
    sides = balanced_sides(places, items=items, sheets=sheets, rng=random.Random(0))
    for key in (*items, *sheets):
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, side in zip(places, sides, strict=True):
            groups[key(place)].append(1 if side else -1)
        assert all(abs(sum(group)) == len(group) % 2 for group in groups.values())


def test_catch_trials_stand_where_they_should():
    plan = design(trials_per_rater=12, catch_share=0.34, seeds=3, votes_per_item=4, prompts=tuple("abcdefghijkl"))
    kinds: Counter[str] = Counter()
    lefts = 0
    for sheet in build_schedule(plan):
        trials = sheet.trials
        assert [trial.kind for trial in trials[:2]] == ["practice", "practice"] and trials[2].kind == "main"
        for position, trial in enumerate(trials):
            kinds[trial.kind] += 1
            if trial.kind == "repeat":
                first = trials[trial.repeat_of or 0]
                assert first.kind == "main" and (first.left, first.right) == (trial.right, trial.left)
                assert position > (trial.repeat_of or 0) + 1 and trial.a_left is not first.a_left
            if trial.kind == "obvious":
                good, bad = (trial.left, trial.right) if trial.answers[0] == "left" else (trial.right, trial.left)
                assert bad.corrupted and not good.corrupted and trial.answers[0] == trial.answers[1]
                lefts += trial.answers[0] == "left"
            if trial.kind == "identical":
                assert trial.left == trial.right and trial.answers == (None, None)
    assert kinds["obvious"] >= plan.raters and kinds["repeat"] and kinds["identical"]
    assert 0.3 < lefts / kinds["obvious"] < 0.7
    assert sum(kinds[kind] for kind in ("obvious", "repeat", "identical")) == plan.raters * 4


def test_every_rater_has_obvious_trials_enough_for_the_exclusion_rule():
    plan = Design(name="s", models=("a", "b"), prompts=tuple(f"p{i}" for i in range(60)))
    for sheet in build_schedule(plan):
        obvious = [trial for trial in sheet.trials if trial.kind == "obvious"]
        assert len(obvious) >= plan.exclusions.min_obvious_trials


def test_prompts_come_back_late():
    plan = design(models=("a", "b", "c"), trials_per_rater=20, catch_share=0.1)
    for sheet in build_schedule(plan):
        texts = [trial.prompt for trial in sheet.trials if trial.kind != "practice"]
        gaps = [j - i for i in range(len(texts)) for j in range(i + 1, len(texts)) if texts[i] == texts[j]]
        assert gaps and min(gaps) > plan.spacing - 1


def test_one_seed_one_schedule_and_any_change_another_hash():
    plan = design()
    sheets = build_schedule(plan)
    assert build_schedule(plan) == sheets
    digest = schedule_hash(plan, sheets, {})
    # fixed for good: the same on every machine and Python version
    assert digest == "adb364f2af680d99f1006765b425040d8e6cfe932c8cc01552281bb05edb80cf"
    others = [
        design(seed=1), design(allow_ties=True), design(exclusions=ExclusionRules(max_obvious_failures=0)),
        design(lease_minutes=5),
    ]  # fmt: skip
    assert len({digest, *(schedule_hash(other, build_schedule(other), {}) for other in others)}) == 5
    assert schedule_hash(plan, sheets, {"clip": 1}) != digest


def test_pairs_with_a_reference():
    assert design(models=("x", "y", "z")).pairs == ((0, 1), (0, 2), (1, 2))
    assert design(models=("x", "y", "z"), reference="y").pairs == ((1, 0), (1, 2))


def test_drawn_prompts_depend_on_the_seed_alone():
    texts = [f"p{i}" for i in range(100)]
    assert draw_prompts(texts, 60, 0) == draw_prompts(texts, 60, 0) != draw_prompts(texts, 60, 1)
    assert len(set(draw_prompts(texts, 60, 0))) == 60
    with pytest.raises(StudyError, match="share 100 prompts"):
        draw_prompts(texts, 101, 0)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"name": "../x"}, "'../x'"), ({"models": ("a",)}, "two or more"), ({"models": ("a", "a")}, "different names"),
        ({"reference": "q"}, "'q'"), ({"prompts": ("p", "p")}, "each once"), ({"seeds": 0}, "seeds"),
        ({"catch_share": 0.6}, "0.6"), ({"trials_per_rater": 60}, "twice"), ({"seed_pairing": "both"}, "'both'"),
        ({"min_watched": 0}, "min_watched"), ({"lease_minutes": 0}, "lease_minutes"), ({"practice_trials": 3}, "3"),
    ],
)  # fmt: skip
def test_bad_designs_are_one_sentence(bad: dict[str, Any], sentence: str):
    with pytest.raises(StudyError, match=sentence):
        design(**bad)
    with pytest.raises(StudyError, match="max_same_side"):
        ExclusionRules(max_same_side=0.4)

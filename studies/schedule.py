"""The schedule: every rater's sheet of trials, fixed before the first vote; pure and the same on every machine.

A *place* is one vote to be had on an item (pair, prompt, seed). Places are dealt to sheets so that no sheet has a pair
on the same prompt twice and all sheets have equal shares of the pairs. Sides are then exact: within every item, (pair,
prompt) and pair, and within every sheet and (sheet, pair), the pair's first model stands left as often as right, to one
where the number is odd. (Of three or more models, one that is first in some pairs and second in others may still stand
more on one side within a sheet.) This is de Werra's balanced 2-colouring: partners are linked at the finest level
first, once on the side of the items and once on that of the sheets; the links form paths and cycles of even length,
coloured in turn.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, Literal

from studies.design import QUESTIONS, Design

Kind = Literal["practice", "main", "obvious", "repeat", "identical"]
OBVIOUS = 2
"""A sheet's first catch trials are obvious: fewer could exclude nobody by the default rules."""
CATCH_CYCLE: tuple[Kind, ...] = ("repeat", "identical")
"""Kinds of the catch trials after those, in turn over the sheets."""
CATCH_POOL = 8
"""Prompts whose clips are corrupted for obvious trials."""


@dataclass(frozen=True, kw_only=True)
class ClipRef:
    """A clip by what it shows."""

    model: int
    """Index of the model."""
    prompt: str
    index: int
    """Index of the sample, from 0."""
    corrupted: bool = False
    """Whether it is shown spoiled, as the wrong answer of an obvious trial."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sheet."""

    kind: Kind
    prompt: str
    left: ClipRef
    right: ClipRef
    pair: int | None = None
    """Index of the pair, for main trials and their repeats."""
    a_left: bool | None = None
    """Whether the pair's first model stands left."""
    answers: tuple[str | None, str | None] = (None, None)
    """Right answers ("left" or "right") to the two questions, where there are any."""
    repeat_of: int | None = None
    """Position in the sheet of the trial that this one repeats with sides swapped."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The trials of one rater, in order, practice first."""

    first_question: str
    """The question asked first, counterbalanced over sheets."""
    trials: tuple[Trial, ...]


@dataclass(frozen=True, kw_only=True)
class _Place:
    pair: int
    prompt: int
    seed: int
    sheet: int


def build_schedule(design: Design, spare_prompts: Sequence[str] = ()) -> tuple[Sheet, ...]:
    """Lay out every trial of the study.

    Args:
        design: the design.
        spare_prompts: prompts that the sets share but the study does not use; practice takes them first.
    """
    rng = random.Random(f"schedule {design.seed}")
    places = _deal(design, rng)
    sides = balanced_sides(
        places,
        items=[lambda p: (p.pair, p.prompt, p.seed), lambda p: (p.pair, p.prompt), lambda p: p.pair],
        sheets=[lambda p: (p.sheet, p.pair), lambda p: p.sheet],
        rng=rng,
    )
    partner = _pair_seeds(design, rng)
    mains: list[list[Trial]] = [[] for _ in range(1 + max(place.sheet for place in places))]
    for place, a_left in zip(places, sides, strict=True):
        prompt = design.prompts[place.prompt]
        model_a, model_b = design.pairs[place.pair]
        a = ClipRef(model=model_a, prompt=prompt, index=place.seed)
        b = ClipRef(model=model_b, prompt=prompt, index=partner[place.pair, place.prompt][place.seed])
        left, right = (a, b) if a_left else (b, a)
        mains[place.sheet].append(
            Trial(kind="main", prompt=prompt, left=left, right=right, pair=place.pair, a_left=a_left)
        )
    practice = _practice(design, spare_prompts, rng)
    first = [QUESTIONS[number % 2] for number in range(len(mains))]
    rng.shuffle(first)
    turns = count(rng.randrange(2))  # the good clip of obvious trials stands left and right in turn
    return tuple(
        Sheet(
            first_question=first[number], trials=(*practice, *_order(design, number, trials, len(practice), turns, rng))
        )
        for number, trials in enumerate(mains)
    )


def schedule_hash(design: Design, sheets: Sequence[Sheet], clips: dict[str, Any]) -> str:
    """SHA-256 over the design with its exclusion rules, every trial, and the clips' own hashes."""
    content = {"design": asdict(design), "sheets": [asdict(sheet) for sheet in sheets], "clips": clips}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def balanced_sides(
    places: Sequence[Any],
    *,
    items: Sequence[Callable[[Any], Hashable]],
    sheets: Sequence[Callable[[Any], Hashable]],
    rng: random.Random,
) -> list[bool]:
    """Two-colour the places so that every group of both nested families is balanced, to one where it is odd.

    Args:
        places: anything.
        items: keys of the groups on one side, finest first, each group inside one of the next.
        sheets: the same for the other side.
        rng: flips whole chains.
    """
    links = (_partners(places, items), _partners(places, sheets))
    sides: list[bool | None] = [None] * len(places)
    order = list(range(len(places)))
    # Ends of paths first: a path walked from its middle would be coloured in two goes that need not agree.
    order.sort(key=lambda place: links[0][place] is not None and links[1][place] is not None)
    for start in order:
        if sides[start] is not None:
            continue
        side = rng.random() < 0.5
        place: int | None = start
        which = 0 if links[0][start] is not None else 1
        while place is not None and sides[place] is None:
            sides[place] = side
            side, place, which = not side, links[which][place], 1 - which
    return [bool(side) for side in sides]


def _partners(places: Sequence[Any], levels: Sequence[Callable[[Any], Hashable]]) -> list[int | None]:
    partner: list[int | None] = [None] * len(places)
    free = list(range(len(places)))
    for level in levels:
        waiting: dict[Hashable, int] = {}
        for place in free:
            key = level(places[place])
            other = waiting.pop(key, None)
            if other is None:
                waiting[key] = place
            else:
                partner[place], partner[other] = other, place
        free = [place for place in free if partner[place] is None]
    return partner


def _deal(design: Design, rng: random.Random) -> list[_Place]:
    """Deal every pair's places to the sheets in runs of distinct prompts."""
    pairs, prompts = len(design.pairs), len(design.prompts)
    rounds = design.seeds * design.votes_per_item
    total = prompts * rounds
    sheets = -(-pairs * total // design.main_trials)
    places = []
    for pair in range(pairs):
        # Cumulative shares, each pair offset so that its larger runs fall on other sheets than the pair before's.
        ends = [(sheet * total * pairs + pair * sheets) // (sheets * pairs) for sheet in range(1, sheets)] + [total]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        seeds = []
        for _ in range(prompts):
            mine = [seed for seed in range(design.seeds) for _ in range(design.votes_per_item)]
            rng.shuffle(mine)
            seeds.append(mine)
        queue: list[int] = []
        for sheet, size in enumerate(sizes):
            run: list[int] = []
            while len(run) < size:
                if not queue:
                    queue = list(range(prompts))
                    rng.shuffle(queue)
                    # What this sheet has already goes to the end of the new round (stable: the rest stays random).
                    queue.sort(key=lambda prompt: prompt in run)
                run.append(queue.pop(0))
            places += [_Place(pair=pair, prompt=prompt, seed=seeds[prompt].pop(), sheet=sheet) for prompt in run]
    return places


def _pair_seeds(design: Design, rng: random.Random) -> dict[tuple[int, int], list[int]]:
    """Index of model b's clip for each index of model a's, by (pair, prompt)."""
    partner = {}
    for pair in range(len(design.pairs)):
        for prompt in range(len(design.prompts)):
            order = list(range(design.seeds))
            if design.seed_pairing == "independent":
                rng.shuffle(order)
            partner[pair, prompt] = order
    return partner


def _obvious(good: ClipRef, bad: ClipRef, good_left: bool, kind: Kind, answers: int = 2) -> Trial:
    """A trial with right answers; with ``answers`` 1, only the second question (alignment) has one."""
    side = "left" if good_left else "right"
    left, right = (good, bad) if good_left else (bad, good)
    right_answers = (side, side) if answers == 2 else (None, side)
    return Trial(kind=kind, prompt=good.prompt, left=left, right=right, answers=right_answers)


def _practice(design: Design, spare: Sequence[str], rng: random.Random) -> tuple[Trial, ...]:
    """The same for every rater: a spoiled clip, then a clip of another prompt."""
    pool = [*rng.sample(list(spare), len(spare)), *rng.sample(design.prompts, len(design.prompts))]
    models = rng.sample(range(len(design.models)), 2)
    good = ClipRef(model=models[0], prompt=pool[0], index=0)
    trials = [_obvious(good, replace(good, corrupted=True), True, "practice")]
    if len(pool) > 1:
        right, other = (ClipRef(model=models[1], prompt=prompt, index=0) for prompt in pool[1::-1])
        trials.append(_obvious(right, other, False, "practice", answers=1))
    return tuple(trials[: design.practice_trials])


def catch_pool(design: Design) -> tuple[ClipRef, ...]:
    """The clips that obvious trials show whole and spoiled, models in turn."""
    rng = random.Random(f"catch {design.seed}")
    prompts = rng.sample(design.prompts, min(CATCH_POOL, len(design.prompts)))
    models = rng.sample(range(len(design.models)), len(design.models))
    return tuple(
        ClipRef(model=models[place % len(models)], prompt=prompt, index=rng.randrange(design.seeds))
        for place, prompt in enumerate(prompts)
    )


def _order(
    design: Design, number: int, mains: list[Trial], offset: int, turns: Iterator[int], rng: random.Random
) -> list[Trial]:
    """Add the catch trials and bring all into an order with spacing; ``offset`` is the first one's position."""
    kinds: list[Kind] = []
    for catch in range(design.catch_trials):
        turn = number * (design.catch_trials - OBVIOUS) + catch - OBVIOUS
        kinds.append("obvious" if catch < OBVIOUS else CATCH_CYCLE[turn % len(CATCH_CYCLE)])
    used = {trial.prompt for trial in mains}
    pool = catch_pool(design)
    fresh = [clip for clip in pool if clip.prompt not in used] or list(pool)
    rng.shuffle(fresh)
    extra: list[Trial] = []
    for place, kind in enumerate(kinds):
        clip = fresh[place % len(fresh)]
        if kind == "obvious":
            extra.append(_obvious(clip, replace(clip, corrupted=True), next(turns) % 2 == 0, "obvious"))
        elif kind == "identical":
            extra.append(Trial(kind="identical", prompt=clip.prompt, left=clip, right=clip))
    order = _spaced([*mains, *extra], design.spacing, rng)
    for _ in range(kinds.count("repeat")):
        order = _with_repeat(order, design.spacing, rng)
    placed = {id(trial): position for position, trial in enumerate(order)}
    return [
        trial if trial.repeat_of is None else replace(trial, repeat_of=offset + _original(trial, order, placed))
        for trial in order
    ]


def _original(repeat: Trial, order: Sequence[Trial], placed: dict[int, int]) -> int:
    return next(
        placed[id(trial)]
        for trial in order
        if trial.kind == "main" and trial.pair == repeat.pair and trial.prompt == repeat.prompt
    )


def _spaced(trials: list[Trial], spacing: int, rng: random.Random) -> list[Trial]:
    """A random order in which no prompt comes back within ``spacing`` trials, or the widest spacing that works."""
    for width in range(spacing, 0, -1):
        for attempt in range(50):
            left = rng.sample(trials, len(trials))
            order: list[Trial] = []
            counts: Counter[str] = Counter(trial.prompt for trial in left)
            while left:
                recent = {trial.prompt for trial in order[-width:]}
                allowed = [trial for trial in left if trial.prompt not in recent]
                if not order:  # a catch trial that opens the sheet would be met before the task is known
                    allowed = [trial for trial in left if trial.kind == "main"] or allowed
                if not allowed:
                    break
                chosen = allowed[0]
                if attempt >= 25:  # chance alone got stuck: spend the most frequent prompts first
                    chosen = max(allowed, key=lambda trial: counts[trial.prompt])
                counts[chosen.prompt] -= 1
                left.remove(chosen)
                order.append(chosen)
            if not left:
                return order
    return rng.sample(trials, len(trials))


def _with_repeat(order: list[Trial], spacing: int, rng: random.Random) -> list[Trial]:
    """Repeat a trial of the first half, sides swapped, in the last third, away from its own prompt."""
    repeated = {(trial.pair, trial.prompt) for trial in order if trial.kind == "repeat"}
    early = [
        trial
        for trial in order[: max(1, len(order) // 2)]
        if trial.kind == "main" and (trial.pair, trial.prompt) not in repeated
    ] or [trial for trial in order if trial.kind == "main" and (trial.pair, trial.prompt) not in repeated]
    if not early:
        return order
    choices = []
    for trial in rng.sample(early, len(early)):
        spots = range(max(order.index(trial) + 1, 2 * len(order) // 3), len(order) + 1)
        near = [{other.prompt for other in order[max(0, spot - spacing) : spot + spacing]} for spot in spots]
        clear = [spot for spot, texts in zip(spots, near, strict=True) if trial.prompt not in texts]
        choices.append((trial, rng.choice(clear or spots)))
        if clear:
            break
    trial, spot = choices[-1]
    again = replace(
        trial, kind="repeat", left=trial.right, right=trial.left, a_left=not trial.a_left, repeat_of=order.index(trial)
    )
    return [*order[:spot], again, *order[spot:]]

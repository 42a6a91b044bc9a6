"""The experiment file: what is trained, how it is tuned, which cells are compared, and which claims they decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from students.errors import ConfigError

BASE = "base"
"""Method name, in cells and claims, of the base model itself, sampled without training."""
TRIALS = "Tuning"
"""Section of the trials."""
SEEDS = 10_000
"""Seeds of trainings lie below."""
SEED_STRIDE = 1000
"""Distance of the base seeds of two cells' videos; at most so many videos a prompt."""
AXES = {"m": "method.m", "n": "method.n", "h": "student.h"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How every cell is scored."""

    prompts: str = "micro"
    """Prompt set; its captions must be the micro world's, for the exact judges read them."""
    num_prompts: int = 1024
    """Held-out captions a cell."""
    samples_per_prompt: int = 2
    """Videos a caption; diversity needs 2."""
    batch_size: int = 64
    """Videos sampled at once."""
    metric: str = "alignment_joint"
    """Headline metric."""

    def __post_init__(self) -> None:
        _positive(self, "num_prompts", "samples_per_prompt", "batch_size")
        _few_samples(self.samples_per_prompt)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of a method's chain; each starts from the checkpoint of the one before."""

    name: str
    """What ablations and trials call it."""
    preset: str
    """Training config: a path beside the experiment file, or the name of a shipped preset."""
    m: tuple[int, ...] | None = None
    """The stage belongs to students of these M only (KD warm-up: 1); none: of every M."""
    axes: dict[str, str] | None = None
    """Settings of M, N and H in this stage; none: the method's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the preset."""
    line: int = 0

    def __post_init__(self) -> None:
        _known_axes(self.axes or {})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation: a chain of trainings."""

    label: str
    """Name in tables."""
    stages: tuple[Stage, ...]
    """First to last; the last one is what budgets of updates count."""
    axes: dict[str, str] = field(default_factory=lambda: dict(AXES))
    """Setting of each axis the method has, among m, n and h; without m, one student is sampled at every M."""
    line: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.stages), "a method needs at least one stage.")
        _known_axes(self.axes)
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"two stages have one name: {', '.join(names)}.")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Settings of a trial of the tuning."""

    set: dict[str, Any] = field(default_factory=dict)
    """Settings of every stage."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of single stages, by name."""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class Ablation(Changes):
    """A change to a method."""

    methods: tuple[str, ...]
    """Methods it applies to."""
    label: str
    """Name in tables."""
    drop: tuple[str, ...] = ()
    """Stages left out."""
    add: tuple[str, ...] = ()
    """Stages put in although they belong to another M."""
    sample: dict[str, Any] = field(default_factory=dict)
    """Settings at sampling: n (such as 1, to sample without recurrence), or times, t_M > ... > t_1 > 0."""

    def __post_init__(self) -> None:
        for key, value in self.sample.items():
            if key == "times":
                _require(_falls(value), f"sample: times are falling numbers from at most 1 to above 0, not {value!r}.")
            else:
                fit = key == "n" and isinstance(value, int) and not isinstance(value, bool) and value >= 1
                _require(fit, f"sample takes times, or n, a whole number of at least 1, not {key}: {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Names one row of the matrix: cells that differ in the seed only."""

    method: str
    """A method's name, or "base" for the untrained base model."""
    m: int
    """M."""
    n: int | None = None
    """N."""
    h: int | None = None
    """H."""
    ablation: str | None = None
    """An ablation's name; none: the method as it is."""
    budget: str | None = None
    """A budget's name; none: the first."""
    guidance: float | None = None
    """CFG scale of the base model, where it stands there with several."""
    line: int = 0

    def __post_init__(self) -> None:
        if self.method == BASE:
            _require(self.budget is None and self.ablation is None, f"{BASE} has neither budget nor ablation.")
        else:
            _require(self.guidance is None, f"guidance tells rows of {BASE} apart, {self.method} has none.")


@dataclass(frozen=True, kw_only=True)
class Like:
    """The cell whose total compute is the budget; its M is that of the student in question."""

    method: str
    """A method's name."""
    n: int | None = None
    """N."""
    h: int | None = None
    """H."""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long the last stage is trained: either of the two, or neither for the presets' own iterations."""

    student_updates: int | None = None
    """Updates of the student in the last stage."""
    like: Like | None = None
    """As long as total compute (all stages) stays within that of this student under ``of``."""
    of: str | None = None
    """Budget under which ``like`` is trained; none: the first."""
    label: str = ""
    """Heading of its table."""
    line: int = 0

    def __post_init__(self) -> None:
        _require(self.student_updates is None or self.like is None, "give student_updates or like, not both.")
        _require(self.student_updates is None or self.student_updates >= 1, "student_updates must be at least 1.")
        _require(self.of is None or self.like is not None, "`of` belongs to `like`.")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Trials of every method, as many for each; the best settings go into all its cells."""

    m: int
    """M of the trials."""
    trials: dict[str, tuple[Changes, ...]]
    """Settings to try, by method."""
    n: int | None = None
    """N of the trials of methods that have one."""
    h: int | None = None
    """H of the trials of methods that have one."""
    seed: int = 1000
    """Of training and of the videos; no cell's."""
    num_prompts: int = 256
    """Captions a trial."""
    samples_per_prompt: int = 1
    """Videos a caption."""
    metrics: tuple[str, ...] = ("alignment_joint", "frechet")
    """The trial with the best mean rank in these wins; ties go to the first metric, then to the first listed."""
    budget: str | None = None
    """Budget of a trial; none: the first."""
    line: int = 0

    def __post_init__(self) -> None:
        _positive(self, "m", "n", "h", "num_prompts", "samples_per_prompt")
        _require(0 <= self.seed < SEEDS, f"seed must lie in 0 to {SEEDS - 1}, not {self.seed}.")
        _require(bool(self.metrics), "metrics must name at least one.")
        _require(all(self.trials.values()), "every method needs at least one trial.")


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """The base model sampled at several numbers of steps."""

    m: tuple[int, ...]
    """Steps; 50 and more make it the teacher."""
    guidance: float | None = None
    """CFG scale; none: the base model's own."""
    samples_per_prompt: int | None = None
    """Videos a caption; none: as evaluation says."""
    line: int = 0

    def __post_init__(self) -> None:
        _positive(self, "m", "samples_per_prompt")
        _few_samples(self.samples_per_prompt or 1)
        _require(self.guidance is None or self.guidance >= 1, f"guidance must be at least 1, not {self.guidance}.")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cells: every combination of the lists."""

    methods: tuple[str, ...]
    """Methods."""
    m: tuple[int, ...]
    """M."""
    n: tuple[int, ...] | None = None
    """N, for methods that have one."""
    h: tuple[int, ...] | None = None
    """H, for methods that have one."""
    ablations: tuple[str | None, ...] = (None,)
    """Ablations; null is the method as it is."""
    line: int = 0

    def __post_init__(self) -> None:
        _positive(self, "m", "n", "h")
        for name in ("methods", "m", "n", "h", "ablations"):
            _require(getattr(self, name) != (), f"{name} is an empty list; name at least one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the matrix, run and reported after the parts above it."""

    name: str
    """Heading."""
    seeds: tuple[int, ...]
    """Training seeds; videos of seed s have the base seed 1000 s."""
    cells: tuple[Block, ...]
    """What it holds."""
    budgets: tuple[str, ...] | None = None
    """Budgets; none: the first."""
    line: int = 0

    def __post_init__(self) -> None:
        _require(self.name != TRIALS, f"{TRIALS} is the section of the trials; choose another name.")
        _require(len(set(self.seeds)) == len(self.seeds), f"seeds {list(self.seeds)} repeat.")
        _require(bool(self.seeds), "seeds must name at least one.")
        _require(all(0 <= seed < SEEDS for seed in self.seeds), f"seeds lie in 0 to {SEEDS - 1}.")
        _require(bool(self.cells), "cells must hold at least one line.")
        _require(self.budgets != (), "budgets is an empty list; name at least one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that two rows of the matrix decide."""

    claim: str
    """The sentence."""
    source: str
    """Where it is made, such as "arXiv:2601.09881 Table 6"."""
    metric: str
    """Metric of the comparison."""
    a: Selector
    """Row whose metric is claimed to be higher, lower or the same ..."""
    b: Selector
    """... than, or as, this one's."""
    direction: Literal["higher", "lower", "same"] = "higher"
    """What is claimed of a."""
    margin: float | None = None
    """For "same": the largest difference that still counts as the same."""
    note: str = ""
    """How you read the outcome, for the report: a bug, the scale, or the claim."""
    line: int = 0

    def __post_init__(self) -> None:
        if self.direction == "same":
            fit = self.margin is not None and 0 < self.margin < math.inf
            _require(fit, "direction same needs a margin above 0.")
        else:
            _require(self.margin is None, f"a margin belongs to direction same, not to {self.direction}.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment file."""

    title: str
    """Heading of the report."""
    methods: dict[str, Method]
    """Methods by name."""
    sections: tuple[Section, ...]
    """The matrix."""
    base: str = "micro"
    """The teacher of every method."""
    out: str | None = None
    """Folder of the run; --out wins."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How cells are scored."""
    budgets: dict[str, Budget] = field(default_factory=lambda: {"presets": Budget(label="Iterations of the presets")})
    """How long cells are trained, by name; the first is the default."""
    untrained: tuple[Untrained, ...] = ()
    """The base model's own rows."""
    tuning: Tuning | None = None
    """Trials before the matrix."""
    ablations: dict[str, Ablation] = field(default_factory=dict)
    """Ablations by name."""
    claims: tuple[Claim, ...] = ()
    """What the report is to decide."""
    pool_seeds: bool = False
    """Take the spread between training seeds from all rows together where a row has few; see docs/experiments.md."""
    notes: tuple[str, ...] = ()
    """How you read the matrix as a whole, for the report."""
    line: int = 0

    @property
    def first_budget(self) -> str:
        return next(iter(self.budgets))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _few_samples(count: int) -> None:
    text = f"samples_per_prompt must be at most {SEED_STRIDE}, or videos of two seeds share their noise."
    _require(count <= SEED_STRIDE, text)


def _known_axes(axes: dict[str, str]) -> None:
    for axis in axes:
        _require(axis in AXES, f"axis {axis} is unknown; there are m, n and h.")


def _falls(times: Any) -> bool:
    """Whether these are times from noise to data, 1 >= t_M > ... > t_1 > 0."""
    from students.times import check_grid, grid_of

    try:
        check_grid(grid_of(times))
    except (ConfigError, TypeError, ValueError):
        return False
    return True


def _positive(part: Any, *names: str) -> None:
    """Refuse numbers below 1; None and lists are fine."""
    for name in names:
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            _require(number is None or number >= 1, f"{name} must be at least 1, not {number}.")

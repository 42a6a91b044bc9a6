"""The experiment file: what is trained, how it is tuned, which cells are compared, and which claims they decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from students.errors import ConfigError
from tmd_eval.experiment.lines import Source, load, read

BASE = "base"
"""Method name, in cells and claims, of the base model itself, sampled without training."""
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
        for name in ("num_prompts", "samples_per_prompt", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluation.{name} must be at least 1, not {getattr(self, name)}.")


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
        for axis in self.axes:
            _require(axis in AXES, f"axis {axis} is unknown; there are m, n and h.")
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
    """Settings at sampling: n (such as 1, to sample without recurrence)."""

    def __post_init__(self) -> None:
        for key, value in self.sample.items():
            fit = key == "n" and isinstance(value, int) and value >= 1
            _require(fit, f"sample takes n, a whole number of at least 1, not {key}: {value!r}.")


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
    line: int = 0


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
        _require(len(set(self.seeds)) == len(self.seeds), f"seeds {list(self.seeds)} repeat.")
        _require(bool(self.seeds), "seeds must name at least one.")
        _require(all(0 <= seed < 10_000 for seed in self.seeds), "seeds lie in 0 to 9999.")


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
            _require(self.margin is not None and self.margin > 0, "direction same needs a margin above 0.")
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


def load_experiment(path: Path) -> tuple[Experiment, Source]:
    """Read an experiment file and note all mistakes that show without a model; the caller raises them (``check``).

    Raises:
        ConfigError: mistakes that leave nothing to go on with, each with its line.
    """
    source = load(path)
    experiment = read(Experiment, source)
    if experiment is None:
        source.check()
    assert experiment is not None
    _check(experiment, source)
    return experiment, source


def _check(experiment: Experiment, source: Source) -> None:
    """Names that lead nowhere and settings that contradict each other."""
    methods, budgets = experiment.methods, experiment.budgets

    def known(name: str, among: dict[str, Any], what: str, line: int) -> bool:
        if name not in among:
            there = f"there are {', '.join(among)}." if among else "there are none."
            source.wrong(line, f"unknown {what} {name}; {there}")
        return name in among

    if not budgets:
        source.wrong(experiment.line, "budgets must hold at least one, or be left out.")
        return
    if BASE in methods:
        source.wrong(methods[BASE].line, f"{BASE} is the name of the untrained base model; rename the method.")
    for name, ablation in experiment.ablations.items():
        for method in ablation.methods:
            if known(method, methods, "method", ablation.line):
                stages = {stage.name: stage for stage in methods[method].stages}
                for stage in (*ablation.stages, *ablation.drop, *ablation.add):
                    known(stage, stages, f"stage (of {method}, ablation {name})", ablation.line)
    for budget in budgets.values():
        if budget.like is not None:
            known(budget.like.method, methods, "method", budget.like.line)
            reference = budgets.get(budget.of or experiment.first_budget)
            if reference is None or reference.like is not None:
                source.wrong(budget.line, "`of` must name a budget that is not itself `like` another.")
    if experiment.tuning is not None:
        _check_tuning(experiment, experiment.tuning, source, known)
    for section in experiment.sections:
        for name in section.budgets or ():
            known(name, budgets, "budget", section.line)
        for block in section.cells:
            for method in block.methods:
                if known(method, methods, "method", block.line):
                    _check_axes(methods[method], method, block, source)
                for ablation_name in block.ablations:
                    if ablation_name is not None and known(ablation_name, experiment.ablations, "ablation", block.line):
                        allowed = experiment.ablations[ablation_name].methods
                        if method not in allowed:
                            text = f"ablation {ablation_name} is for {', '.join(allowed)}, not for {method}."
                            source.wrong(block.line, text)


def _check_tuning(experiment: Experiment, tuning: Tuning, source: Source, known: Any) -> None:
    if tuning.budget is not None:
        known(tuning.budget, experiment.budgets, "budget", tuning.line)
    counts = {}
    for method, trials in tuning.trials.items():
        line = trials[0].line if trials else tuning.line
        if known(method, experiment.methods, "method", line):
            stages = {stage.name: stage for stage in experiment.methods[method].stages}
            for trial in trials:
                for stage in trial.stages:
                    known(stage, stages, f"stage (of {method})", trial.line)
        counts[method] = len(trials)
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{method} {count}" for method, count in counts.items())
        source.wrong(tuning.line, f"every method must get as many trials, not {shown}.")
    used = {method for section in experiment.sections for block in section.cells for method in block.methods}
    for method in sorted(used - set(counts)):
        source.wrong(tuning.line, f"method {method} has cells but no trials; tune every method, or none.")
    seeds = {seed for section in experiment.sections for seed in section.seeds}
    if tuning.seed in seeds:
        source.wrong(tuning.line, f"seed {tuning.seed} of the tuning is also a cell's; choose another.")


def _check_axes(method: Method, name: str, block: Block, source: Source) -> None:
    for axis in ("n", "h"):
        given, has = getattr(block, axis) is not None, axis in method.axes
        if given and not has:
            source.wrong(block.line, f"{name} has no {axis.upper()}; put it in cells of its own.")
        if has and not given:
            source.wrong(block.line, f"{name} needs {axis.upper()}; give {axis}.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)

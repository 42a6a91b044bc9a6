"""What is wrong with an experiment file that is well formed: names that lead nowhere, settings that contradict."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from students.errors import ConfigError
from tmd_eval.experiment.lines import Source, load, read
from tmd_eval.experiment.rows import Row, find, rows_of
from tmd_eval.experiment.schema import BASE, Block, Changes, Claim, Experiment, Like, Method, Selector, Tuning

OURS = ("seed", "base", "out")
"""Settings that the runner gives, beside those of M, N and H."""


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
    check = Check(experiment, source)
    check.all()
    if check.hopeless:
        source.check()
    return experiment, source


class Check:
    """The checks of one file."""

    def __init__(self, experiment: Experiment, source: Source):
        """Take the file; mistakes go to the source."""
        self.experiment, self.source = experiment, source
        self.hopeless = False
        """No cell can be made of this."""

    def all(self) -> None:
        """Check everything."""
        experiment, wrong = self.experiment, self.source.wrong
        if not experiment.sections:
            wrong(self.source.line(("sections",)), "sections must hold at least one.")
        if not experiment.budgets:
            wrong(self.source.line(("budgets",)), "budgets must hold at least one, or be left out.")
        self.hopeless = not experiment.sections or not experiment.budgets
        if self.hopeless:
            return
        if BASE in experiment.methods:
            wrong(experiment.methods[BASE].line, f"{BASE} is the name of the untrained base model; rename the method.")
        self._budgets()
        self._settings()
        self._ablations()
        if experiment.tuning is not None:
            self._tuning(experiment.tuning)
        self._untrained()
        self._sections()
        self._claims()

    def _known(self, name: str, group: str, what: str, line: int) -> bool:
        """Whether a name leads somewhere; one whose own part is wrong was told there."""
        among: Mapping[str, Any] = getattr(self.experiment, group)
        if name not in among and name not in self._raw(group):
            there = f"there are {', '.join(among)}." if among else "there are none."
            self.source.wrong(line, f"unknown {what} {name}; {there}")
        return name in among

    def _raw(self, group: str) -> Mapping[str, Any]:
        """A part of the file as it stands there, with what is wrong in it."""
        part = self.source.tree.get(group)
        return part if isinstance(part, Mapping) else {}

    def _stage(self, name: str, method: str, what: str, line: int) -> None:
        stages = [stage.name for stage in self.experiment.methods[method].stages]
        if name not in stages:
            self.source.wrong(line, f"unknown stage ({what}) {name}; there are {', '.join(stages)}.")

    def _budgets(self) -> None:
        budgets = self.experiment.budgets
        first = next(iter(self._raw("budgets")), self.experiment.first_budget)
        for budget in budgets.values():
            if budget.like is not None:
                if self._known(budget.like.method, "methods", "method", budget.like.line):
                    method = self.experiment.methods[budget.like.method]
                    self.hopeless |= not self._axes(method, budget.like.method, budget.like)
                name = budget.of or first
                reference = budgets.get(name)
                if reference is None or reference.like is not None:
                    self.hopeless = True
                    if reference is not None or name not in self._raw("budgets"):  # else its own mistake was told
                        text = "`of` must name a budget that is not itself `like` another."
                        self.source.wrong(budget.line, text)

    def _settings(self) -> None:
        """Settings that are the runner's must not be set by hand: rows would not be what they are called."""
        for name, method in self.experiment.methods.items():
            for stage in method.stages:
                self._ours(stage.set, name, (stage.name,), stage.line)
        tuning = self.experiment.tuning
        changed: list[tuple[str, Changes]] = [
            (name, trial) for name, trials in (tuning.trials if tuning else {}).items() for trial in trials
        ]
        changed += [(name, part) for part in self.experiment.ablations.values() for name in part.methods]
        for name, changes in changed:
            if name in self.experiment.methods:
                every = tuple(stage.name for stage in self.experiment.methods[name].stages)
                self._ours(changes.set, name, every, changes.line)
                for stage_name, settings in changes.stages.items():
                    self._ours(settings, name, (stage_name,), changes.line)

    def _ours(self, settings: Mapping[str, Any], method_name: str, stages: tuple[str, ...], line: int) -> None:
        method = self.experiment.methods[method_name]
        axes = {
            setting: axis.upper()
            for stage in method.stages
            if stage.name in stages
            for axis, setting in (method.axes if stage.axes is None else stage.axes).items()
        }
        for setting in settings:
            if setting in OURS:
                self.source.wrong(line, f"{setting} is the runner's to set; take it out.")
            elif setting in axes:
                self.source.wrong(
                    line, f"{setting} is {axes[setting]} of {method_name}, which cells give; take it out."
                )

    def _ablations(self) -> None:
        for name, ablation in self.experiment.ablations.items():
            if not any((ablation.set, *ablation.stages.values(), ablation.drop, ablation.add, ablation.sample)):
                self.source.wrong(ablation.line, f"ablation {name} changes nothing.")
            for method in ablation.methods:
                if self._known(method, "methods", "method", ablation.line):
                    for stage in (*ablation.stages, *ablation.drop, *ablation.add):
                        self._stage(stage, method, f"of {method}, ablation {name}", ablation.line)
                    if "n" in ablation.sample and "n" not in self.experiment.methods[method].axes:
                        self.source.wrong(ablation.line, f"ablation {name} samples with n, but {method} has no N.")

    def _tuning(self, tuning: Tuning) -> None:
        experiment, wrong = self.experiment, self.source.wrong
        if tuning.budget is not None:
            self._known(tuning.budget, "budgets", "budget", tuning.line)
        for name in tuning.metrics:
            self._metric(name, tuning.line, tuning.samples_per_prompt)
        counts = {}
        for method, trials in tuning.trials.items():
            if self._known(method, "methods", "method", trials[0].line):
                for trial in trials:
                    for stage in trial.stages:
                        self._stage(stage, method, f"of {method}", trial.line)
                for axis in ("n", "h"):
                    if axis in experiment.methods[method].axes and getattr(tuning, axis) is None:
                        wrong(tuning.line, f"tuning needs {axis}, as {method} has {axis.upper()}.")
            seen: list[tuple[Any, Any]] = []
            for trial in trials:
                if (trial.set, trial.stages) in seen:
                    wrong(trial.line, f"two trials of {method} are alike.")
                seen.append((trial.set, trial.stages))
            counts[method] = len(trials)
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{method} {count}" for method, count in counts.items())
            wrong(tuning.line, f"every method must get as many trials, not {shown}.")
        used = {method for section in experiment.sections for block in section.cells for method in block.methods}
        for method in sorted(used & set(experiment.methods) - set(counts)):
            wrong(tuning.line, f"method {method} has cells but no trials; tune every method, or none.")
        if tuning.seed in {seed for section in experiment.sections for seed in section.seeds}:
            wrong(tuning.line, f"seed {tuning.seed} of the tuning is also a cell's; choose another.")

    def _untrained(self) -> None:
        seen: set[tuple[int, float | None]] = set()
        for part in self.experiment.untrained:
            for m in part.m:
                if (m, part.guidance) in seen:
                    self.source.wrong(part.line, f"the base model at M = {m} is given twice; keep one.")
                seen.add((m, part.guidance))

    def _sections(self) -> None:
        names = [section.name for section in self.experiment.sections]
        for i, section in enumerate(self.experiment.sections):
            if section.name in names[:i]:
                self.source.wrong(section.line, f"two sections are called {section.name}.")
            for name in section.budgets or ():
                self._known(name, "budgets", "budget", section.line)
            for block in section.cells:
                for method in block.methods:
                    if self._known(method, "methods", "method", block.line):
                        self._axes(self.experiment.methods[method], method, block)
                    self._block_ablations(block, method)

    def _axes(self, method: Method, name: str, part: Block | Like) -> bool:
        """Whether N and H are given where the method has them, and only there."""
        fits = True
        for axis in ("n", "h"):
            given, has = getattr(part, axis) is not None, axis in method.axes
            if given and not has:
                rest = "take it out" if isinstance(part, Like) else "put it in cells of its own"
                self.source.wrong(part.line, f"{name} has no {axis.upper()}; {rest}.")
            if has and not given:
                self.source.wrong(part.line, f"{name} needs {axis.upper()}; give {axis}.")
            fits &= given == has
        return fits

    def _block_ablations(self, block: Block, method: str) -> None:
        for name in block.ablations:
            if name is not None and self._known(name, "ablations", "ablation", block.line):
                allowed = self.experiment.ablations[name].methods
                if method not in allowed:
                    text = f"ablation {name} is for {', '.join(allowed)}, not for {method}."
                    self.source.wrong(block.line, text)
                times = self.experiment.ablations[name].sample.get("times")
                if times is not None and set(block.m) != {len(times)}:
                    text = f"ablation {name} samples at {len(times)} times; give it cells of its own, of that M."
                    self.source.wrong(block.line, text)

    def _claims(self) -> None:
        samples = self.experiment.evaluation.samples_per_prompt
        self._metric(self.experiment.evaluation.metric, self.source.line(("evaluation", "metric")), samples)
        rows = self._rows()
        seen: set[tuple[str, str]] = set()
        for claim in self.experiment.claims:
            base = BASE in (claim.a.method, claim.b.method)  # whose rows may have more videos a prompt
            self._metric(claim.metric, claim.line, None if base else samples)
            if claim.claim and (claim.claim, claim.source) in seen:
                self.source.wrong(claim.line, f"two claims say “{claim.claim}” by the same source; tell them apart.")
            seen.add((claim.claim, claim.source))
            if all([self._selector(claim.a), self._selector(claim.b)]) and rows is not None:
                self._sides(claim, rows)

    def _selector(self, selector: Selector) -> bool:
        """Whether all names of a claim's row lead somewhere."""
        names = [("methods", "method", None if selector.method == BASE else selector.method)]
        names += [("ablations", "ablation", selector.ablation), ("budgets", "budget", selector.budget)]
        return all([self._known(name, group, what, selector.line) for group, what, name in names if name is not None])

    def _rows(self) -> dict[Row, None] | None:
        """The rows of the matrix; None where mistakes leave open which there are."""
        parts = ("methods", "sections", "untrained", "budgets", "ablations")
        lines = {line for place, line in self.source.lines.items() if place and place[0] in parts}
        if any(line in lines for line, _ in self.source.problems):
            return None
        made = [row for section in self.experiment.sections for row, _ in rows_of(self.experiment, section)]
        for part in self.experiment.untrained:
            made += [Row(method=BASE, m=m, guidance=part.guidance) for m in part.m]
        return dict.fromkeys(made)

    def _sides(self, claim: Claim, rows: Mapping[Row, None]) -> None:
        found = []
        for selector in (claim.a, claim.b):
            try:
                found.append(find(selector, rows, self.experiment))
            except ConfigError as error:
                self.source.wrong(selector.line, str(error))
        if len(found) == 2 and found[0] == found[1]:
            self.source.wrong(claim.line, "a and b are the same row.")

    def _metric(self, name: str, line: int, samples: int | None) -> None:
        """Whether a metric exists, and can be measured with so many videos a prompt (None: unknown)."""
        there = list(_metrics())
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            self.source.wrong(
                line,
                f"unknown metric {name}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}."),
            )
        elif name.startswith("diversity") and samples == 1:
            self.source.wrong(line, f"{name} needs 2 videos a prompt; samples_per_prompt is 1.")


def _metrics() -> Iterator[str]:
    """What a cell is scored on."""
    from tmd_eval.micro_diversity import GROUPS
    from tmd_eval.micro_scores import ATTRIBUTES

    yield from (f"alignment_{name}" for name in ATTRIBUTES)
    yield from ("frechet", "frechet_real", "diversity")
    yield from (f"diversity_{name}" for name in GROUPS)

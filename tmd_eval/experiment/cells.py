"""From the experiment file to cells: what each one trains, stage by stage, and how it is sampled; pure but for presets.

A *row* is a line of the report's tables; its *cells* differ in the seed only. Everything a cell depends on goes into
its key and into the keys of its trainings, so equal trainings are one job, whichever cells need them, and a changed
setting never meets an old result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from students.errors import ConfigError
from tmd_eval.experiment.layers import Blamed, Layer, Settings
from tmd_eval.experiment.lines import Source
from tmd_eval.experiment.rows import Row, digest, rows_of
from tmd_eval.experiment.schema import BASE, SEED_STRIDE, TRIALS, Ablation, Changes, Experiment, Method, Stage

if TYPE_CHECKING:
    from students.config import TrainConfig

TEACHER_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Training:
    """One stage of one cell."""

    stage: str
    """Name of the stage."""
    preset: str
    """Its preset; trainings of one preset share their measured step."""
    config: TrainConfig
    """Resolved settings; out and parent are filled in when it runs."""
    parent: str | None
    """Key of the training it starts from."""
    key: str
    """SHA-256 of all that decides its weights."""

    @property
    def name(self) -> str:
        """Name of its folder; the same for all cells that need it."""
        return f"{Path(self.preset).stem}-s{self.config.seed}-{self.key[:12]}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student (or the base model) to be trained, sampled and scored."""

    row: Row
    seed: int
    """Of the training."""
    trainings: tuple[Training, ...]
    """First to last; none for the base model."""
    settings: dict[str, Any]
    """What :class:`tmd_eval.generate.Settings` gets."""
    prompts: int
    """Captions to load."""
    key: str
    """SHA-256 of all that decides its videos."""
    sections: tuple[str, ...]
    """Where the report shows it."""

    @property
    def name(self) -> str:
        """Name of its folder; cells that two budgets make equal share it."""
        return f"{replace(self.row, budget=None).slug}-s{self.seed}-{self.key[:12]}"

    @property
    def videos(self) -> int:
        """Videos to make."""
        lines = self.settings.get("lines")
        return (self.prompts if lines is None else len(lines)) * int(self.settings["samples_per_prompt"])


class Resolver:
    """Makes cells; mistakes that only resolved settings show are noted in the source, with their line."""

    def __init__(self, experiment: Experiment, source: Source, *, blocks: int, base_hash: str):
        """Take the file and two facts of the base model.

        Args:
            experiment: the file's content.
            source: the file, for line numbers.
            blocks: L of the base model.
            base_hash: hash of its weights.
        """
        self.experiment, self.source, self.blocks, self.base_hash = experiment, source, blocks, base_hash
        self._settings = Settings(source.path.parent, blocks)
        self._tuned: Mapping[str, Changes] = {}
        self._data: dict[str, Any] | None = None
        self._marks: dict[Path, str | None] = {}

    def trials(self) -> list[Cell]:
        """The cells of the tuning."""
        tuning, cells = self.experiment.tuning, []
        for name, trials in (tuning.trials if tuning else {}).items():
            assert tuning is not None
            method = self.experiment.methods.get(name)
            if method is None or any(a in method.axes and getattr(tuning, a) is None for a in ("n", "h")):
                continue  # noted as a mistake
            for number, changes in enumerate(trials):
                row = Row(
                    method=name,
                    m=tuning.m,
                    n=tuning.n if "n" in method.axes else None,
                    h=tuning.h if "h" in method.axes else None,
                    budget=tuning.budget or self.experiment.first_budget,
                    trial=number,
                )
                first = self.experiment.evaluation.num_prompts
                lines = tuple(range(first, first + tuning.num_prompts))  # captions that no cell is scored on
                cells += self._cell(
                    row, tuning.seed, changes, TRIALS, changes.line,
                    prompts=first + tuning.num_prompts, lines=lines, samples=tuning.samples_per_prompt,
                )  # fmt: skip
        return cells

    def matrix(self, tuned: Mapping[str, Changes]) -> list[Cell]:
        """The cells of the matrix, in the order of the file; the base model first.

        Args:
            tuned: chosen settings by method.
        """
        self._tuned = tuned
        cells = list(self._untrained())
        for section in self.experiment.sections:
            for row, line in rows_of(self.experiment, section):
                for seed in section.seeds:
                    cells += self._cell(row, seed, tuned.get(row.method, Changes()), section.name, line)
        unique: dict[tuple[Row, int], Cell] = {}
        for cell in cells:  # several sections may ask for one cell
            first = unique.setdefault((cell.row, cell.seed), cell)
            sections = tuple(dict.fromkeys((*first.sections, *cell.sections)))
            unique[cell.row, cell.seed] = replace(first, sections=sections)
        return list(unique.values())

    def _untrained(self) -> Iterator[Cell]:
        section = self.experiment.sections[0]
        for part in self.experiment.untrained:
            for m in part.m:
                seeds = section.seeds[:1] if m >= TEACHER_STEPS else section.seeds
                for seed in seeds:
                    row = Row(method=BASE, m=m, guidance=part.guidance)
                    samples = part.samples_per_prompt or self.experiment.evaluation.samples_per_prompt
                    yield self._evaluated(row, seed, (), section.name, samples=samples)

    def _cell(
        self, row: Row, seed: int, changes: Changes, section: str, line: int, *,
        prompts: int | None = None, lines: tuple[int, ...] | None = None, samples: int | None = None,
    ) -> list[Cell]:  # fmt: skip
        """The cell, or none where a mistake was noted."""
        if line in {number for number, _ in self.source.problems}:
            return []
        try:
            trainings = self._trainings(row, seed, changes, line)
            cell = self._evaluated(row, seed, trainings, section, prompts=prompts, lines=lines, samples=samples)
            if row.ablation:
                self._check_ablation(cell, changes, line)
        except ConfigError as error:
            for blamed, text in getattr(error, "parts", ((line, str(error)),)):
                self.source.wrong(blamed, text.removeprefix("--set: "))
            return []
        except KeyError:  # a name that leads nowhere, noted where it is given
            if not self.source.problems:
                raise
            return []
        return [cell]

    def _check_ablation(self, cell: Cell, changes: Changes, line: int) -> None:
        """Refuse a row that would be called ablated and is trained and sampled like the one without."""
        row, ablation = cell.row, self.experiment.ablations[cell.row.ablation or ""]
        if ablation.line in {number for number, _ in self.source.problems}:
            return
        plain = self._trainings(replace(row, ablation=None), cell.seed, changes, line)
        sampled = {key: value for key, value in ablation.sample.items() if (key, value) != ("n", row.n)}
        if not sampled and plain[-1].key == cell.trainings[-1].key:
            text = f"ablation {row.ablation} changes nothing of {row.method} at M = {row.m}"
            raise Blamed((ablation.line, f"{text}: the row would be the one without it."))

    def _evaluated(
        self, row: Row, seed: int, trainings: tuple[Training, ...], section: str, *,
        prompts: int | None = None, lines: tuple[int, ...] | None = None, samples: int | None = None,
    ) -> Cell:  # fmt: skip
        evaluation = self.experiment.evaluation
        ablation = self.experiment.ablations.get(row.ablation or "")
        settings = {
            "samples_per_prompt": samples or evaluation.samples_per_prompt,
            "seed": SEED_STRIDE * seed,
            "lines": None if lines is None else list(lines),
            "m": row.m if row.method == BASE or "m" not in self.experiment.methods[row.method].axes else None,
            "n": ablation.sample.get("n") if ablation else None,
            "guidance": row.guidance,
            "batch_size": evaluation.batch_size,
        }
        if ablation and "times" in ablation.sample:
            settings["times"] = list(ablation.sample["times"])
        prompts = prompts or evaluation.num_prompts
        model = trainings[-1].key if trainings else self.base_hash
        decisive = {key: value for key, value in settings.items() if key != "batch_size"}
        key = digest([model, self._prompts(), prompts, decisive])
        return Cell(
            row=row, seed=seed, trainings=trainings, settings=settings, prompts=prompts, key=key, sections=(section,)
        )  # fmt: skip

    def _prompts(self) -> str:
        """What tells the prompts: "micro", or a file with the hash of its content."""
        source = self.experiment.evaluation.prompts
        return source if source == "micro" else f"{source} {self._mark(Path(source).expanduser())}"

    def _mark(self, path: Path) -> str | None:
        """Hash of a file, read once; None where it is missing (which is told when it is read)."""
        from students.weights import file_hash

        if path not in self._marks:
            self._marks[path] = file_hash(path) if path.is_file() else None
        return self._marks[path]

    def _trainings(self, row: Row, seed: int, changes: Changes, line: int) -> tuple[Training, ...]:
        from tmd_eval.experiment.budget import iterations_with_updates, iterations_within

        experiment = self.experiment
        made = self._chain(row, seed, changes, line)
        budget = experiment.budgets[row.budget or experiment.first_budget]
        last = made[-1].config
        if budget.student_updates is not None or budget.like is not None:
            self._check_iterations(row, changes, made[-1].stage, line)
        if budget.student_updates is not None:
            last = replace(last, iterations=iterations_with_updates(last, budget.student_updates))
        elif budget.like is not None:
            like = budget.like
            reference = Row(method=like.method, m=row.m, n=like.n, h=like.h, budget=budget.of)
            tuned = changes if like.method == row.method else self._tuned.get(like.method, Changes())
            allowed = sum(t.config.cost(self.blocks).total for t in self._trainings(reference, seed, tuned, like.line))
            before = sum(training.config.cost(self.blocks).total for training in made[:-1])
            last = replace(last, iterations=iterations_within(last, allowed - before, self.blocks))
        parent = made[-2].key if len(made) > 1 else None
        return (*made[:-1], self._training(made[-1].stage, made[-1].preset, last, parent))

    def _chain(self, row: Row, seed: int, changes: Changes, line: int) -> list[Training]:
        """The trainings with the iterations of their presets."""
        method = self.experiment.methods[row.method]
        ablation = self.experiment.ablations.get(row.ablation or "")
        stages = stages_of(method, row, ablation)
        if not stages:
            raise ConfigError(f"{row.method} at M = {row.m} has no stage left.")
        configs: list[TrainConfig] = []
        wrong: list[tuple[int, str]] = []
        told: set[tuple[int, str]] = set()
        for first, stage in ((stage is stages[0], stage) for stage in stages):
            runner = {} if first else {"parent": "-"}
            axes = method.axes if stage.axes is None else stage.axes
            own, *given = self._given(stage, row, changes, line)
            layers = [
                Layer(line=stage.line, settings={"base": self.experiment.base, "seed": seed, "out": "-"} | runner),
                Layer(line=stage.line, settings={**own.settings, **runner}),
                Layer(
                    line=line, settings={setting: getattr(row, axis) for axis, setting in axes.items()},
                    names_line=method.line if stage.axes is None else stage.line,
                ),
                *given,
            ]  # fmt: skip
            parents = [layer.line for layer in (own, *given) if "parent" in layer.settings]
            if not first:
                text = f"parent of stage {stage.name} is the stage before it; take it out, or drop that stage."
                wrong += [(place, text) for place in parents]
            try:
                config = self._settings.resolved(stage, layers)
            except Blamed as error:
                wrong += [
                    (place, f"stage {stage.name}: {text}") for place, text in error.parts if (place, text) not in told
                ]
                told |= set(error.parts)
                continue
            configs.append(config)
            if ablation is None and self._other_data(config):
                wrong.append(
                    (stage.line, f"stage {stage.name} ({stage.preset}) has other data than the methods before it.")
                )
            if first and not parents and (config.parent is not None or config.kind.parents):
                needs = f" by {' or '.join(config.kind.parents)}" if config.kind.parents else " before"
                text = (
                    f"stage {stage.name} ({stage.preset}) starts from a student trained{needs}, but no stage comes "
                    "before it; add that stage, or give its parent (null: the teacher)."
                )
                wrong.append((ablation.line if ablation is not None and ablation.drop else stage.line, text))
        if wrong:
            raise Blamed(*wrong)
        made: list[Training] = []
        for stage, config in zip(stages, configs, strict=True):
            kinds = config.kind.parents
            if made and kinds is not None and made[-1].config.kind.label not in kinds:
                text = (
                    f"stage {stage.name} ({config.method_name}) goes on from {' or '.join(kinds)}, "
                    f"not from {made[-1].config.kind.label} of stage {made[-1].stage}."
                )
                raise Blamed((stage.line, text))
            made.append(self._training(stage.name, stage.preset, config, made[-1].key if made else None))
        return made

    def _given(self, stage: Stage, row: Row, changes: Changes, line: int) -> list[Layer]:
        """What the file sets for a stage: by itself, by the tuning, by the ablation."""
        ablation = self.experiment.ablations.get(row.ablation or "")
        layers = [Layer(line=stage.line, settings=stage.set)]
        layers.append(Layer(line=changes.line or line, settings=_changed(changes, stage)))
        return layers + ([Layer(line=ablation.line, settings=_changed(ablation, stage))] if ablation else [])

    def _check_iterations(self, row: Row, changes: Changes, last: str, line: int) -> None:
        """Refuse iterations that the budget would overwrite."""
        stage = next(stage for stage in self.experiment.methods[row.method].stages if stage.name == last)
        text = f"iterations of stage {last} come from the budget; take them out."
        given = self._given(stage, row, changes, line)
        wrong = [(layer.line, text) for layer in given if "iterations" in layer.settings]
        if wrong:
            raise Blamed(*wrong)

    def _other_data(self, config: TrainConfig) -> bool:
        """Whether a training's data are not those of the first one."""
        from students.settings import to_tree

        data = to_tree(config.data)
        self._data = data if self._data is None else self._data
        return data != self._data

    def _training(self, stage: str, preset: str, config: TrainConfig, parent: str | None) -> Training:
        from students.data import INDEX
        from students.run_folder import FREE_ON_RESUME
        from students.settings import flatten
        from students.weights import file_hash

        free = (FREE_ON_RESUME - {"iterations"}) | {"parent"}  # what changes no weight; the parent counts by its key
        settings = {key: value for key, value in flatten(config.tree()).items() if key not in free}
        if parent is None and config.parent is not None:  # a checkpoint from outside the experiment
            record = Path(config.parent) / "student.json"
            if not record.is_file():
                raise ConfigError(f"stage {stage} has the parent {config.parent}, which holds no student.json.")
            outside = file_hash(record)
        else:
            outside = None
        decisive = [settings, parent or outside, self.base_hash]
        if config.data.folder:
            decisive.append(self._mark(Path(config.data.folder) / INDEX))
        key = digest(decisive)
        return Training(stage=stage, preset=preset, config=config, parent=parent, key=key)


def stages_of(method: Method, row: Row, ablation: Ablation | None) -> list[Stage]:
    """The stages that a row trains."""
    drop, add = (ablation.drop, ablation.add) if ablation else ((), ())
    return [
        stage
        for stage in method.stages
        if stage.name not in drop and (stage.m is None or row.m in stage.m or stage.name in add)
    ]


def _changed(changes: Changes, stage: Stage) -> dict[str, Any]:
    return {**changes.set, **changes.stages.get(stage.name, {})}

"""Rows of a matrix: the lines of the report's tables; their cells differ in the seed only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from students.errors import ConfigError
from tmd_eval.experiment.schema import BASE, Block, Experiment, Method, Section, Selector


@dataclass(frozen=True, kw_only=True)
class Row:
    """What cells of one row share."""

    method: str
    """A method's name, or ``BASE``."""
    m: int
    """M."""
    n: int | None = None
    """N."""
    h: int | None = None
    """H."""
    ablation: str | None = None
    """An ablation's name."""
    budget: str | None = None
    """A budget's name; None for the base model."""
    guidance: float | None = None
    """CFG scale of the base model, None for its own."""
    trial: int | None = None
    """Number of the trial of the tuning, from 0; None in the matrix."""

    @property
    def slug(self) -> str:
        """A name for folders."""
        parts = [self.method, f"m{self.m}"]
        parts += [f"n{self.n}"] if self.n is not None else []
        parts += [f"h{self.h}"] if self.h is not None else []
        parts += [f"cfg{self.guidance:g}"] if self.guidance is not None else []
        parts += [part for part in (self.ablation, self.budget) if part]
        parts += [f"trial{self.trial}"] if self.trial is not None else []
        return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")[:80]

    @property
    def key(self) -> str:
        """A name that no other row has, whatever letters theirs are made of."""
        return f"{self.slug}-{digest(asdict(self))[:8]}"


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def rows_of(experiment: Experiment, section: Section) -> Iterator[tuple[Row, int]]:
    """The rows of a section, each with the line that asks for it; one budget after the other, as they are then run."""
    for budget in section.budgets or (experiment.first_budget,):
        for block in section.cells:
            for ablation in block.ablations:
                for row in _block_rows(block, experiment.methods):
                    yield replace(row, ablation=ablation, budget=budget), block.line


def _block_rows(block: Block, methods: Mapping[str, Method]) -> Iterator[Row]:
    for method in (name for name in block.methods if name in methods):
        for m in block.m:
            for n in block.n or (None,):
                for h in block.h or (None,):
                    axes = methods[method].axes
                    yield Row(method=method, m=m, n=n if "n" in axes else None, h=h if "h" in axes else None)


def find(selector: Selector, rows: Mapping[Row, Any], experiment: Experiment) -> Row:
    """The one row that a claim names.

    Raises:
        ConfigError: none, or several.
    """
    budget = None if selector.method == BASE else selector.budget or experiment.first_budget
    wanted = {"method": selector.method, "m": selector.m, "ablation": selector.ablation, "budget": budget}
    more = ("n", "h", "guidance")
    wanted |= {name: getattr(selector, name) for name in more if getattr(selector, name) is not None}
    found = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    shown = ", ".join(f"{name}: {value}" for name, value in wanted.items() if value is not None)
    if not found:
        raise ConfigError(f"no cell of the matrix is {{{shown}}}.")
    if selector.method == BASE and len(found) > 1:  # beside rows with a guidance of the file: the model's own
        found = [row for row in found if row.guidance is None] or found
    if len(found) > 1:
        raise ConfigError(f"{{{shown}}} fits {len(found)} rows ({', '.join(row.slug for row in found[:4])}); say more.")
    return found[0]

"""Names of rows, as people read them."""

from __future__ import annotations

from tmd_eval.experiment.cells import TEACHER_STEPS
from tmd_eval.experiment.rows import Row
from tmd_eval.experiment.schema import BASE, Experiment


def row_name(experiment: Experiment, row: Row, *, budget: bool = True) -> str:
    """A row's name, such as "TMD-N2H2, M = 2 (concat fusion)".

    Args:
        experiment: gives labels.
        row: the row.
        budget: say the budget, where it is not the first.
    """
    if row.method == BASE:
        guidance = "" if row.guidance is None else f", CFG {row.guidance:g}"
        steps = f"{row.m} step{'s' if row.m != 1 else ''}"
        return f"{experiment.base.rstrip('/').rsplit('/', 1)[-1]} {role(row)}, {steps}{guidance}"
    head = "".join(f"{axis}{value}" for axis, value in (("N", row.n), ("H", row.h)) if value is not None)
    name = f"{experiment.methods[row.method].label}{'-' if head else ''}{head}, M = {row.m}"
    if row.ablation is not None:
        name += f" ({experiment.ablations[row.ablation].label})"
    if budget and row.budget not in (None, experiment.first_budget):
        name += f", {budget_name(experiment, str(row.budget))}"
    return name


def budget_name(experiment: Experiment, name: str) -> str:
    """A budget's label."""
    return experiment.budgets[name].label or name.replace("_", " ")


def role(row: Row) -> str:
    """ "teacher", "undistilled" or "student"."""
    if row.method != BASE:
        return "student"
    return "teacher" if row.m >= TEACHER_STEPS else "undistilled"

"""``tmd-eval experiment``: a matrix of students, seeds and evaluations, from one YAML file to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Train, sample and score a matrix of students, and decide claims.\n\n"
    "Start with: tmd-eval experiment run examples/micro_matrix_smoke.yaml",
)

File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Experiment file; see examples/micro_matrix.yaml.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run [default: the file's out].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    file: File,
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes at once [default: one a GPU, or one a core, of one thread each].")
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes, with the state saved (exit 3).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many cells of the matrix.")] = None,
    section: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only the cells of this section; may be repeated.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Only measure steps, for estimates of time.")] = False,
    keep_states: Annotated[
        bool, typer.Option("--keep-states", help="Keep the states that finished trainings could be resumed from.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how long it takes; write nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Do what is missing of an experiment and write its report; running it again goes on where it stopped.

    Example: tmd-eval experiment run examples/micro_matrix_smoke.yaml --out runs/smoke --budget-minutes 30
    """
    import json

    folder = _folder(file, out)  # before the heavy imports: a file that is not there is told at once
    from tmd_eval.experiment.run import Options, outcome_json
    from tmd_eval.experiment.run import run as run_experiment

    options = Options(
        file=file, out=folder, workers=workers, budget_minutes=budget_minutes, limit=limit,
        sections=tuple(section or ()), measure=measure, keep_states=keep_states,
    )  # fmt: skip
    if dry_run:
        from tmd_eval.experiment.dry import dry_run as describe

        plan = describe(options)
        typer.echo(json.dumps(plan) if json_ else plan["text"])
        return
    outcome = run_experiment(options)
    if json_:
        typer.echo(outcome_json(outcome, options.out))
        return
    typer.echo(f"{outcome.made} jobs done now, {outcome.there} there before")
    if outcome.report is not None:
        typer.echo(f"Report: {outcome.report}")


@app.command()
def status(file: File, out: Out = None, json_: Json = False) -> None:
    """Show where an experiment stands: cells done, running, failed (with their logs), and the time left.

    Example: tmd-eval experiment status examples/micro_matrix_smoke.yaml --out runs/smoke
    """
    import json

    from tmd_eval.experiment.jobs import load_plan
    from tmd_eval.experiment.table import summary, text

    folder = _folder(file, out)
    found = summary(folder, load_plan(folder))
    typer.echo(json.dumps(found) if json_ else text(found))


@app.command()
def report(
    file: File,
    out: Out = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Report folder [default: report/ in --out].")] = None,
    json_: Json = False,
) -> None:
    """Write the report of what is done so far.

    Example: tmd-eval experiment report examples/micro_matrix.yaml --out runs/micro-matrix --to reports/micro-matrix
    """
    import json

    from tmd_eval.experiment.run import Options, write_report

    page = write_report(Options(file=file, out=_folder(file, out)), to)
    content = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    if json_:
        typer.echo(json.dumps({"report": str(page), "claims": content["claims"], "missing": content["missing"]}))
        return
    for claim in content["claims"]:
        typer.echo(f"{claim['verdict']:<14} {claim['claim']}")
    typer.echo(f"Report: {page}")


@app.command()
def time(
    file: File,
    out: Out = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    batch: Annotated[int, typer.Option(help="Videos a round and row.")] = 16,
    json_: Json = False,
) -> None:
    """Time every finished row on an idle machine: one process, the rows in turn; the next report shows these seconds.

    Example: tmd-eval experiment time examples/micro_matrix_smoke.yaml --out runs/smoke
    """
    import json

    from tqdm import tqdm

    from tmd_eval.experiment.times import time_rows

    with tqdm(unit="batch", disable=None) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        times = time_rows(file, _folder(file, out), repeats=repeats, batch=batch, told=told)
    if json_:
        typer.echo(json.dumps(times))
        return
    for name, seconds in times["cells"].items():
        typer.echo("{median:.4g} s [{low:.4g}, {high:.4g}]  ".format(**seconds) + name)
    typer.echo(f"Write the report: tmd-eval experiment report {file}{f' --out {out}' if out else ''}")


@app.command("export")
def export_(
    file: File,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the records.")],
    out: Out = None,
    json_: Json = False,
) -> None:
    """Write finished cells as small files (scores, provenance, stills) that outlive this machine.

    Example: tmd-eval experiment export examples/micro_matrix.yaml --to reports/micro-matrix/cells
    """
    import json

    from tqdm import tqdm

    from tmd_eval.experiment.plan import load, make_plan
    from tmd_eval.experiment.records import export_records

    folder = _folder(file, out)
    loaded = load(file, folder)
    with tqdm(unit="cell", disable=None) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = export_records(loaded, make_plan(loaded, folder), folder, to, told=told)
    if json_:
        typer.echo(json.dumps({"written": [str(path) for path in written]}))
        return
    typer.echo(f"{len(written)} records written to {to}")
    typer.echo(f"Take them in elsewhere: tmd-eval experiment import {file} --from {to}")


@app.command("import")
def import_(
    file: File,
    source: Annotated[Path, typer.Option("--from", metavar="DIR", help="Folder of the records.")],
    out: Out = None,
    json_: Json = False,
) -> None:
    """Take in finished cells from another machine; a run then makes what is still missing.

    Example: tmd-eval experiment import examples/micro_matrix.yaml --from reports/micro-matrix/cells
    """
    import json
    from dataclasses import asdict

    from tmd_eval.experiment.records import import_records

    folder = _folder(file, out)
    found = import_records(file, folder, source)
    if json_:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(f"{len(found.taken)} cells taken in, {len(found.there)} there before")
    if found.foreign:
        count, first = len(found.foreign), found.foreign[0]
        typer.echo(f"{count} records belong to no cell of {file} as it is tuned, such as {first}")
    typer.echo(f"Go on with: tmd-eval experiment run {file}{f' --out {out}' if out else ''}")


def _folder(file: Path, out: Path | None) -> Path:
    """--out, or the file's own."""
    from students.errors import ConfigError
    from tmd_eval.experiment.lines import load

    source = load(file)
    if out is None:
        named = source.tree.get("out")
        if not isinstance(named, str) or not named:
            line = source.line(("out",))
            raise ConfigError(f"{file}:{line}: `out` names no folder; write one there, or give --out DIR.")
        out = Path(named)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the folder of the run with --out DIR.")
    return out

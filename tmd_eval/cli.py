"""The command line: a typer tree over ``tmd_eval.commands``, exit codes, and errors a person can act on.

Exit codes: 0 ok; 1 unexpected; 2 usage or configuration; 3 incomplete; 4 environment; 5 quality gate; 130 interrupted.
Any exception with an integer ``exit_code`` is printed as one sentence; anything else is unexpected and is printed the
same way unless ``TMD_EVAL_DEBUG=1`` asks for the traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from tmd_eval import __version__
from tmd_eval.commands import (
    ckpt,
    data,
    doctor,
    experiment,
    generate,
    latency,
    leaderboard,
    micro,
    nfe,
    plan,
    prompts,
    quickstart,
    rerun,
    study,
    train,
    vbench,
)

app = typer.Typer(
    name="tmd-eval",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Evaluate and distil few-step text-to-video students.\n\nStart with: tmd-eval quickstart --out quickstart",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tmd-eval {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the tree itself."""


app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.add_typer(data.app, name="data")
app.command("generate")(generate.generate)
app.add_typer(vbench.app, name="vbench")
app.command("micro")(micro.micro)
app.command("nfe")(nfe.nfe)
app.command("latency")(latency.latency)
app.command("plan")(plan.plan)
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(prompts.app, name="prompts")
app.add_typer(experiment.app, name="experiment")
app.add_typer(leaderboard.app, name="leaderboard")
app.add_typer(study.app, name="study")
app.command("rerun")(rerun.rerun)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as end:
        if end.code == 130 and isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            typer.echo(
                "interrupted; run the same command again to go on where it stopped", err=True
            )  # typer says nothing
        raise
    except Exception as error:  # the last resort: one sentence instead of a traceback
        if os.environ.get("TMD_EVAL_DEBUG") == "1":
            raise
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            typer.echo(f"error: {error}", err=True)
            sys.exit(code)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            typer.echo("error: the disk is full; free some space and run the same command again", err=True)
            sys.exit(1)
        typer.echo(
            f"unexpected error: {type(error).__name__}: {error} (TMD_EVAL_DEBUG=1 prints the traceback)", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()

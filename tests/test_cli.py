"""The command line: its surface is frozen, starts fast, and turns errors into one sentence and the right exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from tmd_eval import __version__, cli
from tmd_eval.cli import app

SURFACE = Path(__file__).parent / "cli_surface.json"


def run(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tmd_eval.cli", *words],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def surface() -> dict[str, list[str]]:
    """Every command with its arguments and options."""

    def walk(command: click.Command, name: str) -> dict[str, list[str]]:
        found = {
            name: sorted(o for p in command.params for o in (p.opts if p.param_type_name == "option" else [p.name]))
        }
        for key, child in getattr(command, "commands", {}).items():
            found |= walk(child, f"{name} {key}")
        return found

    return walk(typer.main.get_command(app), "tmd-eval")


def test_commands_and_options_are_frozen():
    """Users' scripts rely on these; after a deliberate change run `python -m tests.test_cli`."""
    assert surface() == json.loads(SURFACE.read_text())


def processor_seconds() -> float:
    """Processor time of the processes that this one has waited for, which other load disturbs little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_imports_nothing_heavy(tmp_path: Path):
    code = (
        "import sys, tmd_eval.cli; heavy = {'torch', 'diffusers', 'transformers', 'pandas', 'matplotlib', 'numpy', "
        "'sqlalchemy', 'gradio'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # by the first of three
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        assert run("--help", **compiled).returncode == 0
        seconds.append(processor_seconds() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", sorted(json.loads(SURFACE.read_text())))
def test_every_command_has_help_with_an_example(name):
    shown = run(*name.split()[1:], "--help")
    assert shown.returncode == 0
    assert "tmd-eval" in shown.stdout.split("Options")[0]


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    """typer turns Ctrl-C into an exit before our own handler sees it."""
    tree = typer.Typer()

    @tree.command()
    def wait(code: int = 0) -> None:
        if code:
            raise typer.Exit(code)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", tree)
    for words, said in ((["--code", "130"], ""), ([], "interrupted; run the same command again")):
        monkeypatch.setattr(sys, "argv", ["tmd-eval", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        error = capsys.readouterr().err
        assert caught.value.code == 130 and error.startswith(said) and bool(error) == bool(said)


def test_version():
    assert run("--version").stdout.strip() == f"tmd-eval {__version__}"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nfe", "--m", "0", "--n", "2", "--h", "5", "--blocks", "30"], 2, "M"),
        (["nfe", "--m", "2", "--n", "0", "--h", "5", "--blocks", "30"], 2, "N"),
        (["nfe", "--m", "2", "--n", "2", "--h", "30", "--blocks", "30"], 2, "H"),
        (["train", "absent.yaml"], 2, "absent.yaml"),
        (["rerun", "absent"], 2, "neither a report"),
        (["micro", "--ckpt", "micro"], 2, "--out"),
        (["nosuch"], 2, "nosuch"),
        (["quickstart", "--num-prompts", "0"], 2, "num_prompts"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(words, code, sentence, tmp_path):
    result = run(*words, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert not any(tmp_path.iterdir())


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")

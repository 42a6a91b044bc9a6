"""Effective NFE: Eq. 16 by hand, and counted from executed blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from students.base import load_base
from students.checkpoint import BaseRecord, StudentSpec, open_checkpoint, save_student
from students.errors import ConfigError
from students.tmd import TMDStudent
from tests.tiny import TEXT_LENGTH, tiny_pipeline
from tmd_eval.commands.nfe import nfe
from tmd_eval.nfe import effective_nfe, measure_effective_nfe

app = typer.Typer()
app.command()(nfe)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def student(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_base(str(pipeline))
    folder = tmp_path_factory.mktemp("runs") / "student"
    spec = StudentSpec(
        method="tmd", m=2, n=2, h=3, blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(base)
    )  # fmt: skip
    save_student(folder, TMDStudent.from_teacher(base.transformer, h=3), spec)
    return folder


def test_the_papers_figures() -> None:
    assert effective_nfe(2, 2, 5, 30) == pytest.approx(2.33, abs=0.005)  # TMD-N2H5 of the 1.3B model, M = 2
    assert effective_nfe(1, 4, 5, 40) == 1.375  # TMD-N4H5 of the 14B model, M = 1
    assert effective_nfe(1, 1, 5, 30) == 1.0
    assert effective_nfe(4, None, None, None) == 4.0  # plain student


@given(m=st.integers(1, 8), n=st.integers(1, 8), blocks=st.integers(2, 40), data=st.data())
def test_it_counts_blocks(m: int, n: int, blocks: int, data: st.DataObject) -> None:
    h = data.draw(st.integers(1, blocks - 1))
    executed = sum(1 for _ in range(m) for _ in range(blocks - h)) + sum(1 for _ in range(m * n) for _ in range(h))
    assert effective_nfe(m, n, h, blocks) == executed / blocks


@pytest.mark.parametrize(
    "m, n, h, blocks",
    [(0, 1, 5, 30), (1, 0, 5, 30), (1, 1, 0, 30), (1, 1, 30, 30), (1, 2, None, 30), (1, None, 5, 30), (1, 1, 5, None),
     (-1, None, None, None), (1, 1, 1, 1)],
)  # fmt: skip
def test_bad_numbers_are_refused(m: int, n: int | None, h: int | None, blocks: int | None) -> None:
    with pytest.raises(ConfigError):
        effective_nfe(m, n, h, blocks)


@pytest.mark.parametrize("m, n", [(1, 1), (None, None), (3, 4)])
def test_measured_equals_eq_16(student: Path, m: int | None, n: int | None) -> None:
    expected = effective_nfe(m or 2, n or 2, 3, 4)
    assert measure_effective_nfe(open_checkpoint(student), m, n) == expected


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_teachers_guidance_does_not_count(pipeline: Path, guidance: float | None) -> None:
    assert measure_effective_nfe(open_checkpoint(pipeline), 3, guidance=guidance) == 3.0


def test_measuring_leaves_no_hooks(student: Path) -> None:
    checkpoint = open_checkpoint(student)
    measure_effective_nfe(checkpoint)
    assert checkpoint.student is not None
    assert not any(module._forward_hooks for module in checkpoint.student.modules())


def run(*arguments: str) -> dict[str, float]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_command_by_formula() -> None:
    assert run("--m", "2", "--n", "2", "--h", "5", "--blocks", "30") == {
        "effective_nfe": 2 * 35 / 30, "forward_passes": 2 * 35 / 30, "m": 2, "n": 2, "h": 5, "blocks": 30,
    }  # fmt: skip
    assert run("--m", "50", "--guidance", "5")["forward_passes"] == 100
    text = CliRunner().invoke(app, ["--m", "2", "--n", "2", "--h", "5", "--blocks", "30"]).stdout
    assert text == "effective NFE   2.333\nforward passes  2.333\n"


def test_command_on_checkpoints(student: Path, pipeline: Path) -> None:
    assert run("--ckpt", str(student), "--measure") == {
        "effective_nfe": 3.5, "forward_passes": 3.5, "m": 2, "n": 2, "h": 3, "blocks": 4, "measured_effective_nfe": 3.5,
    }  # fmt: skip
    assert run("--ckpt", str(student), "--m", "1", "--n", "3")["effective_nfe"] == 2.5
    assert run("--ckpt", str(pipeline)) == {
        "effective_nfe": 50, "forward_passes": 100, "m": 50, "n": None, "h": None, "blocks": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [[], ["--m", "0"], ["--m", "1", "--measure"], ["--m", "1", "--n", "2"], ["--ckpt", "/absent"],
     ["--m", "1", "--n", "1", "--h", "0", "--blocks", "30"], ["--m", "1", "--n", "1", "--h", "30", "--blocks", "30"],
     ["--ckpt", "/absent", "--h", "2"]],
)  # fmt: skip
def test_command_refuses_bad_input(arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)

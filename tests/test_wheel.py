"""The wheel: builds, holds all that is not code, installs, and runs away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return next(folder.glob("tmd_eval-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the console scripts of a fresh environment that borrows our dependencies but not this checkout."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)], check=True
    )
    return folder / "bin"


def test_it_holds_weights_templates_migrations_and_presets(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "students/micro/weights/model_index.json",
        "students/micro/weights/base.json",
        "students/micro/weights/transformer/diffusion_pytorch_model.safetensors",
        "students/micro/weights/vae/diffusion_pytorch_model.safetensors",
        "students/micro/weights/text_encoder/model.safetensors",
        "leaderboard/templates/index.html.j2",
        "leaderboard/migrations/env.py",
        "tmd_eval/presets/micro_tmd_n2h2_stage1.yaml",
        "tmd_eval/presets/micro_tmd_n2h2_stage2.yaml",
    ):
        assert needed in names
    assert any(name.startswith("leaderboard/migrations/versions/") for name in names)
    assert not any(name.startswith(("tests/", "reports/", "benchmarks/")) for name in names)


def test_it_runs_from_an_empty_folder(installed: Path, tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [installed / "tmd-eval", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").startswith("tmd-eval ")
    where = subprocess.run(
        [installed / "python", "-c", "import students; print(students.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(installed.parent) in where, "the wheel's own code must be what runs"
    caption = "a red circle moves left slowly above a blue square on a dark background"
    run("generate", "--ckpt", "micro", "--prompt", caption, "--m", "2", "--out", "run")
    assert (tmp_path / "run" / "videos" / "00000-0.mp4").is_file()
    assert "micro_tmd" in run("quickstart", "--dry-run")

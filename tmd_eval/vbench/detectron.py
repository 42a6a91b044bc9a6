"""detectron2 for VBench's detector, without its compiled part, which GRiT never calls.

There is no wheel. The plain Python files of a checkout on the path are enough: GRiT pools and suppresses with
torchvision.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from students.errors import ConfigError
from students.machine import home

REPOSITORY = "https://github.com/facebookresearch/detectron2"


def code_folder() -> Path:
    """The folder on the environment's path that holds it; outlives a new environment."""
    return home() / "vbench-code"


def installed() -> bool:
    """Whether it is there."""
    return (code_folder() / "detectron2" / "__init__.py").is_file()


def install(checkout: Path) -> None:
    """Copy the Python files of a checkout.

    Args:
        checkout: root of a clone of ``REPOSITORY``.

    Raises:
        ConfigError: it is not such a folder.
    """
    source = checkout / "detectron2"
    if not (source / "modeling" / "__init__.py").is_file():
        raise ConfigError(f"{checkout} is not a checkout of detectron2: it has no detectron2/modeling.")
    code_folder().mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=code_folder(), prefix=".tmp-"))
    try:
        for path in sorted(source.rglob("*.py")):
            target = new / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        old = code_folder() / "detectron2"
        shutil.rmtree(old, ignore_errors=True)
        new.chmod(0o755)
        new.replace(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def fetch(timeout: float = 300) -> str | None:
    """Clone the repository and install it; returns why that failed, None if it did not."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            done = subprocess.run(
                ["git", "clone", "--quiet", "--depth", "1", REPOSITORY, temporary + "/detectron2"],
                capture_output=True, text=True, timeout=timeout, env=environment,
            )  # fmt: skip
        except FileNotFoundError:
            return "git is not installed"
        except subprocess.TimeoutExpired:
            return f"git took more than {timeout:.0f} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["git failed"])[-1]
        install(Path(temporary, "detectron2"))
    return None

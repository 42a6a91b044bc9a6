"""VBench's managed environment: a virtual environment with its old pins that borrows torch from the project's.

VBench 0.1.5 wants numpy 1 and transformers 4.33, the project wants newer ones. A second environment with its own torch
takes 5.5 GB; this one holds only the pinned packages (``pins.txt``) and a ``.pth`` file that appends the project's
site-packages to its path, so that what is pinned comes first and torch comes from the project.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from typing import IO

from students.errors import ConfigError, EnvironmentMissingError
from students.machine import home
from tmd_eval.files import write_atomic, write_json
from tmd_eval.vbench.detectron import code_folder

SETUP = "tmd-eval vbench setup"
STAMP = "tmd-eval.json"


def folder() -> Path:
    """The managed environment."""
    return home() / "vbench-env"


def pins() -> list[str]:
    """The pinned requirements, one a line, in the order they are installed."""
    lines = resources.files("tmd_eval.vbench").joinpath("pins.txt").read_text("utf-8").splitlines()
    return [requirement for line in lines if (requirement := line.split("#")[0].strip())]


def wanted() -> dict[str, str]:
    """What an environment must have been built for to be of use now; another Python or torch needs a new one."""
    return {
        "pins": hashlib.sha256("\n".join(pins()).encode()).hexdigest(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": metadata.version("torch"),
    }


def problem() -> str | None:
    """Why the environment is of no use as it is, or None when it is ready."""
    if reason := _build_problem():
        return reason
    shared = _link(folder()).read_text().splitlines()
    if not any((Path(path) / "torch").is_dir() for path in shared):
        return "borrows torch from a folder that is gone"
    return None


def _build_problem() -> str | None:
    """Why its packages must be installed anew; a link to a project's environment that moved is no reason."""
    if not folder().is_dir():
        return "is not installed"
    try:
        stamp = json.loads((folder() / STAMP).read_text())
    except (OSError, ValueError):
        return "is incomplete"
    if not _link(folder()).is_file():
        return "is incomplete"
    now = wanted()
    different = [f"{key} was {stamp.get(key)}, is {now[key]}" for key in now if stamp.get(key) != now[key]]
    if different:
        return "was built for something else (" + "; ".join(d if len(d) < 80 else d.split()[0] for d in different) + ")"
    return None


def python() -> Path:
    """The environment's interpreter.

    Raises:
        EnvironmentMissingError: there is no usable environment; names the command that makes it.
    """
    if reason := problem():
        raise EnvironmentMissingError(f"VBench's environment {folder()} {reason}; run {SETUP}.")
    return folder() / "bin" / "python"


def setup(*, force: bool = False, log: Callable[[str], None] = lambda _: None) -> dict[str, object]:
    """Make the environment, unless it is there; a broken-off run starts again from pip's cache.

    The new environment is built beside and renamed when complete, so an interrupted or failed set-up leaves an
    earlier one as it was.

    Args:
        force: build anew even if there is nothing wrong.
        log: told each step.

    Returns:
        path, built (False: was there already), seconds, megabytes.

    Raises:
        EnvironmentMissingError: a package could not be installed; names it and the log.
    """
    start, target = time.perf_counter(), folder()
    _writable(home())
    with _lock():
        built = force or _build_problem() is not None
        if built:
            for debris in _unfinished():
                shutil.rmtree(debris, ignore_errors=True)
            # a new name each time: the installer of a killed run may still be writing
            building = target.with_name(f"{target.name}.building-{secrets.token_hex(4)}")
            _build(building, log)
            shutil.rmtree(target, ignore_errors=True)
            building.replace(target)
        elif _link(target).read_text() != _shared_text():
            write_atomic(_link(target), _shared_text())  # same Python and torch, but another environment of the project
    size = sum(path.lstat().st_size for path in target.rglob("*") if not path.is_dir())
    seconds = round(time.perf_counter() - start, 1)
    return {"path": str(target), "built": built, "seconds": seconds, "megabytes": round(size / 1e6)}


def remove() -> bool:
    """Delete the environment; False if there was none."""
    if not home().is_dir():
        return False
    with _lock():
        found = False
        for path in (folder(), *_unfinished()):
            found |= path.exists()
            shutil.rmtree(path, ignore_errors=True)
    home().joinpath("vbench-env.log").unlink(missing_ok=True)
    return found


def _unfinished() -> list[Path]:
    return list(home().glob(folder().name + ".building-*"))


def _build(target: Path, log: Callable[[str], None]) -> None:
    log(f"making {folder()}")
    venv.create(target, with_pip=True, symlinks=True)
    write_atomic(_link(target), _shared_text())
    requirements = pins()
    if not (shared_torchvision := _has("torchvision")):
        minor = int(metadata.version("torch").split(".")[1])
        requirements.append(f"torchvision==0.{minor + 15}.*")  # torch 2.x goes with torchvision 0.(x + 15)
    log(f"installing {len(requirements)} packages" + ("" if shared_torchvision else ", torchvision among them"))
    with home().joinpath("vbench-env.log").open("w") as output:
        # setuptools first: the packages that come as source are built with it, not with the newest
        _pip(target, requirements[:1], output, log, isolated=True)
        _pip(target, requirements[1:], output, log, isolated=False)
    write_json(target / STAMP, {**wanted(), "requirements": requirements})


def _pip(target: Path, requirements: list[str], output: IO[str], log: Callable[[str], None], *, isolated: bool) -> None:
    # --ignore-installed: the borrowed packages count as installed
    options = ["--ignore-installed", "--no-deps", "--no-input", "--disable-pip-version-check"]
    if not isolated:
        options.append("--no-build-isolation")
    command = [str(target / "bin" / "python"), "-m", "pip", "install", *options, *requirements]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    errors = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.write(line)
            if line.startswith(("Collecting", "Installing", "Building")):
                log(line.strip()[:100])
            if "ERROR:" in line or line.startswith("error:"):
                errors.append(line.strip())
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        reason = errors[-1] if errors else f"pip ended with {process.returncode}"
        raise EnvironmentMissingError(
            f"VBench's environment could not be installed: {reason} (all of pip's output: {output.name}). "
            f"It needs the package index pip is configured for and 1 GB of disk; then run {SETUP} again."
        )


def _link(target: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return target / "lib" / version / "site-packages" / "zz-tmd-eval.pth"


def _shared_text() -> str:
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return "".join(path + "\n" for path in (*shared, str(code_folder())))


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"TMD_EVAL_HOME {path} cannot be made ({error.strerror}); set it to another folder."
        ) from error


@contextmanager
def _lock() -> Iterator[None]:
    with home().joinpath("vbench-env.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

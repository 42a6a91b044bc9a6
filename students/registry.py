"""The methods that a configuration can name."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from students.dmd2v import DMD2V_KIND
from students.errors import ConfigError
from students.kd import KD_KIND
from students.method import MethodKind
from students.rcm import RCM_KIND
from students.tm_mf import TM_MF_KIND
from students.tmd_stage2 import STAGE2_KIND

METHODS: dict[str, MethodKind] = {
    "tm_mf": TM_MF_KIND,
    "tmd_stage2": STAGE2_KIND,
    "dmd2v": DMD2V_KIND,
    "kd": KD_KIND,
    "rcm": RCM_KIND,
}
"""Name in ``method.name`` to the kind of method."""
_OWN: dict[str, MethodKind] = {}
_CODE: dict[str, str] = {}


def method_kind(name: str) -> MethodKind:
    """The kind of method of that name.

    Args:
        name: one of METHODS, or ``FILE.py:NAME`` for a :class:`MethodKind` of your own: the file is run, so name only
            files you trust.

    Raises:
        ConfigError: there is no such method, file or kind; says which there are.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _OWN:
        return _OWN[name]
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise ConfigError(
            f"method.name is {name!r}; choose one of {', '.join(METHODS)}, or FILE.py:NAME for a method of your own."
        )
    module, code = _run(Path(file), name)
    kind = getattr(module, attribute, None)
    if not isinstance(kind, MethodKind):
        raise ConfigError(f"{file} has no MethodKind called {attribute}; see docs/your-own-student.md.")
    _OWN[name], _CODE[name] = kind, code
    return kind


def own_code(name: str) -> str | None:
    """Hash of the file of a method of your own, as it was when it was loaded; None for a shipped method."""
    return _CODE.get(name)


def _run(path: Path, name: str) -> tuple[object, str]:
    if not path.is_file():
        raise ConfigError(f"method.name is {name!r}, but there is no file {path}; give its path from here.")
    unique = f"own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[unique]
        if isinstance(error, Exception):
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            line = lines[-1] if lines else getattr(error, "lineno", 1)
            raise ConfigError(f"{path}:{line} cannot be run ({type(error).__name__}: {error}); mend it.") from error
        raise
    return module, hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def kind_name(settings: object) -> str:
    """The name of the method whose settings these are.

    Args:
        settings: an instance of a kind's ``config``.

    Raises:
        ConfigError: no kind that has been used so far has this class.
    """
    for name, kind in (METHODS | _OWN).items():
        if type(settings) is kind.config:
            return name
    raise ConfigError(f"method must be one of {', '.join(METHODS)}, not a {type(settings).__name__}.")

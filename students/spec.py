"""The record of a student, ``student.json``: what it is, how it samples, where it comes from."""

from __future__ import annotations

import difflib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from students.base import Base
from students.errors import ConfigError
from students.nfe import effective_nfe
from students.times import check_grid, grid
from students.tmd import FUSIONS, TARGETS
from students.weights import read_json

FORMAT_VERSION = 1
SAMPLERS = ("tmd", "ode", "sde")
"""Algorithm 1 of TMD; for plain students the deterministic steps of Eq. 18 and the re-noising ones of Eq. 19."""
INITIAL = ("unit", "scaled")
TIME_PRECISIONS = ("float64", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The base model a student was distilled from."""

    ref: str
    """"micro", a hub id, or the path of a pipeline folder."""
    hash: str
    """sha256 over the base model's weights."""
    revision: str | None = None
    """Commit of a hub id."""

    @classmethod
    def of(cls, base: Base) -> BaseRecord:
        """The record of a loaded base model."""
        return cls(ref=base.ref, hash=base.hash, revision=base.revision)


@dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """What ``student.json`` says of a student: a TMD student (with H and N), or a plain one (without).

    A plain student is a Wan transformer that jumps from each time of its grid straight to a clean estimate: DMD2-v,
    rCM, KD, and the published few-step Wan models.

    Raises:
        ConfigError: a value outside its range, a grid that does not suit M or N.
    """

    method: str
    """How it was trained, for example "tm_mf" (stage 1), "tmd" (stage 2), "dmd2-v" or "rcm"."""
    m: int
    """M, outer steps it was trained for."""
    n: int | None = None
    """N, inner steps it was trained for; null for a plain student."""
    h: int | None = None
    """H, blocks in the flow head; null for a plain student."""
    blocks: int
    """L, blocks of the base model."""
    fusion: str | None = "gated"
    """"gated" or "concat"; null for a plain student."""
    target: str | None = "x1-x"
    """Transition target y: "x1-x" or "x"; null for a plain student."""
    gamma_outer: float | None = 10.0
    """Shift of the outer grid; gives the grid when sampling at another M. Null: the M noisiest points of the grid."""
    gamma_inner: float | None = 10.0
    """Shift of the inner grid; gives the grid when sampling at another N; null for a plain student."""
    outer_grid: tuple[float, ...] = ()
    """0 = t_0 < ... < t_M; made from gamma_outer when not given."""
    inner_grid: tuple[float, ...] = ()
    """0 = s_0 < ... < s_N; made from gamma_inner when not given; empty for a plain student."""
    sampler: str = ""
    """"tmd" (Algorithm 1), or for plain students "ode" (Eq. 18, the default) or "sde" (Eq. 19, re-noising)."""
    initial: str = "unit"
    """The first sample of a plain student: "unit" (x1) or "scaled" (t_M x1, as FastGen and rCM start)."""
    time_precision: str = "float64"
    """Precision of a plain student's network time 1000 t; rCM's code rounds it to "bfloat16"."""
    guidance: float = 1.0
    """Guidance scale w when sampling a plain student; 1 for students with guidance built in, which all of ours are."""
    text_length: int
    """Tokens of a caption, the base model's."""
    base: BaseRecord
    """The model it was distilled from."""
    training: dict[str, Any] = field(default_factory=dict)
    """Provenance: config, step, data hash, code revision, parent checkpoint; the source of a foreign file."""

    @property
    def plain(self) -> bool:
        """True for a student without a flow head."""
        return self.h is None

    def __post_init__(self) -> None:
        effective_nfe(self.m, self.n, self.h, self.blocks)  # refuses M, N or H out of range
        if self.plain:
            for name, none in (("n", None), ("fusion", None), ("target", None), ("gamma_inner", None)):
                object.__setattr__(self, name, none)
        if not self.sampler:
            object.__setattr__(self, "sampler", "ode" if self.plain else "tmd")
        for name, value, known in (
            ("fusion", self.fusion, (None,) if self.plain else FUSIONS),
            ("target", self.target, (None,) if self.plain else TARGETS),
            ("sampler", self.sampler, SAMPLERS[1:] if self.plain else SAMPLERS[:1]),
            ("initial", self.initial, INITIAL if self.plain else INITIAL[:1]),
            ("time_precision", self.time_precision, TIME_PRECISIONS if self.plain else TIME_PRECISIONS[:1]),
        ):
            if value not in known:
                raise ConfigError(
                    f"The {name} {value!r} of the student is unknown; known: {', '.join(map(str, known))}."
                )
        if self.text_length < 1:
            raise ConfigError(f"text_length is {self.text_length}; it must be at least 1.")
        if not self.guidance >= 1 or (self.guidance > 1 and not self.plain):
            raise ConfigError(f"guidance is {self.guidance}; it is 1 for TMD students and at least 1 for plain ones.")
        self._set_grid("outer_grid", self.m, self.gamma_outer)
        if self.n is not None:
            self._set_grid("inner_grid", self.n, self.gamma_inner)
        elif self.inner_grid:
            raise ConfigError("inner_grid is given, but a plain student has no inner steps; leave it out.")
        else:
            object.__setattr__(self, "inner_grid", ())  # JSON gives a list

    def _set_grid(self, name: str, steps: int, gamma: float | None) -> None:
        points = tuple(getattr(self, name))
        if not points:
            if gamma is None:
                raise ConfigError(f"{name} is not given and neither is its shift; give one of them.")
            points = tuple(grid(steps, gamma).tolist())
        check_grid(points)
        if len(points) != steps + 1:
            raise ConfigError(f"{name} has {len(points) - 1} steps, but {steps} are stated; make them agree.")
        object.__setattr__(self, name, points)

    def outer(self, m: int | None) -> Tensor:
        """The outer grid for M steps (None: as trained), float64 (M + 1,)."""
        return self._grid(m, self.m, self.outer_grid, self.gamma_outer)

    def inner(self, n: int | None) -> Tensor:
        """The inner grid for N steps (None: as trained), float64 (N + 1,)."""
        if self.n is None:
            raise ConfigError("A plain student has no inner steps and so no inner grid.")
        return self._grid(n, self.n, self.inner_grid, self.gamma_inner)

    @staticmethod
    def _grid(steps: int | None, trained: int, points: tuple[float, ...], gamma: float | None) -> Tensor:
        if steps is None or steps == trained:
            return torch.tensor(points, dtype=torch.float64)
        if gamma is not None:
            return grid(steps, gamma)
        if not 1 <= steps < trained:
            raise ConfigError(f"This student has the fixed times of {trained} steps; it cannot take {steps}.")
        return torch.tensor((0.0, *points[-steps:]), dtype=torch.float64)

    def to_json(self) -> str:
        """The text of ``student.json``."""
        return json.dumps({"version": FORMAT_VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> StudentSpec:
        """Read ``student.json``.

        Raises:
            ConfigError: unreadable, another version, an unknown, missing or ill-typed key, a value out of range.
        """
        record = read_json(path)
        version = record.pop("version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path} has format version {version}; this tmd-eval reads version {FORMAT_VERSION}.")
        _check_keys(cls, record, path)
        if not isinstance(record["base"], dict):
            raise ConfigError(f"{path}: base must be an object with ref and hash, not {record['base']!r}.")
        _check_keys(BaseRecord, record["base"], path)
        for key in ("m", "n", "h", "blocks", "text_length"):
            value = record.get(key)
            if type(value) is not int and not (value is None and key in ("n", "h")):
                raise ConfigError(f"{path}: {key} must be a whole number, not {value!r}.")
        try:
            return cls(**{**record, "base": BaseRecord(**record["base"])})
        except TypeError as error:
            raise ConfigError(f"{path} has a value of the wrong type ({error}); correct it.") from error


def _check_keys(kind: type, record: dict[str, Any], path: Path) -> None:
    known = {f.name: f for f in fields(kind)}
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"{path} has the unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in record:
            raise ConfigError(f"{path} lacks the key {name!r}.")

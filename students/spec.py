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
    """What ``student.json`` says of a TMD student.

    Raises:
        ConfigError: a value outside its range, a grid that does not suit M or N.
    """

    method: str
    """How it was trained, for example "tm_mf" (stage 1) or "tmd" (stage 2)."""
    m: int
    """M, outer steps it was trained for."""
    n: int
    """N, inner steps it was trained for."""
    h: int
    """H, blocks in the flow head."""
    blocks: int
    """L, blocks of the base model."""
    fusion: str = "gated"
    """"gated" or "concat"."""
    target: str = "x1-x"
    """Transition target y: "x1-x" or "x"."""
    gamma_outer: float = 10.0
    """Shift of the outer grid; gives the grid when sampling at another M."""
    gamma_inner: float = 10.0
    """Shift of the inner grid; gives the grid when sampling at another N."""
    outer_grid: tuple[float, ...] = ()
    """0 = t_0 < ... < t_M; made from gamma_outer when not given."""
    inner_grid: tuple[float, ...] = ()
    """0 = s_0 < ... < s_N; made from gamma_inner when not given."""
    sampler: str = "tmd"
    """"tmd": Algorithm 1 of the paper."""
    text_length: int
    """Tokens of a caption, the base model's."""
    base: BaseRecord
    """The model it was distilled from."""
    training: dict[str, Any] = field(default_factory=dict)
    """Provenance: config, step, data hash, code revision, parent checkpoint."""

    def __post_init__(self) -> None:
        effective_nfe(self.m, self.n, self.h, self.blocks)  # refuses M, N or H out of range
        for name, value, known in (
            ("fusion", self.fusion, FUSIONS),
            ("target", self.target, TARGETS),
            ("sampler", self.sampler, ("tmd",)),
        ):
            if value not in known:
                raise ConfigError(f"The {name} {value!r} of the student is unknown; known: {', '.join(known)}.")
        if self.text_length < 1:
            raise ConfigError(f"text_length is {self.text_length}; it must be at least 1.")
        for name, steps, gamma in (("outer_grid", self.m, self.gamma_outer), ("inner_grid", self.n, self.gamma_inner)):
            points = tuple(getattr(self, name)) or tuple(grid(steps, gamma).tolist())
            check_grid(points)
            if len(points) != steps + 1:
                raise ConfigError(f"{name} has {len(points) - 1} steps, but {steps} are stated; make them agree.")
            object.__setattr__(self, name, points)

    def outer(self, m: int | None) -> Tensor:
        """The outer grid for M steps (None: as trained), float64 (M + 1,)."""
        return self._grid(m, self.m, self.outer_grid, self.gamma_outer)

    def inner(self, n: int | None) -> Tensor:
        """The inner grid for N steps (None: as trained), float64 (N + 1,)."""
        return self._grid(n, self.n, self.inner_grid, self.gamma_inner)

    @staticmethod
    def _grid(steps: int | None, trained: int, points: tuple[float, ...], gamma: float) -> Tensor:
        if steps is None or steps == trained:
            return torch.tensor(points, dtype=torch.float64)
        return grid(steps, gamma)

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
        for key, kind in (("m", int), ("n", int), ("h", int), ("blocks", int), ("text_length", int)):
            if type(record[key]) is not kind:
                raise ConfigError(f"{path}: {key} must be a whole number, not {record[key]!r}.")
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

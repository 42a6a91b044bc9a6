"""Making webdataset shards: which sample lies where, who makes it, and going on after any interruption.

The list of samples is cut into shards in order, and shard i belongs to rank i mod world, so the files do not depend on
the number of ranks. A finished sample waits in a hidden folder until its shard is whole; a rerun makes what is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save
from tqdm import tqdm

from students.base import Base
from students.data import INDEX
from students.errors import ConfigError
from students.tar_shards import (
    FORMAT,
    NEGATIVE,
    Sample,
    replace_text,
    shard_record,
    summarise,
    write_tar,
)
from students.weights import file_hash
from tmd_eval.files import remove_debris, write_atomic, write_json

SOURCE = "source.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[T]):
    """A data folder to be made."""

    folder: Path
    """Where."""
    source: dict[str, Any]
    """All that decides the content, in plain values: a folder begun with another source is refused."""
    items: Sequence[T]
    """What the samples are made of, in order."""
    shard_size: int
    """Samples a shard."""
    batch_size: int
    """Samples made at once."""
    rank: int = 0
    """This process's number."""
    world: int = 1
    """How many processes share the work."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.items:
            raise ConfigError("There is nothing to make samples of; the list is empty.")

    @property
    def shards(self) -> list[range]:
        """Items of every shard."""
        count, size = len(self.items), self.shard_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def missing(self) -> list[int]:
        """Shards that are not complete."""
        return [i for i in range(len(self.shards)) if shard_record(self.folder, i) is None]


Make = Callable[[list[T]], list[Sample | str]]
"""Items -> for each its sample, or why it is left out."""


def make_shards(plan: Plan[T], make: Make[T], base: Base, *, verify: bool, progress: bool) -> dict[str, Any]:
    """Make this rank's missing shards, and ``data.json`` once all shards are there.

    Args:
        plan: the folder.
        make: makes samples.
        base: base model whose VAE and text encoder they are for.
        verify: compare complete shards with their hash first; damaged ones are made again.
        progress: show a bar on stderr.

    Returns:
        What ``--json`` prints: folder, shards, samples, skipped, statistics; complete says whether all ranks are done.

    Raises:
        ConfigError: the folder was begun with another source, or no sample could be made.
    """
    folder = plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    if plan.world == 1:  # otherwise it may be another rank's work
        remove_debris(folder)
    _claim(plan, base)
    if verify:
        for index in _mine(plan):
            _drop_damaged(folder, index)
    todo = [index for index in plan.missing() if index % plan.world == plan.rank]
    total = sum(len(plan.shards[index]) for index in todo)
    with tqdm(total=total, desc="samples", unit="sample", disable=not progress) as bar:
        for index in todo:
            _make_shard(plan, index, make, bar)
    return _finish(plan, base)


def _mine(plan: Plan[Any]) -> range:
    return range(plan.rank, len(plan.shards), plan.world)


def _claim(plan: Plan[Any], base: Base) -> None:
    """Write what decides the content, or refuse a folder that was begun with something else."""
    path, wanted = plan.folder / SOURCE, {**plan.source, "shard_size": plan.shard_size, "base_hash": base.hash}
    wanted["latent_shape"] = list(base.latent_shape)  # the hash is of weights only; older folders do not have this
    strange = any(plan.folder.iterdir()) and not any(plan.folder.glob(".tmp-*"))
    if path.exists():  # looked for last: another rank may just have begun
        begun = json.loads(path.read_text("utf-8"))
        for key in sorted(begun):
            if begun.get(key) != wanted.get(key):
                raise ConfigError(
                    f"{plan.folder} was begun with {key} = {begun.get(key)}, now it is {wanted.get(key)}; "
                    "choose another --out, or the same settings."
                )
        return
    if strange:
        raise ConfigError(f"{plan.folder} is not empty and holds no data that were begun; choose another --out.")
    write_json(path, wanted)


def _drop_damaged(folder: Path, index: int) -> None:
    record = shard_record(folder, index)
    tar = folder / f"{index:05d}.tar"
    if record is not None and file_hash(tar) != record["sha256"]:
        tar.unlink()
        (folder / INDEX).unlink(missing_ok=True)


def _make_shard(plan: Plan[T], index: int, make: Make[T], bar: Any) -> None:
    waiting = plan.folder / f".{index:05d}"
    waiting.mkdir(exist_ok=True)
    remove_debris(waiting)
    rows = list(plan.shards[index])
    todo = [row for row in rows if not (waiting / f"{row}.json").exists()]
    bar.update(len(rows) - len(todo))
    for start in range(0, len(todo), plan.batch_size):
        chosen = todo[start : start + plan.batch_size]
        for row, result in zip(chosen, make([plan.items[row] for row in chosen]), strict=True):
            if isinstance(result, str):
                record: dict[str, Any] = {"skipped": result, "item": str(plan.items[row])}
            else:
                write_atomic(waiting / f"{row}.safetensors", result.data)
                record = {"record": result.record}
            write_json(waiting / f"{row}.json", record)
        bar.update(len(chosen))
    records = {row: json.loads((waiting / f"{row}.json").read_text("utf-8")) for row in rows}

    def samples() -> Iterable[Sample]:
        for row, entry in records.items():
            if "record" in entry:
                yield Sample((waiting / f"{row}.safetensors").read_bytes(), entry["record"])

    skipped = [{"item": e["item"], "reason": e["skipped"]} for e in records.values() if "skipped" in e]
    write_tar(plan.folder, index, samples(), skipped)
    shutil.rmtree(waiting)


def _finish(plan: Plan[Any], base: Base) -> dict[str, Any]:
    found = [shard_record(plan.folder, index) for index in range(len(plan.shards))]
    complete = [(index, record) for index, record in enumerate(found) if record is not None]
    skipped = [entry for _, record in complete for entry in record["skipped"]]
    samples = sum(len(record["samples"]) for _, record in complete)
    report: dict[str, Any] = {
        "folder": str(plan.folder), "complete": len(complete) == len(found), "shards": len(complete),
        "samples": samples, "skipped": len(skipped), "bytes": sum(record["bytes"] for _, record in complete),
        "statistics": summarise(record["statistics"] for _, record in complete) if samples else None,
    }  # fmt: skip
    if not report["complete"]:
        return report
    if not samples:
        raise ConfigError(f"None of the {len(skipped)} samples could be made; the first: {skipped[0]['reason']}")
    if not (plan.folder / INDEX).exists():
        negative = base.encode_prompts([base.negative_prompt])[0].float().cpu()
        used = int(negative.ne(0).any(dim=1).nonzero().max()) + 1 if negative.any() else 1
        write_atomic(plan.folder / NEGATIVE, save({"text": negative[:used].contiguous()}))
        index = {
            "format": FORMAT, "base_hash": base.hash, "encoder_hash": base.encoder_hash, "source": plan.source,
            "latent_shape": list(base.latent_shape), "text_length": base.text_length,
            "shards": [
                {"file": f"{i:05d}.tar", "sha256": record["sha256"], "samples": len(record["samples"])}
                for i, record in complete if record["samples"]
            ],
            "skipped": skipped, "statistics": report["statistics"],
        }  # fmt: skip
        replace_text(plan.folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
    return report


def dtype_of(name: str) -> torch.dtype:
    """The storage type of that name.

    Raises:
        ConfigError: it is none of float32, float16, bfloat16.
    """
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"--dtype is {name}; choose one of {', '.join(known)}.")
    return known[name]

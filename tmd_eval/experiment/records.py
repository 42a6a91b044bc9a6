"""Records: finished cells as small files, which outlive a machine and travel to others without videos or weights.

A record is NAME.tar.xz, named like the folder of its cell, whose key says all that decides its content:

record.json       cell, the mark of its scores, and the student.json of each training
config.yaml       settings and provenance of the videos
scored.json, scores/   as the scorer wrote them
manifest.jsonl    without the key and SHA-256 of each video
stills/           middle frames of the clips that the report shows
"""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaderboard.errors import LeaderboardError
from leaderboard.matrix_sheets import sheet_clips, still
from students.errors import ConfigError
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job, Plan
from tmd_eval.experiment.plan import Loaded, load, make_plan
from tmd_eval.files import TEMPORARY, write_atomic

ENDING = ".tar.xz"
LARGEST = 256 * 2**20
"""Bytes of a record after unpacking, at most."""
NEEDED = ("config.yaml", "scored.json", "manifest.jsonl", "scores/summary.json")
_NAME = re.compile(r"record\.json|config\.yaml|scored\.json|manifest\.jsonl|scores/\w+\.jsonl?|stills/[\w-]+\.webp")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did, as names of cells."""

    taken: tuple[str, ...]
    there: tuple[str, ...]
    """Were finished before."""
    foreign: tuple[str, ...]
    """Records of no cell of this experiment: other settings, prompts, seeds or base model."""


def export_records(
    loaded: Loaded, plan: Plan, out: Path, to: Path, *, told: Callable[[int, int], object] = lambda i, n: None
) -> list[Path]:
    """Write a record of every finished cell that has none yet, or an older one.

    Args:
        loaded: the experiment.
        plan: its plan.
        out: folder of the run.
        to: folder of the records, made when missing.
        told: called after every cell with cells done and cells in all.

    Returns:
        The files written.

    Raises:
        ConfigError: no cell is finished, or a clip of one cannot be read.
    """
    ends = {cell.name: plan.jobs[cell.jobs[-1]] for cell in plan.cells if not plan.waits(cell)}
    cells = {cell.name: cell for cell in plan.cells if cell.name in ends and store.done(out, ends[cell.name])}
    if not cells:
        raise ConfigError(
            f"{out} holds no finished cell yet; run: tmd-eval experiment run {loaded.source.path} --out {out}"
        )
    to.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (name, cell) in enumerate(cells.items(), 1):
        path = to / f"{name}{ENDING}"
        mark = store.read_json(out / "cells" / name / "scored.json")
        if _mark(path) != mark:
            trainings = [plan.jobs[key] for key in cell.jobs if plan.jobs[key].kind == "train"]
            write_atomic(path, _pack(out, ends[name], trainings))
            written.append(path)
        told(number, len(cells))
    return written


def import_records(file: Path, out: Path, source: Path) -> Imported:
    """Take in the records of an experiment's cells; a cell that is finished here stays as it is.

    Args:
        file: the experiment.
        out: folder of the run, made when missing.
        source: folder of the records.

    Raises:
        ConfigError: the experiment is wrong or running, there are no records, or one is damaged, of which nothing was
            taken.
    """
    records = {path.name.removesuffix(ENDING): path for path in sorted(source.glob(f"*{ENDING}"))}
    if not records:
        raise ConfigError(f"{source} holds no record (*{ENDING}); write some with: tmd-eval experiment export")
    taken: list[str] = []
    there: set[str] = set()
    with store.run_lock(out):
        while True:  # with the trials taken in, the settings of the matrix are known, and so its cells' names
            loaded = load(file, out)
            plan = make_plan(loaded, out)
            ends = {cell.name: plan.jobs[cell.jobs[-1]] for cell in plan.cells if not plan.waits(cell)}
            ours = [name for name in ends if name in records and name not in taken]
            fresh = [name for name in ours if not store.done(out, ends[name])]
            there |= set(ours) - set(fresh)
            for name in fresh:
                _take(records[name], out / "cells" / name, ends[name])
                taken.append(name)
            if not fresh:
                break
        store.save_plan(out, plan)
    before = there - set(taken)
    foreign = set(records) - set(taken) - before
    return Imported(taken=tuple(taken), there=tuple(sorted(before)), foreign=tuple(sorted(foreign)))


def _pack(out: Path, job: Job, trainings: list[Job]) -> bytes:
    folder = store.folder(out, job)
    record = {
        **(store.read_json(folder / store.RECORD) or {}),
        "cell": job.name,
        "scored": store.read_json(folder / "scored.json"),
        "trainings": {training.name: store.training_record(out, job.name, training.name) for training in trainings},
    }
    files = {"record.json": json.dumps(record).encode()}
    for path in [folder / "config.yaml", folder / "scored.json", *sorted((folder / "scores").glob("*.json*"))]:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    if (folder / "manifest.jsonl").is_file():
        files["manifest.jsonl"] = "".join(_lean(folder / "manifest.jsonl")).encode()
        try:
            for _, video in sheet_clips(folder):
                picture = io.BytesIO()
                still(folder, video).save(picture, format="WEBP", lossless=True, quality=100, method=4)
                files[f"stills/{Path(video).stem}.webp"] = picture.getvalue()
        except LeaderboardError as error:
            raise ConfigError(str(error)) from error
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():  # owner, mode and time are fixed: the same cell gives the same bytes
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def _mark(path: Path) -> Any:
    """The mark of the scores in a record; None where there is none, or a damaged one."""
    try:
        return _read(path, first=True)["record.json"].get("scored") if path.is_file() else None
    except ConfigError:
        return None


def _lean(manifest: Path) -> Iterator[str]:
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield json.dumps({key: value for key, value in row.items() if key not in ("key", "sha256")}) + "\n"


def _take(path: Path, place: Path, job: Job) -> None:
    """Unpack a record beside its place, then move it there."""
    files = _read(path)
    record = files["record.json"]
    scored = record.get("scored")
    if record.get("cell") != job.name or not isinstance(scored, dict):
        raise ConfigError(f"{path} is no record of the cell it is named after.")
    if lacking := [name for name in NEEDED if name not in files]:
        raise ConfigError(f"{path} is not a whole record (it has no {lacking[0]}); export it again, or move it away.")
    if scored.get("metrics") != job.spec["metrics"]:
        raise ConfigError(
            f"{path} was scored with {scored.get('metrics')}, this version has {job.spec['metrics']}; "
            "move it away to make the cell again."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.parent / f"{TEMPORARY}{job.name}"
    shutil.rmtree(new, ignore_errors=True)
    for name, content in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(json.dumps(content).encode() if name == "record.json" else content)
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


def _read(path: Path, *, first: bool = False) -> dict[str, Any]:
    """The files of a record by name, record.json parsed; nothing in it is trusted, and nothing is written.

    Args:
        path: the record.
        first: read record.json only.

    Raises:
        ConfigError: it is damaged or no record.
    """
    files: dict[str, Any] = {}
    left = LARGEST
    try:
        with tarfile.open(path, mode="r:xz") as archive:
            for entry in archive:
                left -= entry.size
                if not entry.isreg() or not _NAME.fullmatch(entry.name) or entry.name in files or left < 0:
                    raise ValueError(f"it holds {entry.name!r}")
                content = archive.extractfile(entry)
                assert content is not None  # a regular file
                files[entry.name] = content.read()
                if first:
                    break
        record = json.loads(files["record.json"])
        if not isinstance(record, dict):
            raise ValueError("its record.json is no object")
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise ConfigError(f"{path} is not a whole record ({error}); export it again, or move it away.") from error
    files["record.json"] = record
    return files

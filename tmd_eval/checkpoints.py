"""Checkpoints in and out: what a file is, published students as checkpoint folders, students as diffusers pipelines."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from students.base import Base, load_base
from students.checkpoint import base_of_student, check_folder, save_student, student_hash
from students.errors import ConfigError
from students.facts import Facts
from students.foreign import GATE, GATES_NOTE, Schedule, pipeline_schedule, read_foreign
from students.nfe import effective_nfe
from students.published import default_base, open_file, spec_of
from students.spec import StudentSpec
from students.weights import file_hash, read_json, weight_files
from tmd_eval.files import disk_full, is_disk_full
from tmd_eval.model_card import model_card

PIPELINE_PARTS = ("vae", "text_encoder", "tokenizer")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def inspect(ref: str) -> dict[str, Any]:
    """What a checkpoint is and how it is sampled, read from headers and records; no network is built.

    Args:
        ref: what ``--ckpt`` takes.

    Returns:
        ref, kind ("TMD student", "plain student" or "teacher"), layout, method, m, n, h, blocks, width, parameters,
        dtypes, outer_grid, inner_grid, sampler, initial, time_precision, guidance, effective_nfe, text_length, base,
        schedule (where the times come from), hash, notes; null for what is not said.

    Raises:
        ConfigError: it cannot be read.
        EnvironmentMissingError: a hub id that must first be fetched.
    """
    path = Path(ref).expanduser()
    if (path / "student.json").is_file():
        return _of_student(ref, path, "tmd-eval checkpoint folder")
    if path.is_file():
        weights = read_foreign(path)
        facts: dict[str, Any] = {
            "layout": weights.layout, "width": weights.width, "blocks": weights.blocks,
            "parameters": weights.parameters, "dtypes": weights.dtypes, "notes": list(weights.notes),
        }  # fmt: skip
        try:
            facts["base"] = default_base(weights)
        except ConfigError:
            facts["notes"] += ["its shape belongs to no known base model: convert it with --base FOLDER"]
        if weights.schedule is None:
            facts["notes"] += ["nothing says how it is sampled, so as a teacher: a student needs ckpt convert --times"]
        return _row(ref, facts, weights.schedule)
    return _of_pipeline(ref, _pipeline(ref))


def _pipeline(ref: str) -> Base:
    if ref != "micro":
        check_folder(Path(ref).expanduser())
    return load_base(ref)


def _of_pipeline(ref: str, base: Base) -> dict[str, Any]:
    transformer = base.folder / "transformer"
    if (transformer / "student.json").is_file():
        return _of_student(ref, transformer, "pipeline folder of tmd-eval ckpt export")
    schedule = pipeline_schedule(read_json(base.folder / "model_index.json"), base.folder)
    config = read_json(transformer / "config.json")
    width = config.get("num_attention_heads", 40) * config.get("attention_head_dim", 128)
    facts = {"layout": "diffusers pipeline", "width": width, "blocks": base.blocks, "base": base.ref}
    facts["notes"] = [GATES_NOTE] if _gated(transformer) else []
    row = _row(ref, {**facts, **_stored(transformer)}, schedule)
    if schedule is None:
        row |= {"guidance": base.guidance, "sampler": type(base.scheduler).__name__, "text_length": base.text_length}
    return row


def convert(
    ref: str, out: Path, *, base: str | None = None, schedule: Schedule | None = None
) -> tuple[StudentSpec, str]:
    """Write a published student as a checkpoint folder, its weights unchanged in value and precision.

    Args:
        ref: file of another project, or a pipeline folder or hub id that says how it is sampled.
        out: checkpoint folder to be.
        base: pipeline folder or hub id of its base model; None for the one its shape belongs to.
        schedule: how to sample it; None for what its layout implies.

    Returns:
        The record and the hash of the folder.

    Raises:
        ConfigError: nothing says how it is sampled, or it is a student's folder already.
    """
    path = Path(ref).expanduser()
    if (path / "student.json").is_file():
        raise ConfigError(f"{ref} is a checkpoint folder already; tmd-eval ckpt export writes it as a pipeline.")
    if path.is_file():
        found = open_file(path, base, schedule, dtype=None)
        spec, network = found.spec, found.network
    else:
        pipeline = load_base(ref, dtype=_common_dtype(_pipeline(ref).folder / "transformer"))
        stated = schedule or pipeline_schedule(read_json(pipeline.folder / "model_index.json"), pipeline.folder)
        origin = {"pipeline": pipeline.ref, "revision": pipeline.revision}
        spec = None if stated is None else spec_of(stated, load_base(base) if base else pipeline, origin)
        network = pipeline.transformer if spec is not None else None
    if spec is None or network is None:
        raise ConfigError(
            f"Nothing in {ref} says how a few-step student of it is sampled, so it counts as a teacher; give --times "
            "and --sampler if it is one."
        )
    save_student(out, network, spec)
    return spec, student_hash(out)


def export(ref: str, out: Path, *, base: str | None = None) -> dict[str, Any]:
    """Write a model as a diffusers pipeline folder that stands on its own, with a model card.

    A plain student becomes a ``WanPipeline`` whose ``model_index.json`` has ``dmd2_config``, which servers read; a TMD
    student a :class:`students.pipeline.TMDPipeline`; a teacher a ``WanPipeline``. Weights are copied byte by byte where
    the source is a folder.

    Args:
        ref: what ``--ckpt`` takes.
        out: folder to be; must not exist or be empty.
        base: base model of another project's file; None for the one its shape belongs to.

    Returns:
        What :func:`inspect` says of the new folder.

    Raises:
        ConfigError: the source cannot be opened, or ``out`` is in use.
        TmdError: the disk is full; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out.")
    path = Path(ref).expanduser()
    with _in_place(out) as folder:
        if path.is_file():
            found = open_file(path, base, dtype=None)
            pipeline, spec = found.base, found.spec
            if spec is not None and found.network is not None:
                save_student(folder / "transformer", found.network, spec)
            else:
                pipeline.transformer.save_pretrained(folder / "transformer")
        elif (path / "student.json").is_file():
            pipeline, spec = base_of_student(path), StudentSpec.from_file(path / "student.json")
            _copy(path, folder / "transformer")
        else:
            pipeline = _pipeline(ref)
            spec, source = _spec_of_pipeline(pipeline), pipeline.folder / "transformer"
            if spec is not None and _gated(source):
                pipeline = load_base(ref, dtype=_common_dtype(source))
                save_student(folder / "transformer", pipeline.transformer, spec)
            else:
                _copy(source, folder / "transformer")
            if spec is not None:
                (folder / "transformer" / "student.json").write_text(spec.to_json(), encoding="utf-8")
        for part in (*PIPELINE_PARTS, "scheduler"):
            if (pipeline.folder / part).is_dir():
                _copy(pipeline.folder / part, folder / part)
        _describe(folder, pipeline, spec)
    return inspect(str(out))


def _spec_of_pipeline(base: Base) -> StudentSpec | None:
    if (record := base.folder / "transformer" / "student.json").is_file():
        return StudentSpec.from_file(record)
    schedule = pipeline_schedule(read_json(base.folder / "model_index.json"), base.folder)
    return None if schedule is None else spec_of(schedule, base, {"pipeline": base.ref, "revision": base.revision})


def _describe(folder: Path, base: Base, spec: StudentSpec | None) -> None:
    """Write ``model_index.json``, ``base.json``, the scheduler of a plain student and the model card."""
    index = read_json(base.folder / "model_index.json")
    index.pop("dmd2_config", None)
    if spec is not None and spec.plain:
        index |= {
            "_class_name": "WanPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "WanTransformer3DModel"], "dmd2_config": dmd2_config(spec),
        }  # fmt: skip
        from diffusers import FlowMatchEulerDiscreteScheduler

        shutil.rmtree(folder / "scheduler", ignore_errors=True)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=spec.sampler == "sde")
        scheduler.save_pretrained(folder / "scheduler")
    elif spec is not None:
        keep: dict[str, Any] = {
            key: index[key] for key in ("_diffusers_version", "tokenizer", "text_encoder", "vae") if key in index
        }
        shutil.rmtree(folder / "scheduler", ignore_errors=True)
        index = {"_class_name": "TMDPipeline", **keep, "transformer": ["students.tmd", "TMDStudent"]}
        index["tmd_config"] = {
            **{key: getattr(spec, key) for key in ("m", "n", "outer_grid", "inner_grid", "gamma_outer", "gamma_inner")},
            **{key: getattr(base, key) for key in ("text_length", "frames", "height", "width", "fps")},
        }
    facts = {name: getattr(base, name) for name in Facts.__dataclass_fields__}
    if spec is not None:
        facts["encoder_hash"] = base.encoder_hash
    (folder / "base.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(spec, base, _stored(folder / "transformer")), encoding="utf-8")


def dmd2_config(spec: StudentSpec) -> dict[str, Any]:
    """The block of ``model_index.json`` by which servers (vLLM-Omni) sample a plain student."""
    return {
        "num_inference_steps": spec.m,
        "denoising_timesteps": [_whole(1000 * t) for t in reversed(spec.outer_grid[1:])],
        "solver": spec.sampler,
        "guidance_scale": spec.guidance,
    }


def _whole(value: float) -> int | float:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 else round(value, 9)


def _of_student(ref: str, folder: Path, layout: str) -> dict[str, Any]:
    spec = StudentSpec.from_file(folder / "student.json")
    config = read_json(folder / "config.json")
    shape = config.get("transformer", config)
    width = shape.get("num_attention_heads", 40) * shape.get("attention_head_dim", 128)
    notes = spec.training.get("origin", {}).get("notes", [])
    row = _row(ref, {"layout": layout, "width": width, **_stored(folder), "notes": notes}, None)
    record = asdict(spec)
    row |= {key: record[key] for key in row if key in record and key != "base"}
    return row | {
        "kind": "plain student" if spec.plain else "TMD student",
        "base": spec.base.ref,
        "schedule": spec.training.get("schedule"),
        "effective_nfe": effective_nfe(spec.m, spec.n, spec.h, spec.blocks),
        "hash": student_hash(folder),
    }


def _row(ref: str, facts: dict[str, Any], schedule: Schedule | None) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("kind", "layout", "method", "m", "n", "h", "blocks", "width", "parameters", "dtypes", "outer_grid",
         "inner_grid", "sampler", "initial", "time_precision", "guidance", "effective_nfe", "text_length",
         "base", "schedule", "hash", "notes")
    )  # fmt: skip
    row: dict[str, Any] = {"ref": ref, **empty, "kind": "teacher", "method": "teacher", **facts}
    if schedule is None:
        return row
    fields = asdict(schedule)
    fields["schedule"] = fields.pop("source")
    fields.pop("gamma_outer")
    steps = len(schedule.outer_grid) - 1
    return row | fields | {"kind": "plain student", "m": steps, "effective_nfe": float(steps)}


def _headers(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, precision and number of values of every stored tensor; reads headers only."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                part = file.get_slice(name)
                yield name, part.get_dtype(), int(torch.Size(part.get_shape()).numel())


def _stored(folder: Path) -> dict[str, Any]:
    found = [(kind, count) for name, kind, count in _headers(folder) if GATE not in name]
    names = sorted({str(DTYPES.get(kind, kind)).removeprefix("torch.") for kind, _ in found})
    return {"parameters": sum(count for _, count in found), "dtypes": names}


def _gated(folder: Path) -> bool:
    """True for a transformer with the gates of FastVideo's sparse attention, which diffusers' has no place for."""
    return any(GATE in name for name, _, _ in _headers(folder))


def _common_dtype(folder: Path) -> torch.dtype:
    counts: Counter[str] = Counter()
    for _, kind, values in _headers(folder):
        counts[kind] += values
    return DTYPES.get(counts.most_common(1)[0][0], torch.float32)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files; links of the hub's cache become files."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            if path.suffix == ".safetensors" and file_hash(path) != file_hash(target / path.name):
                raise ConfigError(f"{target / path.name} differs from {path} after copying; check the disk.")


@contextmanager
def _in_place(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place when all went well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".tmp-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if out.exists():
            out.rmdir()
        folder.replace(out)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(out) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""From a published file or pipeline folder to a base model, a student's record and its network."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel

from students.base import Base, load_base, micro_folder
from students.errors import ConfigError
from students.foreign import ForeignWeights, Schedule, build_transformer, pipeline_schedule, read_foreign, stored_in
from students.spec import BaseRecord, StudentSpec
from students.weights import combined_hash, file_hash, read_json

WAN_BASES = {
    (1536, 30): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (5120, 40): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
"""(D, L) of the text-to-video transformers of Wan2.1, and the pipelines with their VAE and text encoder."""


class Published(NamedTuple):
    """A model of another project, ready for :class:`students.checkpoint.Checkpoint`."""

    base: Base
    """Its base model; where nothing says how the file is sampled, with the file's transformer in it."""
    spec: StudentSpec | None
    """How it is sampled; None: as the teacher."""
    network: WanTransformer3DModel | None
    """The student's; None with ``spec`` None."""
    hash: str
    """sha256 over weights and schedule."""


def default_base(weights: ForeignWeights) -> str:
    """The base model that a file of this shape belongs to.

    Raises:
        ConfigError: it has the shape of no known one; says how to name it.
    """
    shape = (weights.width, weights.blocks)
    known = dict(WAN_BASES)
    if (config := micro_folder() / "transformer" / "config.json").is_file():
        micro = read_json(config)
        width = micro["num_attention_heads"] * micro["attention_head_dim"]
        known[width, micro["num_layers"]] = "micro"
    if shape not in known:
        raise ConfigError(
            f"{weights.path} has width {shape[0]} and {shape[1]} blocks, which is no base model known here; name its "
            f"pipeline folder: tmd-eval ckpt convert {weights.path} --base FOLDER --out CHECKPOINT."
        )
    return known[shape]


def open_file(
    path: Path,
    base: str | None = None,
    schedule: Schedule | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> Published:
    """Open a file of another project.

    Args:
        path: the file.
        base: its base model; None for the one its shape belongs to.
        schedule: how to sample it; None for what its layout implies.
        dtype: precision of the networks; None for the file's own.
        options: other ones of :func:`students.base.load_base`.

    Raises:
        ConfigError: the file, the base model, or that the two do not fit.
        EnvironmentMissingError: the base model must first be fetched.
    """
    weights = read_foreign(path)
    schedule = schedule or weights.schedule
    pipeline = load_base(base or default_base(weights), dtype=dtype or torch.float32, **options)
    network = build_transformer(weights, pipeline.folder / "transformer" / "config.json", dtype)
    network.to(pipeline.storage)
    parts = stored_in(path)
    digest = file_hash(path) if parts == [path] else combined_hash(parts)
    if schedule is None:
        pipeline = with_transformer(pipeline, network, digest)
        return Published(pipeline, None, None, pipeline.hash)
    origin = {"file": path.name, "sha256": digest, "layout": weights.layout, "notes": list(weights.notes)}
    return Published(pipeline, spec_of(schedule, pipeline, origin), network, _hash(digest, schedule))


def open_pipeline(base: Base) -> Published | None:
    """The few-step student that a pipeline folder says it is; None for an ordinary pipeline.

    Raises:
        ConfigError: what it says makes no sense.
    """
    schedule = pipeline_schedule(read_json(base.folder / "model_index.json"), base.folder)
    if schedule is None:
        return None
    origin = {"pipeline": base.ref, "revision": base.revision}
    return Published(base, spec_of(schedule, base, origin), base.transformer, _hash(base.hash, schedule))


def spec_of(schedule: Schedule, base: Base, origin: dict[str, Any]) -> StudentSpec:
    """The record of a plain student with this schedule.

    Args:
        schedule: how it is sampled.
        base: its base model.
        origin: what ``training`` will say of where it comes from.
    """
    fields = asdict(schedule)
    source = fields.pop("source")
    return StudentSpec(
        **fields, m=len(schedule.outer_grid) - 1, blocks=base.blocks, text_length=base.text_length,
        base=BaseRecord.of(base), training={"origin": origin, "schedule": source},
    )  # fmt: skip


def exported_base(base: Base) -> Base:
    """An exported student's base model under the hash of the one it was distilled from, so that either goes on with the
    other's run folders.

    The folder's own hash covers the student's weights in the teacher's place. The record counts as long as VAE and text
    encoder are those of the export.

    Args:
        base: of a pipeline folder whose transformer has a ``student.json``.
    """
    facts = base.folder / "base.json"
    if facts.is_file() and read_json(facts).get("encoder_hash") == base.encoder_hash:
        record = StudentSpec.from_file(base.folder / "transformer" / "student.json").base
        vars(base)["hash"] = record.hash  # the place of the cached property
    return base


def with_transformer(base: Base, network: WanTransformer3DModel, digest: str) -> Base:
    """The same base model with another transformer, and so another hash.

    Args:
        base: gives VAE, text encoder and facts.
        network: the transformer, where ``base.storage`` says.
        digest: sha256 of its weights.
    """
    changed = copy.copy(base)
    vars(changed)["transformer"] = network  # the places of the two cached properties
    vars(changed)["hash"] = hashlib.sha256((base.hash + digest).encode()).hexdigest()
    return changed


def _hash(digest: str, schedule: Schedule) -> str:
    return hashlib.sha256((digest + repr(schedule)).encode()).hexdigest()

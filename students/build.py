"""The parts of a training run - base model, data, student, method - made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from torch import Tensor

from students.base import Base, load_base, micro_folder
from students.checkpoint import load_student
from students.config import TrainConfig
from students.data import LatentShards, open_data
from students.distributed import Ranks
from students.dmd2v import TMDStage2
from students.errors import ConfigError
from students.machine import home
from students.method import Method
from students.spec import BaseRecord, StudentSpec
from students.tm_mf import TMMF, TMMFConfig
from students.tmd import TMDStudent
from students.weights import combined_hash, weight_files


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop of :mod:`students.train` works with."""

    base: Base
    """The base model; only its transformer is loaded."""
    data: LatentShards
    """Training pairs."""
    student: TMDStudent
    """The network that the run is for."""
    method: Method
    """Losses and the networks they train, the student among them."""
    parent: dict[str, str] | None
    """Path and weights' hash of the checkpoint the student started from."""


def build_parts(config: TrainConfig, ranks: Ranks, *, progress: bool = True) -> Parts:
    """Load the base model, encode or open the data, and build the networks, drawn from the run's seed.

    Args:
        config: the run.
        ranks: its processes; gives the device.
        progress: show bars.

    Raises:
        ConfigError: the parent, H, or the data do not fit the base model.
    """
    base = load_base(config.base, device=ranks.device)
    config.check_base(base.blocks)
    data, negative = _encoded(config, ranks, progress)
    torch.manual_seed(config.seed)
    student, parent = _student(config, base)
    if config.gradient_checkpointing:  # the GAN term back-propagates through the frozen teacher too
        base.transformer.enable_gradient_checkpointing()
    method = build_method(config, base.transformer, student.to(ranks.device), negative)
    for network in method.networks.values():
        network.to(ranks.device).train()
        if config.gradient_checkpointing and isinstance(network, ModelMixin):
            network.enable_gradient_checkpointing()
    return Parts(base=base, data=data, student=student, method=method, parent=parent)


def _encoded(config: TrainConfig, ranks: Ranks, progress: bool) -> tuple[LatentShards, Tensor]:
    """Data and the negative prompt's embedding; VAE and text encoder are let go afterwards, for they are large."""
    encoder = load_base(config.base, device=ranks.device)
    data = open_data(encoder, config.data, first=ranks.first, progress=progress)
    return data, encoder.encode_prompts([encoder.negative_prompt]).float()


def _student(config: TrainConfig, base: Base) -> tuple[TMDStudent, dict[str, str] | None]:
    shape = config.student
    if config.parent is None:
        student = TMDStudent.from_teacher(
            base.transformer, h=shape.h, fusion=shape.fusion, target=shape.target, gate=shape.gate
        )
        return student, None
    folder = Path(config.parent)
    spec, student = load_student(folder)
    for name, theirs, ours in (
        ("student.h", spec.h, shape.h),
        ("student.fusion", spec.fusion, shape.fusion),
        ("student.target", spec.target, shape.target),
        ("base (its weights' hash)", spec.base.hash, base.hash),
    ):
        if theirs != ours:
            raise ConfigError(f"parent {folder} has {name} = {theirs}, but this run {ours}; make them agree.")
    return student, {"ref": str(folder.resolve()), "hash": combined_hash(weight_files(folder))}


def build_method(config: TrainConfig, teacher: WanTransformer3DModel, student: TMDStudent, negative: Tensor) -> Method:
    """The method of a run.

    Args:
        config: the run.
        teacher: frozen transformer of the base model.
        student: network to train.
        negative: embedding of the negative prompt, (1, text_length, D).
    """
    if isinstance(config.method, TMMFConfig):
        return TMMF(student, negative, config.method)
    return TMDStage2(student, teacher, negative, config.method)


def student_spec(config: TrainConfig, base: Base, training: dict[str, Any]) -> StudentSpec:
    """The record of the run's student.

    Args:
        config: the run.
        base: its base model.
        training: provenance.
    """
    method, shape = config.method, config.student
    return StudentSpec(
        method="tm_mf" if isinstance(method, TMMFConfig) else "tmd",
        m=method.m, n=method.n, h=shape.h, blocks=base.blocks, fusion=shape.fusion, target=shape.target,
        gamma_outer=method.gamma_outer, gamma_inner=method.gamma_inner, text_length=base.text_length,
        base=BaseRecord.of(base), training=training,
    )  # fmt: skip


def describe(config: TrainConfig) -> str:
    """The plan of a run in a few lines: iterations, updates and parameters of each network, without loading weights."""
    lines = [f"plan: {config.method_name}, {config.iterations} iterations of {config.batch} pairs"]
    ref, _, revision = str(micro_folder() if config.base == "micro" else config.base).partition("@")
    try:
        shape = WanTransformer3DModel.load_config(
            ref,
            subfolder="transformer",
            revision=revision or None,
            cache_dir=home() / "hub",
            local_files_only=True,
        )
    except (OSError, ValueError):
        return "\n".join([*lines, f"networks: unknown, as the base model {config.base} is not here"])
    config.check_base(shape.get("num_layers", 40))
    with torch.device("meta"):
        teacher = WanTransformer3DModel.from_config(shape)
        form = config.student
        student = TMDStudent.from_teacher(teacher, h=form.h, fusion=form.fusion, target=form.target, gate=form.gate)
        method = build_method(config, teacher, student, torch.empty(1, 1, shape.get("text_dim", 4096)))
    for name, network in method.networks.items():
        updates = sum(name in method.turn(i) for i in range(1, config.iterations + 1))
        size = sum(p.numel() for p in network.parameters())
        lines.append(f"{name}: {size:,} parameters, {updates} updates, learning rate {config.optimiser.rate(name):g}")
    return "\n".join(lines)

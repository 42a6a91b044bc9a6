"""The parts of a training run - base model, data, student, method - made from its configuration."""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from torch import Tensor, nn

from students.base import Base, load_base, micro_folder
from students.checkpoint import load_student
from students.config import TrainConfig
from students.data import open_data
from students.distributed import Ranks
from students.errors import ConfigError
from students.machine import home
from students.method import Method, Pairs
from students.parallel import Layout, store_low
from students.spec import BaseRecord, StudentSpec
from students.tmd import TMDStudent
from students.weights import combined_hash, weight_files

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop of :mod:`students.train` works with."""

    base: Base
    """The base model; only its transformer is loaded."""
    data: Pairs
    """Training pairs."""
    student: nn.Module
    """The network that the run is for."""
    method: Method
    """Losses and the networks they train, the student among them."""
    layout: Layout
    """How networks lie over the ranks."""
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
    config.parallel.check(ranks.world, base.heads, base.tokens)
    data, negative = ranks.agree(lambda: _encoded(config, ranks, progress))
    layout = Layout(config.parallel, ranks)
    student, method, parent = ranks.agree(lambda: _networks(config, base, layout, negative))
    low, blocks = config.precision == "bf16", getattr(student, "head_blocks", None)
    in_full = [student, *(getattr(student, "blocks", []) if blocks is None else blocks)]
    for network in method.networks.values():
        _recompute(config, network.train())
        mine = network is student
        layout.place(
            network, low=low, full=in_full if mine and config.kind.differentiates else (),
            keep=blocks if mine and blocks is not None else (),
        )  # fmt: skip
    teacher = getattr(method, "teacher", None)
    if teacher is not None:
        _recompute(config, teacher)  # the GAN term back-propagates through the frozen teacher too
        if low:
            store_low(teacher)
        layout.place(teacher, low=low)
    elif not layout.sharded:
        base.transformer.to("cpu")  # stage 1 needs it no more
    return Parts(base=base, data=data, student=student, method=method, layout=layout, parent=parent)


def _networks(
    config: TrainConfig, base: Base, layout: Layout, negative: Tensor
) -> tuple[nn.Module, Method, dict[str, str] | None]:
    """Student and method with weights in the CPU's memory or on the device, or on the meta device where
    :class:`students.parallel.Layout` brings the weights later."""
    torch.manual_seed(config.seed)
    with contextlib.nullcontext() if layout.here else torch.device("meta"):
        if not layout.here:
            shape = WanTransformer3DModel.load_config(base.folder / "transformer")
            teacher = WanTransformer3DModel.from_config(shape).eval().requires_grad_(False)
        elif layout.sharded:
            teacher = load_base(base.ref if base.revision is None else f"{base.ref}@{base.revision}").transformer
        else:
            teacher = base.transformer
        student, parent = _student(config, base, teacher)
        if not layout.sharded:
            student = student.to(layout.ranks.device)
        return student, config.kind.build(student, teacher, negative, config.method), parent


def _recompute(config: TrainConfig, network: nn.Module) -> None:
    if config.gradient_checkpointing and isinstance(network, ModelMixin):
        network.enable_gradient_checkpointing()
    if config.parallel.checkpoint_head and isinstance(network, TMDStudent):
        network.head_checkpointing = True


def _encoded(config: TrainConfig, ranks: Ranks, progress: bool) -> tuple[Pairs, Tensor]:
    """Data and the negative prompt's embedding; VAE and text encoder are let go afterwards, for they are large."""
    encoder = load_base(config.base, device=ranks.device)
    data: Pairs = open_data(encoder, config.data, first=ranks.first, progress=progress)
    if config.kind.prepare is not None:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            data = config.kind.prepare(config.method, encoder, data, ranks, progress)
    stored = getattr(data, "negative", None)
    if stored is not None:
        return data, stored.to(ranks.device)
    return data, encoder.encode_prompts([encoder.negative_prompt]).float()


def new_student(config: TrainConfig, teacher: WanTransformer3DModel) -> nn.Module:
    """The student before any training: a flow head on the teacher's weights, or a trainable copy of the teacher.

    Args:
        config: the run.
        teacher: transformer of the base model.
    """
    if not config.kind.flow_head:
        return copy.deepcopy(teacher).requires_grad_(True)
    form = config.student
    return TMDStudent.from_teacher(teacher, h=form.h, fusion=form.fusion, target=form.target, gate=form.gate)


def _student(
    config: TrainConfig, base: Base, teacher: WanTransformer3DModel
) -> tuple[nn.Module, dict[str, str] | None]:
    if config.parent is None or teacher.patch_embedding.weight.is_meta:  # weights and provenance are the main rank's
        return new_student(config, teacher), None
    folder = Path(config.parent)
    spec, student = load_student(folder)
    kind, shape = config.kind, config.student
    if (spec.h is not None) != kind.flow_head:
        theirs, ours = ("a", "has none") if spec.h is not None else ("no", "has one")
        raise ConfigError(
            f"parent {folder} has {theirs} flow head, but the student of {config.method_name} {ours}; choose another."
        )
    if kind.parents is not None and spec.method not in kind.parents:
        raise ConfigError(
            f"parent {folder} was trained by {spec.method}, but {config.method_name} goes on from "
            f"{' or '.join(kind.parents)}; choose another."
        )
    agreement: list[tuple[str, object, object]] = [("base (its weights' hash)", spec.base.hash, base.hash)]
    if kind.flow_head:
        agreement += [
            ("student.h", spec.h, shape.h),
            ("student.fusion", spec.fusion, shape.fusion),
            ("student.target", spec.target, shape.target),
        ]
    for name, theirs_, ours_ in agreement:
        if theirs_ != ours_:
            raise ConfigError(f"parent {folder} has {name} = {theirs_}, but this run {ours_}; make them agree.")
    for name, ours_ in config.kind.sampling(config.method).items():
        theirs_ = getattr(spec, name)
        if name in ("m", "n", "gamma_outer", "gamma_inner") and None not in (theirs_, ours_) and theirs_ != ours_:
            log.warning("parent %s was trained with %s = %s, this run has %s", folder, name, theirs_, ours_)
    student.requires_grad_(True)
    return student, {"ref": str(folder.resolve()), "hash": combined_hash(weight_files(folder))}


def student_spec(config: TrainConfig, base: Base, training: dict[str, Any]) -> StudentSpec:
    """The record of the run's student.

    Args:
        config: the run.
        base: its base model.
        training: provenance.
    """
    kind, shape = config.kind, config.student
    head: dict[str, Any] = {"h": shape.h, "fusion": shape.fusion, "target": shape.target} if kind.flow_head else {}
    return StudentSpec(
        method=kind.label, blocks=base.blocks, text_length=base.text_length, base=BaseRecord.of(base),
        training=training, **head, **kind.sampling(config.method),
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
        negative = torch.empty(1, 1, shape.get("text_dim", 4096))
        method = config.kind.build(new_student(config, teacher), teacher, negative, config.method)
    for name, network in method.networks.items():
        updates = sum(name in method.turn(i) for i in range(1, config.iterations + 1))
        size = sum(p.numel() for p in network.parameters())
        lines.append(f"{name}: {size:,} parameters, {updates} updates, learning rate {config.optimiser.rate(name):g}")
    return "\n".join(lines)

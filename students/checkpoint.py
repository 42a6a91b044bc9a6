"""Checkpoint folders of students, and one way to open and sample anything that ``--ckpt`` takes.

A folder holds ``student.json`` (:class:`StudentSpec`), ``config.json`` and ``diffusion_pytorch_model.safetensors``, the
last two in diffusers' layout, so that ``from_pretrained(folder)`` of ``TMDStudent``, or for a plain student of
``WanTransformer3DModel``, loads it too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from students.base import Base, load_base
from students.errors import ConfigError
from students.nfe import branches, check_h, effective_nfe
from students.published import exported_base, open_file, open_pipeline
from students.sampling import Clock, VideoNoise, sample_plain, sample_teacher, sample_tmd, untimed
from students.spec import BaseRecord, StudentSpec
from students.times import check_grid
from students.tmd import TMDStudent
from students.weights import combined_hash, file_hash, read_json, weight_files

__all__ = ["BaseRecord", "Checkpoint", "StudentSpec", "load_student", "open_checkpoint", "save_student"]

Student: TypeAlias = TMDStudent | WanTransformer3DModel
TEACHER_STEPS = 50
"""Steps of a teacher unless told otherwise; with fewer it counts as an undistilled few-step model."""


def save_student(folder: Path, student: Student, spec: StudentSpec) -> None:
    """Write a checkpoint folder under a temporary name and rename it into place; an old one is replaced.

    Args:
        folder: the checkpoint folder to be; its parent is made if missing.
        student: its network, on any device.
        spec: what ``student.json`` will say.

    Raises:
        ConfigError: the record does not describe this network, or the path is in use by something else.
    """
    folder = Path(folder)
    _check_agreement(student, spec, str(folder))
    if folder.exists() and not (folder / "student.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not a checkpoint folder; choose another path.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary, old = folder.parent / f".tmp-{mark}", folder.parent / f".tmp-{mark}-old"
    try:
        student.save_pretrained(temporary)
        (temporary / "student.json").write_text(spec.to_json(), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
        _sync(folder.parent)
    except SafetensorError as error:  # it hides the number of the system's error in its text
        if "code: 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def load_student(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[StudentSpec, Student]:
    """Read a checkpoint folder; the network comes in evaluation mode.

    Args:
        folder: as :func:`save_student` writes it.
        device: where the network goes.
        dtype: its precision; what diffusers keeps in float32 stays so.

    Raises:
        ConfigError: a missing, truncated or contradictory file, by name.
    """
    folder = Path(folder)
    if not (folder / "student.json").is_file():
        raise ConfigError(f"{folder / 'student.json'} is missing, so {folder} is not a student's checkpoint folder.")
    spec = StudentSpec.from_file(folder / "student.json")
    read_json(folder / "config.json")
    weight_files(folder)
    network = WanTransformer3DModel if spec.plain else TMDStudent
    try:
        student, report = network.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "plain student" if spec.plain else "TMD student"
        raise ConfigError(f"{folder} does not load as a {what} ({reason}); restore the folder.") from error
    if lacking := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ConfigError(f"The weights in {folder} do not fit its config.json (first: {lacking[0]}); restore them.")
    _check_agreement(student, spec, str(folder))
    return spec, student.to(device).eval()


class Checkpoint:
    """A model that can be sampled: a teacher, or a student with its teacher's VAE and text encoder.

    Attributes:
        kind: "teacher" or "student".
        base: the base model.
        spec: the student's record; None for a teacher.
        student: the student's network, a Wan transformer for a plain student; None for a teacher.
        ref: what it was opened by; the absolute path of a pipeline folder.
        name: short name for tables.
        hash: sha256 that changes with the weights and the record.
    """

    def __init__(
        self, ref: str, name: str, hash: str, base: Base, spec: StudentSpec | None, student: Student | None
    ) -> None:
        self.kind: Literal["teacher", "student"] = "teacher" if student is None else "student"
        self.ref, self.name, self.hash = ref, name, hash
        self.base, self.spec, self.student = base, spec, student
        self._text: dict[str, Tensor] = {}

    @property
    def network(self) -> Student:
        """What runs at every step: the student, or the teacher's transformer."""
        return self.base.transformer if self.student is None else self.student

    def settings(
        self, m: int | None = None, n: int | None = None, guidance: float | None = None,
        outer_grid: Tensor | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """All that decides what :meth:`sample` makes, beside prompts and seeds; None stands for the default.

        Returns:
            method, role ("teacher", "undistilled" for a teacher of fewer than 50 steps, "student"), m, n, h, blocks,
            effective_nfe (Eq. 16), forward_passes (with guidance), guidance (1 is none), sampler, text_length. A
            student at another ``outer_grid``, 0 = t_0 < ... < t_M, has its times in the name of its sampler.

        Raises:
            ConfigError: M or N below 1, N or a grid for a teacher, guidance for a student, a bad grid or one not of M.
        """
        if outer_grid is not None:
            check_grid(outer_grid)
            if self.spec is None:
                raise ConfigError("Times are for students; a teacher's come from its scheduler. Leave them out.")
            if m not in (None, steps := len(outer_grid) - 1):
                raise ConfigError(f"M is {m}, but there are {steps} times; leave M out, or give M = {steps}.")
            m = steps
        if self.spec is not None:
            spec, w = self.spec, self.spec.guidance
            if guidance not in (None, w):
                raise ConfigError(f"Guidance is {guidance}, but students have theirs built in; leave it out.")
            if n is not None and spec.plain:
                raise ConfigError(f"N is {n}, but {self.name} is a plain student without inner steps; leave N out.")
            m, n = spec.m if m is None else m, spec.n if n is None else n
            method, role, h, sampler = spec.method, "student", spec.h, spec.sampler
            blocks = spec.blocks
            if outer_grid is None:
                spec.outer(m)  # refuses an M that the student has no times for
            else:
                sampler += " at " + ", ".join(map(repr, outer_grid.tolist()[:0:-1]))
        else:
            if n is not None:
                raise ConfigError(f"N is {n}, but a teacher has no inner steps; leave N out.")
            m = TEACHER_STEPS if m is None else m
            w = self.base.guidance if guidance is None else float(guidance)
            method, role = "teacher", "teacher" if m >= TEACHER_STEPS else "undistilled"
            h, blocks = None, self.base.blocks
            scheduler = self.base.scheduler
            sampler = f"{type(scheduler).__name__}(flow_shift={scheduler.config.get('flow_shift', 1.0):g})"
        nfe = effective_nfe(m, n, h, blocks)
        return {
            "method": method,
            "role": role,
            "m": m,
            "n": n,
            "h": h,
            "blocks": blocks,
            "effective_nfe": nfe,
            "forward_passes": nfe * branches(w),
            "guidance": w,
            "sampler": sampler,
            "text_length": self.base.text_length,
        }

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        m: int | None = None,
        n: int | None = None,
        guidance: float | None = None,
        outer_grid: Tensor | None = None,
    ) -> Tensor:
        """One video per prompt and seed, as one batch; a video does not depend on what else is in the batch.

        Args:
            prompts: captions.
            seeds: one per caption; teacher and student start from the same noise for the same seed.
            m: M, by default as trained (50 for a teacher).
            n: N, by default as trained.
            guidance: w of a teacher, by default the base model's.
            outer_grid: other outer times for a student, 0 = t_0 < ... < t_M; M is then its number of steps.

        Returns:
            uint8 (B, frames, height, width, 3) on the CPU.

        Raises:
            ConfigError: settings that do not suit the model, a bad grid, or not one seed per prompt.
        """
        if not prompts or len(prompts) != len(seeds):
            raise ConfigError(f"{len(prompts)} prompts come with {len(seeds)} seeds; give one seed per prompt.")
        settings = self.settings(m, n, guidance, outer_grid)
        texts = self._encode([*prompts, self.base.negative_prompt] if settings["guidance"] > 1 else prompts)
        text, negative = texts[: len(prompts)], texts[len(prompts) :]
        latents = self.latents(text, negative, seeds, m=m, n=n, guidance=guidance, outer_grid=outer_grid)
        return self.base.decode(latents).cpu()

    @torch.inference_mode()
    def latents(
        self,
        text: Tensor,
        negative: Tensor,
        seeds: Sequence[int],
        *,
        m: int | None = None,
        n: int | None = None,
        guidance: float | None = None,
        outer_grid: Tensor | None = None,
        clock: Clock = untimed,
    ) -> Tensor:
        """As :meth:`sample`, from embeddings to normalised latents (B, C, T, H, W).

        Args:
            text: caption embeddings (B, text_length, D).
            negative: embedding of the negative prompt, (1, text_length, D); not used without guidance.
            seeds: one per caption.
            m: see :meth:`sample`.
            n: see :meth:`sample`.
            guidance: see :meth:`sample`.
            outer_grid: see :meth:`sample`.
            clock: told of the parts "backbone" and "head".

        Raises:
            ConfigError: see :meth:`sample`.
        """
        base, spec, network = self.base, self.spec, self.network
        settings = self.settings(m, n, guidance, outer_grid)
        w = settings["guidance"]
        noise = VideoNoise(seeds, base.latent_shape)
        x1 = noise.draw().to(base.device)
        with base.resident(network):
            if spec is None:
                return sample_teacher(base, text, negative if w > 1 else None, x1, settings["m"], w, clock)
            outer = spec.outer(m) if outer_grid is None else outer_grid
            if isinstance(network, TMDStudent):
                return sample_tmd(network, text, x1, outer, spec.inner(n), noise.draw, clock)
            return sample_plain(
                network, text, x1, outer, spec.sampler, noise.draw, negative=negative, guidance=w,
                scaled=spec.initial == "scaled", bf16_times=spec.time_precision == "bfloat16", clock=clock,
            )  # fmt: skip

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings; those of the last call are kept, so neighbouring batches do not repeat the work."""
        lacking = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text]
        new = dict(zip(lacking, self.base.embeddings(lacking), strict=True)) if lacking else {}
        self._text = {prompt: new[prompt] if prompt in new else self._text[prompt] for prompt in prompts}
        return torch.stack([self._text[prompt] for prompt in prompts])


def open_checkpoint(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    vae_tiling: bool = False,
) -> Checkpoint:
    """Open whatever ``--ckpt`` names.

    Args:
        ref: a student's folder, "micro", a diffusers pipeline folder or hub id (a teacher, a published student, or
            what ``ckpt export`` wrote), or a file of another project (:mod:`students.foreign`).
        device: where networks run.
        dtype: their precision.
        offload: keep networks in the CPU's memory while they do not compute.
        vae_tiling: decode in tiles.

    Raises:
        ConfigError: missing, truncated or contradictory files, by name.
        EnvironmentMissingError: weights that must first be fetched.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "offload": offload, "vae_tiling": vae_tiling}
    path = Path(ref).expanduser()
    if (path / "student.json").is_file():
        return _open_student(path, base_of_student(path, **options), str(ref), _table_name(path.resolve()))
    if path.is_file():
        found = open_file(path, **options)
        return Checkpoint(str(ref), path.stem, found.hash, found.base, found.spec, found.network)
    if str(ref) != "micro":
        check_folder(path)
    base = load_base(str(ref), **options)
    name = Path(base.ref).name
    if (base.folder / "transformer" / "student.json").is_file():
        return _open_student(base.folder / "transformer", exported_base(base), base.ref, name)
    if (few := open_pipeline(base)) is not None:
        return Checkpoint(base.ref, name, few.hash, base, few.spec, few.network)
    return Checkpoint(base.ref, name, base.hash, base, None, None)


def check_folder(path: Path) -> None:
    """Refuse a folder that is neither a checkpoint nor a pipeline, and say what of it may be meant.

    Raises:
        ConfigError: it is such a folder.
    """
    if not path.is_dir() or any((path / name).is_file() for name in ("student.json", "model_index.json")):
        return
    found = [file for kind in ("*.safetensors.index.json", "*.safetensors", "*.pt*") for file in path.glob(kind)]
    hint = f"; to open weights that lie in it, name their file, such as {found[0]}" if found else ""
    if any((path / part / ".metadata").is_file() for part in (".", "model")):
        hint = ", but torch's distributed checkpoint: gather it with torch.distributed.checkpoint's dcp_to_torch_save"
    raise ConfigError(
        f"{path} has neither student.json nor model_index.json; it is not a checkpoint or pipeline{hint}."
    )


def base_of_student(folder: Path, **options: Any) -> Base:
    """The base model that a checkpoint folder names.

    Args:
        folder: with a ``student.json``.
        options: of :func:`students.base.load_base`.

    Raises:
        ConfigError: it is not there, or has other weights than the student was distilled from.
    """
    record = StudentSpec.from_file(folder / "student.json").base
    base = load_base(record.ref + (f"@{record.revision}" if record.revision else ""), **options)
    if record.revision is None and base.hash != record.hash:
        raise ConfigError(
            f"{folder} was distilled from {record.ref} with weights {record.hash[:12]}, but those there now are "
            f"{base.hash[:12]}; restore the base model."
        )
    return base


def _table_name(folder: Path) -> str:
    """The folder's name; of a run's ``checkpoint/``, which they all have, the run's."""
    return folder.parent.name if folder.name == "checkpoint" and folder.parent.name else folder.name


def _open_student(folder: Path, base: Base, ref: str, name: str) -> Checkpoint:
    spec, student = load_student(folder, device=base.storage, dtype=base.dtype)
    if (base.blocks, base.text_length) != (spec.blocks, spec.text_length):
        raise ConfigError(
            f"{folder} needs a base model of {spec.blocks} blocks and text length {spec.text_length}; "
            f"{base.ref} has {base.blocks} and {base.text_length}."
        )
    return Checkpoint(ref, name, student_hash(folder), base, spec, student)


def student_hash(folder: Path) -> str:
    """sha256 of a checkpoint folder's weights and record, the same for what ``ckpt export`` makes of it."""
    weights = combined_hash(weight_files(folder))
    return hashlib.sha256((weights + file_hash(folder / "student.json")).encode()).hexdigest()


def _check_agreement(student: Student, spec: StudentSpec, where: str) -> None:
    if isinstance(student, TMDStudent):
        check_h(spec.h or 0, student.blocks)
        facts: list[tuple[str, object, object]] = [("H", spec.h, student.h), ("L", spec.blocks, student.blocks)]
        facts += [("fusion", spec.fusion, student.config.fusion), ("target", spec.target, student.target)]
    else:
        facts = [("H", spec.h, None), ("L", spec.blocks, student.config.num_layers)]
    for name, stated, actual in facts:
        if stated != actual:
            raise ConfigError(f"{where}: student.json says {name} is {stated}, the network has {actual}.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""From a checkpoint and prompts to a video set that says where each video comes from; stops and resumes anywhere.

**Seeds.** Sample ``index`` of a prompt has the seed ``seed + index`` for VBench's prompts, as VBench's maintainers
advise: all prompts share five noises. For other sets it is ``seed + index + 100000 * line``, so that no two videos of a
set share a noise. A video made alone and the same video made in a batch may differ in the last bit of a pixel, as sums
run in another order; nothing else depends on the batch. A student and its teacher start from the same noise for the
same seed. Runs meant as independent repetitions need base seeds at least ``samples_per_prompt`` apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from students.errors import ConfigError
from tmd_eval import video_set
from tmd_eval.make_videos import make, read_config
from tmd_eval.prompts import PromptSet
from tmd_eval.video import default_lossless
from tmd_eval.video_set import MANIFEST, Unit

if TYPE_CHECKING:
    from students.base import Base
    from students.checkpoint import Checkpoint

LINE_STRIDE = 100_000
"""Distance of the seeds of neighbouring prompts; also the largest number of samples a prompt."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How videos are made from a checkpoint."""

    samples_per_prompt: int = 1
    """Videos a prompt, 1 to 100,000."""
    seed: int = 0
    """Base seed, at least 0."""
    limit: int | None = None
    """Make at most so many videos of the set, None for all."""
    lines: tuple[int, ...] | None = None
    """Only these prompts of the set, by line; None for all."""
    samples_of_line: Mapping[int, int] | None = None
    """Videos of these prompts, by line, instead of ``samples_per_prompt``: VBench's static filter chooses from 25."""
    line_stride: int | None = None
    """Distance of the seeds of neighbouring prompts; None for the set's rule, see the module."""
    m: int | None = None
    """M, steps of the outer loop; None for the checkpoint's own (50 for a teacher)."""
    n: int | None = None
    """N, inner steps of a TMD student; None for the checkpoint's own."""
    guidance: float | None = None
    """Guidance scale of a teacher; None for its own."""
    times: Sequence[float] | None = None
    """Other outer times of a student, t_M > ... > t_1 > 0, of which there are M; None for its own."""
    batch_size: int | None = None
    """Videos sampled at once; None for 16 in the micro world, else 1."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("samples_per_prompt", 1, LINE_STRIDE),
            ("seed", 0, 2**62),
            ("limit", 1, None),
            ("batch_size", 1, None),
        ):
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                to = "" if high is None else f" and at most {high}"
                raise ConfigError(f"{name} must be at least {low}{to}, not {value}.")

    def sampling(self) -> dict[str, Any]:
        """What :meth:`Checkpoint.settings` and :meth:`Checkpoint.sample` take: m, n, guidance and outer_grid."""
        from students.times import grid_of

        outer_grid = None if self.times is None else grid_of(self.times)
        return {"m": self.m, "n": self.n, "guidance": self.guidance, "outer_grid": outer_grid}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run folder is to hold and what of it is there."""

    out: Path
    """The run folder."""
    checkpoint: Checkpoint
    """The model."""
    settings: Settings
    """How it is sampled."""
    units: list[Unit]
    """Every video, in the order they are made."""
    config: dict[str, Any]
    """``config.yaml`` but for the provenance."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of the videos that are there and of use, by file name."""
    changed: int = 0
    """Videos of the manifest that come from other settings, or whose file is damaged or gone; they are made anew or
    removed."""

    @property
    def missing(self) -> list[Unit]:
        """The videos still to be made."""
        return [unit for unit in self.units if unit.video not in self.rows]


def generate_run(
    checkpoint: str | Path | Checkpoint,
    prompts: PromptSet,
    out: Path,
    *,
    samples_per_prompt: int = 1,
    seed: int = 0,
    limit: int | None = None,
    m: int | None = None,
    n: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    command: str | None = None,
) -> Path:
    """Make what is missing of a video set.

    Args:
        checkpoint: what ``--ckpt`` takes, or an open checkpoint.
        prompts: the prompts.
        out: run folder, made if missing.
        samples_per_prompt: videos a prompt.
        seed: base seed; see the module for each video's own.
        limit: at most so many videos of the set.
        m: M; None for the checkpoint's own.
        n: N; None for the checkpoint's own.
        guidance: of a teacher; None for its own.
        batch_size: videos at once; None for 16 in the micro world, else 1.
        device: "cpu", "cuda", ...; None for the GPU if there is one. An open checkpoint keeps its own.
        command: command line to record, by default this process's.

    Returns:
        The run folder.

    Raises:
        ConfigError: a setting, the checkpoint or the folder is wrong.
        TmdError: the disk is full; what is finished stays.
    """
    settings = Settings(
        samples_per_prompt=samples_per_prompt, seed=seed, limit=limit, m=m, n=n, guidance=guidance,
        batch_size=batch_size,
    )  # fmt: skip
    run(checkpoint, prompts, Path(out), settings, device=device, command=command)
    return Path(out)


def run(
    checkpoint: str | Path | Checkpoint,
    prompts: PromptSet,
    out: Path,
    settings: Settings,
    *,
    device: str | None = None,
    command: str | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
) -> tuple[Plan, int]:
    """As :func:`generate_run`, with the settings as one object; under torchrun the ranks share the videos.

    A video's noise belongs to its seed, so neither the number of ranks nor the batch changes it.

    Returns:
        The plan as it was before, and how many videos were made (by this rank).
    """
    from students.distributed import Ranks

    check_target(out)
    video_set.check_writable(out)
    with Ranks("cpu" if device == "cpu" else "auto") as ranks:
        place = str(ranks.device) if ranks.world > 1 else device
        opened = open_model(checkpoint, place, offload=offload, vae_tiling=vae_tiling)
        with video_set.locked(out) if ranks.main else nullcontext():
            ranks.barrier()  # the lock is held
            work = plan(opened, prompts, out, settings)
            return work, make(work, command=command, ranks=ranks)


def open_model(
    checkpoint: str | Path | Checkpoint, device: str | None = None, *, offload: bool = False, vae_tiling: bool = False
) -> Checkpoint:
    """Open a checkpoint where it will run: in bfloat16 on a GPU, in float32 on the CPU.

    Raises:
        ConfigError: a GPU is asked for and there is none, or the checkpoint cannot be opened.
    """
    import torch

    from students.checkpoint import open_checkpoint

    if not isinstance(checkpoint, str | Path):
        return checkpoint
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"There is no GPU here for --device {device}; leave it out or choose cpu.")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return open_checkpoint(str(checkpoint), device=device, dtype=dtype, offload=offload, vae_tiling=vae_tiling)


def check_target(out: Path) -> None:
    """Refuse a folder that holds another kind of run.

    Raises:
        ConfigError: it has a ``config.yaml`` that is not a video set's.
    """
    config = read_config(out)
    if (out / "config.yaml").exists() and "prompts" not in (config or {}):
        raise ConfigError(f"{out / 'config.yaml'} is not that of a video set; choose another --out.")


def plan(checkpoint: Checkpoint, prompts: PromptSet, out: Path, settings: Settings) -> Plan:
    """Compare what is wanted with what is there; writes nothing.

    Raises:
        ConfigError: settings that do not suit the model, or a broken manifest.
    """
    base = checkpoint.base
    model = checkpoint.settings(**settings.sampling())
    size: dict[str, Any] = {"size": [base.height, base.width], "frames": base.frames, "fps": base.fps}
    if base.vae_tiling:
        size["vae_tiling"] = True
    decisive = {"checkpoint": checkpoint.hash, "base": base.hash, "dtype": str(base.dtype), **model, **size}
    if checkpoint.kind == "teacher":  # the base's hash is of weights only
        decisive |= sampled_by(base, model["guidance"])
    stride = settings.line_stride
    if stride is None:
        stride = 0 if prompts.named_by_prompt else LINE_STRIDE

    def unit(line: int, index: int) -> Unit:
        seed = settings.seed + index + stride * line
        return Unit(
            video=prompts.video_name(line, index), prompt=prompts.prompts[line], text=prompts.text(line), line=line,
            index=index, seed=seed, key=video_set.unit_key(decisive, prompts.text(line), seed),
        )  # fmt: skip

    lines = range(len(prompts.prompts)) if settings.lines is None else settings.lines
    samples = {line: (settings.samples_of_line or {}).get(line, settings.samples_per_prompt) for line in lines}
    order = ((line, i) for line in lines for i in range(samples[line]))
    units = [unit(line, index) for line, index in islice(order, settings.limit)]
    # A finished video beyond the present plan (a smaller --limit, say) stays if a larger plan would make the same one.
    rows: dict[str, dict[str, Any]] = {}
    written = video_set.read_manifest(out)
    for row in written:
        known = isinstance(row.get("index"), int) and row.get("line") in range(len(prompts.prompts))
        same = known and unit(row["line"], row["index"])
        if same and (same.video, same.key) == (row["video"], row.get("key")) and video_set.is_whole(out, row):
            rows[row["video"]] = row
    config = {
        "checkpoint": {
            **model, "name": checkpoint.name, "ref": checkpoint.ref, "hash": checkpoint.hash,
            "base": {"ref": base.ref, "hash": base.hash, "revision": base.revision},
        },
        "prompts": {"name": prompts.name, "sha256": prompts.sha256, "count": len(prompts.prompts)},
        **({"texts": prompts.texts_record} if prompts.texts is not None else {}),
        "samples_per_prompt": settings.samples_per_prompt,
        **({"samples_of_line": dict(settings.samples_of_line)} if settings.samples_of_line else {}),
        "lines": None if settings.lines is None else list(settings.lines),
        "limit": settings.limit,
        "seed": settings.seed,
        "seed_rule": "seed + index" + (f" + {stride} * line" if stride else ""),
        **size,
        "dtype": str(base.dtype).removeprefix("torch."),
        "batch_size": _batch_size(settings, base.height, base.width),
    }  # fmt: skip
    changed = len({row["video"] for row in written} - set(rows))
    return Plan(
        out=out, checkpoint=checkpoint, settings=settings, units=units, config=config, rows=rows, changed=changed
    )


def sampled_by(base: Base, guidance: float) -> dict[str, Any]:
    """What decides a teacher's samples beside weights, steps and guidance: negative prompt and scheduler.

    Args:
        base: the teacher.
        guidance: w; without guidance (1 or less) the negative prompt does nothing.
    """
    scheduler = {k: str(v) for k, v in sorted(base.scheduler.config.items()) if not k.startswith("_")}
    return {"negative_prompt": base.negative_prompt if guidance > 1 else None, "scheduler": scheduler}


def _batch_size(settings: Settings, height: int, width: int) -> int:
    return settings.batch_size or (16 if default_lossless(height, width) else 1)


__all__ = [
    "MANIFEST", "Plan", "Settings", "check_target", "generate_run", "make", "open_model", "plan", "run", "sampled_by",
]  # fmt: skip

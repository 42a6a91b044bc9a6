"""KD warm-up of DMD2-v: the student regresses the ends of the teacher's ODE trajectories (Luhman & Luhman, 2021).

The TMD paper warms the one-step DMD2-v up on 10k trajectories with guidance 5 and "skip 10", and finds that it harms
M >= 2. We read the skip as: of the teacher's 50 steps, every tenth point is kept. Trajectories are made once and
cached: all ranks share the work, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from students.base import Base
from students.data import stream_seed
from students.distributed import Ranks
from students.errors import ConfigError
from students.machine import home
from students.method import Batch, Cost, MethodKind, Pairs, Shape
from students.parallel import embed_time_in_full, store_low
from students.plain import plain_estimate
from students.sampling import VideoNoise, sample_teacher
from students.times import grid

INDEX = "trajectories.json"
VALUES = 2**17
"""Latent values of one shard, so that a shard of Wan's is one trajectory and one of the micro world's is 64 or more."""


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Hyper-parameters of the warm-up; the defaults are the paper's."""

    m: int = 1
    """M of the student to warm up; the paper's warm-up is for 1 only."""
    gamma_outer: float = 10.0
    """Shift of its grid, above 0; 1 is none."""
    trajectories: int = 10_000
    """Number of teacher trajectories, each of one training text and a noise of its own."""
    teacher_steps: int = 50
    """Steps of the teacher's sampler."""
    skip: int = 10
    """Of a trajectory every skip-th point is kept, from the noise on, and its end; 1 to teacher_steps."""
    guidance: float = 5.0
    """Guidance scale w of the teacher; 1 means none."""
    trajectory_seed: int = 0
    """Seed of texts and noises; not the run's seed, so that runs of several seeds share their trajectories."""
    cache: str | None = None
    """Folder that keeps trajectories between runs; null: trajectories/ under TMD_EVAL_HOME (~/.cache/tmd-eval)."""

    def __post_init__(self) -> None:
        grid(self.m, self.gamma_outer)
        for name in ("trajectories", "teacher_steps", "skip", "guidance"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"method.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.skip > self.teacher_steps:
            raise ConfigError(
                f"method.skip is {self.skip}, more than the {self.teacher_steps} steps of the teacher; lower it."
            )


@dataclass(frozen=True, kw_only=True)
class Trajectories(Batch):
    """A mini-batch of teacher trajectories; ``latents`` are their ends."""

    points: Tensor
    """Kept points before the end, (B, K, C, T, H, W), from noise to data."""
    times: Tensor
    """Their times, float64, (K,), falling."""


class TrajectoryShards:
    """A folder of finished trajectories as a source of training pairs."""

    def __init__(self, folder: Path, texts: Pairs, seed: int) -> None:
        """Open every shard.

        Args:
            folder: As :func:`open_trajectories` fills it.
            texts: The pairs whose texts the trajectories have.
            seed: That of the texts' order.

        Raises:
            ConfigError: a shard is missing or damaged.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.count, self.size = index["count"], index["shard"]
            self.times = torch.tensor(index["times"], dtype=torch.float64)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{folder / INDEX} is damaged; delete {folder} to make its trajectories again.") from None
        self.hash = hashlib.sha256(f"{index['key']} {texts.hash}".encode()).hexdigest()
        self._texts, self._seed = texts, seed
        self._order: tuple[tuple[int, int], Tensor] | None = None
        try:
            self._shards = [safe_open(path, "pt") for path in _paths(folder, self.count, self.size)]
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{folder} lost a shard of trajectories, or has a damaged one ({error}); delete the folder."
            ) from None
        noted = [(shard.metadata() or {}).get("seconds") for shard in self._shards]
        self.setup_seconds = sum(map(float, noted)) if all(noted) else None  # type: ignore[arg-type]
        """Seconds that the shards took to make, one after the other; None where an older version made them."""

    def __len__(self) -> int:
        return self.count

    def draw(self, seed: int, iteration: int, batch: int, part: slice) -> Trajectories:
        """Some trajectories of one iteration's batch: epochs without replacement; see :class:`Pairs`."""
        chosen = [self._at(seed, (iteration - 1) * batch + position) for position in range(batch)[part]]
        shards = [self._shards[i // self.size].get_slice("points") for i in chosen]
        points = torch.stack([s[i % self.size] for s, i in zip(shards, chosen, strict=True)]).float()
        texts = [self._texts.draw(self._seed, 1, self.count, slice(i, i + 1)).text for i in chosen]
        return Trajectories(latents=points[:, -1], text=torch.cat(texts), points=points[:, :-1], times=self.times)

    def _at(self, seed: int, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(stream_seed(seed, "trajectories", epoch))
            self._order = (seed, epoch), torch.randperm(self.count, generator=generator)
        return int(self._order[1][place])


def _paths(folder: Path, count: int, size: int) -> list[Path]:
    return [folder / f"{start // size:06d}.safetensors" for start in range(0, count, size)]


def open_trajectories(config: KDConfig, base: Base, pairs: Pairs, ranks: Ranks, progress: bool) -> TrajectoryShards:
    """The teacher's trajectories for a run, made on first use by all its ranks together.

    The folder's name is a key over everything its content depends on, so changed settings never reuse old ones.

    Args:
        config: How many, and how.
        base: The teacher.
        pairs: Give the texts.
        ranks: Processes of the run; each makes its share of the shards that are missing.
        progress: Show a bar on stderr.
    """
    folder, source = _folder(config, base, pairs)
    if _lacking(ranks, [folder / INDEX]):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) if ranks.main else contextlib.nullcontext():
            ranks.barrier()  # the main rank holds the folder
            if _lacking(ranks, [folder / INDEX]):
                _fill(folder, source, config, base, pairs, ranks, progress)
    return TrajectoryShards(folder, pairs, config.trajectory_seed)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder: another run that wants the same trajectories waits for them to be made."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lacking(ranks: Ranks, paths: list[Path]) -> list[Path]:
    """The files that some rank does not see: the same list on every rank."""
    absent = ranks.largest([float(not path.is_file()) for path in paths])
    return [path for path, lacks in zip(paths, absent, strict=True) if lacks]


def _fill(
    folder: Path, source: dict[str, Any], config: KDConfig, base: Base, pairs: Pairs, ranks: Ranks, progress: bool
) -> None:
    size = source["shard"]
    starts = dict(zip(_paths(folder, config.trajectories, size), range(0, config.trajectories, size), strict=True))
    mine = [(path, starts[path]) for path in _lacking(ranks, list(starts))[ranks.rank :: ranks.world]]

    def make() -> None:
        negative = _negative(config, base, pairs) if mine else None
        if mine and torch.is_autocast_enabled(base.device.type):  # half the memory, as the trainer keeps teachers
            store_low(base.transformer)
            embed_time_in_full(base.transformer, base.device)
        for path, start in tqdm(mine, desc="teacher trajectories", unit="shard", disable=not progress):
            clock = time.perf_counter()
            numbers = range(start, min(start + size, config.trajectories))
            made = _trajectories(config, base, pairs, numbers, negative)
            _write(path, made, seconds=time.perf_counter() - clock)

    ranks.agree(make)
    ranks.agree(lambda: _finish(folder, config, source) if ranks.main else None)


def _negative(config: KDConfig, base: Base, pairs: Pairs) -> Tensor | None:
    """The negative prompt's embedding as other methods get it: the data's own, or encoded in full precision."""
    if config.guidance <= 1:
        return None
    stored: Tensor | None = getattr(pairs, "negative", None)
    if stored is not None:
        return stored
    with torch.autocast(base.device.type, enabled=False):
        return base.encode_prompts([base.negative_prompt])


def _folder(config: KDConfig, base: Base, pairs: Pairs) -> tuple[Path, dict[str, Any]]:
    values = torch.Size(base.latent_shape).numel()
    low = torch.is_autocast_enabled(base.device.type)
    source = {
        "base": base.hash,
        "data": pairs.hash,
        "trajectories": config.trajectories,
        "teacher_steps": config.teacher_steps,
        "skip": config.skip,
        "guidance": config.guidance,
        "seed": config.trajectory_seed,
        "scheduler": {key: str(value) for key, value in sorted(dict(base.scheduler.config).items())},
        "autocast": low,
        **({"time_embedder": "float32"} if low else {}),
        **({"negative": base.negative_prompt} if config.guidance > 1 else {}),
        "shard": max(VALUES // values, 1),
    }
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:20]
    root = Path(config.cache) if config.cache else home() / "trajectories"
    return root / key, source


def _finish(folder: Path, config: KDConfig, source: dict[str, Any]) -> None:
    """Write the index over a full set of shards, which makes the folder complete."""
    first, *_ = _paths(folder, config.trajectories, source["shard"])
    with safe_open(first, "pt") as shard:
        times = shard.get_tensor("times").tolist()
    partial = folder / f".{INDEX}.{os.getpid()}"
    record = {**source, "key": folder.name, "count": config.trajectories, "times": times}
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(folder / INDEX)


@torch.no_grad()
def _trajectories(
    config: KDConfig, base: Base, pairs: Pairs, numbers: range, negative: Tensor | None
) -> dict[str, Tensor]:
    """One shard, on the CPU: "times" of the kept points, and "points" with the end, (n, K + 1, C, T, H, W)."""
    part = slice(numbers.start, numbers.stop)
    text = pairs.draw(config.trajectory_seed, 1, config.trajectories, part).text.to(base.device)
    negative = None if negative is None else negative.to(text)
    seeds = [stream_seed(config.trajectory_seed, "trajectory noise", i) for i in numbers]
    noise = VideoNoise(seeds, base.latent_shape).draw().to(base.device)
    times: list[float] = []
    points: list[Tensor] = []

    def keep(step: int, t: float, x: Tensor) -> None:
        if step % config.skip == 0:
            times.append(t)
            points.append(x.cpu())

    end = sample_teacher(base, text, negative, noise, config.teacher_steps, config.guidance, watch=keep)
    return {
        "times": torch.tensor(times, dtype=torch.float64),
        "points": torch.stack([*points, end.cpu()], dim=1).contiguous(),
    }


def _write(path: Path, tensors: dict[str, Tensor], *, seconds: float) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"seconds": f"{seconds:.3f}"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class KD:
    """The warm-up as a Method: one network, mean squared distance to the trajectory's end."""

    def __init__(self, student: nn.Module, config: KDConfig) -> None:
        """Set the method up.

        Args:
            student: Copy of the teacher to train.
            config: Hyper-parameters.
        """
        self.student, self.config = student, config
        self.networks: dict[str, nn.Module] = {"student": student}

    def turn(self, iteration: int) -> tuple[str, ...]:
        """Name the networks that move: always the student."""
        return ("student",)

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the one term, "kd": half the mean of |g(x_t, t) - end|^2.

        x_t is the kept point nearest in time to a random t_i of the student's grid; the noise itself for M = 1.
        """
        assert isinstance(batch, Trajectories)
        count, device = len(batch.latents), batch.latents.device
        wanted = grid(self.config.m, self.config.gamma_outer)[1:]
        nearest = (wanted[:, None] - batch.times[None]).abs().argmin(dim=1)
        index = torch.randint(self.config.m, (count,), generator=generator, device=generator.device).cpu()
        kept = nearest[index]
        x_t = batch.points[torch.arange(count), kept].to(device)
        g = plain_estimate(self.student, x_t, batch.times[kept].to(device), batch.text)
        return {"kd": 0.5 * functional.mse_loss(g.float(), batch.latents.float())}

    def metrics(self) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}


def kd_setup_cost(config: KDConfig, shape: Shape) -> Cost:
    """What all trajectories cost, once: as many passes of the teacher as it has steps, twice with guidance."""
    passes = config.teacher_steps * (2 if config.guidance > 1 else 1)
    return Cost(float(config.trajectories * passes * shape.blocks))


def _build(student: nn.Module, teacher: WanTransformer3DModel, negative: Tensor, config: KDConfig) -> KD:
    return KD(student, config)


KD_KIND = MethodKind(
    label="kd",
    config=KDConfig,
    build=_build,
    sampling=lambda config: {"m": config.m, "sampler": "ode", "gamma_outer": config.gamma_outer},
    cost=lambda config, iteration, shape: Cost(shape.blocks, shape.blocks),
    prepare=open_trajectories,
    setup_cost=kd_setup_cost,
)

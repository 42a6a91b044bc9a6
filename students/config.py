"""The configuration of a training run: one frozen dataclass, read from YAML, environment and flags.

Precedence: defaults < YAML (parents first) < ``TMD_EVAL_TRAIN__SECTION__NAME`` environment variables < ``--set`` flags.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from students.data import DataConfig
from students.errors import ConfigError
from students.method import Cost, MethodKind, Shape
from students.nfe import check_h
from students.parallel import ParallelConfig
from students.preview import PreviewConfig
from students.registry import METHODS, kind_name, method_kind, own_code
from students.settings import Layer, build, environment_layer, flag_layer, merge, to_tree, yaml_layers
from students.tmd import FUSIONS, TARGETS

ENVIRONMENT = "TMD_EVAL_TRAIN__"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Shape of the flow head; plain students have none, and leave this section out of account."""

    h: int = 5
    """H, blocks of the flow head, 1 to L - 1."""
    fusion: Literal["gated", "concat"] = "gated"
    """How y_s joins the backbone's tokens: one learnable gate, or concatenation (ablation)."""
    target: Literal["x1-x", "x"] = "x1-x"
    """The transition target y: x1 - x (default), or x (ablation)."""
    gate: float = -3.0
    """Start of the gate's scalar a; the share of y_s is sigmoid(a)."""

    def __post_init__(self) -> None:
        _require(self.h >= 1, f"student.h (H) must be at least 1, not {self.h}.")
        _require(self.fusion in FUSIONS, f"student.fusion must be one of {', '.join(FUSIONS)}, not {self.fusion}.")
        _require(self.target in TARGETS, f"student.target must be one of {', '.join(TARGETS)}, not {self.target}.")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, one per network, rates constant after a warm-up; the defaults are the paper's Table 7 (1.3B, stage 2)."""

    lr: float = 1e-5
    """Learning rate of the student, and of the networks that name none."""
    lr_fake_score: float | None = None
    """Learning rate of the fake score; none: lr."""
    lr_discriminator: float | None = None
    """Learning rate of the discriminator; none: lr."""
    lr_gate: float | None = None
    """Learning rate of the fusion gate; none: lr. At few updates the gate hardly moves at the common rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; the gate has none."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Adam's floor of the denominator."""
    warmup: int = 0
    """Updates of a network over which its rates grow linearly from 0, each in its own turns; 0: constant."""
    clip: float | None = 10.0
    """Largest gradient norm of each network, beyond which the gradient is scaled down; null: no clipping."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_fake_score", "lr_discriminator", "lr_gate"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"optimiser.{name} must be above 0, not {value}.")
        _require(self.weight_decay >= 0, f"optimiser.weight_decay must be at least 0, not {self.weight_decay}.")
        fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(fit, f"optimiser.betas must be two numbers in [0, 1), not {list(self.betas)}.")
        _require(self.eps > 0, f"optimiser.eps must be above 0, not {self.eps}.")
        _require(self.warmup >= 0, f"optimiser.warmup must be at least 0, not {self.warmup}.")
        _require(self.clip is None or self.clip > 0, f"optimiser.clip must be above 0 or null, not {self.clip}.")

    def rate(self, network: str) -> float:
        """Learning rate of a network, "gate" for the fusion gate."""
        own = {"fake_score": self.lr_fake_score, "discriminator": self.lr_discriminator, "gate": self.lr_gate}
        value = own.get(network)
        return self.lr if value is None else value


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    method: Any
    """What is minimised, with M, N and the time shifts: settings of a method in students.registry.METHODS, in YAML a
    section with its ``name``; or of one of your own, with the name ``FILE.py:NAME``."""
    out: str
    """Folder of the run: config.yaml, state/, events.jsonl, tensorboard/, and in the end checkpoint/."""
    base: str = "micro"
    """The teacher: micro, a diffusers pipeline folder, or a hub id."""
    parent: str | None = None
    """Checkpoint folder of the student to start from (stage 2: stage 1's); null: the teacher's weights."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """Shape of the student."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pairs."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW."""
    batch: int = 64
    """Pairs per iteration, over all ranks and accumulated passes."""
    micro_batch: int | None = None
    """Pairs per forward pass on one rank, so that batch / (micro_batch x ranks) passes accumulate; null: batch / ranks.
    Random draws belong to a pass of the global batch: with it fixed, the number of ranks changes only rounding."""
    iterations: int = 3000
    """Iterations; stage 2 counts those of the alternation."""
    ema: float = 0.99
    """Decay of the student's moving average, whose weights the checkpoint holds, in [0, 1); 0: the raw weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward passes under autocast; weights, optimiser and times keep their full precision."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory for about a third more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    seed: int = 0
    """Of new weights, the order of data, and every draw of noise and time."""
    save_every: int = 250
    """Iterations between saved states."""
    keep: int = 2
    """Saved states to keep; the latest is what --resume reads."""
    keep_every: int | None = None
    """States at multiples of this many iterations are kept as well; null: none."""
    log_every: int = 10
    """Iterations between lines of events.jsonl, each the mean since the last."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the metrics beside TensorBoard; null: none. Needs the wandb package."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is laid out over its ranks."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Samples while it trains."""

    def __post_init__(self) -> None:
        kind_name(self.method)
        _require(bool(self.out), "out must name a folder.")
        for name in ("batch", "iterations", "save_every", "keep", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        _require(
            self.keep_every is None or self.keep_every >= 1, f"keep_every must be at least 1, not {self.keep_every}."
        )
        _require(0 <= self.ema < 1, f"ema must lie in [0, 1), not {self.ema}.")
        if self.micro_batch is not None:
            fit = self.micro_batch >= 1 and self.batch % self.micro_batch == 0
            _require(fit, f"micro_batch must divide batch ({self.batch}), which {self.micro_batch} does not.")

    @property
    def method_name(self) -> str:
        """The method's name: one of METHODS, or FILE.py:NAME."""
        return kind_name(self.method)

    @property
    def kind(self) -> MethodKind:
        """How the method is made and what it costs."""
        return method_kind(self.method_name)

    def shape(self, blocks: int) -> Shape:
        """L and, with a flow head, H.

        Args:
            blocks: L of the base model.
        """
        return Shape(blocks, self.student.h if self.kind.flow_head else None)

    def cost(self, blocks: int) -> Cost:
        """Transformer blocks run by the whole training, over all pairs; what ``prepare`` makes is included.

        The fair measure of "equal total training compute": ``config.cost(L).total``.

        Args:
            blocks: L of the base model.
        """
        shape, kind = self.shape(blocks), self.kind
        total = Cost() if kind.setup_cost is None else kind.setup_cost(self.method, shape)
        for iteration in range(1, self.iterations + 1):
            total = total.plus(kind.cost(self.method, iteration, shape).times(self.batch))
        return total

    def passes(self, world: int) -> tuple[int, int]:
        """Pairs per forward pass and accumulated passes per rank.

        Args:
            world: number of ranks.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        micro = self.micro_batch or self.batch // world
        if micro == 0 or self.batch % (micro * world):
            raise ConfigError(f"batch {self.batch} cannot be cut into equal passes of {micro} on {world} ranks.")
        return micro, self.batch // (micro * world)

    def check_base(self, blocks: int) -> None:
        """Refuse a flow head that the base model cannot give.

        Args:
            blocks: L.

        Raises:
            ConfigError: H is not in 1 to L - 1.
        """
        if self.kind.flow_head:
            check_h(self.student.h, blocks)

    def tree(self) -> dict[str, Any]:
        """Nested plain values, complete: :func:`load_config` reads them back from YAML."""
        tree = to_tree(self)
        code = own_code(self.method_name)  # a changed file is another method: no resuming, no re-use of its jobs
        tree["method"] = {"name": self.method_name, **({"code": code} if code else {}), **tree["method"]}
        if not self.kind.flow_head:
            del tree["student"]
        return tree

    def yaml(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.tree(), sort_keys=False, allow_unicode=True)


def load_config(
    path: Path | str, overrides: Iterable[str] = (), environ: Mapping[str, str] | None = None
) -> TrainConfig:
    """Resolve the configuration of a run.

    Args:
        path: YAML file.
        overrides: ``name=value`` of ``--set`` flags, such as ``optimiser.lr=1e-4``.
        environ: environment variables, by default the process's.

    Raises:
        ConfigError: a file, name or value is wrong; says where and how to mend it.
    """
    environment = environment_layer(os.environ if environ is None else environ, ENVIRONMENT)
    return resolve([*yaml_layers(Path(path)), environment, flag_layer(overrides)])


def resolve(layers: Iterable[Layer]) -> TrainConfig:
    """The configuration that some layers give together, the last one winning."""
    settings = merge(layers)
    name, source = settings.pop("method.name", (None, ""))
    if name is None:
        raise ConfigError(f"setting method.name is missing; choose one of {', '.join(METHODS)}.")
    try:
        kind = method_kind(str(name))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if own_code(str(name)):
        settings.pop("method.code", None)  # written by tree(), for comparison only
    for key, (_, origin) in settings.items():  # a shared parent file may shape flow heads, a flag means this run
        if key.startswith("student.") and origin == "--set" and not kind.flow_head:
            raise ConfigError(f"--set {key}: a student of {name} has no flow head; leave the setting out.")
    for key in ("m", "n"):  # here, as a method would only say that some time grid has too few steps
        value, source = settings.get(f"method.{key}", (1, ""))
        if isinstance(value, (int, float)) and value < 1:
            raise ConfigError(f"{source}: method.{key} ({key.upper()}) must be at least 1, not {value}.")
    return build(TrainConfig, settings, {"method": kind.config})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)

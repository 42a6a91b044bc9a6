"""``tmd-eval plan``: its operations and its memory against what really runs, on small networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from students.base import velocity
from students.config import TrainConfig, load_config
from students.errors import ConfigError, QualityGateError
from students.method import Method, Shape
from students.parallel import embed_time_in_full, store_low
from tmd_eval.cli import app
from tmd_eval.plan import RESERVE, Counts, Plan, advice, block_flops, make_plan, sizes_of, tokens_of
from tmd_eval.plan_activations import (
    Activations,
    LiveBytes,
    Sizes,
    activation_bytes,
    blank_batch,
    build,
    costliest_turns,
    update_bytes,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = Sizes(
    transformer={
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": 8, "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    },
    latent=(4, 3, 16, 16), text_length=12,
)  # fmt: skip


def config_of(name: str, *settings: str) -> TrainConfig:
    return load_config(EXAMPLES / f"{name}.yaml", settings)


def saved_bytes(config: TrainConfig, iteration: int) -> int:
    """Bytes that autograd keeps for the backward pass of one real update: each storage once, weights left out."""
    method, teacher = build(config, SIZES, "cpu")
    weights = {p.untyped_storage().data_ptr() for n in (teacher, *method.networks.values()) for p in n.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    batch = blank_batch(config, SIZES, "cpu")
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = method.losses(batch, iteration, torch.Generator().manual_seed(0))
    assert losses
    return sum(kept.values())


@pytest.mark.parametrize(
    "name, iteration",
    [
        ("micro_tmd_n2h2_stage1", 1), ("micro_tmd_n2h2_stage2", 5), ("micro_dmd2v", 5), ("micro_rcm_dcm", 1),
        ("micro_dmd2v_kd", 1), ("wan1.3b_rcm", 1020),
    ],
)  # fmt: skip
def test_memory_model_against_saved_tensors(name: str, iteration: int) -> None:
    """Without recomputation nearly all that is alive at the peak is what autograd saved: within 15 %.

    rCM's figure is that of an update after the warm-up, which has both terms of the loss.
    """
    config = config_of(name, "gradient_checkpointing=false", "precision=fp32")
    planned = activation_bytes(config, SIZES)[("student",)].peak
    assert planned == pytest.approx(saved_bytes(config, iteration), rel=0.15)


def as_trained(config: TrainConfig, sizes: Sizes) -> tuple[Method, tuple[nn.Module, ...]]:
    """Method and networks as the trainer holds them: float32 but for the teacher of a bf16 run."""
    method, teacher = build(dataclasses.replace(config, precision="fp32"), sizes, "cpu")
    if config.precision == "bf16":
        store_low(teacher)
    networks = (teacher, *method.networks.values())
    for network in networks:
        embed_time_in_full(network, torch.device("cpu"))
    return method, networks


def peak_under_autocast(config: TrainConfig) -> dict[tuple[str, ...], int]:
    """Most bytes alive in a real bf16 pass as the trainer makes it: float32 weights, autocast, its bf16 copies."""
    method, networks = as_trained(config, SIZES)
    found = {}
    for turn, iteration in costliest_turns(config, method, 8).items():
        live = LiveBytes("cpu")
        grads = [torch.zeros_like(p) for network in method.networks.values() for p in network.parameters()]
        for p, grad in zip((p for n in method.networks.values() for p in n.parameters()), grads, strict=True):
            p.grad = grad
        live.know([*grads, *(p for network in networks for p in network.parameters())])
        batch = blank_batch(config, SIZES, "cpu")
        with live:
            with torch.autocast("cpu", torch.bfloat16):
                losses = method.losses(batch, iteration, torch.Generator().manual_seed(0))
            torch.stack([loss.double() for loss in losses.values()]).sum().backward()
        found[turn] = live.peak
    return found


@pytest.mark.parametrize(
    "name, settings",
    [
        ("micro_rcm", ("method.derivative=finite", "gradient_checkpointing=false")),
        ("micro_rcm", ("method.derivative=exact", "gradient_checkpointing=true")),
        ("micro_tmd_n2h2_stage1", ("gradient_checkpointing=true",)),
    ],
    ids=["rcm-differences", "rcm-forward-mode", "stage1"],
)
def test_bf16_runs_against_a_real_pass(name: str, settings: tuple[str, ...]) -> None:
    """Passes outside autocast, for derivatives, are in float32: activations and working copies within 15 %."""
    config, counts = config_of(name, "precision=bf16", "batch=1", *settings), Counts()
    plan, real = make_plan(config, 1, SIZES, counts), peak_under_autocast(config)
    planned = plan.memory.activations + plan.memory.gathered
    assert set(real) == set(counts.of(config, SIZES)[1]) and plan.memory.turn in real
    assert planned == pytest.approx(real[plan.memory.turn], rel=0.15)


def peak_of_update(config: TrainConfig, sizes: Sizes, turn: tuple[str, ...], passes: int) -> int:
    """Most bytes alive in a real update as the trainer makes it on one GPU, beside weights and moments."""
    method, networks = as_trained(config, sizes)
    iteration = costliest_turns(config, method, 8)[turn]
    optimisers = [torch.optim.AdamW(method.networks[name].parameters(), foreach=True) for name in turn]
    batch, live = blank_batch(config, sizes, "cpu"), LiveBytes("cpu")
    live.know(p for network in networks for p in network.parameters())

    def update() -> None:
        for k in range(passes):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                losses = method.losses(batch, iteration, torch.Generator().manual_seed(k))
            torch.stack([loss.double() for loss in losses.values()]).sum().backward()
            del losses
        for optimiser in optimisers:
            optimiser.step()
        for network in method.networks.values():
            network.zero_grad(set_to_none=True)

    update()  # makes the moments
    with live:
        update()
    return live.peak


LITTLE = dataclasses.replace(SIZES, latent=(4, 1, 4, 4), text_length=4)
"""Clips so small that weights count for more than activations."""


@pytest.mark.parametrize(
    "name, precision, sizes, passes, moment",
    [
        ("micro_tmd_n2h2_stage1", "fp32", SIZES, 1, "backward"),
        ("micro_tmd_n2h2_stage1", "bf16", SIZES, 1, "forward"),
        ("micro_tmd_n2h2_stage1", "fp32", SIZES, 2, "backward"),
        ("micro_tmd_n2h2_stage2", "fp32", LITTLE, 1, "update"),
    ],
)
def test_a_whole_update_against_its_moments(name: str, precision: str, sizes: Sizes, passes: int, moment: str) -> None:
    """Gradients come while stored activations go, and AdamW takes room of its own: all that is alive, within 15 %."""
    settings = (f"precision={precision}", f"batch={passes}", "micro_batch=1", "gradient_checkpointing=true", "ema=0")
    config = config_of(name, *settings)
    memory = make_plan(config, 1, sizes).memory
    planned = memory.gathered + memory.gradients + memory.activations
    real = peak_of_update(config, sizes, memory.turn, passes)
    assert planned == pytest.approx(real, rel=0.15) and memory.moment == moment


def test_a_warm_up_does_not_stand_for_the_run() -> None:
    """rCM learns without its fake score for 1,000 iterations; the plan is of what follows."""
    config = config_of("wan1.3b_rcm")
    method, _ = build(config, SIZES, "meta")
    turns = costliest_turns(config, method, 8)
    assert set(turns) == {("student",), ("fake_score",)} and turns[("student",)] > 1000
    shape = Shape(blocks=8, h=None)
    early, late = (config.kind.cost(config.method, i, shape).total for i in (1, turns[("student",)]))
    assert late > early


@pytest.mark.parametrize("name, recompute", [("micro_tmd_n2h2_stage1", "false"), ("micro_tmd_n2h2_stage2", "true")])
def test_shallow_networks_on_the_meta_device_foretell_the_real_peak(name: str, recompute: str) -> None:
    config = config_of(name, f"gradient_checkpointing={recompute}")
    planned, real = activation_bytes(config, SIZES), update_bytes(config, SIZES, "cpu")
    assert set(planned) == set(real)
    for turn, found in real.items():
        assert planned[turn].forward == pytest.approx(found.forward, rel=0.15)
        assert planned[turn].backward == pytest.approx(found.backward, rel=0.15)


def test_recomputation_saves_memory() -> None:
    full, less = (
        activation_bytes(config_of("micro_tmd_n2h2_stage1", f"gradient_checkpointing={value}"), SIZES)[("student",)]
        for value in ("false", "true")
    )
    assert less.peak < full.peak / 3


def test_block_flops_against_torchs_counter() -> None:
    def count(blocks: int) -> int:
        network = WanTransformer3DModel.from_config({**SIZES.transformer, "num_layers": blocks})
        x, t, text = torch.zeros(1, *SIZES.latent), torch.tensor([0.5]), torch.zeros(1, SIZES.text_length, 16)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            velocity(network, x, t, text)
        return counter.get_total_flops()

    assert tokens_of(SIZES) == 192
    assert count(3) - count(2) == pytest.approx(block_flops(SIZES), rel=1e-9)


def test_full_size_shapes_need_no_download() -> None:
    sizes = sizes_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert tokens_of(sizes) == 32_760 and sizes.latent == (16, 21, 60, 104) and sizes.text_length == 512
    assert block_flops(sizes) * 30 == pytest.approx(0.28e15, rel=0.02)
    large = sizes_of("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert block_flops(large) * 40 == pytest.approx(1.66e15, rel=0.02)
    with torch.device("meta"):
        count = sum(p.numel() for p in WanTransformer3DModel.from_config(sizes.transformer).parameters())
    assert count == pytest.approx(1.42e9, rel=0.01)
    assert sizes_of("micro").transformer["num_layers"] == 10
    with pytest.raises(ConfigError, match="nobody/nothing is not here"):
        sizes_of("nobody/nothing")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the count of activations, which has tests of its own and takes seconds."""

    def bytes_of(config: TrainConfig, sizes: Sizes) -> dict[tuple[str, ...], Activations]:
        size = 8_000 if config.gradient_checkpointing else 8_000_000
        return {("student",): Activations(forward=size // 2, backward=size, late=size // 4)}

    monkeypatch.setattr("tmd_eval.plan.activation_bytes", bytes_of)


def test_parts_over_gpus(counted: None) -> None:
    config = config_of("micro_tmd_n2h2_stage2", "batch=8", "ema=0.99")
    one = make_plan(config, 1, SIZES).memory
    count = make_plan(config, 1, SIZES).parameters
    assert one.weights["student"] == 4 * count["student"] and one.weights["teacher"] == 4 * count["teacher"]
    assert one.optimiser == 8 * sum(count[name] for name in ("student", "fake_score", "discriminator"))
    assert one.average == 4 * count["student"] and one.gathered == 0
    sharded = make_plan(
        dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard="fsdp")), 8, SIZES
    )
    assert sharded.memory.optimiser == pytest.approx(one.optimiser / 8, rel=1e-3)
    assert sharded.memory.activations == one.activations / 8  # one pair a GPU instead of eight
    assert sharded.memory.gathered > 0 and sharded.memory.total < one.total / 4
    assert sharded.flops_iteration == make_plan(config, 1, SIZES).flops_iteration


def test_advice_asks_for_nothing_needless(counted: None) -> None:
    """Settings that turn out superfluous once another one is there are not asked for; GPUs come last."""

    def advised(gpus: int, enough: Plan) -> list[str]:
        found = advice(make_plan(config, gpus), enough.memory.total / 2**30 / (1 - RESERVE) * 1.0001)
        assert found[-1][1].fits(enough.memory.total / 2**30 / (1 - RESERVE) * 1.0001)
        return [what for what, _ in found]

    config = config_of("micro_tmd_n2h2_stage2", "batch=64", "micro_batch=1")
    wide = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard="fsdp"))
    assert advised(8, make_plan(wide, 8)) == ["parallel.shard=fsdp"]
    assert advised(2, make_plan(wide, 8)) == ["--gpus 8 with parallel.shard=fsdp"]
    config = wide
    shared = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context=2))
    assert make_plan(shared, 8).memory.activations == make_plan(wide, 8).memory.activations / 2
    hopeless = advice(make_plan(config, 8), 0.001)
    assert not hopeless[-1][1].fits(0.001) and "--gpus 64" in [what for what, _ in hopeless]


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_command(counted: None) -> None:
    path = str(EXAMPLES / "micro_tmd_n2h2_stage1.yaml")
    fits = call(path, "--gpus", "2", "--gpu-memory", "1", "--set", "batch=32", "--tflops", "100", "--json")
    assert fits.exit_code == 0, fits.output
    row = json.loads(fits.stdout)
    assert row["fits"] and row["total_bytes_per_gpu"] == sum(row["bytes_per_gpu"].values()) and row["gpu_hours"] > 0
    small = call(path, "--gpus", "2", "--gpu-memory", "0.15", "--set", "batch=32")
    assert isinstance(small.exception, QualityGateError) and small.exception.exit_code == 5
    assert "does not fit" in small.stdout
    assert [line.split()[0] for line in small.stdout.split("before it:\n")[1].splitlines()] == ["micro_batch=1"]
    assert small.stdout.rstrip().endswith("fits")
    for words, what in (((path, "--gpus", "0"), "--gpus is 0"), ((path, "--gpus", "3"), "batch 32")):
        refused = call(*words)
        assert isinstance(refused.exception, ConfigError) and what in str(refused.exception)

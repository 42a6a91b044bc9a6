"""The trainer: the same weights after any interruption and on any number of ranks, and nothing lost by failures."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from students import train as trainer
from students.base import load_base
from students.checkpoint import load_student
from students.config import TrainConfig, resolve
from students.data import write_index, write_shard
from students.errors import ConfigError
from students.method import Batch
from students.run_folder import FREE_ON_RESUME, StopRequest, resume_command
from students.settings import Layer, flatten
from students.tm_mf import TMMF
from students.train import Run, optimiser, run_file, train
from students.trainer_state import (
    Average,
    DiskFullError,
    MetricLog,
    NonFiniteError,
    TrainingInterrupted,
    latest_state,
    load_state,
    save_state,
)
from tests.tiny import tiny_pipeline

STAGE1 = {"method.name": "tm_mf", "method.guidance": 1.5}
STAGE2 = {"method.name": "tmd_stage2", "method.guidance": 1.5}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that all runs here share: a tiny random base model and 12 random pairs in two shards."""
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    base, folder = load_base(str(pipeline)), tmp_path_factory.mktemp("data")
    torch.manual_seed(1)
    text = base.encode_prompts(["a red circle moves left", "a blue square moves up on a dark background"])
    for index in range(2):
        write_shard(folder, index, torch.randn(6, *base.latent_shape), text.repeat(3, 1, 1))
    write_index(folder, base_hash=base.hash, source={})
    return {
        "base": str(pipeline), "student.h": 1, "data.kind": "shards", "data.folder": str(folder), "batch": 4,
        "optimiser.lr": 1e-3, "optimiser.lr_gate": 0.05, "device": "cpu", "iterations": 2, "log_every": 1,
    }  # fmt: skip


def make(world: dict[str, Any], out: Path, method: dict[str, Any] = STAGE1, **changes: Any) -> TrainConfig:
    """A config; in names of changes two underscores stand for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve([Layer("test", {**world, **method, "out": str(out), **named})])


def weights(out: Path) -> bytes:
    (path,) = (out / "checkpoint").glob("*.safetensors")
    return path.read_bytes()


def events(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_both_stages_end_in_checkpoints_that_tell_their_story(world: dict[str, Any], tmp_path: Path) -> None:
    first = train(make(world, tmp_path / "one"), progress=False)
    config = make(world, tmp_path / "two", STAGE2, parent=str(first), iterations=5)
    second = train(config, progress=False)
    (spec1, student1), (spec2, student2) = load_student(first), load_student(second)
    assert (spec1.method, spec2.method) == ("tm_mf", "tmd")
    assert (spec2.m, spec2.n, spec2.h, spec2.blocks, spec2.text_length) == (2, 2, 1, 4, 12)
    training = spec2.training
    assert training["config"] == config.tree() and training["iteration"] == 5 and training["device"] == "cpu"
    assert len(training["data_hash"]) == 64 and training["seconds"] > 0 and training["code_revision"] != "unknown"
    assert training["parent"]["ref"] == str(first) and len(training["parent"]["hash"]) == 64
    assert spec1.training["parent"] is None
    teacher = load_base(world["base"]).transformer
    for mine, theirs in ((student1, teacher), (student2, student1)):  # the backbone, too, moved in both stages
        assert not torch.equal(mine.patch_embedding.weight, theirs.patch_embedding.weight)
    lines = events(tmp_path / "two")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    assert all({"loss", "seconds", "gate"} <= set(line) for line in lines)
    assert ["grad_norm/student" in line for line in lines] == [False] * 4 + [True]  # the student moves every fifth time
    assert any((tmp_path / "two" / "tensorboard").iterdir())
    assert trainer.load_config(tmp_path / "two" / "config.yaml", environ={}) == config


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(world: dict[str, Any], tmp_path: Path) -> None:
    """Stage 2, three networks: SIGKILL twice, whenever it hits, then to the end; the uninterrupted run's bytes."""
    settings = {"iterations": 24, "save_every": 3}
    train(make(world, tmp_path / "whole", STAGE2, **settings), progress=False)
    out = tmp_path / "killed"
    config = make(world, out, STAGE2, **settings)
    left = []
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(
            target=train, args=(config,), kwargs={"resume": True, "progress": False}
        )
        before = latest_state(out)
        process.start()
        while process.is_alive() and latest_state(out) == before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (out / "checkpoint").exists()
        left.append(latest_state(out))
    assert None not in left and left[0] != left[1]
    train(config, resume=True, progress=False)
    assert weights(out) == weights(tmp_path / "whole")
    assert [line["iteration"] for line in events(out)] == list(range(1, 25))  # none twice, none lost
    assert len(list((out / "state").glob("*.pt"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    train(make(world, tmp_path / "whole", iterations=5), progress=False)
    config = make(world, tmp_path / "stopped", iterations=5)
    losses = Run._losses

    def interrupted(run: Run, iteration: int, index: int) -> dict[str, torch.Tensor]:
        if iteration == 3:
            os.kill(os.getpid(), number)
        return losses(run, iteration, index)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_losses", interrupted)
        with pytest.raises(
            TrainingInterrupted, match=f"iteration 3 of 5.*{resume_command(tmp_path / 'stopped', 1)}"
        ) as e:
            train(config, progress=False)
    assert e.value.exit_code == 130 and signal.getsignal(number) is handler
    train(config, resume=True, progress=False)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_weights_depend_on_the_seed(world: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(make(world, tmp_path / name, seed=seed), progress=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


TWO_RANKS = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
from students.config import load_config
from students.train import Run, train
go = Run.go
def both(run, progress):
    go(run, progress)
    for name, network in run.method.networks.items():
        state = {k: v.contiguous().clone() for k, v in network.state_dict().items()}
        save_file(state, Path(sys.argv[2]) / f"{name}-{os.environ['RANK']}.safetensors")
Run.go = both
train(load_config(sys.argv[1]))
"""


def test_two_ranks_agree_and_equal_one_process(world: dict[str, Any], tmp_path: Path) -> None:
    """Under torchrun both ranks hold the same bits; one process accumulating the same passes differs by rounding."""
    settings = {"iterations": 6, "micro_batch": 2, "ema": 0.0}
    (tmp_path / "config.yaml").write_text(make(world, tmp_path / "ranks", STAGE2, **settings).yaml())
    (tmp_path / "run.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    done = subprocess.run(
        [*command, "config.yaml", "."], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("student", "fake_score", "discriminator"):
        assert (tmp_path / f"{name}-0.safetensors").read_bytes() == (tmp_path / f"{name}-1.safetensors").read_bytes()
    train(make(world, tmp_path / "alone", STAGE2, **settings), progress=False)
    (path,) = (tmp_path / "ranks" / "checkpoint").glob("*.safetensors")
    ranks, alone = load_file(path), load_file(tmp_path / "alone" / "checkpoint" / path.name)
    for name in ranks:
        torch.testing.assert_close(ranks[name], alone[name], atol=1e-5, rtol=1e-4, msg=name)
    assert json.loads((path.parent / "student.json").read_text())["training"]["device"] == "2 x cpu"


def test_passes_are_averaged(world: dict[str, Any], tmp_path: Path) -> None:
    """The gradient of two accumulated passes is the mean of the gradients of each."""
    config = make(world, tmp_path / "x", micro_batch=2)
    with trainer.Ranks("cpu") as ranks:
        run = Run(config, ranks, trainer.build_parts(config, ranks, progress=False))
        student = run.parts.student
        singles = []
        for index in range(2):
            student.zero_grad()
            sum(run._losses(1, index).values()).backward()
            singles.append(student.proj_out.weight.grad.clone())
        run.optimisers["student"].step = lambda: None  # type: ignore[method-assign]
        figures, _ = run.step(1, StopRequest())
    assert figures["grad_norm/student"] < 10  # so nothing was clipped
    torch.testing.assert_close(student.proj_out.weight.grad, sum(singles) / 2)


def test_every_pass_has_its_own_randomness(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    losses = TMMF.losses

    def noting(method: TMMF, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        seeds.append(generator.initial_seed())
        return losses(method, batch, iteration, generator)

    monkeypatch.setattr(TMMF, "losses", noting)
    train(make(world, tmp_path / "a", iterations=3, micro_batch=2), progress=False)
    assert len(seeds) == len(set(seeds)) == 6
    first = seeds.copy()
    train(make(world, tmp_path / "b", iterations=3, micro_batch=2, seed=1), progress=False)
    assert not set(first) & set(seeds[6:])


def test_a_non_finite_loss_is_named_and_moves_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    """One pair of the data is NaN; the run stops where it is drawn, with the state of the iteration before."""
    base, folder = load_base(world["base"]), tmp_path / "data"
    latents = torch.randn(12, *base.latent_shape)
    latents[5, 0, 0, 0, 0] = float("nan")
    write_shard(folder, 0, latents, torch.randn(12, 12, 16))
    write_index(folder, base_hash=base.hash, source={})
    config = make(world, tmp_path / "run", data__folder=str(folder), batch=1, iterations=12, save_every=1)
    with pytest.raises(
        NonFiniteError, match=r"loss term tm_mf is not finite at iteration (\d+); .*last good state"
    ) as e:
        train(config, progress=False)
    assert e.value.exit_code == 1
    at = int(str(e.value).split("iteration ")[1].split(";")[0])
    state = latest_state(tmp_path / "run")
    assert (state is None and at == 1) or (state is not None and load_state(state)["iteration"] == at - 1)
    assert state is None or all(t.isfinite().all() for t in load_state(state)["networks"]["student"].values())


def test_a_non_finite_gradient_is_named(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Run._losses

    def steep(run: Run, iteration: int, index: int) -> dict[str, torch.Tensor]:
        weight = run.parts.student.proj_out.bias[0].double()
        return {**losses(run, iteration, index), "root": (weight - weight.detach()).abs().sqrt()}  # slope 0/0 at 0

    monkeypatch.setattr(Run, "_losses", steep)
    with pytest.raises(NonFiniteError, match=r"gradient of student is not finite at iteration 1; .*no state was saved"):
        train(make(world, tmp_path / "run"), progress=False)


def test_a_full_disk_is_one_sentence_and_keeps_the_old_state(world: dict[str, Any], tmp_path: Path) -> None:
    """A real limit on file sizes, met in the middle of torch.save."""
    out = tmp_path / "run"
    train(make(world, out, iterations=2), progress=False)
    state = latest_state(out)
    assert state is not None
    before = state.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"no space left while writing .*00000004\.pt.*--resume") as e:
            train(make(world, out, iterations=4), resume=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.exit_code == 1 and "\n" not in str(e.value)
    assert [path.name for path in (out / "state").iterdir()] == [state.name] and state.read_bytes() == before
    train(make(world, out, iterations=4), resume=True, progress=False)
    assert latest_state(out).name == "00000004.pt"  # type: ignore[union-attr]


def test_a_folder_in_use_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make(world, out), progress=False)
    before = weights(out)
    with pytest.raises(ConfigError, match=r"is not empty: add --resume .* or choose another folder with --set out="):
        train(make(world, out), progress=False)
    with pytest.raises(ConfigError, match=r"its run has optimiser\.lr = 0\.001, this one 0\.1"):
        train(make(world, out, optimiser__lr=0.1), resume=True, progress=False)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(make(world, stranger), resume=True, progress=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file; name a folder"):
        train(make(world, tmp_path / "file"), progress=False)
    written = (out / "checkpoint" / "student.json").stat().st_mtime_ns
    assert train(make(world, out), resume=True, progress=False) == out / "checkpoint"  # complete: nothing to do
    assert weights(out) == before and (out / "checkpoint" / "student.json").stat().st_mtime_ns == written


def test_more_iterations_go_on_from_the_raw_weights(world: dict[str, Any], tmp_path: Path) -> None:
    train(make(world, tmp_path / "whole", iterations=4), progress=False)
    train(make(world, tmp_path / "longer", iterations=2), progress=False)
    train(make(world, tmp_path / "longer", iterations=4), resume=True, progress=False)
    assert weights(tmp_path / "longer") == weights(tmp_path / "whole")


def test_damaged_state_and_foreign_data(world: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make(world, out), progress=False)
    state = latest_state(out)
    assert state is not None
    whole = state.read_bytes()
    saved = load_state(state)
    save_state(out, 2, {**saved, "data_hash": "0" * 64}, keep=1)
    with pytest.raises(ConfigError, match="its data had hash 000000000000, now"):
        train(make(world, out, iterations=3), resume=True, progress=False)
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"00000002\.pt is damaged .*delete it to go on from an earlier one"):
        train(make(world, out, iterations=3), resume=True, progress=False)


def test_a_run_goes_on_with_its_own_parent_and_never_backwards(world: dict[str, Any], tmp_path: Path) -> None:
    parent, out = tmp_path / "one", tmp_path / "two"
    train(make(world, parent), progress=False)
    train(make(world, out, STAGE2, parent=str(parent / "checkpoint")), progress=False)
    shutil.rmtree(out / "checkpoint")
    with pytest.raises(ConfigError, match="it is at iteration 2, and iterations is 1; raise it"):
        train(make(world, out, STAGE2, parent=str(parent / "checkpoint"), iterations=1), resume=True, progress=False)
    shutil.copytree(parent, tmp_path / "moved")  # the same parent elsewhere will do
    assert train(make(world, out, STAGE2, parent=str(tmp_path / "moved" / "checkpoint")), resume=True, progress=False)
    shutil.rmtree(out / "checkpoint")
    shutil.rmtree(parent)
    train(make(world, parent, seed=9), progress=False)  # another student where the parent was
    with pytest.raises(ConfigError, match="its parent had hash"):
        train(make(world, out, STAGE2, parent=str(parent / "checkpoint")), resume=True, progress=False)
    (out / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        train(make(world, out, STAGE2, parent=str(parent / "checkpoint")), resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__seed": -1}, "data.seed must be at least 0"),
        ({"method__gamma_s": 0.0}, "gamma is 0.0; it must be above 0"),
    ],
)
def test_settings_that_would_break_later_are_refused_at_once(
    world: dict[str, Any], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        make(world, tmp_path / "run", **changes)


def test_parent_must_have_the_same_shape(world: dict[str, Any], tmp_path: Path) -> None:
    parent = str(train(make(world, tmp_path / "one"), progress=False))
    with pytest.raises(ConfigError, match=r"has student\.h = 1, but this run 2"):
        train(make(world, tmp_path / "a", STAGE2, parent=parent, student__h=2), progress=False)
    with pytest.raises(ConfigError, match=r"student\.json is missing"):
        train(make(world, tmp_path / "b", STAGE2, parent=str(tmp_path / "nothing")), progress=False)
    with pytest.raises(ConfigError, match="H is 4; the flow head needs 1 to 3"):
        train(make(world, tmp_path / "c", student__h=4), progress=False)


def test_the_gate_has_its_own_rate(world: dict[str, Any], tmp_path: Path) -> None:
    """Adam's first step has the length of the rate, whatever the gradient."""
    config = make(world, tmp_path / "run", iterations=1, ema=0.0, optimiser__lr=1e-6, optimiser__lr_gate=0.25)
    _, student = load_student(train(config, progress=False))
    assert abs(abs(float(student.gate_parameter.detach()) + 3) - 0.25) < 1e-4
    start = load_base(world["base"]).transformer.patch_embedding.weight
    assert 0 < float((student.patch_embedding.weight.detach() - start).abs().max()) < 2e-6
    (line,) = events(tmp_path / "run")
    assert abs(line["gate"] - 1 / (1 + np.exp(3))) < 1e-6  # the share before the step


def test_gate_is_not_decayed(world: dict[str, Any], tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gate_parameter = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(-3.0))

    network = Gated()
    adam = optimiser(make(world, tmp_path, optimiser__weight_decay=0.5, optimiser__lr=0.1), "student", network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    assert network.gate_parameter.item() == -3.0
    torch.testing.assert_close(network.weight.detach(), torch.full((3,), 0.95))
    defaults = adam.param_groups[0]
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.99), 1e-8)


def test_average_is_the_closed_form() -> None:
    """Weights k = 1, 2, ... with decay min(d, (1 + k) / (10 + k)), by hand in float64."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    average, expected = Average(network, 0.5), 0.0
    for k in range(1, 30):
        nn.init.constant_(network.weight, k)
        average.update(network)
        decay = min(0.5, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
    average.copy_to(network)
    torch.testing.assert_close(network.weight.detach(), torch.full((1, 2), expected))


def test_the_log_drops_what_a_killed_run_wrote_after_its_state(tmp_path: Path) -> None:
    lines = [json.dumps({"iteration": i, "loss": 1.0}) for i in (1, 2, 3)] + ['{"iteration": 4, "lo']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    log = MetricLog(tmp_path, after=2)
    for loss in (1.0, 4.0):
        log.add({"loss": loss})
    log.add({"loss": 7.0, "rare": 2.0})
    assert log.write(5, 1.0) == {"loss": 4.0, "rare": 2.0}
    log.add({"loss": 0.5})
    log.write(6, 2.0)
    log.close()
    assert events(tmp_path)[:2] == [json.loads(line) for line in lines[:2]]
    assert [(e["iteration"], e["loss"]) for e in events(tmp_path)[2:]] == [(5, 4.0), (6, 0.5)]


def test_the_checkpoint_holds_the_average_and_the_state_the_raw_weights(world: dict[str, Any], tmp_path: Path) -> None:
    train(make(world, tmp_path / "run", iterations=3, ema=0.9), progress=False)
    state = load_state(tmp_path / "run" / "state" / "00000003.pt")
    _, student = load_student(tmp_path / "run" / "checkpoint")
    names = [name for name, _ in student.named_parameters()]
    for name, parameter, averaged in zip(names, student.parameters(), state["average"]["weights"], strict=True):
        assert torch.equal(parameter, averaged), name
    raw = state["networks"]["student"]["patch_embedding.weight"]
    assert not torch.equal(student.patch_embedding.weight, raw)


def test_bf16_trains_with_full_precision_weights(world: dict[str, Any], tmp_path: Path) -> None:
    train(
        make(world, tmp_path / "bf16", STAGE2, precision="bf16", gradient_checkpointing=True, iterations=5),
        progress=False,
    )
    state = load_state(tmp_path / "bf16" / "state" / "00000005.pt")
    for network in state["networks"].values():
        assert {t.dtype for t in network.values() if t.is_floating_point()} <= {torch.float32, torch.float64}
    assert all(np.isfinite(line["loss"]) for line in events(tmp_path / "bf16"))


def test_checkpointing_changes_memory_only(world: dict[str, Any], tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        train(make(world, tmp_path / name, gradient_checkpointing=on), progress=False)
    a, b = (load_student(tmp_path / name / "checkpoint")[1].state_dict() for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5, msg=name)


def test_dry_run_describes_and_writes_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    config = make(world, tmp_path / "run", STAGE2, iterations=12)
    (tmp_path / "config.yaml").write_text(config.yaml())
    text = run_file(tmp_path / "config.yaml", overrides=["seed=7"], resume=False, dry_run=True)
    assert (
        "seed: 7" in text and "plan: tmd_stage2, 12 iterations of 4 pairs" in text and not (tmp_path / "run").exists()
    )
    teacher = load_base(world["base"]).transformer
    size = sum(p.numel() for p in teacher.parameters())
    assert f"fake_score: {size:,} parameters, 10 updates, learning rate 0.001" in text
    assert "2 updates, learning rate 0.001" in text.split("student: ")[1].splitlines()[0]
    absent = run_file(tmp_path / "config.yaml", overrides=["base=Nobody/Nothing"], resume=False, dry_run=True)
    assert "the base model Nobody/Nothing is not here" in absent


def test_flat_names_cover_the_config(world: dict[str, Any], tmp_path: Path) -> None:
    names = set(flatten(make(world, tmp_path).tree()))
    assert names >= FREE_ON_RESUME  # no name there is stale


def test_the_module_prints_the_checkpoint_or_one_sentence(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(make(world, tmp_path / "run").yaml())
    command = ["students.train", str(tmp_path / "config.yaml"), "--set", "iterations=1"]
    monkeypatch.setattr(sys, "argv", command)
    trainer.main()
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'checkpoint'}\n"
    monkeypatch.setattr(sys, "argv", [*command, "--set", "studnt.h=2"])
    with pytest.raises(SystemExit) as stopped:
        trainer.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --set: unknown key studnt.h; did you mean student.h?\n"

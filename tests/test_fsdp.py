"""Training over two ranks (gloo): sharding, hybrid sharding and context parallelism against one process.

In float32 the runs differ by the order of sums only: losses and gradient norms agree to 1e-4 of their size, and weights
to 1e-5 after a few steps at rate 1e-3. In bf16 the parts that are summed differ, so norms agree to 2 %.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from students.base import load_base
from students.config import TrainConfig
from students.errors import ConfigError
from students.parallel import ParallelConfig
from students.run_folder import FREE_ON_RESUME
from students.train import Run, train
from students.trainer_state import NonFiniteError, latest_state, load_state
from tests.ranks import in_ranks
from tests.test_train import STAGE1, STAGE2, make, world

__all__ = ["world"]  # the fixture

SHARDED = {"parallel__shard": "fsdp"}
OFTEN = {**STAGE2, "method.student_every": 2}  # the student moves in every second iteration


def run(config: TrainConfig, resume: bool = False) -> None:
    train(config, resume=resume, progress=False)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, Tensor]:
    (path,) = (out / "checkpoint").glob("*.safetensors")
    return load_file(path)


def check(found: Path, expected: Path, *, relative: float = 1e-4, absolute: float | None = 1e-5) -> None:
    """Losses and norms of gradients of every iteration, and the checkpoint's weights."""
    mine, theirs = lines(found), lines(expected)
    assert [line["iteration"] for line in mine] == [line["iteration"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        keys = [key for key in b if key.startswith(("loss", "grad_norm"))]
        assert len(keys) >= 3
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=relative, abs=1e-6), (key, a["iteration"])
    if absolute is not None:
        reference = weights(expected)
        for name, tensor in weights(found).items():
            torch.testing.assert_close(tensor, reference[name], atol=absolute, rtol=0, msg=name)


@pytest.fixture(scope="module")
def alone(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, which accumulates the passes that ranks share."""
    folder = tmp_path_factory.mktemp("alone")
    for name, method, settings in (
        ("stage1", STAGE1, {"iterations": 3, "micro_batch": 1}),
        ("stage2", OFTEN, {"iterations": 4, "micro_batch": 2}),
        ("bf16", OFTEN, {"iterations": 2, "micro_batch": 2, "precision": "bf16"}),
    ):
        run(make(world, folder / name, method, **settings))
    return {path.name: path for path in folder.iterdir()}


def test_stage1_sharded(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    """Passes of one pair: ranks without a sample for a branch run it all the same, or all would wait for ever."""
    config = make(world, tmp_path / "run", iterations=3, micro_batch=1, **SHARDED)
    in_ranks(2, run, config)
    check(tmp_path / "run", alone["stage1"])


def test_stage2_sharded_with_recomputation_and_previews(
    world: dict[str, Any], alone: dict[str, Path], tmp_path: Path
) -> None:
    """Three networks and the teacher cut up; neither recomputing nor looking at samples changes what is learnt."""
    out = tmp_path / "run"
    config = make(
        world, out, OFTEN, iterations=4, micro_batch=2, gradient_checkpointing=True, parallel__checkpoint_head=True,
        preview__every=4, preview__count=1, save_every=1, keep=1, keep_every=2, **SHARDED,
    )  # fmt: skip
    in_ranks(2, run, config)
    check(out, alone["stage2"])
    assert sorted(path.name for path in (out / "state").iterdir()) == ["00000002", "00000004"]
    assert sorted(path.name for path in (out / "previews").iterdir()) == ["00000004.png"]
    # The state of iteration 2 was written while training went on; from it, one process comes to the same end.
    shutil.rmtree(out / "checkpoint")
    shutil.rmtree(out / "state" / "00000004")
    run(config, resume=True)
    check(out, alone["stage2"])


def test_bf16_sharded(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    settings = {"iterations": 2, "micro_batch": 2, "precision": "bf16", **SHARDED}
    config = make(world, tmp_path / "run", OFTEN, **settings)
    types = in_ranks(2, _stored_types, config)
    assert types[0] == types[1] == {"student": ["float32"], "fake_score": ["float32"], "discriminator": ["float32"]}
    check(tmp_path / "run", alone["bf16"], relative=0.02, absolute=None)


def _stored_types(config: TrainConfig) -> dict[str, list[str]]:
    """Run, and give the types that weights and Adam's moments are kept in."""
    found: dict[str, list[str]] = {}
    export = Run.export

    def noting(self: Run) -> None:
        for name, network in self.method.networks.items():
            kept = [*network.parameters(), *(v for s in self.optimisers[name].state.values() for v in s.values())]
            found[name] = sorted({str(t.dtype).removeprefix("torch.") for t in kept})
        export(self)

    Run.export = noting  # type: ignore[method-assign]
    run(config)
    return found


def test_hybrid_sharding(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    """Two copies, each on one rank: the all-reduce between copies, over several passes."""
    in_ranks(2, run, make(world, tmp_path / "run", iterations=3, micro_batch=1, parallel__shard_ranks=1, **SHARDED))
    check(tmp_path / "run", alone["stage1"])


@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.slow), "fsdp"])
def test_ranks_share_the_tokens_of_a_sample(
    world: dict[str, Any], alone: dict[str, Path], tmp_path: Path, shard: str
) -> None:
    """The norms of gradients tell a sum from a mean, which Adam's weights alone would not."""
    config = make(
        world, tmp_path / "run", OFTEN, iterations=4, micro_batch=2, parallel__shard=shard, parallel__context=2
    )
    in_ranks(2, run, config)
    check(tmp_path / "run", alone["stage2"])


def test_stage1_shares_tokens(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    in_ranks(2, run, make(world, tmp_path / "run", iterations=3, micro_batch=1, parallel__context=2))
    check(tmp_path / "run", alone["stage1"])


def test_resuming_on_more_ranks(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    """The state file of one process, cut up over two."""
    out = tmp_path / "run"
    run(make(world, out, OFTEN, iterations=2, micro_batch=2))
    shutil.rmtree(out / "checkpoint")
    in_ranks(2, run, make(world, out, OFTEN, iterations=4, micro_batch=2, **SHARDED), True)
    check(out, alone["stage2"])
    with pytest.raises(ConfigError, match=r"training state .*00000004 is damaged"):
        next((out / "state" / "00000004").glob("*.distcp")).unlink()
        run(make(world, out, OFTEN, iterations=5, micro_batch=2), resume=True)


def test_resuming_with_parameters_that_never_move(world: dict[str, Any], tmp_path: Path) -> None:
    """TM instead of TM-MF leaves the embedding of s - r alone, so Adam has no moments of it."""
    settings = {"micro_batch": 1, "method__matching_share": 1.0}
    run(make(world, tmp_path / "one", iterations=3, **settings))
    out = tmp_path / "run"
    in_ranks(2, run, make(world, out, iterations=2, **settings, **SHARDED))
    shutil.rmtree(out / "checkpoint")
    in_ranks(2, run, make(world, out, iterations=3, **settings, **SHARDED), True)
    check(out, tmp_path / "one")


def test_resuming_where_nothing_divides(world: dict[str, Any], tmp_path: Path) -> None:
    """2 ranks, then 3: parts of other sizes, one network's moments not there yet; the end is one process's."""
    settings = {"batch": 6, "micro_batch": 1}
    run(make(world, tmp_path / "one", OFTEN, iterations=3, **settings))
    out = tmp_path / "run"
    in_ranks(2, run, make(world, out, OFTEN, iterations=1, **settings, **SHARDED))
    assert set(read_sizes(out / "state" / "00000001")) == {0, 1}
    shutil.rmtree(out / "checkpoint")
    in_ranks(3, run, make(world, out, OFTEN, iterations=3, **settings, **SHARDED), True)
    assert set(read_sizes(out / "state" / "00000003")) == {0, 1, 2}
    check(out, tmp_path / "one")


def read_sizes(state: Path) -> dict[int, int]:
    """Bytes that each rank wrote of a sharded state."""
    sizes: dict[int, int] = {}
    for path in state.glob("__*.distcp"):
        rank = int(path.name.split("_")[2])
        sizes[rank] = sizes.get(rank, 0) + path.stat().st_size
    return sizes


def test_another_number_of_ranks_needs_the_same_passes(world: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(make(world, out, iterations=1))  # passes of 4
    with pytest.raises(AssertionError, match="on 2 ranks: its passes held 4 pairs, now 2; use as many ranks as before"):
        in_ranks(2, run, make(world, out, iterations=2, **SHARDED), True)


def test_a_killed_rank_and_torchruns_restart(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    """torchrun's own agent: rank 1 dies by SIGKILL in iteration 3; all start again and go on from the last state."""
    out, lives = tmp_path / "run", tmp_path / "lives"
    lives.mkdir()
    config = make(world, out, iterations=3, micro_batch=1, save_every=1, **SHARDED)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="killed",
    )  # fmt: skip
    elastic_launch(launch, _dies_once)(config, lives)
    assert sorted(path.name for path in lives.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]  # life and rank
    assert int((lives / "1-0").read_text()) >= 1  # went on from a state
    check(out, alone["stage1"])


def _dies_once(config: TrainConfig, lives: Path) -> None:
    life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    state = latest_state(Path(config.out))
    (lives / f"{life}-{rank}").write_text(str(int(state.name) if state else 0))
    losses = Run._losses

    def deadly(self: Run, iteration: int, index: int) -> dict[str, Tensor]:
        if (life, rank, iteration) == ("0", "1", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(self, iteration, index)

    Run._losses = deadly  # type: ignore[method-assign]
    run(config)


def test_a_bad_loss_on_one_rank_stops_all(world: dict[str, Any], tmp_path: Path) -> None:
    messages = in_ranks(2, _bad_on_rank_1, make(world, tmp_path / "run", micro_batch=1, **SHARDED))
    assert "a loss term of another rank is not finite at iteration 1" in messages[0]
    assert "loss term tm_mf is not finite at iteration 1" in messages[1]


def _bad_on_rank_1(config: TrainConfig) -> str:
    losses = Run._losses

    def bad(self: Run, iteration: int, index: int) -> dict[str, Tensor]:
        scale = float("nan") if self.ranks.rank == 1 else 1.0
        return {name: value * scale for name, value in losses(self, iteration, index).items()}

    Run._losses = bad  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as error:
        run(config)
    return str(error.value)


def test_a_full_disk_in_the_background_is_one_sentence(world: dict[str, Any], tmp_path: Path) -> None:
    """A real limit on file sizes; the state before stays, and the run goes on from it."""
    out = tmp_path / "run"
    config = make(world, out, micro_batch=1, iterations=1, **SHARDED)
    in_ranks(2, run, config)
    messages = in_ranks(2, _fills_the_disk, config)
    assert all("no space left while writing" in text and "--resume" in text for text in messages)
    assert [path.name for path in (out / "state").iterdir()] == ["00000001"]
    run(make(world, out, micro_batch=1, iterations=2), resume=True)


def _fills_the_disk(config: TrainConfig) -> str:
    import resource
    from dataclasses import replace

    from students.trainer_state import DiskFullError

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(DiskFullError) as error:
        run(replace(config, iterations=2), resume=True)
    return str(error.value)


def test_layouts_that_do_not_fit_are_refused(world: dict[str, Any]) -> None:
    base = load_base(world["base"])
    assert (base.heads, base.tokens) == (2, 48)
    for settings, message in (
        ({"context": 3}, "parallel.context is 3, which does not divide the 8 ranks"),
        ({"context": 4}, "parallel.context is 4, which does not divide the 2 attention heads"),
        ({"shard": "fsdp", "shard_ranks": 3}, "parallel.shard_ranks is 3, which does not divide the 8 ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParallelConfig(**settings).check(8, base.heads, base.tokens)
    with pytest.raises(ConfigError, match=r"parallel\.shard_ranks is 2; .* needs parallel\.shard fsdp"):
        ParallelConfig(shard_ranks=2)
    with pytest.raises(ConfigError, match=r"parallel\.compile is 'inducto'; choose null or one of .*inductor"):
        ParallelConfig(compile="inducto")
    assert {f"parallel.{name}" for name in ParallelConfig.__dataclass_fields__} <= FREE_ON_RESUME


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"method.name": "dmd2v", "method.guidance": 1.5, "method.student_every": 2},
        {"method.name": "rcm", "method.derivative": "finite", "method.tangent_warmup": 0, "method.student_every": 2},
    ],
    ids=["dmd2v", "rcm"],
)
def test_plain_students_sharded(world: dict[str, Any], tmp_path: Path, method: dict[str, Any]) -> None:
    """A whole Wan transformer as the student; rCM runs it outside autocast too, so it is gathered in float32."""
    plain = {name: value for name, value in world.items() if name != "student.h"}
    settings = {"iterations": 2, "micro_batch": 2, "precision": "bf16", "optimiser__lr_gate": None}
    run(make(plain, tmp_path / "alone", method, **settings))
    in_ranks(2, run, make(plain, tmp_path / "ranks", method, **settings, **SHARDED))
    check(tmp_path / "ranks", tmp_path / "alone", relative=0.02, absolute=None)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(world: dict[str, Any], alone: dict[str, Path], tmp_path: Path) -> None:
    config = make(world, tmp_path / "run", iterations=3, micro_batch=1, parallel__compile="aot_eager", **SHARDED)
    in_ranks(2, run, config)
    check(tmp_path / "run", alone["stage1"])


def test_state_files_of_one_process_stay_as_they_were(alone: dict[str, Path]) -> None:
    state = load_state(alone["stage2"] / "state" / "00000004.pt")
    assert {"iteration", "data_hash", "base_hash", "networks", "optimisers", "average"} <= set(state)

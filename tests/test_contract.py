"""The contract of students: every shipped method and the worked example keep it, and broken ones are caught."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from students import registry
from students.base import load_base
from students.config import TrainConfig, resolve
from students.contract import ContractError, check_contract
from students.data import write_index, write_shard
from students.errors import ConfigError
from students.method import Cost
from students.registry import METHODS, method_kind
from students.run_folder import prepare
from students.settings import Layer, flatten
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
EXAMPLE = f"{ROOT / 'examples' / 'discrete_consistency.py'}:KIND"
CASES: dict[str, dict[str, Any]] = {
    "tm_mf": {"guidance": 1.5},
    "tmd_stage2": {"guidance": 1.5, "r1_weight": 0.1},
    "dmd2v": {"m": 2, "guidance": 1.5, "discriminator": "attention", "sampler": "sde"},
    "dmd2v simulated": {"m": 1, "guidance": 1.0, "discriminator": "none", "backward_simulation": True},
    "kd": {"trajectories": 4, "teacher_steps": 4, "skip": 2, "guidance": 1.5},
    "rcm": {"tangent_warmup": 2, "guidance": 1.5},
    "rcm discrete": {"consistency": "dcm", "discrete_skip": 2, "dmd_weight": 0, "tangent_warmup": 0},
    EXAMPLE: {"steps": 6, "guidance": 1.5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=(1, 2, 2))
    base, folder = load_base(str(pipeline)), tmp_path_factory.mktemp("data")
    torch.manual_seed(1)
    text = base.encode_prompts(["a red circle moves left", "a blue square moves up on a dark background"])
    write_shard(folder, 0, torch.randn(6, *base.latent_shape), text.repeat(3, 1, 1))
    write_index(folder, base_hash=base.hash, source={})
    return {
        "base": str(pipeline), "student.h": 2, "data.kind": "shards", "data.folder": str(folder), "batch": 4,
        "device": "cpu", "iterations": 12, "out": str(folder / "run"),
    }  # fmt: skip


def make(world: dict[str, Any], case: str, settings: dict[str, Any], **more: Any) -> TrainConfig:
    name = case if case == EXAMPLE else case.split()[0]
    method = {"method.name": name, **{f"method.{key}": value for key, value in settings.items()}}
    return resolve([Layer("test", {**world, **method, **more})])


def test_every_method_has_a_case() -> None:
    assert {case.split()[0] for case in CASES if case != EXAMPLE} == set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "example" if case == EXAMPLE else case)
def test_methods_keep_the_contract(world: dict[str, Any], tmp_path: Path, case: str) -> None:
    more = {"method.cache": str(tmp_path)} if case == "kd" else {}
    promises = list(check_contract(make(world, case, CASES[case], **more)))
    assert len(promises) == 7 and promises[-1].startswith("the checkpoint opens and samples")


@dataclass(frozen=True, kw_only=True)
class BrokenConfig(method_kind(EXAMPLE).config):  # type: ignore[misc]
    """Settings of the example, for methods broken on purpose."""


def broken(how: str) -> Any:
    """The example's method with one promise broken."""
    whole = method_kind(EXAMPLE).build

    def build(student: Any, teacher: Any, negative: Tensor, config: Any) -> Any:
        method: Any = whole(student, teacher, negative, config)
        losses = method.losses

        def changed(batch: Any, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
            terms = losses(batch, iteration, generator)
            if how == "global":
                terms["noise"] = terms["consistency"] * 0 + torch.rand(())
            if how == "memory":
                method.calls = getattr(method, "calls", 0) + 1
                terms["memory"] = terms["consistency"] * method.calls
            if how == "nan":
                terms["bad"] = terms["consistency"] * float("nan")
            return terms

        method.losses = changed
        if how == "critic":  # reached by the student's losses
            method.networks["fake_score"] = torch.nn.Linear(1, 1)
            weight = method.networks["fake_score"].weight
            method.losses = lambda *a: {"consistency": losses(*a)["consistency"] * weight.sum()}
        if how == "hidden":
            method.frozen = method.__dict__.pop("teacher")
        if how == "teacher":
            method.networks["fake_score"] = teacher.requires_grad_(True)
        if how == "name":
            method.networks = {"generator": student}
        if how == "nobody":
            method.turn = lambda iteration: ()
        if how == "metrics":
            method.metrics = lambda: {"distance": torch.zeros(2)}
        return method

    return build


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("global", "global random state"),
        ("memory", "keep nothing between calls"),
        ("nan", "loss term bad .* finite scalar"),
        ("critic", "reach fake_score, whose turn it is not"),
        ("teacher", "trains weights of the teacher itself"),
        ("hidden", "keeps the teacher as frozen; call it teacher"),
        ("name", r'networks\["student"\] must be'),
        ("nobody", "nothing moves at iteration 1"),
        ("metrics", "names with floats"),
        ("cost", "says 2 block forwards a pair, but 12 are run"),
    ],
)
def test_broken_methods_are_caught(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    kind = replace(method_kind(EXAMPLE), config=BrokenConfig, build=broken(how))
    if how == "cost":
        kind = replace(kind, cost=lambda config, iteration, shape: Cost(2, 4))
    monkeypatch.setitem(registry.METHODS, "broken", kind)
    with pytest.raises(ContractError, match=message):
        list(check_contract(make(world, "broken", {"steps": 6, "guidance": 1.0})))


def test_a_changed_file_is_another_method(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shutil.copy(ROOT / "examples" / "discrete_consistency.py", tmp_path / "own.py"))
    settings = {**world, "method.name": f"{file}:KIND", "out": str(tmp_path / "run")}
    before = resolve([Layer("test", settings)]).tree()
    prepare(tmp_path / "run", resolve([Layer("tree", flatten(before))]), resume=False)
    prepare(tmp_path / "run", resolve([Layer("test", settings)]), resume=True)
    file.write_text(file.read_text() + "# changed\n")
    monkeypatch.setattr(registry, "_OWN", {})  # as in a new process
    monkeypatch.setattr(registry, "_CODE", {})
    changed = resolve([Layer("test", settings)])
    assert changed.tree()["method"]["code"] != before["method"]["code"]
    with pytest.raises(ConfigError, match=r"cannot resume .* its run has method\.code"):
        prepare(tmp_path / "run", changed, resume=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:KIND", "there is no file nowhere.py"),
        (f"{ROOT / 'examples' / 'discrete_consistency.py'}:KINDS", "has no MethodKind called KINDS"),
        ("consistency", r"choose one of tm_mf, tmd_stage2, dmd2v, kd, rcm, or FILE\.py:NAME"),
    ],
)
def test_unknown_methods(world: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve([Layer("test", {**world, "method.name": name})])

"""Configuration: precedence, strictness, and every preset in examples/."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import yaml

from students.config import ENVIRONMENT, OptimiserConfig, StudentConfig, TrainConfig, load_config
from students.errors import ConfigError
from students.settings import Layer, build, flag_layer, merge
from students.tm_mf import TMMFConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMON = ("micro", "wan")
RUNS = sorted(p for p in EXAMPLES.glob("*.yaml") if p.stem not in COMMON and "matrix" not in p.stem)
"""Every training preset; a matrix is a file of tmd-eval experiment."""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.yaml", "method: {name: tm_mf}\nout: runs/x\n")


def test_each_layer_beats_the_one_before(tmp_path: Path) -> None:
    write(tmp_path / "a" / "parent.yaml", "method: {name: tm_mf, n: 3}\nout: o\nbatch: 10\nseed: 10\niterations: 10\n")
    path = write(tmp_path / "child.yaml", "base_config: a/parent.yaml\nseed: 20\niterations: 20\n")
    environ = {ENVIRONMENT + "ITERATIONS": "30", ENVIRONMENT + "OPTIMISER__LR_GATE": "1e-2", "TMD_EVAL_HOME": "/x"}
    config = load_config(path, ["iterations=40", "student.h=7"], environ)
    assert (config.method.n, config.batch, config.seed, config.iterations) == (3, 10, 20, 40)
    assert load_config(path, [], environ).iterations == 30
    assert config.optimiser.lr_gate == 0.01 and config.student.h == 7
    assert config.ema == TrainConfig.__dataclass_fields__["ema"].default  # untouched defaults stay


@pytest.mark.parametrize(
    ("line", "near"),
    [("iteration: 5", "iterations"), ("optimiser: {weight_decy: 0}", "optimiser.weight_decay"), ("h: 3", "student.h"),
     ("method: {gamma_outr: 3}", "method.gamma_outer"), ("optimizer: {lr: 1}", "optimiser.lr")],
)  # fmt: skip
def test_unknown_key_names_the_nearest_and_the_file(tmp_path: Path, line: str, near: str) -> None:
    write(tmp_path / "parent.yaml", f"method: {{name: tm_mf}}\nout: o\n{line}\n" if "method" not in line else line)
    path = write(tmp_path / "child.yaml", "base_config: parent.yaml\nmethod: {name: tm_mf}\nout: o\n")
    with pytest.raises(ConfigError, match=rf"parent\.yaml: unknown key .*did you mean {near}\?") as caught:
        load_config(path, environ={})
    assert caught.value.exit_code == 2


def test_unknown_flag_and_environment_are_named(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set: unknown key student\.hh; did you mean student\.h\?"):
        load_config(small, ["student.hh=1"], {})
    with pytest.raises(ConfigError, match=r"environment .*unknown key student\.hh; did you mean student\.h\?"):
        load_config(small, [], {ENVIRONMENT + "STUDENT__HH": "1"})
    with pytest.raises(ConfigError, match="write --set name=value"):
        load_config(small, ["student.h"], {})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("method.name=tmmf", "choose one of tm_mf, tmd_stage2"),
        ("method.n=0", r"--set: method\.n \(N\) must be at least 1, not 0"),
        ("method.m=0", r"method\.m \(M\) must be at least 1"),
        ("method.gamma_outer=0", "above 0"),
        ("student.h=0", r"student\.h \(H\) must be at least 1"),
        ("student.h=2.5", "student.h must be a whole number, not 2.5"),
        ("student.h=true", "student.h must be a whole number, not True"),
        ("student.fusion=sum", "student.fusion must be one of gated, concat, not 'sum'"),
        ("student=3", "student is a section and takes no value; it holds student.fusion"),
        ("batch=0", "batch must be at least 1"),
        ("micro_batch=7", "micro_batch must divide batch"),
        ("ema=1", "ema must lie in"),
        ("optimiser.lr=-1", "optimiser.lr must be above 0"),
        ("optimiser.lr=fast", "optimiser.lr must be a number, not 'fast'"),
        ("optimiser.betas=[0.9]", "two numbers"),
        ("optimiser.clip=0", "above 0 or null"),
        ("data.kind=shards", "name the folder"),
        ("data.folder=x", "data.kind is micro"),
        ("gradient_checkpointing=1", "true or false"),
        ("out=", "out must be a text, not None"),
        ("seed=[", "not a valid value"),
    ],
)
def test_wrong_values_say_what_is_wrong(small: Path, flag: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(small, [flag], {})


def test_a_flow_head_is_no_flag_of_a_plain_student(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", "student: {h: 3}\nout: o\n")
    path = write(tmp_path / "plain.yaml", "base_config: parent.yaml\nmethod: {name: dmd2v}\n")
    assert "student" not in load_config(path, [], {}).tree()
    with pytest.raises(ConfigError, match=r"--set student\.h: a student of dmd2v has no flow head"):
        load_config(path, ["student.h=2"], {})


def test_head_must_leave_a_backbone(small: Path) -> None:
    config = load_config(small, ["student.h=4"], {})
    config.check_base(5)
    with pytest.raises(ConfigError, match="H is 4; the flow head needs 1 to 3"):
        config.check_base(4)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "no.yaml", environ={})
    with pytest.raises(ConfigError, match=r"no config file .*named as base_config in .*a\.yaml"):
        load_config(write(tmp_path / "a.yaml", "base_config: no.yaml"), environ={})
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path / "b.yaml", "a: [1"), environ={})
    with pytest.raises(ConfigError, match="must hold"):
        load_config(write(tmp_path / "c.yaml", "- 1"), environ={})
    write(tmp_path / "d.yaml", "base_config: e.yaml")
    with pytest.raises(ConfigError, match="leads back to"):
        load_config(write(tmp_path / "e.yaml", "base_config: d.yaml"), environ={})
    with pytest.raises(ConfigError, match=r"setting method\.name is missing"):
        load_config(write(tmp_path / "f.yaml", "out: x"), environ={})
    with pytest.raises(ConfigError, match="setting out is required"):
        load_config(write(tmp_path / "g.yaml", "method: {name: tm_mf}"), environ={})


def test_a_section_keeps_its_own_defaults() -> None:
    """A section with a default instance is changed where set, and stays that instance elsewhere."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inner:
        a: int = 1
        b: Literal["x", "y"] = "x"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer:
        inner: Inner = dataclasses.field(default_factory=lambda: Inner(a=5))

    Inner.__module__ = Outer.__module__ = __name__
    globals()["Inner"] = Inner  # get_type_hints resolves names here
    assert build(Outer, merge([flag_layer(["inner.b=y"])])).inner == Inner(a=5, b="y")
    assert build(Outer, {}).inner == Inner(a=5)


def test_yaml_reads_back_as_the_same_config(small: Path, tmp_path: Path) -> None:
    config = load_config(small, ["optimiser.lr=1e-4", "data.cache=/tmp/x", "micro_batch=16"], {})
    assert config.optimiser.lr == 1e-4  # YAML 1.1 itself takes 1e-4 for a text
    assert load_config(write(tmp_path / "again.yaml", config.yaml()), environ={}) == config
    assert yaml.safe_load(config.yaml())["method"]["name"] == "tm_mf"


def test_passes_share_the_batch(small: Path) -> None:
    config = load_config(small, ["batch=24"], {})
    assert config.passes(1) == (24, 1) and config.passes(4) == (6, 1)
    assert load_config(small, ["batch=24", "micro_batch=3"], {}).passes(2) == (3, 4)
    with pytest.raises(ConfigError, match="cannot be cut into equal passes"):
        config.passes(5)


def test_rates() -> None:
    settings = OptimiserConfig(lr=1e-3, lr_discriminator=2e-3, lr_gate=0.1)
    rates = [settings.rate(name) for name in ("student", "fake_score", "discriminator", "gate")]
    assert rates == [1e-3, 1e-3, 2e-3, 0.1]


def test_build_reports_unknown_names_before_bad_values() -> None:
    layer = Layer("f.yaml", {"h": 0, "fusio": "gated"})
    with pytest.raises(ConfigError, match="unknown key fusio; did you mean fusion"):
        build(StudentConfig, merge([layer]))


BASES = {
    "micro": "micro",
    "wan1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
OWN = "examples/discrete_consistency.py:KIND"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)  # a preset names a file of its own from here


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_examples_resolve(path: Path) -> None:
    config = load_config(path, environ={})
    model, method, *rest = path.stem.split("_")
    assert config.base == BASES[model] and Path(config.out).name == path.stem
    if config.parent is not None:  # starts where another preset ends, on the same base model
        first = load_config(EXAMPLES / f"{Path(config.parent).parent.name}.yaml", environ={})
        assert config.parent == f"{first.out}/checkpoint" and config.base == first.base
        assert first.kind.flow_head == config.kind.flow_head and first.method.m == config.method.m
    if method == "tmd":
        n, h = map(int, rest[0].removeprefix("n").split("h"))
        assert (config.method.n, config.student.h) == (n, h)
        assert config.method_name == {"stage1": "tm_mf", "stage2": "tmd_stage2"}[rest[1]]
    else:
        names = {"kd": "kd", "consistency": OWN}
        assert config.method_name == (names.get(rest[-1], method) if rest else method)
        assert not config.kind.flow_head and "student" not in config.tree()
    if method == "tmd" and rest[1] == "stage2":  # with the same shape and grids
        assert config.student == first.student
        grids = ("m", "n", "gamma_outer", "gamma_inner")
        assert [getattr(config.method, g) for g in grids] == [getattr(first.method, g) for g in grids]
    if path.stem.endswith("dmd2v_m1"):
        assert first.method_name == "kd", "the KD warm-up is for M = 1"
    elif config.method_name == "dmd2v":
        assert config.parent is None and config.method.m > 1


def test_wan_examples_are_table_7() -> None:
    """Learning rates, iterations and the loss constant of the paper's Table 7; rCM's as released."""
    rows = {p.stem: load_config(p, environ={}) for p in RUNS if p.stem.startswith("wan")}
    found = {name: (c.optimiser.rate("student"), c.iterations) for name, c in rows.items()}
    assert found == {
        "wan1.3b_tmd_n2h5_stage1": (3e-5, 3000), "wan1.3b_tmd_n2h5_stage2": (1e-5, 4000),
        "wan1.3b_tmd_n4h5_stage1": (3e-5, 3000), "wan1.3b_tmd_n4h5_stage2": (1e-5, 4000),
        "wan14b_tmd_n4h5_stage1": (1e-5, 3000), "wan14b_tmd_n4h5_stage2": (1e-5, 1000),
        "wan1.3b_dmd2v_kd": (7e-5, 10000), "wan1.3b_dmd2v_m1": (1e-5, 12000), "wan1.3b_dmd2v_m2": (1e-5, 4000),
        "wan1.3b_dmd2v_m4": (1e-5, 4000), "wan14b_dmd2v_kd": (7e-5, 5000), "wan14b_dmd2v_m1": (1e-5, 5000),
        "wan14b_dmd2v_m2": (1e-5, 1000), "wan1.3b_rcm": (2e-6, 10000), "wan14b_rcm": (1e-6, 10000),
    }  # fmt: skip
    for name, config in rows.items():
        optimiser, method = config.optimiser, config.method
        assert (config.batch, config.precision, optimiser.weight_decay, optimiser.eps) == (64, "bf16", 0.01, 1e-8)
        large = "14b" in name or name == "wan1.3b_tmd_n4h5_stage2"  # the latter takes 74 GiB as plain data parallelism
        assert config.parallel.shard == ("fsdp" if large else "none")
        if "rcm" in name:
            assert optimiser.betas == (0, 0.999) and optimiser.clip is None and optimiser.warmup == 100
            assert optimiser.rate("fake_score") == (1e-7 if "14b" in name else 4e-7)
            assert (method.guidance, method.consistency_weight, method.dmd_weight, method.gamma_dmd) == (5, 100, 1, 5)
            released = (1.5, 1.6, 0, 10, 200) if "14b" in name else (0.7, 1.6, 1000, 5, 80)
            ours = (method.sigma_mean, method.sigma_deviation, method.tangent_warmup, method.student_every)
            assert (*ours, method.sigma_max) == released
            continue
        assert optimiser.betas == (0.9, 0.99)
        if config.method_name in ("dmd2v", "tmd_stage2"):
            assert {optimiser.rate(n) for n in ("fake_score", "discriminator")} == {1e-5}
            assert (method.guidance, method.gamma_dmd, method.gan_weight, method.student_every) == (5, 5, 0.03, 5)
        if config.method_name == "kd":
            assert (method.trajectories, method.skip, method.guidance, method.m) == (10_000, 10, 5, 1)
        assert method.gamma_outer == (5 if name.endswith("m4") else 10)
        if "tmd" in name:
            assert (method.m, method.gamma_inner) == (2, 10)
        if isinstance(method, TMMFConfig):
            assert (method.guidance, method.gamma_s, method.matching_share) == (3, 3, 0.75)
            assert method.c_factor == (1e-5 if "14b" in name else 1)


def test_the_table_of_examples_is_true() -> None:
    """Every run has its row, with the figures its file resolves to."""
    rows = [line for line in (EXAMPLES / "README.md").read_text().splitlines() if line.startswith("| `")]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[4:-1]] for row in rows}
    assert sorted(cells) == [path.stem for path in RUNS]
    for path in RUNS:
        config = load_config(path, environ={})
        form = f"{config.method.n}, {config.student.h}" if config.kind.flow_head else "\u2013, \u2013"
        shape, iterations, batch, rate, gpus = cells[path.stem]
        assert (gpus == "\u2013") == path.stem.startswith("micro")
        assert (
            shape == f"{config.method.m}, {form}"
            and iterations == f"{config.iterations:,}"
            and batch == str(config.batch)
        )
        assert float(rate) == config.optimiser.lr

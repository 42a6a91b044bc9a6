"""Checkpoint folders: round trips, damage, and sampling through them."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from students.base import load_base
from students.checkpoint import BaseRecord, StudentSpec, load_student, open_checkpoint, save_student
from students.errors import ConfigError
from students.sampling import VideoNoise, sample_teacher, sample_tmd
from students.times import grid, grid_of
from students.tmd import TMDStudent
from tests.tiny import TEXT_LENGTH, tiny_pipeline

PROMPTS = ["a red circle moves left", "a blue square moves up slowly", "a green circle moves down"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def make_spec(pipeline: Path, **changes: Any) -> StudentSpec:
    values: dict[str, Any] = dict(
        method="tmd", m=2, n=2, h=1, blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(load_base(str(pipeline)))
    )
    return StudentSpec(**{**values, **changes})


@pytest.fixture(scope="module")
def saved(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    student = TMDStudent.from_teacher(load_base(str(pipeline)).transformer, h=1, gate=0.0)
    folder = tmp_path_factory.mktemp("runs") / "student-1"
    save_student(folder, student, make_spec(pipeline, training={"step": 7, "config": {"lr": 1e-5}}))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(saved: Path, pipeline: Path) -> None:
    spec, student = load_student(saved)
    assert spec == make_spec(pipeline, training={"step": 7, "config": {"lr": 1e-5}})
    assert student.h == 1 and not student.training
    again = TMDStudent.from_pretrained(saved)  # diffusers' layout
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))
    record = json.loads((saved / "student.json").read_text())
    assert record["version"] == 1 and record["outer_grid"] == grid(2, 10).tolist()
    assert sorted(path.name for path in saved.parent.iterdir()) == ["student-1"]  # no debris


def test_replacing_keeps_one_whole_folder(copy: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, student = load_student(copy)
    save_student(copy, student, make_spec(pipeline, method="tm_mf"))
    assert load_student(copy)[0].method == "tm_mf"
    full = SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: ... })")

    def fail(self: object, folder: Path) -> None:
        Path(folder).mkdir()
        raise full

    monkeypatch.setattr(TMDStudent, "save_pretrained", fail)
    with pytest.raises(OSError) as caught:
        save_student(copy, student, make_spec(pipeline))
    assert caught.value.errno == errno.ENOSPC
    assert load_student(copy)[0].method == "tm_mf"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_failing_rename_brings_the_old_folder_back(
    copy: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, student = load_student(copy)
    rename = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-") and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        save_student(copy, student, make_spec(pipeline, method="tm_mf"))
    assert load_student(copy)[0].method == "tmd"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_saving_refuses_a_record_of_another_network_and_a_foreign_folder(
    saved: Path, pipeline: Path, tmp_path: Path
) -> None:
    _, student = load_student(saved)
    with pytest.raises(ConfigError, match="H is 2, the network has 1"):
        save_student(tmp_path / "new", student, make_spec(pipeline, h=2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a checkpoint folder"):
        save_student(tmp_path, student, make_spec(pipeline))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"h": 0}, "H is 0"),
        ({"h": 4}, "H is 4"),
        ({"m": 0}, "M is 0"),
        ({"n": 0}, "N is 0"),
        ({"n": 2.5}, "n must be a whole number"),
        ({"fusion": "sum"}, "fusion 'sum'"),
        ({"fusion": "concat"}, "fusion is concat, the network has gated"),
        ({"h": 2}, "H is 2, the network has 1"),
        ({"gamma_outer": "ten", "outer_grid": []}, "wrong type"),
        ({"outer_grid": [0, 0.9, 0.5]}, "strictly increasing"),
        ({"outer_grid": [0, 0.9]}, "1 steps, but 2"),
        ({"inner_gird": []}, "unknown key 'inner_gird'; did you mean 'inner_grid'"),
        ({"version": 2}, "version 2"),
        ({"base": {"ref": "micro"}}, "lacks the key 'hash'"),
        ({"base": "micro"}, "base must be an object"),
    ],
)
def test_bad_records_are_refused(copy: Path, changes: dict[str, Any], what: str) -> None:
    edit(copy, **changes)
    with pytest.raises(ConfigError, match=what) as caught:
        load_student(copy)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(copy: Path, tmp_path: Path) -> None:
    weights = copy / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for kept in (whole[:-1], whole[:20], b""):
        weights.write_bytes(kept)
        with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
            open_checkpoint(copy)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        open_checkpoint(copy)
    weights.write_bytes(whole)
    for name in ("config.json", "student.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text[: len(text) // 2])
        with pytest.raises(ConfigError, match=rf"{name} is not valid JSON"):
            open_checkpoint(copy)
        (copy / name).unlink()
        with pytest.raises(ConfigError, match=name):
            open_checkpoint(copy)
        (copy / name).write_text(text)
    with pytest.raises(ConfigError, match="no folder"):
        open_checkpoint(tmp_path / "absent")
    open_checkpoint(copy)


def test_weights_that_do_not_fit_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for changes in ({"fusion": "concat"}, {"transformer": {**config["transformer"], "ffn_dim": 56}}, {"h": "x"}):
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=str(copy)):
            load_student(copy)


def test_a_changed_base_is_refused(saved: Path, pipeline: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(saved, tmp_path / "copy")
    record = json.loads((saved / "student.json").read_text())["base"]
    edit(tmp_path / "copy", base={**record, "ref": str(other)})
    with pytest.raises(ConfigError, match="restore the base model"):
        open_checkpoint(tmp_path / "copy")


def test_student_samples_algorithm_1(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert (checkpoint.kind, checkpoint.name, checkpoint.ref) == ("student", "student-1", str(saved.resolve()))
    base, student = checkpoint.base, checkpoint.student
    assert student is not None
    videos = checkpoint.sample(PROMPTS[:2], [4, 5])
    assert videos.dtype == torch.uint8 and videos.shape == (2, 9, 32, 32, 3) and videos.numpy().std() > 5
    noise = VideoNoise([4, 5], base.latent_shape)
    x1 = noise.draw()
    latents = sample_tmd(student, base.encode_prompts(PROMPTS[:2]), x1, grid(2, 10), grid(2, 10), noise.draw)
    assert torch.equal(videos, base.decode(latents))
    torch.testing.assert_close(checkpoint.sample(PROMPTS[:2], [4, 5], outer_grid=grid(2, 10)), videos)
    for changed in (dict(m=1), dict(n=4), dict(outer_grid=torch.tensor([0, 0.5, 0.999]))):
        assert not torch.equal(checkpoint.sample(PROMPTS[:2], [4, 5], **changed), videos)


def test_a_video_depends_on_its_seed_only(saved: Path, pipeline: Path) -> None:
    for ref in (saved, pipeline):
        checkpoint = open_checkpoint(ref)
        m = 2
        together = checkpoint.sample(PROMPTS, [4, 5, 6], m=m).int()
        alone = checkpoint.sample(PROMPTS[1:2], [5], m=m).int()
        assert (together[1:2] - alone).abs().max() <= 1  # sums may be taken in another order
        assert (checkpoint.sample(PROMPTS[1:2], [6], m=m).int() - alone).abs().max() > 5


def test_teacher_and_undistilled_settings(pipeline: Path) -> None:
    checkpoint = open_checkpoint(str(pipeline))
    assert checkpoint.kind == "teacher" and checkpoint.spec is None and checkpoint.hash == checkpoint.base.hash
    settings = checkpoint.settings()
    assert settings == {
        "method": "teacher", "role": "teacher", "m": 50, "n": None, "h": None, "blocks": 4, "effective_nfe": 50.0,
        "forward_passes": 100.0, "guidance": 3.0, "sampler": "UniPCMultistepScheduler(flow_shift=3)",
        "text_length": TEXT_LENGTH,
    }  # fmt: skip
    few = checkpoint.settings(m=2, guidance=1)
    assert (few["role"], few["effective_nfe"], few["forward_passes"]) == ("undistilled", 2.0, 2.0)
    base = checkpoint.base
    noise, text = VideoNoise([4], base.latent_shape).draw(), base.encode_prompts(PROMPTS[:1])
    latents = sample_teacher(base, text, base.encode_prompts([""]), noise, 3, 3.0)
    assert torch.equal(checkpoint.sample(PROMPTS[:1], [4], m=3), base.decode(latents))


def test_student_settings(saved: Path) -> None:
    settings = open_checkpoint(saved).settings(m=4, n=3)
    assert settings["effective_nfe"] == settings["forward_passes"] == 4 * (1 + 2 * 1 / 4)
    assert (settings["role"], settings["h"], settings["guidance"], settings["sampler"]) == ("student", 1, 1.0, "tmd")


def test_settings_at_other_times(saved: Path, pipeline: Path) -> None:
    student = open_checkpoint(saved)
    times = grid_of((0.999, 0.7, 0.25))
    settings = student.settings(n=3, outer_grid=times)
    assert settings == student.settings(m=3, n=3) | {"sampler": "tmd at 0.999, 0.7, 0.25"}
    assert settings == student.settings(m=3, n=3, outer_grid=times)
    with pytest.raises(ConfigError, match="M = 3"):
        student.settings(m=2, outer_grid=times)
    with pytest.raises(ConfigError, match="strictly increasing"):
        student.settings(outer_grid=grid_of((0.5, 0.7)))
    with pytest.raises(ConfigError, match="student"):
        open_checkpoint(pipeline).settings(outer_grid=grid_of((0.999, 0.7)))


def test_settings_that_do_not_suit_are_refused(saved: Path, pipeline: Path) -> None:
    student, teacher = open_checkpoint(saved), open_checkpoint(pipeline)
    for checkpoint, arguments in (
        (student, dict(m=0)), (student, dict(n=0)), (student, dict(guidance=3.0)), (teacher, dict(n=2)),
        (teacher, dict(m=0)), (teacher, dict(outer_grid=grid(2, 10))), (student, dict(m=1, outer_grid=grid(2, 10))),
        (student, dict(outer_grid=torch.tensor([0, 0.9, 0.5]))),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            checkpoint.sample(PROMPTS[:1], [1], **arguments)  # type: ignore[arg-type]
    for prompts, seeds in (([], []), (PROMPTS, [1])):
        with pytest.raises(ConfigError, match="seed"):
            student.sample(prompts, seeds)


def test_hash_changes_with_weights_and_record(saved: Path, copy: Path) -> None:
    first = open_checkpoint(saved).hash
    assert open_checkpoint(copy).hash == first
    edit(copy, gamma_outer=5.0)
    assert open_checkpoint(copy).hash != first


def test_micro_is_not_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").mkdir()
    monkeypatch.setattr("students.base.micro_folder", lambda: pipeline)
    checkpoint = open_checkpoint("micro")
    assert (checkpoint.ref, checkpoint.name, checkpoint.kind) == ("micro", "micro", "teacher")


def test_explicit_grids_are_kept_and_others_recomputed(pipeline: Path) -> None:
    spec = make_spec(pipeline, outer_grid=(0, 0.5, 0.9), gamma_inner=1)
    assert spec.outer(None).tolist() == spec.outer(2).tolist() == [0, 0.5, 0.9]
    assert torch.equal(spec.outer(3), grid(3, 10)) and torch.equal(spec.inner(4), grid(4, 1))
    assert replace(spec, method="tm_mf").outer_grid == (0, 0.5, 0.9)

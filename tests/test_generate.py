"""A video set is what a plain loop over the sampler gives, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
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
import typer
import yaml
from typer.testing import CliRunner

from students.base import load_base
from students.checkpoint import BaseRecord, Checkpoint, StudentSpec, open_checkpoint, save_student
from students.errors import ConfigError, TmdError
from tests.tiny import TEXT_LENGTH, tiny_pipeline, tiny_transformer
from tmd_eval import files, video_set
from tmd_eval.commands.generate import generate as command
from tmd_eval.generate import LINE_STRIDE, Settings, generate_run, plan
from tmd_eval.prompts import PromptSet
from tmd_eval.video import read_video

PROMPTS = PromptSet(name="three.txt", prompts=("a red circle", "../a/blue\nsquare", "green"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def run(model: Any, out: Path, **options: Any) -> Path:
    return generate_run(model, PROMPTS, out, **{"m": 2, "samples_per_prompt": 2, "batch_size": 2, **options})


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pixels(out: Path) -> dict[str, str]:
    return {row["video"]: row["sha256"] for row in manifest(out)}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}


def test_each_video_is_the_sampler_s_for_its_prompt_and_seed(model: Checkpoint, tmp_path: Path) -> None:
    out = run(model, tmp_path / "run", seed=7, command="tmd-eval generate ...")
    rows = manifest(out)
    assert [row["video"] for row in rows] == [f"{line:05d}-{index}.mp4" for line in range(3) for index in range(2)]
    assert [row["seed"] for row in rows] == [
        7,
        8,
        7 + LINE_STRIDE,
        8 + LINE_STRIDE,
        7 + 2 * LINE_STRIDE,
        8 + 2 * LINE_STRIDE,
    ]
    for row in rows:
        frames, fps = read_video(out / "videos" / row["video"])
        expected = model.sample([row["prompt"]], [row["seed"]], m=2)[0].numpy()
        # one for the colour conversion, one for sums in another order at another batch size
        assert np.abs(frames.astype(int) - expected).max() <= 2
        assert frames.shape == (row["frames"], row["height"], row["width"], 3) and fps == row["fps"] == 8
        assert row["prompt"] == row["text"] == PROMPTS.prompts[row["line"]] and row["seconds"] > 0
        assert row["checkpoint_hash"] == model.hash
    assert len(set(pixels(out).values())) == 6  # no two videos share prompt and noise
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["command"] == "tmd-eval generate ..." and config["size"] == [32, 32] and config["frames"] == 9
    assert config["checkpoint"]["hash"] == model.hash and config["checkpoint"]["m"] == 2
    assert config["checkpoint"]["forward_passes"] == 4 and config["checkpoint"]["role"] == "undistilled"
    assert config["prompts"] == {"name": "three.txt", "sha256": PROMPTS.sha256, "count": 3}
    assert {"code_revision", "device", "packages", "created"} <= set(config)
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == ["generate_started", "generate_finished"]
    assert not list(tmp_path.glob("**/.tmp-*"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_text_is_encoded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    model = open_checkpoint(folder)
    encode, seen = model.base.encode_prompts, []

    def counted(texts: list[str]) -> Any:
        seen.extend(texts)
        return encode(texts)

    monkeypatch.setattr(model.base, "encode_prompts", counted)
    run(model, tmp_path, samples_per_prompt=5, guidance=guidance, m=1)
    negative = [model.base.negative_prompt] if guidance > 1 else []
    # the one more "" loads the text encoder before the clock starts; it is the negative prompt of the tiny model too
    assert sorted(seen) == sorted([*PROMPTS.prompts, "", *negative])


def test_vbench_names_and_seeds(model: Checkpoint, tmp_path: Path) -> None:
    chosen = PromptSet(name="vbench", prompts=("a red.", "blue"), named_by_prompt=True)
    rows = manifest(generate_run(model, chosen, tmp_path, m=1, samples_per_prompt=2, seed=3))
    assert [(row["video"], row["seed"]) for row in rows] == [
        ("a red.-0.mp4", 3), ("a red.-1.mp4", 4), ("blue-0.mp4", 3), ("blue-1.mp4", 4),
    ]  # fmt: skip


def test_a_rerun_makes_only_what_is_missing_or_damaged(model: Checkpoint, tmp_path: Path) -> None:
    out = run(model, tmp_path, batch_size=1)  # sums in another order at another batch size may move a pixel by one
    before, config, first = times(out), (out / "config.yaml").read_bytes(), pixels(out)
    run(model, out, batch_size=1, command="another")
    assert times(out) == before and (out / "config.yaml").read_bytes() == config
    (out / "videos" / "00001-0.mp4").write_bytes(b"damaged")
    (out / "videos" / "00002-1.mp4").unlink()
    (out / "scores").mkdir()
    (out / "scores" / "summary.json").write_text("{}")
    run(model, out, batch_size=1)
    after = times(out)
    assert {name for name in after if after[name] != before.get(name)} == {"00001-0.mp4", "00002-1.mp4"}
    assert pixels(out) == first
    assert not (out / "scores" / "summary.json").exists()  # it was about other files


def test_limit_grows_without_making_anything_twice(model: Checkpoint, tmp_path: Path) -> None:
    out = run(model, tmp_path, limit=3)
    before = times(out)
    assert len(before) == 3
    run(model, out)
    after = times(out)
    assert len(after) == 6 and {name: after[name] for name in before} == before
    run(model, out, limit=2)
    assert times(out) == after and len(manifest(out)) == 6


def test_changed_settings_never_reuse_a_video(
    model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(model, tmp_path / "a")
    old = {row["video"]: row["key"] for row in manifest(out)}
    for change in ({"m": 3}, {"guidance": 1.0}, {"seed": 1}):
        run(model, out, **change)
        new = {row["video"]: row["key"] for row in manifest(out)}
        assert all(new[video] != old[video] for video in old), change
        assert "6 videos" in capsys.readouterr().err
        assert pixels(out) == pixels(run(model, tmp_path / f"fresh{sorted(change)}", **change))
        old = new
    other = PromptSet(name="two", prompts=("a red circle", "up"))
    generate_run(model, other, out, m=2, samples_per_prompt=2, seed=1)
    assert sorted(times(out)) == sorted(pixels(out)) == ["00000-0.mp4", "00000-1.mp4", "00001-0.mp4", "00001-1.mp4"]


def test_other_times_of_a_student(folder: Path, tmp_path: Path) -> None:
    record = StudentSpec(
        method="dmd2-v", m=2, h=None, blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(load_base(str(folder)))
    )
    student = tmp_path / "student"
    save_student(student, tiny_transformer(patch=(1, 1, 1), seed=3), record)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    call = ["--ckpt", str(student), "--prompt", "a red circle", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, call).exit_code == 0
    (own,) = manifest(tmp_path / "run")
    assert CliRunner().invoke(app, [*call, "--times", "0.5,0.999"]).exit_code == 0
    (other,) = manifest(tmp_path / "run")  # never mistaken for the video at the student's own times
    assert own["sampler"] == "ode" and other["sampler"] == "ode at 0.999, 0.5" and own["sha256"] != other["sha256"]
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["checkpoint"]
    assert (settings["m"], settings["sampler"]) == (2, "ode at 0.999, 0.5")
    frames = open_checkpoint(student).sample(
        ["a red circle"], [0], outer_grid=torch.tensor([0, 0.5, 0.999], dtype=torch.float64)
    )
    made, _ = read_video(tmp_path / "run" / "videos" / other["video"])
    assert np.abs(made.astype(int) - frames[0].numpy()).max() <= 2  # the colour conversion
    refused = CliRunner().invoke(app, [*call, "--times", "0.5,0.999", "--m", "3"])
    assert isinstance(refused.exception, ConfigError) and "2 times" in str(refused.exception)


def test_other_weights_change_every_key(model: Checkpoint, tmp_path: Path) -> None:
    out = run(model, tmp_path / "run")
    first = {row["key"] for row in manifest(out)}
    run(str(tiny_pipeline(tmp_path / "other", seed=1)), out, device="cpu")
    assert first.isdisjoint(row["key"] for row in manifest(out)) and len(manifest(out)) == 6


def test_a_teacher_s_negative_prompt_and_scheduler_are_in_its_keys(folder: Path, tmp_path: Path) -> None:
    """The base's hash is of weights only; without guidance the negative prompt does nothing."""

    def keys(source: Path, guidance: float) -> set[str]:
        settings = Settings(m=2, guidance=guidance)
        return {unit.key for unit in plan(open_checkpoint(source), PROMPTS, tmp_path / "run", settings).units}

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert keys(other, 3.0) == keys(folder, 3.0)
    facts = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps({**facts, "negative_prompt": "another"}))
    assert keys(other, 3.0).isdisjoint(keys(folder, 3.0)) and keys(other, 1.0) == keys(folder, 1.0)
    scheduler = other / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    assert config.get("solver_order", 2) == 2
    scheduler.write_text(json.dumps({**config, "solver_order": 1}))
    assert keys(other, 1.0).isdisjoint(keys(folder, 1.0))


def test_a_student_s_keys_stay_as_they_were(folder: Path, tmp_path: Path) -> None:
    record = StudentSpec(
        method="dmd2-v", m=2, h=None, blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(load_base(str(folder)))
    )
    save_student(tmp_path / "student", tiny_transformer(patch=(1, 1, 1), seed=3), record)
    student = open_checkpoint(tmp_path / "student")
    base = student.base
    decisive = {
        "checkpoint": student.hash, "base": base.hash, "dtype": str(base.dtype), **student.settings(),
        "size": [base.height, base.width], "frames": base.frames, "fps": base.fps,
    }  # fmt: skip
    (first, *_) = plan(student, PROMPTS, tmp_path / "run", Settings()).units
    assert first.key == video_set.unit_key(decisive, PROMPTS.prompts[0], 0)


def test_ranks_may_probe_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = Path.touch

    def touched_and_removed(path: Path, *args: Any, **options: Any) -> None:
        touch(path, *args, **options)
        path.unlink()  # by the other rank

    monkeypatch.setattr(Path, "touch", touched_and_removed)
    video_set.check_writable(tmp_path / "run")
    assert not list((tmp_path / "run" / "videos").iterdir())


def test_a_half_written_row_and_debris_are_cleared(model: Checkpoint, tmp_path: Path) -> None:
    out = run(model, tmp_path, batch_size=1)
    whole, first = (out / "manifest.jsonl").read_bytes(), pixels(out)
    for cut in (1, 40):  # within the last row; only its newline is lost
        (out / "manifest.jsonl").write_bytes(whole[:-cut])
        (out / "videos" / ".tmp-0123").write_bytes(b"half")
        run(model, out, batch_size=1)
        assert pixels(out) == first and not list(out.glob("**/.tmp-*"))
    lines = whole.split(b"\n")
    (out / "manifest.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:30], *lines[2:]]))
    with pytest.raises(ConfigError, match="Line 2"):
        run(model, out)


def test_kill_9_loses_nothing(folder: Path, model: Checkpoint, tmp_path: Path) -> None:
    out, prompts = tmp_path / "run", tmp_path / "p.txt"
    prompts.write_text("".join(f"a red circle moves {i}\n" for i in range(40)))
    script = (
        "import sys; from pathlib import Path; from tmd_eval.generate import generate_run; "
        "from tmd_eval.prompts import load_prompts; "
        "generate_run(sys.argv[1], load_prompts(sys.argv[2]), Path(sys.argv[3]), m=2, batch_size=1, device='cpu')"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(prompts), str(out)],
        cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        if (out / "manifest.jsonl").exists() and len(video_set.read_manifest(out)) >= 3:
            break
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    kept = times(out)
    rows = video_set.read_manifest(out)
    assert 3 <= len(rows) < 40 and all(video_set.is_whole(out, row) for row in rows)
    generate_run(model, video_set_prompts(prompts), out, m=2, batch_size=1)
    after = times(out)
    assert len(after) == 40 and all(after[row["video"]] == kept[row["video"]] for row in rows)


def video_set_prompts(path: Path) -> PromptSet:
    return PromptSet(name=path.name, prompts=tuple(path.read_text().splitlines()))


@pytest.mark.parametrize("where", ["video", "manifest"])
def test_a_full_disk_costs_nothing(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    out, calls = tmp_path / "run", 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        calls += (where == "manifest") == name.endswith("manifest.jsonl") and (
            where == "manifest" or "/videos/" in name
        )
        if calls > (1 if where == "manifest" else 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TmdError, match="disk is full") as caught:
        run(model, out, batch_size=1)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    monkeypatch.undo()
    rows = manifest(out)
    assert rows and all(video_set.is_whole(out, row) for row in rows)
    run(model, out, batch_size=1)
    assert pixels(out) == pixels(run(model, tmp_path / "fresh", batch_size=1))
    assert not list(out.glob("**/.tmp-*"))


def test_folders_that_cannot_be_used_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.yaml").write_text("optimiser: adamw\n")
    for name in ("file", "training"):
        with pytest.raises(ConfigError, match=name):  # "absent" is not even opened
            generate_run("absent", PROMPTS, tmp_path / name)
    assert (tmp_path / "training" / "config.yaml").read_text() == "optimiser: adamw\n"


def test_two_processes_do_not_share_a_folder(model: Checkpoint, tmp_path: Path) -> None:
    with video_set.locked(tmp_path), pytest.raises(ConfigError, match="Another"):
        run(model, tmp_path)


@pytest.mark.parametrize(
    "options", [{"samples_per_prompt": 0}, {"seed": -1}, {"limit": 0}, {"batch_size": 0}, {"m": 0}, {"n": 2}]
)
def test_bad_settings(model: Checkpoint, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        run(model, tmp_path, **options)


def test_command(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    call = [
        "--ckpt",
        str(folder),
        "--prompt",
        "a red circle",
        "--m",
        "1",
        "--samples-per-prompt",
        "3",
        "--device",
        "cpu",
    ]
    out = tmp_path / "run"
    dry = CliRunner().invoke(app, [*call, "--out", str(out), "--dry-run"])
    assert dry.exit_code == 0 and "1 prompts x 3 samples: 3 videos, 0 present, 3 missing" in dry.stdout
    assert not out.exists()
    done = CliRunner().invoke(app, [*call, "--out", str(out), "--json"])
    result = json.loads(done.stdout)
    assert result.pop("seconds_per_video") > 0
    assert result == {
        "run": str(out), "prompts": 1, "samples_per_prompt": 3, "videos": 3, "present": 3, "missing": 0, "changed": 0,
        "made": 3,
    }  # fmt: skip
    for wrong in ([], ["--prompt", "a", "--prompts", "micro"]):
        failed = CliRunner().invoke(app, ["--ckpt", str(folder), "--out", str(out), *wrong])
        assert isinstance(failed.exception, ConfigError)

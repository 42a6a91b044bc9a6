"""``tmd-eval ckpt``: published students in, students out as diffusers pipelines, and round trips to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from students.base import load_base
from students.checkpoint import BaseRecord, StudentSpec, open_checkpoint, save_student
from students.errors import ConfigError
from students.pipeline import TMDPipeline
from students.sampling import VideoNoise
from students.tmd import TMDStudent
from students.weights import file_hash
from tests.test_foreign import fastgen, rcm
from tests.tiny import TEXT_LENGTH, tiny_pipeline, tiny_transformer
from tmd_eval.checkpoints import convert, export, inspect
from tmd_eval.commands.ckpt import app
from tmd_eval.generate import generate_run
from tmd_eval.prompts import single_prompt

PROMPTS = ["a red circle moves left", "a blue square moves up slowly"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=(1, 2, 2))


def student_folder(folder: Path, pipeline: Path, *, plain: bool, **changes: Any) -> Path:
    base = load_base(str(pipeline))
    shape: dict[str, Any] = {"m": 2} if plain else {"m": 2, "n": 2, "h": 1}
    spec = StudentSpec(
        method="dmd2v" if plain else "tmd", blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(base),
        training={"step": 7, "note": "``` |"}, **{**shape, **changes},
    )  # fmt: skip
    torch.manual_seed(1)
    network = tiny_transformer(seed=5) if plain else TMDStudent.from_teacher(base.transformer, h=1, gate=0.0)
    save_student(folder, network, spec)
    return folder


@pytest.mark.parametrize("plain, sampler", [(True, "ode"), (True, "sde"), (False, "")])
def test_round_trip_to_the_bit(pipeline: Path, tmp_path: Path, plain: bool, sampler: str) -> None:
    folder = student_folder(tmp_path / "student", pipeline, plain=plain, sampler=sampler)
    row = export(str(folder), tmp_path / "exported")
    assert row["kind"] == ("plain student" if plain else "TMD student") and row["layout"].startswith("pipeline folder")
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "exported")
    assert after.spec == before.spec and after.settings() == before.settings()
    assert after.hash == before.hash == row["hash"]
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "student.json"):
        assert file_hash(folder / name) == file_hash(tmp_path / "exported" / "transformer" / name)
    assert torch.equal(before.sample(PROMPTS, [4, 5]), after.sample(PROMPTS, [4, 5]))
    export(str(tmp_path / "exported"), tmp_path / "again")  # an export of an export is the same
    assert open_checkpoint(tmp_path / "again").hash == before.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "exported", "student"]  # no debris


@pytest.mark.parametrize("plain", [True, False])
def test_an_exported_student_goes_on_with_the_run(pipeline: Path, tmp_path: Path, plain: bool) -> None:
    """The unit key is the same by checkpoint folder and by export, unless the export's VAE is another one."""
    folder, out, run = student_folder(tmp_path / "student", pipeline, plain=plain), tmp_path / "out", tmp_path / "run"
    export(str(folder), out)
    export(str(out), tmp_path / "again")
    bases = [open_checkpoint(path).base.hash for path in (folder, out, tmp_path / "again")]
    assert set(bases) == {load_base(str(pipeline)).hash} and load_base(str(out)).hash != bases[0]
    prompts = single_prompt(PROMPTS[0])
    generate_run(folder, prompts, run, device="cpu")
    manifest = (run / "manifest.jsonl").read_text()
    generate_run(out, prompts, run, device="cpu")
    assert (run / "manifest.jsonl").read_text() == manifest  # with its seconds: nothing was made
    vae = out / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(vae).items()}, vae)
    assert open_checkpoint(out).base.hash not in bases
    generate_run(out, prompts, run, device="cpu")
    row, old = (json.loads(text) for text in ((run / "manifest.jsonl").read_text(), manifest))
    assert row["checkpoint_hash"] == old["checkpoint_hash"] and row["key"] != old["key"]


def test_plain_student_in_diffusers(pipeline: Path, tmp_path: Path) -> None:
    folder = student_folder(tmp_path / "student", pipeline, plain=True, m=4, gamma_outer=5.0)
    export(str(folder), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["dmd2_config"] == {
        "num_inference_steps": 4, "denoising_timesteps": [999, 937.5, 833.333333333, 625], "solver": "ode",
        "guidance_scale": 1.0,
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and card.count("```") % 2 == 0
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    scope: dict[str, Any] = {}
    exec("\n".join(code.splitlines()[:-1]), scope)  # the model card's own lines, but for the last
    served = scope["pipeline"]
    assert isinstance(served, WanPipeline)
    served.set_progress_bar_config(disable=True)
    checkpoint = open_checkpoint(folder)
    noise = VideoNoise([3], checkpoint.base.latent_shape)
    latents = served(
        PROMPTS[0], height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        latents=noise.draw(), max_sequence_length=TEXT_LENGTH, output_type="latent",
    ).frames  # fmt: skip
    text = checkpoint.base.encode_prompts(PROMPTS[:1])
    torch.testing.assert_close(checkpoint.latents(text, text, [3]), latents, atol=2e-5, rtol=0)


def test_tmd_student_as_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    folder = student_folder(tmp_path / "student", pipeline, plain=False)
    export(str(folder), tmp_path / "out")
    loaded = TMDPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, DiffusionPipeline) and isinstance(loaded.transformer, TMDStudent)
    checkpoint = open_checkpoint(folder)
    ours = checkpoint.sample(PROMPTS, [4, 5])
    assert torch.equal(torch.from_numpy(loaded(PROMPTS, seed=4).frames), ours)
    assert torch.equal(loaded(PROMPTS, seed=[4, 5], output_type="pt").frames, ours)
    one = loaded(PROMPTS[0], seed=4, m=1, n=3, output_type="pt").frames
    assert torch.equal(one, checkpoint.sample(PROMPTS[:1], [4], m=1, n=3))
    assert loaded(PROMPTS[0], height=16, width=48, num_frames=5, output_type="pt").frames.shape == (1, 5, 16, 48, 3)
    for wrong in (dict(height=20), dict(num_frames=8), dict(seed=[1, 2])):
        with pytest.raises(ConfigError):
            loaded(PROMPTS[0], **wrong)
    loaded.save_pretrained(tmp_path / "saved")
    again = TMDPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(PROMPTS, seed=4, output_type="pt").frames, ours)


def test_bf16_weights_stay_as_they_are(pipeline: Path, tmp_path: Path) -> None:
    network = tiny_transformer(seed=5).to(torch.bfloat16)
    torch.save(rcm(network.state_dict()), tmp_path / "rCM.pt")
    spec, digest = convert(str(tmp_path / "rCM.pt"), tmp_path / "student", base=str(pipeline))
    assert (spec.method, spec.m, spec.sampler, spec.guidance) == ("rcm", 4, "sde", 1.0)
    row = inspect(str(tmp_path / "student"))
    assert row["dtypes"] == ["bfloat16", "float32"] and row["hash"] == digest and "rCM" in row["schedule"]
    opened = open_checkpoint(tmp_path / "student").network.state_dict()
    assert all(torch.equal(opened[name], tensor.float()) for name, tensor in network.state_dict().items())
    exported = export(str(tmp_path / "rCM.pt"), tmp_path / "exported", base=str(pipeline))
    assert exported["hash"] == digest  # straight, or by way of a checkpoint folder: the same
    again, _ = convert(str(tmp_path / "exported"), tmp_path / "back")
    assert again.outer_grid == pytest.approx(spec.outer_grid)
    back = open_checkpoint(tmp_path / "back").network.state_dict()
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in network.state_dict().items())


def test_a_pipeline_with_gates_of_sparse_attention(pipeline: Path, tmp_path: Path) -> None:
    """FastWan's published folder: diffusers' names, FastVideo's class, gates that diffusers' network lacks."""
    folder = Path(shutil.copytree(pipeline, tmp_path / "FastWan"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanDMDPipeline"}))
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    gates = {f"blocks.{i}.to_gate_compress.bias": torch.zeros(24) for i in range(4)}
    save_file({**load_file(path), **gates}, path)
    row = inspect(str(folder))
    assert (row["kind"], row["m"], row["guidance"], row["sampler"]) == ("plain student", 3, 1.0, "sde")
    assert "gates are left out" in row["notes"][0] and row["parameters"] == inspect(str(pipeline))["parameters"]
    video = open_checkpoint(folder).sample(PROMPTS[:1], [1])
    export(str(folder), tmp_path / "out")
    convert(str(folder), tmp_path / "student")
    for again in ("out", "student"):
        assert torch.equal(open_checkpoint(tmp_path / again).sample(PROMPTS[:1], [1]), video)


def test_teacher_out_and_in(pipeline: Path, tmp_path: Path) -> None:
    row = export(str(pipeline), tmp_path / "out")
    assert (row["kind"], row["guidance"], row["sampler"]) == ("teacher", 3.0, "UniPCMultistepScheduler")
    before, after = open_checkpoint(pipeline), open_checkpoint(tmp_path / "out")
    assert before.hash == after.hash
    assert torch.equal(before.sample(PROMPTS[:1], [1], m=2), after.sample(PROMPTS[:1], [1], m=2))


def test_commands(pipeline: Path, tmp_path: Path) -> None:
    def call(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads(result.stdout)

    file = tmp_path / "0006000.pth"
    torch.save(fastgen(tiny_transformer(seed=5).state_dict()), file)
    row = call("inspect", str(file))
    assert (row["layout"], row["m"], row["sampler"], row["guidance"], row["base"]) == ("fastgen", 4, "ode", 1.0, None)
    assert row["outer_grid"] == [0, 0.624, 0.833, 0.937, 0.999] and any("logvar" in note for note in row["notes"])
    row = call(
        "convert", str(file), "--base", str(pipeline), "--times", "0.9,0.999", "--sampler", "sde", "--method", "mine",
        "--out", str(tmp_path / "mine"),
    )  # fmt: skip
    assert (row["method"], row["m"], row["sampler"], row["kind"]) == ("mine", 2, "sde", "plain student")
    assert call("export", str(tmp_path / "mine"), "--out", str(tmp_path / "out"))["hash"] == row["hash"]
    assert call("inspect", str(pipeline))["kind"] == "teacher"
    text = CliRunner().invoke(app, ["inspect", str(tmp_path / "mine")]).stdout
    assert "plain student" in text and "0.999" in text
    for words, what in (
        (("convert", str(tmp_path / "mine"), "--out", str(tmp_path / "x")), "already"),
        (("convert", str(pipeline), "--out", str(tmp_path / "x")), "--times"),
        (("convert", str(file), "--sampler", "ode", "--out", str(tmp_path / "x")), "--times"),
        (("convert", str(file), "--times", "a", "--out", str(tmp_path / "x")), "numbers with commas"),
        (
            ("convert", str(file), "--times", "0.9,1.5", "--base", str(pipeline), "--out", str(tmp_path / "x")),
            r"\[0, 1\]",
        ),
        (("export", str(pipeline), "--out", str(tmp_path / "out")), "exists"),
        (("inspect", str(tmp_path / "absent")), "no folder"),
    ):
        with pytest.raises(ConfigError, match=what):
            CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert not (tmp_path / "x").exists()

"""VBench-Long: the same cuts, means and fusion as the wheel's own code, and one sentence where something is missing."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from students.errors import ConfigError, EnvironmentMissingError
from tests.test_vbench import FLICKER, clip, invoke, small_info, vbench_environment  # noqa: F401 - fixtures
from tests.test_vbench_fast import random_weights  # noqa: F401 - fixture
from tmd_eval.vbench import environment, long, plan, runner, weights
from tmd_eval.vbench import score as scoring
from tmd_eval.vbench.plan import Selection, Video
from tmd_eval.vbench.score import Options
from tmd_eval.vbench.summary import Scored, sums_of
from tmd_eval.video import read_video, write_video

OFFICIAL = """
import importlib.util, json, os, sys, types
from pathlib import Path

import torch, torchvision.io

worker, work, dinov2 = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
spec = importlib.util.spec_from_file_location("worker", worker)
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)


class Stub(types.ModuleType):
    def __getattr__(self, name):
        return object


missing = "scenedetect scenedetect.detectors scenedetect.video_splitter moviepy moviepy.editor"
for name in missing.split():
    sys.modules[name] = Stub(name)
written = {}

def keep(path, frames, fps):
    written[os.path.basename(path)] = len(frames), fps, frames


torchvision.io.write_video = keep
from vbench2_beta_long import subject_consistency, utils

utils.split_video_into_clips(str(work / "videos" / "long-0.mp4"), str(work / "official"), 2)
cuts = {name: [count, fps] for name, (count, fps, _) in sorted(written.items())}
request = json.loads((work / "split.json").read_text())
print(json.dumps(ours.split(request)))
from vbench.utils import load_video

first = request["videos"][0]
gaps = []
for name in first["names"]:  # the pieces show what the official ones would
    shown = load_video(os.path.join(first["folder"], name), return_tensor=False)
    gaps.append(float(abs(shown.astype(float) - written[name][2].numpy()).mean()))
names = [os.path.join(first["folder"], name) for name in first["names"]]
firsts = load_video(os.path.join(first["folder"], first["first_frames"]), return_tensor=False)
sys.path.insert(0, dinov2)
from dinov2.models.vision_transformer import vit_base

model = vit_base()
path = os.path.join(first["folder"], first["first_frames"])
_, rows = subject_consistency.subject_consistency_dinov2(model, [path], torch.device("cpu"), False)
result = str(work / "first.jsonl")
ours.first_frames({
    "dimension": "first_frames_dinov2", "weights": [os.path.join(dinov2, "dinov2_vitb14_pretrain.pth")],
    "device": "cpu", "results": result,
    "videos": [{"key": "k", "path": path}],
})
from vbench2_beta_long import background_consistency

class Tiny:
    def embed(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) - 0.4

import dreamsim

dreamsim.dreamsim = lambda **options: (Tiny(), None)
_, background = background_consistency.background_consistency_dreamsim(Tiny(), None, [path], torch.device("cpu"), False)
ours.first_frames({
    "dimension": "first_frames_dreamsim", "weights": ["archive.zip"], "device": "cpu",
    "results": str(work / "background.jsonl"), "videos": [{"key": "k", "path": path}],
})
details = [{"video_path": p, "video_results": v} for p, v in zip(names, (0.9, 0.8, 0.4))]
_, _, averages = utils.reorganize_clips_results(details)
other = [{"video_path": str(work / "official" / "other-0" / "other-0_full.mp4"), "video_results": 0.2}]
mean = utils.reorganize_clips_results([*details, *other])[0]
(work / "params.yaml").write_text("w_inclip_sb: 0.5\\nw_clip2clip_sb: 0.5\\n")
fused = {}
for value in (0.0, 0.137, 0.5, 0.999, 1.0):
    between = [{"video_path": "long-0.mp4", "video_results": value}]
    fused[value] = utils.fuse_inclip_clip2clip(
        0.0, 0.0, averages, between, "subject_consistency", dev_flag=True, w_inclip=1.0, w_clip2clip=0.0,
        slow_fast_eval_config=str(work / "params.yaml"), sb_mapping_file_path=str(work / "table.yaml"),
    )[0]
print(json.dumps({
    "cuts": cuts, "gaps": gaps, "firsts": len(firsts), "mean": mean,
    "fused": list(fused.items()),
    "official": rows[0]["video_results"], "ours": json.loads(Path(result).read_text())["value"],
    "background": [background[0]["video_results"], json.loads((work / "background.jsonl").read_text())["value"]],
}))
"""
TINY_DINO = """
import torch


def vit_base(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 16))
"""


def moving(path: Path, frames: int, fps: float = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tile = np.random.default_rng(len(path.name)).integers(0, 255, (16, 40, 3)).astype(np.uint8)
    image = tile.repeat(8, 0).repeat(8, 1)
    write_video(path, np.stack([image[:64, 2 * t : 2 * t + 64] for t in range(frames)]), fps, lossless=False)
    return path


def test_cuts_reach_back_for_what_the_last_piece_lacks() -> None:
    assert long.cuts(81, 32) == [(0, 32), (32, 64), (49, 81)]
    assert long.cuts(64, 32) == [(0, 32), (32, 64)]
    assert long.cuts(31, 32) == [(0, 31)]
    assert long.cuts(33, 32) == [(0, 32), (1, 33)]
    assert long.cuts(81, 160) == [(0, 81)]


def test_pieces_are_as_long_as_the_prompt_s_longest_dimension_wants(
    small_info: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        {"prompt_en": "a", "dimension": ["subject_consistency"]},
        {"prompt_en": "b", "dimension": ["aesthetic_quality", "overall_consistency"]},
    ]
    monkeypatch.setattr(plan, "full_info", lambda: entries)
    assert long.piece_frames("a", "standard", 16.0) == 32
    assert long.piece_frames("b", "standard", 23.976) == 230  # aesthetic quality too: a video is cut once
    assert long.piece_frames("b", "custom", 8.0) == 16


def test_same_cuts_fusion_and_first_frames_as_the_wheel_s_code(
    vbench_environment: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = moving(tmp_path / "videos" / "long-0.mp4", 41)
    cuts = long.cuts(41, 16)
    names = [f"long-0_{n:03d}.mp4" for n in range(len(cuts))]
    request = {
        "videos": [
            {
                "path": str(path), "folder": str(tmp_path / "ours"), "cuts": cuts, "fps": 8,
                "names": names, "first_frames": "long-0.first-frames.mp4",
            }
        ]
    }  # fmt: skip
    (tmp_path / "split.json").write_text(json.dumps(request))
    table = {round(n / 100, 2): 0.0 if n == 0 else 0.6 + 0.4 * (n / 100) ** 2 for n in range(101)}
    (tmp_path / "table.yaml").write_text("".join(f"{key}: {value}\n" for key, value in table.items()))
    code = tmp_path / "dino" / "dinov2" / "models"
    code.mkdir(parents=True)
    (code / "vision_transformer.py").write_text(TINY_DINO)
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from dinov2.models.vision_transformer import vit_base; "
        "torch.save(vit_base().state_dict(), sys.argv[1] + '/dinov2_vitb14_pretrain.pth')"
    )
    python = str(environment.python())
    subprocess.run([python, "-c", script, str(tmp_path / "dino")], check=True)
    worker = Path(runner.__file__).with_name("worker.py")
    arguments = [str(worker), str(tmp_path), str(tmp_path / "dino")]
    done = subprocess.run([python, "-c", OFFICIAL, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[0] == {"failed": {}}
    found = lines[-1]
    assert found["cuts"] == {name: [16, 8] for name in names}
    assert max(found["gaps"]) < 6  # of 255: what x264 loses by default; one frame off gives 20 and more
    assert found["firsts"] == 3
    assert found["ours"] == pytest.approx(found["official"], abs=1e-6) and found["ours"] < 0.99999
    official, ours = found["background"]
    assert ours == pytest.approx(official, abs=1e-6) and ours < 0.99
    rows = long.by_video(*two_videos()).rows
    assert found["mean"] == pytest.approx(sums_of("aesthetic_quality", rows).aggregate) == 0.575
    monkeypatch.setattr(weights, "folder", lambda: tmp_path)
    (tmp_path / "long_config").mkdir()
    (tmp_path / "table.yaml").rename(tmp_path / "long_config" / "subject_mapping_table.yaml")
    mapping = long.mapping_table("subject")
    for first, fused in found["fused"]:
        assert long.fuse(0.7, float(first), mapping) == pytest.approx(fused, abs=1e-12), first


def test_long_clips_end_to_end(vbench_environment: Path, tmp_path: Path) -> None:  # noqa: F811
    moving(tmp_path / "videos" / "one.mp4", 48)
    moving(tmp_path / "videos" / "another.mp4", 41)
    run = tmp_path / "run"
    arguments = ["--videos", str(tmp_path / "videos"), "--dimensions", FLICKER, "--protocol", "long", "--device", "cpu"]
    result = invoke(*arguments, "--out", str(run), "--json")
    assert result.exit_code == 0, (result.exception, result.output)
    rows = [json.loads(line) for line in (run / "scores" / f"{FLICKER}.jsonl").read_text().splitlines()]
    assert [(row["video"], row["extra"]["pieces"]) for row in rows] == [("another.mp4", 3), ("one.mp4", 3)]
    summary = json.loads((run / "scores" / "summary.json").read_text())[FLICKER]
    assert summary["n"] == 2 and summary["metric_version"] == "vbench-0.1.5+long"
    record = json.loads((run / "scores" / "vbench.json").read_text())
    assert record["protocol"]["rule"] == "VBench-Long" and record["protocol"]["long_rule_applies"]
    assert record["protocol"]["frames"] in (41, 48)  # of the videos, not of the pieces
    pieces = sorted((run / "scores" / "clips").glob("*/one_*.mp4"))
    assert [len(read_video(path)[0]) for path in pieces] == [16, 16, 16]
    # the mean over a video's pieces of the official values of the pieces, scored as plain videos
    invoke("--videos", str(pieces[0].parent), "--dimensions", FLICKER, "--out", str(tmp_path / "plain"))
    plain = [json.loads(line) for line in (tmp_path / "plain" / "scores" / f"{FLICKER}.jsonl").read_text().splitlines()]
    of_pieces = [row["value"] for row in plain if "first-frames" not in row["video"]]
    assert rows[1]["value"] == pytest.approx(np.mean(of_pieces), abs=1e-12) and len(of_pieces) == 3
    stamps = {path: path.stat().st_mtime_ns for path in (run / "scores" / "clips").rglob("*.mp4")}
    before = (run / "scores" / "summary.json").read_bytes()
    assert invoke(*arguments, "--out", str(run)).exit_code == 0
    assert before == (run / "scores" / "summary.json").read_bytes()
    assert stamps == {path: path.stat().st_mtime_ns for path in (run / "scores" / "clips").rglob("*.mp4")}


@pytest.mark.slow
def test_both_consistencies_at_full_size(
    random_weights: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DINOv2 and DreamSim as the protocol "long" has them: half of a value lies between the pieces' first frames."""
    monkeypatch.setattr(weights, "folder", lambda: random_weights)
    weights.prepare()
    moving(tmp_path / "videos" / "one.mp4", 48)
    moving(tmp_path / "videos" / "short.mp4", 12)
    names = ["subject_consistency", "background_consistency"]
    options = Options(protocol="long", unverified=True)
    record = scoring.score(tmp_path / "videos", tmp_path / "run", names, options=options)
    within = replace(options, protocol="long-in-clip")
    scoring.score(tmp_path / "videos", tmp_path / "within", names, options=within)
    for name in names:
        rows, other = (
            [json.loads(line) for line in (tmp_path / run / "scores" / f"{name}.jsonl").read_text().splitlines()]
            for run in ("run", "within")
        )
        assert [row["video"] for row in rows] == ["one.mp4", "short.mp4"]
        between = rows[0]["extra"]["first_frames"]
        assert 0 < between < 1 and rows[1]["extra"]["first_frames"] == 0
        of_pieces = [rows[0]["extra"]["in_clip"], rows[1]["value"]]
        assert of_pieces == pytest.approx([row["value"] for row in other], abs=1e-6)
        table = long.mapping_table(long.BETWEEN[name])
        assert rows[0]["value"] == pytest.approx(long.fuse(of_pieces[0], between, table), abs=1e-12)
        assert any("dreamsim" in path or "dinov2" in path for path in record["dimensions"][name]["weights"])


def two_videos() -> tuple[Scored, Selection, long.Pieces, None]:
    """Three pieces of one video and the only one of another, scored."""
    videos = [Video(path=Path(f"{name}-0.mp4"), prompt=name) for name in ("long", "other")]
    parents = {**{f"long-0_00{n}.mp4": videos[0] for n in range(3)}, "other-0_full.mp4": videos[1]}
    rows: list[dict[str, Any]] = [
        {"video": name, "value": value, "extra": {}} for name, value in zip(parents, (0.9, 0.8, 0.4, 0.2), strict=True)
    ]
    whole = Selection(videos=videos, expected=2, protocol="standard")
    one = Scored(
        dimension="aesthetic_quality", rows=rows, reason=None, n=4, undetected=0, missing=[], expected=4,
        protocol="standard",
    )  # fmt: skip
    return one, whole, long.Pieces(selection=whole, parents=parents, first_frames=whole), None


def test_a_video_s_value_is_the_mean_of_its_pieces_fused_with_the_first_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [Video(path=Path(f"{name}-0.mp4"), prompt=name) for name in ("a", "b")]
    whole = Selection(videos=videos, expected=5, missing=["c-0.mp4", "d-0.mp4", "e-0.mp4"], protocol="standard")
    parents = {"a-0_000.mp4": videos[0], "a-0_001.mp4": videos[0], "b-0_full.mp4": videos[1]}
    pieces = long.Pieces(selection=whole, parents=parents, first_frames=whole)
    rows: list[dict[str, Any]] = [
        {"video": name, "value": value, "extra": {"frame_pairs": 7}}
        for name, value in zip(parents, (0.9, 0.7, 0.6), strict=True)
    ]
    one = Scored(
        dimension="subject_consistency", rows=rows, reason=None, n=3, undetected=0, missing=[], expected=3,
        protocol="standard",
    )  # fmt: skip
    within = long.by_video(one, whole, pieces, None)
    assert [row["value"] for row in within.rows] == pytest.approx([0.8, 0.6])
    assert (within.n, within.expected, len(within.missing), within.partial) == (2, 5, 3, True)
    monkeypatch.setattr(long, "mapping_table", lambda stem: {0.0: 0.0, 0.5: 0.6, 1.0: 1.0})
    fused = long.by_video(one, whole, pieces, {"a-0.mp4": 0.75})
    assert [row["value"] for row in fused.rows] == pytest.approx([0.8, 0.6])  # (0.8 + 0.8) / 2; b has one piece
    assert fused.rows[0]["extra"]["first_frames"] == 0.75 and fused.rows[1]["extra"]["first_frames"] == 0


def test_what_long_lacks_is_said_with_the_way_out(
    vbench_environment: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "folder", lambda: tmp_path / "none")
    monkeypatch.setattr(runner, "check_ready", lambda dimension, unverified=False: None)
    moving(tmp_path / "videos" / "one.mp4", 4)
    call = ["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "run"), "--dimensions"]
    for name, sentence in (
        ("subject_consistency", "dinov2_vitb14"),
        ("background_consistency", "dreamsim_ensemble_checkpoint.zip"),
    ):
        result = invoke(*call, name, "--protocol", "long")
        assert isinstance(result.exception, EnvironmentMissingError), result.output
        assert sentence in str(result.exception) and "long-in-clip" in str(result.exception)
        long.check(name, "long-in-clip")
    with pytest.raises(ConfigError, match="--protocol must be vbench, long, long-in-clip, not 'longer'"):
        long.check(FLICKER, "longer")
    assert not (tmp_path / "run").exists()


def test_a_video_that_cannot_be_cut_is_named(
    vbench_environment: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "videos").mkdir()
    frames = np.zeros((20, 33, 31, 3), np.uint8)
    write_video(tmp_path / "videos" / "odd.mp4", frames, 8, lossless=True)
    with pytest.raises(scoring.IncompleteError, match=r"1 videos could not be cut for VBench-Long: odd\.mp4"):
        scoring.score(tmp_path / "videos", tmp_path / "run", [FLICKER], options=Options(protocol="long"))

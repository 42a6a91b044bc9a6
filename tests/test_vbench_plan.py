"""The file plan, resuming, retries and the static filter, with a function in the place of the worker process."""

from __future__ import annotations

import json
import threading
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from students.errors import ConfigError, EnvironmentMissingError, IncompleteError
from tmd_eval import scores
from tmd_eval.vbench import diversity, plan, runner, summary, weights
from tmd_eval.vbench import score as scoring
from tmd_eval.vbench.dimensions import DIMENSIONS
from tmd_eval.vbench.runner import STATIC, Workers
from tmd_eval.vbench.worker import Results
from tmd_eval.video import write_video

FLICKER = "temporal_flickering"
LONG = "a very long prompt " + "x" * 189  # a name of 216 bytes with its index and suffix, like VBench's longest
PROMPTS = {
    FLICKER: ["a still cup", "a clock.", LONG],
    "subject_consistency": ["façades", "A fantasy landscape", "a fantasy landscape"],
    "human_action": ["A person is clapping"],
    "color": ["a red cup"],
}


@pytest.fixture(autouse=True)
def small_vbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VBench with a handful of prompts, no environment and no weights."""
    entries: list[dict[str, Any]] = [
        {"prompt_en": prompt, "dimension": [dimension]} for dimension, of in PROMPTS.items() for prompt in of
    ]
    entries[-1]["auxiliary_info"] = {"color": {"color": "red"}}
    info = tmp_path / "info.json"
    info.write_text(json.dumps(entries))
    monkeypatch.setattr(runner, "full_info", lambda: info)
    monkeypatch.setattr(runner, "official_version", lambda: "0.1.5")
    monkeypatch.setattr(runner, "check_ready", lambda dimension, unverified=False: None)
    monkeypatch.setattr(weights, "hashes", lambda dimension: {})
    monkeypatch.setattr(weights, "check", lambda task, unverified=False: None)


def clip(path: Path, frames: int = 3, size: int = 16, fps: float = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.name.encode())  # no two files alike
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, size, size, 3)).astype(np.uint8)
    write_video(path, pixels, fps, lossless=True)
    return path


def whole_set(videos: Path, dimensions: tuple[str, ...] = (FLICKER,), samples: int = 5) -> Path:
    for dimension in dimensions:
        for prompt in PROMPTS[dimension]:
            for index in range(samples):
                clip(videos / f"{prompt}-{index}.mp4")
    return videos


Answer = Callable[[str, dict[str, Any]], Any]


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[str]:
    """Let ``answer`` (of file name and video) stand for the worker; returns the names it is asked about."""
    asked: list[str] = []

    def ask(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        results = Results(request["results"], request["videos"])
        for video in request["videos"]:
            name = Path(video["path"]).name
            asked.append(name)
            try:
                value = answer(name, video | {"dimension": request["dimension"]})
            except ValueError as error:
                return {"ok": False, "error": "ValueError", "message": str(error), "traceback": ""}
            results.add(video["path"], None if value is None else {"video_results": value, "frame_pairs": 2})
        return {"ok": True}

    monkeypatch.setattr(runner, "_ask", ask)
    return asked


def by_name(name: str, video: dict[str, Any]) -> float:
    return sum(name.encode()) % 97 / 97


def score(videos: Path, out: Path, dimensions: list[str], **options: Any) -> dict[str, Any]:
    workers = Workers(count=options.pop("count", 1))
    return scoring.score(videos, out, dimensions, workers=workers, options=scoring.Options(**options))


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = whole_set(tmp_path / "videos", (FLICKER, "subject_consistency"))
    names = [FLICKER, "subject_consistency"]
    answer_with(monkeypatch, by_name)
    score(videos, tmp_path / "whole", names)
    count = 0

    def dies(name: str, video: dict[str, Any]) -> float:
        nonlocal count
        count += 1
        if count in (4, 21):
            raise KeyboardInterrupt
        return by_name(name, video)

    asked = answer_with(monkeypatch, dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score(videos, tmp_path / "parts", names)
    part = next((tmp_path / "parts" / "scores" / "parts" / FLICKER).glob("*.jsonl"))
    part.write_bytes(part.read_bytes() + b'{"key": "half')  # and the last line was being written
    score(videos, tmp_path / "parts", names, count=3)
    files = ["summary.json", "vbench.json", f"{FLICKER}.jsonl", "subject_consistency.jsonl"]
    for file in files:
        assert (tmp_path / "parts" / "scores" / file).read_bytes() == (
            tmp_path / "whole" / "scores" / file
        ).read_bytes()
    assert len(asked) == 30 + 2  # each video once, but for the two it died on
    before = len(asked)
    score(videos, tmp_path / "parts", names)
    assert len(asked) == before
    clip(videos / "a clock.-2.mp4", frames=3, size=16, fps=8).write_bytes((videos / "a clock.-1.mp4").read_bytes())
    score(videos, tmp_path / "parts", names)
    assert len(asked) == before  # the bytes decide: these are scored already


def test_a_worker_that_dies_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = whole_set(tmp_path / "videos", (FLICKER, "subject_consistency"))
    failures = 0

    def once(name: str, video: dict[str, Any]) -> float:
        nonlocal failures
        if name == "a clock.-3.mp4" and failures == 0:
            failures += 1
            raise ValueError("out of memory")
        return by_name(name, video)

    asked = answer_with(monkeypatch, once)
    assert (
        score(videos, tmp_path / "a", [FLICKER])["dimensions"][FLICKER]["n"] == 15
        and asked.count("a clock.-3.mp4") == 2
    )

    def always(name: str, video: dict[str, Any]) -> float:
        if name == "a clock.-3.mp4":
            raise ValueError("out of memory")
        return by_name(name, video)

    answer_with(monkeypatch, always)
    with pytest.raises(
        scoring.NotMeasuredError, match=r"temporal_flickering \(ValueError: out of memory \(log: "
    ) as got:
        score(videos, tmp_path / "b", [FLICKER, "subject_consistency"])
    assert set(got.value.record["dimensions"]) == {"subject_consistency"}  # the other dimension finished
    answer_with(monkeypatch, by_name)
    again = score(videos, tmp_path / "b", [FLICKER])
    assert not again["not_measured"] and again["totals"] is None and len(again["dimensions"]) == 2


def test_every_gap_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, by_name)
    videos = whole_set(tmp_path / "videos")
    (videos / ".DS_Store").write_bytes(b"x")
    (videos / "aaa.txt").write_text("listed first")
    assert score(videos, tmp_path / "run", [FLICKER])["dimensions"][FLICKER]["n"] == 15
    for file, match in {
        "a clock.-0.mp4": r"1 of 15 videos.*a clock\.-0\.mp4",
        f"{LONG}-4.mp4": "1 of 15 videos.*xxx-4.mp4",
    }.items():
        data = (videos / file).read_bytes()
        (videos / file).unlink()
        with pytest.raises(IncompleteError, match=match) as caught:
            score(videos, tmp_path / "other", [FLICKER])
        assert caught.value.exit_code == 3
        (videos / file).write_bytes(data)
    cup = videos / "a still cup-0.mp4"
    data = cup.read_bytes()
    for make, match in (
        (lambda: cup.write_bytes(data[:300]), "a still cup-0.mp4 .unreadable or truncated"),
        (lambda: clip(cup, frames=7), "7 frames of 16x16 at 8 fps where most have 3 frames of 16x16 at 8 fps"),
        (lambda: clip(cup, size=32), "3 frames of 32x32"),
        (lambda: clip(cup, fps=16), "at 16 fps where most"),
    ):
        make()
        with pytest.raises(IncompleteError, match=match):
            score(videos, tmp_path / "other", [FLICKER])
    partial = score(videos, tmp_path / "other", [FLICKER], allow_partial=True)
    one = partial["dimensions"][FLICKER]
    assert one["partial"] and one["n"] == 14 and one["missing"] == 1 and partial["totals"] is None
    entries = json.loads((tmp_path / "other" / "scores" / "summary.json").read_text())
    assert entries[FLICKER]["partial"] and entries[FLICKER]["completeness"] == pytest.approx(14 / 15)


def test_a_small_run_is_scored_where_it_has_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, by_name)
    videos = whole_set(tmp_path / "videos", samples=2)
    record = score(videos, tmp_path / "run", [FLICKER, "subject_consistency"], allow_partial=True)
    assert list(record["dimensions"]) == [FLICKER] and "subject_consistency: left out" in capsys.readouterr().err
    with pytest.raises(IncompleteError, match="no video of a prompt of subject_consistency"):
        score(videos, tmp_path / "run", ["subject_consistency"], allow_partial=True)
    with pytest.raises(IncompleteError, match="9 of 15 videos for temporal_flickering"):
        score(videos, tmp_path / "run", [FLICKER, "subject_consistency"])


def test_two_of_ten_are_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, by_name)
    videos = tmp_path / "videos"
    clip(videos / "a clock.-0.mp4"), clip(videos / "a still cup-1.mp4")
    with pytest.raises(IncompleteError, match="13 of 15 videos"):
        score(videos, tmp_path / "run", [FLICKER])
    assert not list(tmp_path.glob("run/scores/*.json*"))


def test_names_that_differ_in_case_or_in_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, by_name)
    videos = whole_set(tmp_path / "videos", ("subject_consistency",))
    for index in range(5):  # as macOS writes it
        path = videos / f"façades-{index}.mp4"
        path.rename(videos / unicodedata.normalize("NFD", path.name))
    assert score(videos, tmp_path / "run", ["subject_consistency"])["dimensions"]["subject_consistency"]["n"] == 15
    rows = (tmp_path / "run" / "scores" / "subject_consistency.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["video"] == "façades-0.mp4"  # composed, as VBench has it
    twin = clip(videos / "FAÇADES-0.mp4")
    with pytest.raises(IncompleteError, match="only in case"):
        score(videos, tmp_path / "run", ["subject_consistency"])
    twin.unlink()
    (videos / "a fantasy landscape-2.mp4").rename(videos / "A Fantasy Landscape-2.mp4")
    with pytest.raises(IncompleteError, match="differ"):
        score(videos, tmp_path / "run", ["subject_consistency"])


def test_folders_vbench_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no mp4 file"):
        plan.select(tmp_path / "empty", FLICKER)
    (tmp_path / "empty" / "a clock.-0.mov").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a clock\.-0\.mov.*ffmpeg"):
        plan.select(tmp_path / "empty", FLICKER)
    clip(tmp_path / "empty" / "a still cup-0.mp4")
    assert "a clock.-0.mp4 (there is .mov; convert it)" in plan.select(tmp_path / "empty", FLICKER).missing
    with pytest.raises(ConfigError, match="no folder"):
        plan.select(tmp_path / "absent", FLICKER)


def test_other_people_s_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def look(name: str, video: dict[str, Any]) -> float:
        seen.append((name, video["prompt"]))
        return 1.0

    answer_with(monkeypatch, look)
    videos = tmp_path / "videos"
    prompts = {"x.mp4": "A person is clapping", "y.mp4": "../up/and away " + "z" * 600, "z.mp4": "rm -rf $HOME; '"}
    for name in prompts:
        clip(videos / name)
    with pytest.raises(ConfigError, match="color compares with what VBench records"):
        score(videos, tmp_path / "run", ["color"])
    with pytest.raises(ConfigError, match=r"x\.mp4.*--prompt-file"):
        score(videos, tmp_path / "run", ["human_action"])
    record = score(videos, tmp_path / "run", ["human_action"], prompts=prompts)
    assert record["protocol"]["set"] == "custom" and record["dimensions"]["human_action"]["n"] == 3
    assert [prompt for _, prompt in seen] == list(prompts.values())
    assert seen[0][0] == "A person is clapping-0.mp4"  # the label is read from the name
    assert all("/" not in name and len(name.encode()) < 256 for name, _ in seen)
    with pytest.raises(IncompleteError, match=r"1 of 4.*w\.mp4"):
        score(videos, tmp_path / "run", [FLICKER], prompts={**prompts, "w.mp4": "absent"})


def test_the_static_filter_keeps_the_first_five_still_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = whole_set(tmp_path / "videos", samples=12)

    def answer(name: str, video: dict[str, Any]) -> float:
        index = int(name.rpartition("-")[2].removesuffix(".mp4"))
        return float(index % 2) if video["dimension"] == STATIC else index / 100  # the odd ones hold still

    answer_with(monkeypatch, answer)
    record = score(videos, tmp_path / "run", [FLICKER])
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores" / f"{FLICKER}.jsonl").read_text().splitlines()]
    assert [row["video"].rpartition("-")[2] for row in rows[:5]] == [f"{i}.mp4" for i in (1, 3, 5, 7, 9)]
    assert record["dimensions"][FLICKER]["value"] == pytest.approx(0.05) and len(rows) == 15
    assert record["protocol"]["static_filter"] == {
        "applied": True, "videos": 36, "still": 18, "kept": 15, "prompts_with_fewer_than_five": 0,
    }  # fmt: skip
    off = score(videos, tmp_path / "off", [FLICKER], static_filter=False)
    assert (
        off["dimensions"][FLICKER]["value"] == pytest.approx(0.02) and not off["protocol"]["static_filter"]["applied"]
    )
    entries = json.loads((tmp_path / "off" / "scores" / "summary.json").read_text())
    assert "without static filter" in entries[FLICKER]["metric_version"]
    for index in (9, 11):
        (videos / f"a clock.-{index}.mp4").unlink()
    with pytest.raises(IncompleteError, match=r"1 of 3 prompts.*'a clock\.' lacks 1.*Sample more"):
        score(videos, tmp_path / "run", [FLICKER])
    with pytest.raises(ConfigError, match="belongs to temporal_flickering"):
        score(videos, tmp_path / "run", ["imaging_quality"], static_filter=True)


def test_color_leaves_out_what_was_not_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = whole_set(tmp_path / "videos", ("color",))
    answer_with(monkeypatch, lambda name, video: 0.5 if name == "a red cup-1.mp4" else None)
    record = score(videos, tmp_path / "run", ["color"])
    one = record["dimensions"]["color"]
    assert (one["n"], one["undetected"], one["value"], one["partial"]) == (1, 4, 0.5, False)
    answer_with(monkeypatch, lambda name, video: None)
    for path in videos.iterdir():
        clip(path, frames=4)
    with pytest.raises(scoring.NotMeasuredError, match="found no object"):  # VBench: ZeroDivisionError
        score(videos, tmp_path / "none", ["color"])


def test_clips_of_five_seconds_are_recorded_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, by_name)
    clip(tmp_path / "videos" / "x.mp4", frames=81, fps=16)
    protocol = score(tmp_path / "videos", tmp_path / "run", [FLICKER])["protocol"]
    assert protocol["long_rule_applies"] and protocol["rule"] == "VBench" and protocol["fps"] == 16
    assert "VBench-Long" in capsys.readouterr().err
    clip(tmp_path / "short" / "x.mp4", frames=79, fps=16)
    assert not score(tmp_path / "short", tmp_path / "other", [FLICKER])["protocol"]["long_rule_applies"]


def test_diversity_of_the_samples_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = np.eye(3)
    vectors = {"0": unit[0], "1": 2 * unit[1], "2": unit[0]}  # pairs: 1, 0, 1
    assert diversity.pairwise_distance(np.stack(list(vectors.values()))).mean() == pytest.approx(2 / 3)
    videos = tmp_path / "videos"
    prompts = {}
    for prompt in "ab":
        for index in range(3):
            clip(videos / f"{prompt}{index}.mp4")
            prompts[f"{prompt}{index}.mp4"] = prompt
    clip(videos / "single.mp4")

    def feature(name: str, video: dict[str, Any]) -> list[float]:
        file = Path(video["path"]).resolve().name
        return list(vectors[file[1]] if video["prompt"] == "a" else unit[2])

    asked = answer_with(monkeypatch, feature)
    entry = diversity.score_diversity(
        videos, tmp_path / "run", "dino", options=scoring.Options(prompts={**prompts, "single.mp4": "c"})
    )
    assert entry["value"] == pytest.approx((2 / 3 + 0) / 2) and entry["n"] == 6 and len(asked) == 6
    assert entry["low"] == 0 and entry["high"] == 2  # two prompts say little
    assert "diversity_dino" in json.loads((tmp_path / "run" / "scores" / "summary.json").read_text())
    with pytest.raises(ConfigError, match="Nobody knows"):
        diversity.score_diversity(videos, tmp_path / "run", "clip")
    with pytest.raises(IncompleteError, match="no diversity"):
        diversity.score_diversity(videos, tmp_path / "run", "clip", options=scoring.Options(prompts={"a0.mp4": "a"}))


def test_diversity_of_an_interrupted_run_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"prompts": {"count": 2}, "samples_per_prompt": 2, "lines": None, "limit": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    names = ["00000-0.mp4", "00000-1.mp4", "00001-0.mp4"]  # 00001-1.mp4 was to follow
    rows = [{"video": name, "prompt": name[:5], "line": int(name[:5]), "index": int(name[6])} for name in names]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        clip(tmp_path / "videos" / name)
    answer_with(monkeypatch, lambda name, video: [1.0, float(zlib.crc32(video["key"].encode()) % 7)])
    entry = diversity.score_diversity(tmp_path, tmp_path, "dino")
    assert entry["completeness"] == 0.5 and entry["partial"] and "00001-1.mp4" in capsys.readouterr().err


def test_a_run_s_samples_beyond_the_fifth_belong_to_its_plan(tmp_path: Path) -> None:
    from tmd_eval.video_set import planned_videos

    config = {
        "prompts": {"count": 7}, "samples_per_prompt": 2, "lines": [0, 1], "limit": None, "samples_of_line": {1: 4},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    names = planned_videos(tmp_path, ["p", "q"])
    assert names == ["p-0.mp4", "p-1.mp4", "q-0.mp4", "q-1.mp4", "q-2.mp4", "q-3.mp4"]


def test_no_gpu_and_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            runner.devices("cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert runner.devices("cuda:1", None).gpus == ("6",) and runner.devices("cuda", None).count == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"more processes than there are GPUs here \(2\)"):
        runner.devices("cuda", None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runner.devices("cuda", None).gpus == ("6",)
    for wrong, sentence in (("gpu", "must be cpu, cuda or cuda:NUMBER"), ("cuda:2", "no GPU 2 here"), ("cuda:x", "be")):
        with pytest.raises(ConfigError, match=sentence):
            runner.devices(wrong, None)
    with pytest.raises(ConfigError, match="--workers"):
        runner.devices("cpu", 0)
    assert runner.devices("cpu", None).count == 1


def test_a_whole_protocol_starts_only_when_all_sixteen_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    from tmd_eval.commands.vbench import _dimensions

    monkeypatch.setattr(weights, "prepare", lambda: None)
    monkeypatch.setattr(
        weights, "problems", lambda name, unverified=False: {} if name == FLICKER else {"w.pth": "is missing"}
    )
    with pytest.raises(EnvironmentMissingError, match=r"subject_consistency.*w\.pth.*--dimensions temporal_flickering"):
        _dimensions(None, False, whole=True, un=False)
    assert _dimensions(None, False, whole=False, un=False) == [FLICKER]
    assert _dimensions(["color,scene"], False, whole=True, un=False) == ["color", "scene"]
    assert _dimensions(["all"], False, whole=True, un=False) == list(DIMENSIONS)
    with pytest.raises(ConfigError, match="did you mean color"):
        monkeypatch.undo()
        _dimensions(["colour"], True, whole=False, un=False)


def test_totals_come_when_the_sixteenth_does_and_go_when_one_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, run = sixteen(tmp_path, monkeypatch), tmp_path / "run"
    names = list(DIMENSIONS)
    first = score(videos, run, names[:9])
    assert first["totals"] is None and len(first["dimensions"]) == 9
    record = score(videos, run, names[9:])
    assert len(record["dimensions"]) == 16 and not record["not_measured"]
    entries = json.loads((run / "scores" / "summary.json").read_text())
    from tmd_eval.vbench.totals import totals

    expected = totals({name: entries[name]["value"] for name in DIMENSIONS})
    for key, value in expected._asdict().items():
        assert entries[key]["value"] == pytest.approx(value, abs=1e-12) == record["totals"][key]["value"]
        assert entries[key]["low"] <= entries[key]["value"] <= entries[key]["high"]
    (videos / "a dog-4.mp4").unlink()
    partial = score(videos, run, ["scene"], allow_partial=True)
    entries = json.loads((run / "scores" / "summary.json").read_text())
    assert partial["totals"] is None and not set(expected._asdict()) & set(entries) and len(entries) == 16


def _add_with(extra: dict[str, Any]) -> Callable[..., None]:
    add = Results.add

    def more(self: Results, path: str, row: dict[str, Any] | None) -> None:
        add(self, path, None if row is None else {**row, **extra})

    return more


def sixteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two prompts' videos, on which all sixteen dimensions are scored."""
    info = tmp_path / "all.json"
    info.write_text(json.dumps([{"prompt_en": p, "dimension": list(DIMENSIONS)} for p in ("a cup", "a dog")]))
    monkeypatch.setattr(runner, "full_info", lambda: info)
    for prompt in ("a cup", "a dog"):
        for index in range(5):
            clip(tmp_path / "videos" / f"{prompt}-{index}.mp4")
    extra = {"frame_pairs": 2, "cnt_per_video": 2, "frame_count": 16, "frame_results": [0.5] * 16}
    answer_with(monkeypatch, by_name)
    monkeypatch.setattr(Results, "add", _add_with(extra))
    return tmp_path / "videos"


def test_scores_of_other_videos_never_enter_one_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, run = sixteen(tmp_path, monkeypatch), tmp_path / "run"
    names = list(DIMENSIONS)
    score(videos, run, names[:15])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in videos.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert score(copy, run, names[15:])["totals"] is not None  # the same bytes in another folder
    clip(copy / "a dog-3.mp4", frames=3, size=16).write_bytes((copy / "a cup-0.mp4").read_bytes())
    capsys.readouterr()
    record = score(copy, run, names[15:])
    assert record["totals"] is None and list(record["dimensions"]) == names[15:]
    assert names[0] in capsys.readouterr().err
    assert set(json.loads((run / "scores" / "summary.json").read_text())) == {names[15]}
    assert [path.stem for path in (run / "scores").glob("*.jsonl")] == [names[15]]
    assert score(copy, run, names[:15])["totals"] is not None
    (run / "scores" / "videos.json").unlink()  # as scored before this was recorded: nobody knows the videos
    assert score(copy, run, names[15:])["totals"] is None
    other = tmp_path / "other"
    clip(other / "x.mp4"), score(other, tmp_path / "own", ["imaging_quality"])
    (other / "x.mp4").rename(other / "y.mp4")
    assert list(score(other, tmp_path / "own", [FLICKER])["dimensions"]) == [FLICKER]


def test_a_later_call_keeps_what_is_true_of_earlier_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, run = sixteen(tmp_path, monkeypatch), tmp_path / "run"
    for prompt in ("a cup", "a dog"):
        clip(videos / f"{prompt}-5.mp4")
    monkeypatch.setattr(weights, "check", lambda task, unverified=False: None)
    answer_with(monkeypatch, lambda name, video: 1.0)
    score(videos, run, [FLICKER], unverified=True)
    record = score(videos, run, ["imaging_quality"])
    assert record["protocol"]["static_filter"]["applied"] and record["unverified_weights"]
    assert {one["device"] for one in record["dimensions"].values()} == {"cpu"}
    record = score(videos, run, [FLICKER], static_filter=False)
    assert not record["protocol"]["static_filter"]["applied"] and not record["unverified_weights"]


def test_two_processes_take_turns_at_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "videos" / "x.mp4")
    answer_with(monkeypatch, by_name)
    run = tmp_path / "run"
    other = threading.Thread(target=score, args=(tmp_path / "videos", run, ["imaging_quality"]))
    with scores.locked(run):
        other.start()
        other.join(1.5)
        assert other.is_alive() and not (run / summary.RECORD).exists()
    other.join(60)
    score(tmp_path / "videos", run, [FLICKER])
    assert set(summary.read_record(run)["dimensions"]) == {"imaging_quality", FLICKER}


def test_samples_beyond_the_fifth_are_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = whole_set(tmp_path / "videos", samples=6)
    (videos / "a clock.-5.mp4").write_bytes(b"cut")
    clip(videos / "a still cup-5.mp4", frames=7)
    for name in ("a clock.-0 copy", "a clock.-06", "a clock.-x"):
        clip(videos / f"{name}.mp4")
    answer_with(monkeypatch, lambda name, video: 1.0)
    with pytest.raises(IncompleteError, match=r"2 of 18.*a still cup-5\.mp4 \(7 frames.*a clock\.-5\.mp4 \(unread"):
        score(videos, tmp_path / "run", [FLICKER])
    assert "a clock.-0 copy.mp4, a clock.-06.mp4, a clock.-x.mp4" in capsys.readouterr().err
    record = score(videos, tmp_path / "run", [FLICKER], allow_partial=True)
    assert record["protocol"]["static_filter"]["videos"] == 16 and record["dimensions"][FLICKER]["n"] == 15
    assert "a clock.-5.mp4 (unreadable" in capsys.readouterr().err


def test_the_filter_s_weights_are_checked_before_any_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = whole_set(tmp_path / "videos", samples=6)
    monkeypatch.undo()
    monkeypatch.setattr(runner, "check_ready", lambda dimension, unverified=False: None)
    monkeypatch.setattr(runner, "full_info", lambda: tmp_path / "info.json")
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(scoring, "inspect_videos", lambda *_: pytest.fail("a video was decoded"))
    for wanted in (None, True):
        with pytest.raises(EnvironmentMissingError, match=r"raft-things\.pth is missing.*--no-static-filter"):
            score(videos, tmp_path / "run", [FLICKER], static_filter=wanted)


def test_an_out_that_cannot_be_written_to_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "videos" / "x.mp4")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(scoring, "inspect_videos", lambda *_: pytest.fail("a video was decoded"))
    with pytest.raises(ConfigError, match="Cannot write to"):
        score(tmp_path / "videos", tmp_path / "file" / "run", [FLICKER])

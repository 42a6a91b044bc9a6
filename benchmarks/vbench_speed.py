"""Seconds per clip of VBench's fast engine against the official code: same clips, weights, device, one worker.

    python benchmarks/vbench_speed.py --work /tmp/speed --report reports/benchmarks/vbench_speed

writes ``vbench_speed.json`` and ``.md``. Weights are those under TMD_EVAL_HOME; random ones will do, since no step's
cost depends on them but RAFT's early stop, which saves more on videos that move. Loading models is not counted. A
worker times its decoding, its preparing of images and its models' passes apart (``tmd_eval/vbench/stopwatch.py``): the
passes alone are the floor that equal arithmetic sets. What the dimensions of the fast engine share is counted with the
first that wants it. With the defaults about six minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from students.errors import ConfigError
from tmd_eval.files import write_atomic, write_json
from tmd_eval.provenance import provenance
from tmd_eval.vbench import plan, runner, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, FAST
from tmd_eval.vbench.score import PARTS, Options, score
from tmd_eval.vbench.stopwatch import PARTS as TIMED
from tmd_eval.video import write_video


def make_clips(folder: Path, dimensions: list[str], frames: int, height: int, width: int, fps: float) -> int:
    """Write a moving pattern for the first prompt of each dimension; returns the number of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{next(iter(plan.prompts_of(name)))}-0.mp4" for name in dimensions}
    for number, name in enumerate(sorted(names)):
        tile = np.random.default_rng(number).integers(0, 255, (height // 8 + 20, width // 8 + 20, 3)).astype(np.uint8)
        image = tile.repeat(8, 0).repeat(8, 1)
        clip = np.stack([image[t : t + height, t : t + width] for t in range(frames)])
        write_video(folder / name, clip, fps, lossless=False)
    return len(names)


def seconds(run: Path, dimension: str, device: str) -> dict[str, float]:
    """Median seconds of a clip: all, and in decoding, preparing images and models.

    Processor time on the CPU, which other load on the machine disturbs little; else wall time.

    Raises:
        ConfigError: the work folder holds results without the parts.
    """
    rows = list(runner.read_parts(run / PARTS / dimension).values())
    if not all("parts" in row for row in rows):
        raise ConfigError(f"{run} holds results of an earlier version, which took no parts; give another --work.")
    cpu = device == "cpu"
    found = {part: float(np.median([row["parts"][part][0 if cpu else 1] for row in rows])) for part in TIMED}
    return {"all": float(np.median([row["cpu_seconds" if cpu else "seconds"] for row in rows])), **found}


def values(run: Path, dimension: str) -> list[float]:
    """Every clip's value."""
    lines = (run / "scores" / f"{dimension}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["value"] for line in lines]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Score the clips with both engines; what is scored already is not scored again."""
    names = options.dimensions.split(",")
    height, width = map(int, options.size.split("x"))
    weights.prepare()
    os.environ["TMD_EVAL_VBENCH_PARTS"] = "1"
    count = make_clips(options.work / "videos", names, options.frames, height, width, options.fps)
    for engine in ("official", "fast"):
        score(
            options.work / "videos", options.work / engine, names,
            workers=runner.devices(options.device, 1, engine),
            options=Options(allow_partial=True, unverified=True, static_filter=False),
        )  # fmt: skip
    rows = []
    for name in names:
        parts = {engine: seconds(options.work / engine, name, options.device) for engine in ("official", "fast")}
        took = {engine: found.pop("all") for engine, found in parts.items()}
        pairs = zip(values(options.work / "official", name), values(options.work / "fast", name), strict=True)
        gaps = [abs(a - b) for a, b in pairs]
        rows.append({"dimension": name, **took, "n": len(gaps), "largest_difference": max(gaps), "parts": parts})
    together: dict[str, Any] = {engine: sum(row[engine] for row in rows) for engine in ("official", "fast")}
    together["parts"] = {
        engine: {part: sum(row["parts"][engine][part] for row in rows) for part in TIMED}
        for engine in ("official", "fast")
    }
    command = shlex.join(["python", "-m", "benchmarks.vbench_speed", *sys.argv[1:]])
    return {
        **provenance(command=command.replace(str(Path.home()), "~"), device=options.device),
        "seconds": "processor" if options.device == "cpu" else "wall",
        "clips": count, "frames": options.frames, "height": height, "width": width, "fps": options.fps,
        "dimensions": rows, "together": together,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# VBench: fast engine against the official code",
        "",
        f"{result['device']}; {result['clips']} clips of {result['frames']} frames, "
        f"{result['width']}x{result['height']}, {result['fps']:g} fps; {result['seconds']} seconds a clip "
        "(median of n), models loaded; the weights under TMD_EVAL_HOME.",
        "",
        "| dimension | n | official s | fast s | speed-up | floor s | at most | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every = [*result["dimensions"], {"dimension": "together", **result["together"]}]
    for row in every:
        floor = min(parts["forward"] for parts in row["parts"].values())
        cells = [
            row["dimension"], row.get("n", ""), f"{row['official']:.2f}", f"{row['fast']:.2f}",
            f"{row['official'] / row['fast']:.2f}x", f"{floor:.2f}", f"{row['official'] / floor:.2f}x",
            f"{row['largest_difference']:.1e}" if "largest_difference" in row else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "Floor: what the models' passes alone take, in the quicker engine; with equal arithmetic *at most* "
        "(official over floor) bounds the speed-up. Where the time goes, in seconds a clip:",
        "",
        "| dimension | engine | decode | prepare images | models | rest |",
        "|---|---|---|---|---|---|",
    ]
    for row in every:
        for engine in ("official", "fast"):
            parts = row["parts"][engine]
            rest = row[engine] - sum(parts.values())
            cells = [f"{value:.2f}" for value in (*(parts[part] for part in TIMED), rest)]
            lines.append(f"| {row['dimension']} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Made by `{result['command']}` at {result['code_revision']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of clips and scores; a broken-off run goes on")
    parser.add_argument("--report", type=Path, help="files REPORT.json and REPORT.md")
    parser.add_argument("--dimensions", default=",".join(name for name in DIMENSIONS if name in FAST))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="128x160", help="height x width, from 128 on (RAFT)")
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    result = measure(options)
    if options.report:
        write_json(options.report.with_suffix(".json"), result)
        write_atomic(options.report.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()

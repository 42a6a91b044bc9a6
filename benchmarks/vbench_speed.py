"""Seconds per clip of VBench's fast engine against the official code: same clips, weights, device, one worker.

    python benchmarks/vbench_speed.py --out /tmp/speed --frames 17 --size 96x128

Weights are those under TMD_EVAL_HOME; random ones will do, since no step's cost depends on them but RAFT's early stop,
which saves more on videos that move. Loading models is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from students.machine import cpu_name
from tmd_eval.vbench import plan, runner, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, FAST
from tmd_eval.vbench.score import PARTS, Options, score
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


def seconds(run: Path, dimension: str, device: str) -> float:
    """Median processor time of a clip on the CPU, which other load on the machine disturbs little; else wall time."""
    rows = runner.read_parts(run / PARTS / dimension).values()
    return float(np.median([row["cpu_seconds" if device == "cpu" else "seconds"] for row in rows]))


def values(run: Path, dimension: str) -> list[float]:
    """Every clip's value."""
    lines = (run / "scores" / f"{dimension}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["value"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dimensions", default=",".join(name for name in DIMENSIONS if name in FAST))
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", default="96x128", help="height x width")
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    names = options.dimensions.split(",")
    height, width = map(int, options.size.split("x"))
    weights.prepare()
    count = make_clips(options.out / "videos", names, options.frames, height, width, options.fps)
    for engine in ("official", "fast"):
        score(
            options.out / "videos", options.out / engine, names,
            workers=runner.devices(options.device, 1, engine),
            options=Options(allow_partial=True, unverified=True, static_filter=False),
        )  # fmt: skip
    print(f"{cpu_name()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, {options.device}; {count} clips of")
    print(f"{options.frames} frames of {width}x{height} at {options.fps:g} fps\n")
    print(f"{'dimension':24}{'official s':>12}{'fast s':>9}{'speed-up':>10}{'largest difference':>20}")
    total = {"official": 0.0, "fast": 0.0}
    for name in names:
        took = {engine: seconds(options.out / engine, name, options.device) for engine in total}
        gap = max(
            abs(a - b)
            for a, b in zip(values(options.out / "official", name), values(options.out / "fast", name), strict=True)
        )
        for engine in total:
            total[engine] += took[engine]
        ratio = took["official"] / took["fast"]
        print(f"{name:24}{took['official']:12.2f}{took['fast']:9.2f}{ratio:9.2f}x{gap:20.1e}")
    ratio = total["official"] / total["fast"]
    print(f"{'together':24}{total['official']:12.2f}{total['fast']:9.2f}{ratio:9.2f}x")


if __name__ == "__main__":
    main()

"""How fast the leaderboard is: a site of 5,000 runs with per-video rows for 200, and the import of a score file.

    python -m benchmarks.leaderboard_speed [--runs 5000] [--with-videos 200] [--keep DIR] [--out FILE.json]

prints one JSON line and writes it with the device to reports/benchmarks/leaderboard_speed.json: seconds and peak memory
of the build, which runs in a process of its own, and seconds to record a run with a score file of 4,720 rows (VBench's
944 prompts x 5). Goals on 2 cores: 60 s, 1 GB, 2 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sqlalchemy import insert

from leaderboard.checks import DIMENSIONS, total_of
from leaderboard.database import writing
from leaderboard.models import Metric, Result, VideoScore
from leaderboard.record import record_run
from leaderboard.run_folder import prompt_id

PROMPTS, SAMPLES = 944, 5
REPORT = Path(__file__).parents[1] / "reports" / "benchmarks" / "leaderboard_speed.json"
METHODS = ("tmd", "dmd2-v", "rcm", "kd")


def fill(db: str, runs: int, with_videos: int) -> None:
    """Rows with all sixteen dimensions; the first ones also with a score for each of 4,720 videos."""
    rng = np.random.default_rng(0)
    results, metrics = [], []
    for i in range(1, runs + 1):
        m = int(rng.integers(1, 5))
        role = "teacher" if i == 1 else "student"
        nfe = 50.0 if i == 1 else round(m * float(rng.uniform(1, 1.6)), 2)
        results.append(
            {
                "id": i, "key": hashlib.sha256(str(i).encode()).hexdigest(), "source": "measured", "name": f"run {i}",
                "role": role, "method": "teacher" if i == 1 else METHODS[i % 4], "m": m, "effective_nfe": nfe,
                "forward_passes": nfe, "guidance": 1.0, "base": "base", "checkpoint": f"ckpt/{i}",
                "checkpoint_hash": hashlib.sha256(f"c{i}".encode()).hexdigest(), "prompts_name": "vbench",
                "prompts_sha256": "0" * 64, "prompts_count": PROMPTS, "samples_per_prompt": SAMPLES, "seeds": [0],
                "height": 480, "width": 832, "frames": 81, "fps": 16.0, "dtype": "bfloat16",
                "videos": PROMPTS * SAMPLES, "seconds_per_video": nfe * float(rng.uniform(0.9, 1.1)), "batch_size": 1,
                "device": "a GPU", "code_revision": "0" * 40, "packages": {"torch": "2.14.1"}, "command": "tmd-eval x",
                "created": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=i), "manifest_sha256": "0" * 64,
                "run": "", "origin": None,
            }
        )  # fmt: skip
        values = dict(zip(DIMENSIONS, np.clip(0.8 + rng.normal(size=16) / 20, 0, 1).tolist(), strict=True))
        quality, semantic = float(np.mean(list(values.values())[:7])), float(np.mean(list(values.values())[7:]))
        values |= {"quality": quality, "semantic": semantic, "total": total_of(quality, semantic)}
        metrics += [
            {
                "result_id": i, "name": name, "value": value, "low": value - 0.01, "high": value + 0.01,
                "n": PROMPTS * SAMPLES, "completeness": 1.0, "metric_version": "1", "weight_hashes": {},
            }
            for name, value in values.items()
        ]  # fmt: skip
    prompts = [prompt_id(f"prompt {line}") for line in range(PROMPTS)]
    with writing(db) as session:
        session.execute(insert(Result), results)
        session.execute(insert(Metric), metrics)
        for i in range(1, with_videos + 1):
            values_of = rng.uniform(0, 1, (PROMPTS, SAMPLES))
            session.execute(
                insert(VideoScore),
                [
                    {
                        "result_id": i,
                        "name": "imaging_quality",
                        "prompt": p,
                        "sample": s,
                        "value": float(values_of[j, s]),
                    }
                    for j, p in enumerate(prompts)
                    for s in range(SAMPLES)
                ],
            )


def build(db: str, out: str, queue: Any) -> None:
    """Build the site and report seconds and the highest memory of this process."""
    from leaderboard.site import build_site

    start, cpu = time.perf_counter(), time.process_time()
    build_site(db, Path(out), command="benchmark")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put((time.perf_counter() - start, time.process_time() - cpu, peak))


def score_file(folder: Path) -> Path:
    """A run folder whose one dimension has a score for each of 4,720 videos."""
    (folder / "scores").mkdir(parents=True)
    names = [
        (f"prompt {line}", index, f"prompt {line}-{index}.mp4") for line in range(PROMPTS) for index in range(SAMPLES)
    ]
    manifest = [
        {"video": video, "prompt": prompt, "line": int(prompt[7:]), "index": index, "seconds": 1.0}
        for prompt, index, video in names
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    rows = [{"video": video, "value": 0.5, "extra": {}} for _, _, video in names]
    (folder / "scores" / "imaging_quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"value": 0.5, "low": 0.4, "high": 0.6, "n": len(rows), "completeness": 1.0, "metric_version": "1"}
    (folder / "scores" / "summary.json").write_text(json.dumps({"imaging_quality": {**entry, "weight_hashes": {}}}))
    config = {
        "command": "tmd-eval vbench", "code_revision": "0" * 40, "device": "a GPU", "packages": {},
        "created": "2026-11-20T10:00:00+00:00", "samples_per_prompt": SAMPLES, "seed": 0, "size": [480, 832],
        "checkpoint": {"role": "student", "method": "tmd", "m": 2, "base": "base", "name": "x"},
        "prompts": {"name": "vbench", "sha256": "0" * 64, "count": PROMPTS},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--with-videos", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="write the site here instead of a temporary folder")
    parser.add_argument("--out", type=Path, default=REPORT, help="the JSON file")
    choice = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        db = str(folder / "board.db")
        fill(db, choice.runs, choice.with_videos)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=build, args=(db, str(choice.keep or folder / "site"), queue))
        process.start()
        seconds, cpu, peak = queue.get()
        process.join()
        run = score_file(folder / "run")
        start, start_cpu = time.perf_counter(), time.process_time()
        record_run(db, run)
        found = {
            "runs": choice.runs,
            "with_videos": choice.with_videos,
            "build_seconds": round(seconds, 2),
            "build_cpu_seconds": round(cpu, 2),
            "build_peak_bytes": peak,
            "import_rows": PROMPTS * SAMPLES,
            "import_seconds": round(time.perf_counter() - start, 3),
            "import_cpu_seconds": round(time.process_time() - start_cpu, 3),
        }
    from tmd_eval.files import write_json
    from tmd_eval.provenance import provenance

    command = shlex.join(["python", "-m", "benchmarks.leaderboard_speed", *sys.argv[1:]]).replace(
        f"{REPORT.parents[2]}/", ""
    )
    write_json(choice.out, {**provenance(command=command), "threads": len(os.sched_getaffinity(0)), **found})
    print(json.dumps(found))


if __name__ == "__main__":
    main()

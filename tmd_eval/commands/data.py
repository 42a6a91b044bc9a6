"""``tmd-eval data``: training sets of latents and text embeddings, made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from students.base import Base

app = typer.Typer(
    no_args_is_help=True,
    help="Make training data: shards of latents and text embeddings.\n\n"
    "Example: tmd-eval data encode --base micro --videos runs/teacher/videos --out data/micro",
)

BASE = Annotated[str, typer.Option(help='The teacher: "micro", a diffusers pipeline folder or a hub id.')]
OUT = Annotated[Path, typer.Option(help="Data folder; an unfinished one is gone on with.")]
SHARD_SIZE = Annotated[int, typer.Option(help="Samples a shard.")]
BATCH_SIZE = Annotated[int, typer.Option(help="Samples made at once.")]
DTYPE = Annotated[str, typer.Option(help="Storage: float16, bfloat16 or float32.")]
LIMIT = Annotated[int | None, typer.Option(help="Only the first so many samples.")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu or cuda; under torchrun each rank has its own GPU.")]
VERIFY = Annotated[bool, typer.Option("--verify", help="Check finished shards against their hash; mend what differs.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")]
JSON = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


@app.command()
def encode(
    base: BASE,
    videos: Annotated[Path, typer.Option(help="Folder of videos; manifest.jsonl or text files beside give captions.")],
    out: OUT,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL with file and text a line, instead.", metavar="FILE.jsonl")
    ] = None,
    shard_size: SHARD_SIZE = 64,
    batch_size: BATCH_SIZE = 1,
    dtype: DTYPE = "float16",
    limit: LIMIT = None,
    device: DEVICE = "auto",
    verify: VERIFY = False,
    dry_run: DRY_RUN = False,
    json_: JSON = False,
) -> None:
    """Encode a folder of captioned videos.

    Videos are scaled to cover the model's size, cut in the middle and sampled at its frame rate; what cannot be read or
    is too short is left out and counted. Under torchrun the ranks share the shards.

    Example: tmd-eval data encode --base micro --videos runs/teacher/videos --out data/micro
    """
    from students.weights import file_hash
    from tmd_eval import encode as encoding
    from tmd_eval.shards import dtype_of

    clips, bare = encoding.find_clips(videos, captions)
    clips = clips[: _checked(limit)]
    source = {
        "kind": "videos", "folder": videos.resolve().name, "items": encoding.listing(clips),
        "files": [clip.path.stat().st_size for clip in clips], "without_caption": bare, "dtype": dtype,
        "captions": file_hash(captions) if captions else None,
    }  # fmt: skip
    kind = dtype_of(dtype)
    _run(
        base, out, source, clips, lambda model: encoding.encoder(model, kind), shard_size, batch_size, device, verify,
        dry_run, json_,
    )  # fmt: skip


@app.command()
def synthesize(
    base: BASE,
    prompts: Annotated[str, typer.Option(help='"vbench", "micro" or a file with one prompt a line.')],
    out: OUT,
    samples_per_prompt: Annotated[int, typer.Option(help="Samples of each prompt.")] = 1,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    m: Annotated[int, typer.Option("--m", help="M, steps of the teacher.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale [default: the teacher's own].")] = None,
    seed: Annotated[int, typer.Option(help="Of the whole set; each sample's own seed is in its record.")] = 0,
    shard_size: SHARD_SIZE = 64,
    batch_size: BATCH_SIZE = 1,
    dtype: DTYPE = "float16",
    limit: LIMIT = None,
    device: DEVICE = "auto",
    verify: VERIFY = False,
    dry_run: DRY_RUN = False,
    json_: JSON = False,
) -> None:
    """Let the teacher generate latents for a list of prompts; no pixels are made. Under torchrun the ranks share them.

    Example: tmd-eval data synthesize --base micro --prompts captions.txt --m 50 --out data/teacher
    """
    from students.errors import ConfigError
    from tmd_eval import encode as encoding
    from tmd_eval.generate import sampled_by
    from tmd_eval.prompts import load_prompts
    from tmd_eval.shards import dtype_of

    if m < 1:
        raise ConfigError(f"M must be at least 1, not {m}.")
    chosen = load_prompts(prompts, count=num_prompts)
    items = encoding.wishes(chosen, samples_per_prompt, seed)[: _checked(limit)]
    source = {
        "kind": "teacher", "items": encoding.listing(items), "m": m, "guidance": guidance, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    kind = dtype_of(dtype)

    def own(model: Base) -> float:
        return model.guidance if guidance is None else guidance

    def make(model: Base) -> Any:
        return encoding.synthesizer(model, m, own(model), kind)

    def facts(model: Base) -> dict[str, Any]:
        return {"w": own(model), "text_length": model.text_length, **sampled_by(model, own(model))}

    _run(base, out, source, items, make, shard_size, batch_size, device, verify, dry_run, json_, facts)


def _checked(limit: int | None) -> int | None:
    from students.errors import ConfigError

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}.")
    return limit


def _run(
    base: str,
    out: Path,
    source: dict[str, Any],
    items: list[Any],
    make: Any,
    shard_size: int,
    batch_size: int,
    device: str,
    verify: bool,
    dry_run: bool,
    json_: bool,
    facts: Callable[[Base], dict[str, Any]] = lambda model: {},
) -> None:
    import dataclasses
    import hashlib
    import json

    import torch

    from students.base import load_base
    from students.distributed import Ranks
    from tmd_eval.shards import Plan, make_shards

    ranks = Ranks(device)
    # The list itself may be long: its hash is enough to tell another one.
    source["items"] = hashlib.sha256(json.dumps(source["items"], ensure_ascii=False).encode()).hexdigest()
    if "files" in source:
        source["files"] = hashlib.sha256(json.dumps(source["files"]).encode()).hexdigest()
    plan = Plan(
        folder=out, source=source, items=items, shard_size=shard_size, batch_size=batch_size, rank=ranks.rank,
        world=ranks.world,
    )  # fmt: skip
    if dry_run:
        report: dict[str, Any] = {
            "folder": str(out), "samples": len(items), "shards": len(plan.shards),
            "missing_shards": len(plan.missing()),
        }  # fmt: skip
        text = "{samples} samples in {shards} shards, {missing_shards} of them missing, to {folder}".format(**report)
    else:
        low = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        model = load_base(base, device=ranks.device, dtype=low)
        plan = dataclasses.replace(plan, source={**source, **facts(model)})  # only the model knows its own settings
        report = make_shards(plan, make(model), model, verify=verify, progress=ranks.main)
        text = _describe(report)
    if json_:
        typer.echo(json.dumps(report))
    else:
        typer.echo(text)


def _describe(report: dict[str, Any]) -> str:
    lines = [
        f"{report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB, "
        f"{report['skipped']} left out, in {report['folder']}"
    ]
    if statistics := report["statistics"]:
        spread = statistics["latent_spread"]
        mean = max(statistics["latent_mean"], key=abs)
        lines += [
            f"latents: mean of a channel up to {mean:+.3f}, spread {min(spread):.3f} to {max(spread):.3f}, "
            f"largest {statistics['latent_largest']:.2f}",
            f"text: {statistics['tokens_mean']:.1f} tokens on average, at most {statistics['tokens_longest']}",
        ]
    if not report["complete"]:
        lines.append("other ranks are still at work: the last one completes the folder")
    return "\n".join(lines)

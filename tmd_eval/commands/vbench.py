"""``tmd-eval vbench``: the official VBench in its own environment: score; sub-commands set up, check, compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmd_eval.commands import vbench_results, vbench_setup

if TYPE_CHECKING:
    from tmd_eval.generate import Settings
    from tmd_eval.prompts import PromptSet

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Score videos with the official VBench.\n\nExample: tmd-eval vbench --videos DIR --out runs/mine",
)
app.command("setup")(vbench_setup.setup)
app.command("doctor")(vbench_setup.doctor)
app.command("total")(vbench_results.total)
app.command("compare")(vbench_results.compare)
app.command("export")(vbench_results.export)
app.command("diversity")(vbench_results.diversity)

FLICKER = "temporal_flickering"


@app.callback()
def vbench(
    context: typer.Context,
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint; its videos are generated first if missing.")] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of mp4 files, or a run, instead of a checkpoint.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; scores go to its scores/.")] = None,
    dimensions: Annotated[
        list[str] | None, typer.Option(help="Dimensions, comma-separated, or all [default: all that are ready].")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help='With --ckpt: "vbench", "micro" or a file.', metavar="SET|FILE")
    ] = "vbench",
    texts: Annotated[
        str | None,
        typer.Option(help="Extended prompts for the model: a file, wan-seed42, gpt or hunyuan; names stay short."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="With --videos: JSON {file name: prompt} of videos with names of their own.")
    ] = None,
    m: Annotated[int | None, typer.Option("--m", help="M, outer steps [default: the checkpoint's].")] = None,
    n: Annotated[int | None, typer.Option("--n", help="N, inner steps of a TMD student.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of a teacher; 1 is none.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts of the dimensions.")] = None,
    samples_per_prompt: Annotated[int | None, typer.Option(help="Videos a prompt [default: vbench 5, else 1].")] = None,
    static_filter: Annotated[
        bool | None,
        typer.Option(
            "--static-filter/--no-static-filter",
            help="Flickering on the stillest of 25 samples [default: where RAFT's weights, or more samples, are].",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Base seed.")] = 0,
    seed_rule: Annotated[
        str | None,
        typer.Option(help="index: seed + index; line: + 100000 x prompt [default: vbench index, else line]."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many videos.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Videos at once [default: micro 16, else 1].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    engine: Annotated[
        str, typer.Option(help="official, or fast: the same models and weights, no work done twice.")
    ] = "official",
    protocol: Annotated[
        str, typer.Option(help="vbench; long: VBench-Long, for clips of 5 s on; long-in-clip: less DINOv2, DreamSim.")
    ] = "vbench",
    workers: Annotated[int | None, typer.Option(help="Scoring processes [default: one a GPU, or one].")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Score what is there; figures are marked partial, no total.")
    ] = False,
    unverified_weights: Annotated[
        bool, typer.Option("--unverified-weights", help="Take weights whose hash is not the published one.")
    ] = False,
    db: Annotated[
        str | None, typer.Option(help="Database to record in [default: TMD_EVAL_DB or ./tmd-eval.db].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be generated and scored.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a checkpoint's videos, or a folder's; a run whose checkpoint is known is recorded in the database."""
    if context.invoked_subcommand is not None:
        return
    if ckpt is None and videos is None and out is None and not dimensions:
        typer.echo(context.get_help())
        return
    import torch

    from students.errors import ConfigError, IncompleteError
    from tmd_eval import generate as generation
    from tmd_eval.vbench import long, plan, runner, weights
    from tmd_eval.vbench import score as scoring
    from tmd_eval.vbench.environment import python

    if (ckpt is None) == (videos is None):
        raise ConfigError("Give either --ckpt CHECKPOINT or --videos DIR.")
    if out is None:
        raise ConfigError("Give --out RUN, the folder for the scores.")
    _refuse_misplaced(context, with_videos=videos is not None)
    if videos is not None:
        _refuse_other_run(videos, out)
    python()
    small = not (num_prompts is None and limit is None and samples_per_prompt is None)
    custom = prompts != "vbench" if videos is None else prompt_file is not None or not plan.is_standard(videos)
    whole = ckpt is not None and not custom and not small
    names = _dimensions(dimensions, custom, whole=whole, un=unverified_weights, rule=long.check_rule(protocol))
    if static_filter and (FLICKER not in names or custom):
        raise ConfigError(
            "--static-filter belongs to temporal_flickering of VBench's own prompts; leave it out, or score those."
        )
    if static_filter:
        weights.check(runner.STATIC, unverified=unverified_weights)
    captions = vbench_results.read_captions(prompt_file)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = runner.devices(device, workers, engine)
    folder = videos or out
    if ckpt is not None:
        chosen, settings = _settings(
            prompts,
            texts,
            names,
            num_prompts,
            samples_per_prompt,
            seed,
            seed_rule,
            limit,
            m,
            n,
            guidance,
            batch_size,
            protocol == "vbench" and _filtering(names, static_filter, samples_per_prompt, un=unverified_weights),
        )
        if dry_run:
            work = generation.plan(generation.open_model(ckpt, device), chosen, out, settings)
            result = {"videos": len(work.units), "missing": len(work.missing), "dimensions": names}
            text = f"{len(work.units)} videos, {len(work.missing)} to generate; then {', '.join(names)}"
            typer.echo(json.dumps(result) if json_ else text)
            return
        generation.run(ckpt, chosen, out, settings, device=device)
    if dry_run:
        found = {name: plan.select(folder, name, prompts=captions) for name in names}
        counts = {name: {"videos": len(s.videos), "missing": len(s.missing)} for name, s in found.items()}
        typer.echo(json.dumps(counts) if json_ else "\n".join(f"{name}: {c}" for name, c in counts.items()))
        return
    options = scoring.Options(
        allow_partial=allow_partial, static_filter=static_filter, unverified=unverified_weights, prompts=captions,
        protocol=protocol,
    )  # fmt: skip
    lost: IncompleteError | None = None
    try:
        record = scoring.score(folder, out, names, workers=processes, options=options)
    except scoring.NotMeasuredError as error:
        record, lost = error.record, error
    if not record:  # another rank than the first
        return
    recorded = None
    if _same_folder(plan.locate(folder)[0], out) and (out / "config.yaml").is_file():  # else nobody knows the model
        from leaderboard.record import record_run

        recorded = record_run(db, out)
    vbench_results.show(out, record, names, recorded, json_)
    if lost is not None:
        raise lost


def _dimensions(given: list[str] | None, custom: bool, *, whole: bool, un: bool, rule: str = "vbench") -> list[str]:
    """The dimensions to score.

    Those that are asked for must be ready. By default they are the ones that are ready, the others are named on stderr;
    but the whole protocol, which is to end in a total, starts only if all are ready.
    """
    from students.errors import EnvironmentMissingError
    from tmd_eval.vbench import long, runner, weights
    from tmd_eval.vbench.dimensions import DIMENSIONS, check_dimension

    weights.prepare()
    possible = [name for name, one in DIMENSIONS.items() if not custom or not (one.needs_prompts or one.reads_prompt)]
    names = list(dict.fromkeys(d.strip() for text in given or [] for d in text.split(",") if d.strip()))
    if names == ["all"]:
        names = possible
    for name in names:
        runner.check_ready(check_dimension(name), unverified=un)
        long.check(name, rule, unverified=un)
    if names:
        return names
    lacking = {
        name: weights.problems(name, unverified=un) | long.problems(name, rule, unverified=un) for name in possible
    }
    lacking = {name: found for name, found in lacking.items() if found}
    if lacking:
        files = sorted({Path(path).name for found in lacking.values() for path in found})
        text = f"without weights: {', '.join(lacking)} (missing or wrong: {', '.join(files)})"
        if whole:
            raise EnvironmentMissingError(
                f"The whole of VBench cannot be scored here, {text}. Get them with: tmd-eval vbench setup --fetch, or "
                f"choose --dimensions {','.join(n for n in possible if n not in lacking)}."
            )
        print(f"not scored, {text}", file=sys.stderr)
    return [name for name in possible if name not in lacking]


def _filtering(names: list[str], wanted: bool | None, samples: int | None, *, un: bool) -> bool:
    """Whether flickering's prompts get the 25 samples that the static filter chooses from."""
    from tmd_eval.vbench import weights
    from tmd_eval.vbench.runner import STATIC

    if FLICKER not in names or wanted is False:
        return False
    return samples is None and (bool(wanted) or not weights.problems(STATIC, unverified=un))


def _refuse_misplaced(context: typer.Context, *, with_videos: bool) -> None:
    """Refuse options that would do nothing, or fail only after the videos are generated."""
    from students.errors import ConfigError

    makes = (
        "prompts", "texts", "m", "n", "guidance", "num_prompts", "samples_per_prompt", "seed", "seed_rule", "limit",
        "batch_size",
    )  # fmt: skip
    names = makes if with_videos else ("prompt_file",)
    given = [
        "--" + name.replace("_", "-")
        for name in names
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        why = "--videos: they are there already" if with_videos else "--ckpt: the run knows its videos' prompts"
        raise ConfigError(f"Leave out {', '.join(given)}, of no use with {why}.")


def _refuse_other_run(videos: Path, out: Path) -> None:
    """Refuse to mix scores of other videos into a run: they would be recorded as its model's."""
    from students.errors import ConfigError
    from tmd_eval.vbench import plan
    from tmd_eval.video_set import MANIFEST

    if (out / MANIFEST).is_file() and not _same_folder(plan.locate(videos)[0], out):
        raise ConfigError(
            f"{out} is a run with videos of its own, and {videos} holds others; score them into another --out, or give "
            f"--videos {out}."
        )


def _same_folder(one: Path | None, other: Path) -> bool:
    return one is not None and one.resolve() == other.resolve()


def _settings(
    source: str, texts: str | None, dimensions: list[str], num_prompts: int | None, samples: int | None, seed: int,
    seed_rule: str | None, limit: int | None, m: int | None, n: int | None, guidance: float | None,
    batch_size: int | None, filtering: bool,
) -> tuple[PromptSet, Settings]:  # fmt: skip
    """The prompt set and how to sample it; of VBench's set only the prompts of the dimensions."""
    from students.errors import ConfigError
    from tmd_eval.generate import LINE_STRIDE, Settings
    from tmd_eval.prompts import load_prompts, vbench_prompts
    from tmd_eval.prompts_texts import with_texts
    from tmd_eval.vbench.dimensions import FILTER_SAMPLES

    if seed_rule not in (None, "index", "line"):
        raise ConfigError(f"--seed-rule must be index or line, not {seed_rule!r}.")
    whole = source == "vbench" or (texts is not None and source != "micro")  # texts belong to all prompts of a file
    chosen = load_prompts(source, count=None if whole else num_prompts)
    if texts is not None:
        chosen = with_texts(chosen, texts)
    if not chosen.named_by_prompt:
        chosen = chosen.first(num_prompts)
    extra: dict[str, Any] = {}
    if chosen.named_by_prompt:
        place = {prompt: line for line, prompt in enumerate(chosen.prompts)}
        extra["lines"] = tuple(sorted(place[p] for p in vbench_prompts(dimensions).first(num_prompts).prompts))
        samples = 5 if samples is None else samples
        if filtering:
            of_flicker = {place[prompt] for prompt in vbench_prompts([FLICKER]).prompts} & set(extra["lines"])
            extra["samples_of_line"] = dict.fromkeys(sorted(of_flicker), FILTER_SAMPLES)
    if seed_rule is not None:
        extra["line_stride"] = LINE_STRIDE if seed_rule == "line" else 0
    settings = Settings(
        samples_per_prompt=1 if samples is None else samples, seed=seed, limit=limit, m=m, n=n, guidance=guidance,
        batch_size=batch_size, **extra,
    )  # fmt: skip
    return chosen, settings

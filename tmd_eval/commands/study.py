"""``tmd-eval study``: preference studies from design to figure."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Preference studies: two clips, two questions, honest intervals.\n\n"
    "Start with: tmd-eval study create --videos tmd=runs/tmd --videos dmd2=runs/dmd2 --out studies/first",
)

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="Folder that study create wrote.")]
Database = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", help="Database URL or SQLite file; else TMD_EVAL_DB, else ./tmd-eval.db."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    videos: Annotated[
        list[str], typer.Option(metavar="NAME=DIR", help="Video set of a model; give two or more, the reference first.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the study.")],
    name: Annotated[str | None, typer.Option(help="Name in the database; by default the folder's.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model set against each other one; else all pairs.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts drawn from those that the sets share.")] = 60,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts to use, one a line; no draw.")] = None,
    seeds: Annotated[int, typer.Option(help="Videos a model and prompt.")] = 5,
    seed_pairing: Annotated[str, typer.Option(help="matched or independent.")] = "matched",
    votes_per_item: Annotated[int, typer.Option(help="Votes on each pair, prompt and seed.")] = 2,
    trials_per_rater: Annotated[int, typer.Option(help="Trials of a rater, catch trials included.")] = 20,
    catch_share: Annotated[float, typer.Option(help="Share of catch trials, 0 to 0.5; two obvious ones first.")] = 0.1,
    practice_trials: Annotated[int, typer.Option(help="Practice trials, 0 to 2.")] = 2,
    allow_ties: Annotated[bool, typer.Option("--allow-ties", help="Offer 'no difference'.")] = False,
    break_every: Annotated[int, typer.Option(help="Trials between suggested breaks; 0 for none.")] = 15,
    lease_minutes: Annotated[float, typer.Option(help="Silence after which a rater may lose what is unanswered.")] = 20,
    seed: Annotated[int, typer.Option(help="Of draws, sides and orders.")] = 0,
    platform: Annotated[str, typer.Option(help="Where raters come from: none, prolific or mturk.")] = "none",
    rater_parameter: Annotated[
        str | None, typer.Option(help="Query parameter with the rater's id; by default the platform's.")
    ] = None,
    completion_code: Annotated[str | None, typer.Option(help="Shown at the end; mturk needs one.")] = None,
    completion_url: Annotated[str | None, typer.Option(help="Link at the end; {code} is replaced.")] = None,
    language: Annotated[str, typer.Option(help="Texts of the page: en, or a YAML file.")] = "en",
    contact: Annotated[str, typer.Option(help="Whom raters can write to.")] = "",
    allow_unequal_prompts: Annotated[
        bool, typer.Option("--allow-unequal-prompts", help="Take the prompts that all sets share.")
    ] = False,
    conform: Annotated[
        bool, typer.Option("--conform", help="Bring unequal clips to the lowest rate, length and size.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")] = False,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Fix a study's design, encode its clips under random names, and hash the whole schedule.

    Example: tmd-eval study create --videos tmd=runs/tmd --videos dmd2=runs/dmd2 --out studies/first
    """
    from tqdm import tqdm

    from studies.create import create_study, plan_study
    from studies.errors import StudyError
    from studies.serving import Serving

    sets: dict[str, Path] = {}
    for item in videos:
        label, equals, folder = item.partition("=")
        if not equals or not label or label in sets:
            raise StudyError(f"--videos {item!r} is not NAME=DIR with a name of its own.")
        sets[label] = Path(folder)
    settings: dict[str, Any] = {
        "name": name or out.resolve().name, "reference": reference, "seeds": seeds, "seed_pairing": seed_pairing,
        "votes_per_item": votes_per_item, "trials_per_rater": trials_per_rater, "catch_share": catch_share,
        "practice_trials": practice_trials, "allow_ties": allow_ties, "break_every": break_every,
        "lease_minutes": lease_minutes, "seed": seed,
    }  # fmt: skip
    serving = Serving(
        platform=platform, rater_parameter=rater_parameter, completion_code=completion_code,  # type: ignore[arg-type]
        completion_url=completion_url, language=language, contact=contact,
    )  # fmt: skip
    chosen = None
    if prompts is not None:
        try:
            chosen = [line.strip() for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise StudyError(f"Cannot read the prompts {prompts} ({error.strerror}).") from error
        except UnicodeError as error:
            raise StudyError(f"The prompts {prompts} are not UTF-8 text ({error}); save them as UTF-8.") from error
    plan = plan_study(
        sets, settings, prompts=chosen, num_prompts=num_prompts, serving=serving,
        allow_unequal=allow_unequal_prompts, conform=conform,
    )  # fmt: skip
    if dry_run:
        design = plan.design
        facts = {
            "study": design.name, "pairs": len(design.pairs), "prompts": len(design.prompts), "votes": design.votes,
            "raters": len(plan.sheets), "trials_per_rater": design.trials_per_rater, "clips": len(plan.clips),
        }  # fmt: skip
    else:
        facts = create_study(
            plan, out, db, command=_command(),
            progress=lambda clips: tqdm(clips, desc="clips", unit="clip", file=sys.stderr),
        )  # fmt: skip
    typer.echo(json.dumps(facts) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items()))


@app.command()
def serve(
    study: Study,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 7860,
    db: Database = None,
) -> None:
    """Serve the raters' page until interrupted.

    Example: tmd-eval study serve studies/first --port 7860
    """
    from studies.app import Server, serve
    from studies.serving import open_folder

    folder = open_folder(study)
    server = Server(folder, db)
    query = "" if folder.serving.platform == "none" else f"/?{folder.serving.parameter}=ID"
    typer.echo(f"{folder.name}: http://{host}:{port}{query} (Ctrl-C ends; votes are stored at once)", err=True)
    serve(server, host, port)


@app.command()
def status(study: Study, db: Database = None, as_json: Json = False) -> None:
    """Counts and quality of a study; never who is winning.

    Example: tmd-eval study status studies/first
    """
    from datetime import UTC, datetime

    from studies.database import Database, find_study
    from studies.serving import open_folder
    from studies.status import study_status

    folder = open_folder(study)
    database = Database(db)
    try:
        with database.reading() as session:
            row = find_study(session, folder.name, folder.schedule_hash, database.shown)
            facts = study_status(session, row.id, datetime.now(UTC))
    finally:
        database.close()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if key == "audit":
            typer.echo("audit: " + ", ".join(f"{row['at']} {row['action']}" for row in value))
        elif isinstance(value, dict):
            typer.echo(f"{key}: " + ", ".join(f"{name} {item}" for name, item in value.items()))
        else:
            typer.echo(f"{key}: {value}")


@app.command()
def unblind(
    study: Study,
    reason: Annotated[str, typer.Option(help="Why now; goes into the audit log.")],
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Open a study's win rates for good; written to its audit log.

    Example: tmd-eval study unblind studies/first --reason "all votes are in"
    """
    from studies.serving import open_folder
    from studies.unblind import unblind_study

    facts = unblind_study(open_folder(study), db, reason=reason, command=_command())
    _say(facts, as_json)


@app.command()
def analyze(
    study: Study,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the files; by default STUDY/analysis.")
    ] = None,
    record: Annotated[bool, typer.Option(help="Write the results into the database's leaderboard tables.")] = True,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Win rates with intervals, agreement and sensitivity: preferences.json, report.json, report.md and the figure.

    Example: tmd-eval study analyze studies/first --out reports/first
    """
    from students.revision import code_revision
    from studies.analyze import analyze_study
    from studies.report import NONE
    from studies.serving import open_folder
    from tmd_eval.provenance import cpu_name, package_versions

    target = out or study / "analysis"
    command = _command() if out else f"{_command()} {shlex.join(['--out', str(target)])}"
    facts = analyze_study(
        open_folder(study), db, target, command=command, code_revision=code_revision(), device=f"{cpu_name()} (cpu)",
        packages=package_versions(), record=record,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    if facts["simulated"]:
        typer.echo("SIMULATED raters, not people")
    typer.echo(f"{facts['votes']} of {facts['wanted_votes']} votes, {facts['raters']} raters kept")
    for row in facts["results"]:
        interval = f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        p = NONE if row["p_holm"] is None else f"{row['p_holm']:.3g}"
        typer.echo(f"{row['question']}: {row['a']} over {row['b']} {interval}, p (Holm) {p}, n = {row['n_votes']}")
    typer.echo(f"method: {facts['results'][0]['method']}")
    typer.echo(f"{target}")


@app.command()
def export(
    study: Study,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the tables.")],
    backup: Annotated[
        bool, typer.Option("--backup", help="Also copy the SQLite database; unblinded studies only.")
    ] = False,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Votes as CSV, JSON Lines and Parquet; without anything that tells models apart while the study is blind.

    Example: tmd-eval study export studies/first --out votes
    """
    from studies.export import export_study
    from studies.serving import open_folder

    _say(export_study(open_folder(study), db, out, command=_command(), backup=backup), as_json)


@app.command()
def power(
    num_prompts: Annotated[int, typer.Option(help="Prompts.")] = 60,
    seeds: Annotated[int, typer.Option(help="Videos a model and prompt.")] = 5,
    votes_per_item: Annotated[int, typer.Option(help="Votes on each pair, prompt and seed.")] = 2,
    raters: Annotated[int, typer.Option(help="Raters.")] = 30,
    level: Annotated[float, typer.Option(help="Level of the test; divide by the number of tests for Holm.")] = 0.05,
    prompt_sd: Annotated[float, typer.Option(help="Spread of prompt effects, log-odds.")] = 0.8,
    item_sd: Annotated[float, typer.Option(help="Spread of clip effects within a prompt.")] = 0.8,
    rater_sd: Annotated[float, typer.Option(help="Spread of rater effects.")] = 0.4,
    simulations: Annotated[int, typer.Option(help="Simulated studies a preference.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the simulation.")] = 0,
    as_json: Json = False,
) -> None:
    """What preference a design detects, simulated with prompt, clip and rater effects.

    Example: tmd-eval study power --num-prompts 60 --seeds 5 --votes-per-item 2 --raters 30
    """
    from tqdm import tqdm

    from studies.power import PowerDesign
    from studies.power import power as simulate_power
    from studies.simulate import Effects

    design = PowerDesign(
        prompts=num_prompts, seeds=seeds, votes_per_item=votes_per_item, raters=raters, level=level,
        simulations=simulations, seed=seed,
    )  # fmt: skip
    facts = simulate_power(
        design, Effects(prompt=prompt_sd, item=item_sd, rater=rater_sd),
        progress=lambda grid: tqdm(grid, desc="preferences", file=sys.stderr),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{facts['votes']} votes on a pair, {raters} raters, {facts['test']}")
    for row in facts["rows"]:
        typer.echo(f"{100 * row['preference']:.0f} %: power {row['power']:.2f} (+- {row['error']:.2f})")
    found, plain = facts["detectable"], facts["independent"]
    typer.echo("80 % power: " + (f"from a preference of {100 * found:.1f} %" if found else "not on this grid"))
    typer.echo(
        f"independent votes would detect {100 * plain:.1f} %; design effect {facts['design_effect']:.1f}"
        if plain and facts["design_effect"]
        else "independent votes would not reach 80 % either"
    )


@app.command()
def simulate(
    study: Study,
    quality: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=LOGODDS", help="Strength in visual quality; may be repeated.")
    ] = None,
    alignment: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=LOGODDS", help="Strength in prompt alignment; may be repeated.")
    ] = None,
    prompt_sd: Annotated[float, typer.Option(help="Spread of prompt effects, log-odds.")] = 0.8,
    item_sd: Annotated[float, typer.Option(help="Spread of clip effects within a prompt.")] = 0.8,
    rater_sd: Annotated[float, typer.Option(help="Spread of rater effects.")] = 0.4,
    side: Annotated[float, typer.Option(help="Lean towards the left clip, log-odds.")] = 0.0,
    careless: Annotated[float, typer.Option(help="Share of raters who answer at random.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Rehearse a study with simulated raters; it is marked as simulated for good.

    Example: tmd-eval study simulate studies/rehearsal --quality tmd=0.3 --alignment tmd=0.9
    """
    from studies.errors import StudyError
    from studies.rehearse import Model, rehearse
    from studies.serving import open_folder
    from studies.simulate import Effects

    strengths = []
    for given in (quality, alignment):
        found = {}
        for item in given or []:
            name, _, value = item.rpartition("=")
            try:
                found[name] = float(value)
            except ValueError:
                raise StudyError(f"{item!r} is not MODEL=LOGODDS, such as tmd=0.5.") from None
        strengths.append(found)
    model = Model(
        strengths=(strengths[0], strengths[1]),
        effects=Effects(prompt=prompt_sd, item=item_sd, rater=rater_sd, side=side),
        careless=careless,
    )
    _say(rehearse(open_folder(study), db, model, seed=seed, command=_command()), as_json)


def _say(facts: dict[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items()))


def _command() -> str:
    from tmd_eval.provenance import command_line

    return command_line()

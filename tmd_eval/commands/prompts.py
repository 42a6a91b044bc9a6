"""``tmd-eval prompts``: longer texts for short prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Work on prompts.\n\nExample: tmd-eval prompts extend --prompts vbench --out texts.jsonl",
)


@app.callback()
def prompts() -> None:
    """Holds the sub-commands."""


@app.command("extend")
def extend(
    prompts: Annotated[str, typer.Option(help='"vbench", "micro" or a file with one prompt a line.')],
    out: Annotated[Path, typer.Option(help="File ending in .jsonl; an unfinished one is gone on with.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an instruct model [default: Qwen/Qwen2.5-7B-Instruct].")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="File with another system message.")] = None,
    seed: Annotated[int, typer.Option(help="Base seed; each prompt has its own.")] = 42,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many texts of the set.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; load no model.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Let an instruct model write longer texts for prompts; use them with tmd-eval vbench --texts FILE.

    Videos keep the short prompt's name, seed and score. Model hash, template and seeds are recorded beside the file.

    Example: tmd-eval prompts extend --prompts vbench --out texts.jsonl
    """
    import torch

    from students.errors import ConfigError
    from tmd_eval import prompts_extend
    from tmd_eval.prompts import load_prompts

    chosen = load_prompts(prompts, count=num_prompts)
    text = prompts_extend.TEMPLATE
    if template is not None:
        try:
            text = template.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the template {template} ({error}).") from error
    settings = prompts_extend.Extension(
        model=model or prompts_extend.MODEL, template=text, seed=seed, max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip
    prompts_extend.check(out, limit)
    if dry_run:
        count = len(chosen.prompts) if limit is None else min(limit, len(chosen.prompts))
        result = {"prompts": count, "model": settings.model, "out": str(out)}
        typer.echo(json.dumps(result) if json_ else f"{count} texts by {settings.model} into {out}")
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    done = prompts_extend.extend(chosen, out, settings, device=device, limit=limit)
    typer.echo(json.dumps(done) if json_ else f"{done['texts']} texts in {out} ({done['made']} made now)")

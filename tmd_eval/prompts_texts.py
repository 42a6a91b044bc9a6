"""Extended texts for a set of prompts: what a model is told, while names, seeds and scores keep the short prompt."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from students.errors import ConfigError, EnvironmentMissingError
from students.machine import home
from tmd_eval.files import write_atomic
from tmd_eval.prompts import PromptSet

_SOURCE = (
    "https://raw.githubusercontent.com/Vchitect/VBench/45e79ec14e69a2187202c675d2dbce1a71843d53/prompts/"
    "augmented_prompts"
)


@dataclass(frozen=True, kw_only=True)
class KnownTexts:
    """A published list of extended prompts: line i belongs to line i of VBench's 946."""

    path: str
    """Under VBench's folder of augmented prompts."""
    sha256: str
    """Of the file."""


KNOWN: dict[str, KnownTexts] = {
    "wan-seed42": KnownTexts(  # by Qwen2.5-3B-Instruct, seed 42: the leaderboard's row of 2025-05-03
        path="Wan2.1-T2V-1.3B/all_dimension_aug_wanx_seed42.txt",
        sha256="54fb940aea8f1ede1e8728f62d3e67efacdd7b341fb8a6c91308bcba874d5d5d",
    ),
    "gpt": KnownTexts(  # by GPT-4o with CogVideoX's script
        path="gpt_enhanced_prompts/all_dimension_longer.txt",
        sha256="58ed0665de52c1bdb4820af01327f5cc1138bedbeedcc63902751056f6bf5768",
    ),
    "hunyuan": KnownTexts(  # by HunyuanVideo's rewriter
        path="hunyuan_all_dimension.txt",
        sha256="bb1f6c7c27390eb268ef1e25faa196169ee7dc8a30741290bdd9c30c5970d9fe",
    ),
}


def with_texts(prompts: PromptSet, source: str) -> PromptSet:
    """The set with the texts of a list.

    Args:
        prompts: the set; for VBench's, a list may have a line for each of the 944 prompts or of the 946 entries.
        source: "wan-seed42", "gpt" or "hunyuan" (fetched once where online), or a file: one text a line, or the JSON
            lines that ``tmd-eval prompts extend`` writes.

    Raises:
        ConfigError: no such file, not one text a prompt, a blank one, or texts of other prompts.
        EnvironmentMissingError: a known list that is not here and could not be fetched.
    """
    if source in KNOWN:
        texts = _known(source).splitlines()
    else:
        texts = _read(Path(source).expanduser(), prompts)
        if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
            raise ConfigError(
                f"Text {empty[0]} of {source} is blank, so those after it may be of other prompts; give one a line."
            )
    if prompts.name == "vbench" and len(texts) == 946:
        texts = _one_each(texts, len(prompts.prompts))
    if len(texts) != len(prompts.prompts):
        raise ConfigError(
            f"{source} has {len(texts)} texts for {len(prompts.prompts)} prompts; give one a line, in their order."
        )
    return replace(prompts, texts=tuple(texts), texts_name=Path(source).name)


def _one_each(texts: list[str], count: int) -> list[str]:
    """Of 946 texts those of the entries that name a prompt for the first time."""
    from tmd_eval.vbench.plan import full_info

    first: dict[str, str] = {}
    for entry, text in zip(full_info(), texts, strict=True):
        first.setdefault(entry["prompt_en"], text)
    return list(first.values())[:count]


def _read(path: Path, prompts: PromptSet) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r} is neither a text file with one text a line nor one of {', '.join(KNOWN)} ({error})."
        ) from error
    if path.suffix != ".jsonl":
        return [line.strip() for line in lines]
    try:
        rows = [json.loads(line) for line in lines]
        texts = [str(row["text"]) for row in rows]
        for place, row in enumerate(rows):
            line, prompt = row.get("line", place), row.get("prompt")
            known = prompts.prompts[place] if place < len(prompts.prompts) else None
            if line != place or (prompt is not None and known is not None and prompt != known):
                raise ConfigError(
                    f"Row {place + 1} of {path} is of line {line} and {prompt!r}, not of line {place} and {known!r}; "
                    "give the texts of these prompts, in their order."
                )
        return texts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what tmd-eval prompts extend writes ({error!r}).") from error


def _known(name: str) -> str:
    known, path = KNOWN[name], home() / "vbench-prompts" / f"{name}.txt"
    url = f"{_SOURCE}/{known.path}"
    if path.is_file():
        data = path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != known.sha256:
            raise ConfigError(
                f"{path} has SHA-256 {found[:12]}..., not {known.sha256[:12]}...; delete it and try again."
            )
        return data.decode()
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            data = reply.read()
    except (OSError, HTTPException) as error:
        raise EnvironmentMissingError(
            f"The list {name} is not here and cannot be fetched ({getattr(error, 'reason', error)}); put the file "
            f"of {url} at {path}."
        ) from error
    if (found := hashlib.sha256(data).hexdigest()) != known.sha256:
        raise EnvironmentMissingError(
            f"What came from {url} has SHA-256 {found[:12]}..., not {known.sha256[:12]}...; put the right file "
            f"at {path}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return data.decode()

"""Sets of prompts and the file names of their videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from students.errors import ConfigError

MICRO_COUNT = 1024
"""Captions in the set "micro"."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in a fixed order; a prompt's *line* is its place in it, from 0."""

    name: str
    """ "vbench", "micro", "prompt" for a single one, or the file's name."""
    prompts: tuple[str, ...]
    """The prompts."""
    named_by_prompt: bool = False
    """Videos are called after their prompt (VBench's rule), otherwise after its line."""
    texts: tuple[str, ...] | None = None
    """What the model is told instead of each prompt: extended versions; None for the prompts themselves."""
    texts_name: str | None = None
    """Name of the list of texts."""

    def text(self, line: int) -> str:
        """What the model is told for a prompt."""
        return self.prompts[line] if self.texts is None else self.texts[line]

    @property
    def texts_record(self) -> dict[str, str]:
        """Name and hash of the texts, for the run's configuration."""
        assert self.texts is not None
        return {"name": str(self.texts_name), "sha256": hashlib.sha256("\n".join(self.texts).encode()).hexdigest()}

    @property
    def sha256(self) -> str:
        """Hash of the prompts, one a line."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def video_name(self, line: int, index: int) -> str:
        """File name of sample ``index`` of a prompt: ``{prompt}-{index}.mp4`` or ``{line:05d}-{index}.mp4``."""
        return f"{self.prompts[line] if self.named_by_prompt else f'{line:05d}'}-{index}.mp4"

    def first(self, count: int | None) -> PromptSet:
        """The set of the first ``count`` prompts (all if None).

        Raises:
            ConfigError: count below 1.
        """
        if count is None or count >= len(self.prompts):
            return self
        if count < 1:
            raise ConfigError(f"The number of prompts must be at least 1, not {count}.")
        return replace(self, prompts=self.prompts[:count], texts=None if self.texts is None else self.texts[:count])

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError(f"The prompt set {self.name} is empty; give at least one prompt.")
        if self.texts is not None and len(self.texts) != len(self.prompts):
            raise ConfigError(f"{len(self.texts)} texts for {len(self.prompts)} prompts; give one text a prompt.")
        if self.named_by_prompt:
            for prompt in self.prompts:
                _check_name(prompt)


def load_prompts(source: str, *, count: int | None = None) -> PromptSet:
    """The set a user names.

    Args:
        source: "vbench" (its 944 different prompts), "micro" (held-out captions), or a file with one prompt a line;
            blank lines and white space around a prompt do not count. A file called "micro" is ``./micro``.
        count: only the first so many prompts.

    Raises:
        ConfigError: no such file, not text, or no prompt in it.
        EnvironmentMissingError: VBench's prompts are wanted and its environment is not there.
    """
    if source == "vbench":
        return vbench_prompts().first(count)
    if source == "micro":
        return micro_prompts(count)
    path = Path(source).expanduser()
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; a prompt file has one prompt a line.") from error
    except OSError as error:
        raise ConfigError(
            f"{source!r} is neither vbench, micro nor a readable file ({error.strerror or error})."
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"{path} holds no prompt; write one a line.")
    return PromptSet(name=path.name, prompts=prompts).first(count)


def single_prompt(text: str) -> PromptSet:
    """The set of one prompt given on the command line.

    Raises:
        ConfigError: only white space.
    """
    if not text.strip():
        raise ConfigError("The prompt is empty; give some text.")
    return PromptSet(name="prompt", prompts=(text.strip(),))


def micro_prompts(count: int | None = None) -> PromptSet:
    """Held-out captions of the micro world, all different, always the same ones in the same order.

    Args:
        count: how many, by default 1,024; fewer are the first of more.

    Raises:
        ConfigError: below 1 or more than the world has.
    """
    from students.micro.world import sample_attributes

    count = MICRO_COUNT if count is None else count
    check_count("micro", count)
    rng = np.random.default_rng(20_260_109)
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions.setdefault(sample_attributes(rng, held_out=True).caption)
    return PromptSet(name="micro", prompts=tuple(captions))


def check_count(source: str, count: int) -> None:
    """Refuse more prompts than a set has; those of the micro world are counted, not made.

    Args:
        source: as in :func:`load_prompts`.
        count: how many are wanted.

    Raises:
        ConfigError: count is below 1 or more than there are, or the set cannot be read.
    """
    from students.micro.world import all_attributes, is_held_out

    if source == "micro":
        most = sum(is_held_out(attributes.caption) for attributes in all_attributes()) if count > MICRO_COUNT else count
        if not 1 <= count <= most:
            raise ConfigError(f"The micro world's held-out captions number {most}; {count} were asked for.")
        return
    most = len(load_prompts(source).prompts)
    if not 1 <= count <= most:
        raise ConfigError(f"{count} prompts are needed, but there are {most}.")


def check_micro(source: str, count: int) -> None:
    """As :func:`check_count`, for scores by the micro world's judges: every prompt must be one of its captions.

    Raises:
        ConfigError: as there, or a prompt is no caption of the micro world.
    """
    from students.micro.world import parse_caption

    if source == "vbench":
        raise ConfigError("VBench's prompts are no captions of the micro world; name micro, or a file of its captions.")
    check_count(source, count)
    if source == "micro":
        return
    for number, prompt in enumerate(load_prompts(source).prompts[:count], 1):
        try:
            parse_caption(prompt)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"Prompt {number} of {source} cannot be judged: {error}.") from error


def vbench_prompts(dimensions: Sequence[str] | None = None) -> PromptSet:
    """VBench's prompts in its order, each once (2 of the 946 entries repeat an earlier prompt).

    Args:
        dimensions: only the prompts these dimensions are scored on; all if None.

    Raises:
        EnvironmentMissingError: VBench's environment, which holds the list, is not there.
    """
    from tmd_eval.vbench.runner import full_info

    entries = json.loads(full_info().read_text("utf-8"))
    wanted = None if dimensions is None else set(dimensions)
    prompts = _unique(e["prompt_en"] for e in entries if wanted is None or wanted & set(e["dimension"]))
    return PromptSet(name="vbench", prompts=prompts, named_by_prompt=True)


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _check_name(prompt: str) -> None:
    """VBench's rule makes file names of prompts; none may leave the folder or be too long for it."""
    if "/" in prompt or "\0" in prompt or prompt.startswith(".") or len(f"{prompt}-00.mp4".encode()) > 255:
        raise ConfigError(f"{prompt[:80]!r} cannot be a file name; give such prompts in a file of your own.")

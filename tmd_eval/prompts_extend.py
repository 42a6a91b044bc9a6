"""Longer texts for short prompts by an instruct model; the TMD paper has Qwen2.5-7B-Instruct extend VBench's prompts.

The paper does not print its template; ours is below, and the one used is recorded with the model's hash and the seed.
Each text has its own seed, ``seed`` and the prompt's line, so that a run that is gone on with gives the same texts as
one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from students.errors import ConfigError, EnvironmentMissingError
from tmd_eval.files import write_atomic, write_json
from tmd_eval.prompts import PromptSet
from tmd_eval.provenance import provenance

MODEL = "Qwen/Qwen2.5-7B-Instruct"
TEMPLATE = (
    "You write prompts for a text-to-video model. Rewrite the user's prompt as one paragraph of 80 to 100 words of "
    "plain English. Keep every object, number, colour, action, place and style that it names, add nothing that "
    "contradicts it, and describe appearance, motion, setting, light and camera. Answer with the new prompt alone."
)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """How texts are made."""

    model: str = MODEL
    """Hub id or folder of a causal language model with a chat template."""
    template: str = TEMPLATE
    """The system message."""
    seed: int = 42
    """Base seed of the sampling."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """Sampling temperature, at least 0; 0 takes the likeliest token each time."""
    top_p: float = 0.8
    """Nucleus, 0 to 1; 0.7 and 0.8 are the model card's."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ConfigError(
                f"max_new_tokens must be at least 1, temperature and seed at least 0, top_p in (0, 1], not "
                f"{self.max_new_tokens}, {self.temperature}, {self.seed}, {self.top_p}."
            )


def check(out: Path, limit: int | None) -> None:
    """Refuse a file of another kind, and a limit that makes nothing.

    Raises:
        ConfigError: what is wrong.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out must end in .jsonl, not {out.name!r}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}.")


def extend(
    prompts: PromptSet, out: Path, settings: Extension, *, device: str = "cpu", limit: int | None = None
) -> dict[str, Any]:
    """Write ``out``, one JSON line ``{"line", "prompt", "text"}`` a prompt, and ``out`` + ".json", its record.

    Args:
        prompts: the short prompts.
        out: file ending in .jsonl; lines that are there stay.
        settings: model, template, sampling.
        device: "cpu" or "cuda".
        limit: make at most so many texts of the set.

    Returns:
        out, texts (in the file now), made (by this call), and the record.

    Raises:
        ConfigError: a bad ``limit``, or ``out`` holds texts made with other settings or of other prompts.
        EnvironmentMissingError: the model is not here and cannot be fetched.
    """
    from tqdm import tqdm

    check(out, limit)
    wanted = list(enumerate(prompts.prompts))[:limit]
    out.parent.mkdir(parents=True, exist_ok=True)
    tell, digest = _load(settings, device)
    decisive = {
        "model": settings.model, "model_sha256": digest, "template": settings.template, "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": settings.top_p,
        "prompts": {"name": prompts.name, "sha256": prompts.sha256}, "transformers": metadata.version("transformers"),
    }  # fmt: skip
    done = _resume(out, decisive, prompts)
    write_json(out.with_name(out.name + ".json"), {**provenance(device=device), **decisive})
    left = [(line, prompt) for line, prompt in wanted if line not in done]
    with out.open("a", encoding="utf-8") as file:
        for line, prompt in tqdm(left, desc="extending", unit="prompt", file=sys.stderr, mininterval=1):
            row = {"line": line, "prompt": prompt, "text": tell(line, prompt)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    return {"out": str(out), "texts": len(done) + len(left), "made": len(left), "record": decisive}


def _resume(out: Path, decisive: dict[str, Any], prompts: PromptSet) -> set[int]:
    """Lines that are there; a last one that was cut short is removed."""
    record = out.with_name(out.name + ".json")
    if not out.is_file():
        return set()
    try:
        old = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} has no record {record.name}; choose another --out.") from error
    if different := [key for key, value in decisive.items() if old.get(key) != value]:
        raise ConfigError(f"{out} was made with another {', '.join(different)}; choose another --out.")
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomic(out, whole)
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    if any(prompts.prompts[row["line"]] != row["prompt"] for row in rows):
        raise ConfigError(f"{out} holds texts of other prompts; choose another --out.")
    return {int(row["line"]) for row in rows}


def _load(settings: Extension, device: str) -> tuple[Callable[[int, str], str], str]:
    """A function of line and prompt that asks the model, and the hash of its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise EnvironmentMissingError(
            f"The model {settings.model} cannot be loaded ({str(error).splitlines()[0]}); give --model a folder that "
            "holds an instruct model."
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(f"{settings.model} has no chat template, so it is not an instruct model; choose another.")
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": None}

    def tell(line: int, prompt: str) -> str:
        chat = [{"role": "system", "content": settings.template}, {"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(device)
        torch.manual_seed(settings.seed + 1_000_003 * line)
        with torch.inference_mode():
            answer = model.generate(
                **inputs, max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join(text.split()) or prompt  # one line; a model that says nothing leaves the prompt as it is

    return tell, _digest(model.state_dict())


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 over names and values, the same wherever the model was loaded from."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode())
    return digest.hexdigest()

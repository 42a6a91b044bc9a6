"""Extended prompts: reproducible, resumable, recorded; a tiny random model of Qwen2's class stands in for the 7B."""

from __future__ import annotations

import io
import json
import urllib.request
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from typer.testing import CliRunner

from students.errors import ConfigError, EnvironmentMissingError
from tmd_eval.cli import app
from tmd_eval.prompts import PromptSet
from tmd_eval.prompts_extend import Extension, extend
from tmd_eval.prompts_texts import with_texts

PROMPTS = PromptSet(name="three", prompts=("a red cup", "a dog, running / fast", "façades"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}
    fast = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_texts_are_the_same_interrupted_or_not(model: Path, tmp_path: Path) -> None:
    settings = Extension(model=str(model), seed=7, max_new_tokens=6)
    whole = extend(PROMPTS, tmp_path / "whole.jsonl", settings)
    assert whole["texts"] == whole["made"] == 3 and len(whole["record"]["model_sha256"]) == 64
    parts = tmp_path / "parts.jsonl"
    assert extend(PROMPTS, parts, settings, limit=1)["made"] == 1
    parts.write_bytes(parts.read_bytes() + b'{"line": 1, "pro')  # killed while it wrote
    assert extend(PROMPTS, parts, settings)["made"] == 2
    assert parts.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in parts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS.prompts) and all("\n" not in row["text"] for row in rows)
    assert len({row["text"] for row in rows}) > 1
    record = json.loads((tmp_path / "parts.jsonl.json").read_text())
    assert record["seed"] == 7 and "text-to-video" in record["template"]
    for other in (Extension(model=str(model), seed=8, max_new_tokens=6), Extension(model=str(model), template="x")):
        with pytest.raises(ConfigError, match="another"):
            extend(PROMPTS, parts, other)


def test_names_keep_the_short_prompt(model: Path, tmp_path: Path) -> None:
    extend(PROMPTS, tmp_path / "texts.jsonl", Extension(model=str(model), max_new_tokens=4))
    chosen = with_texts(PROMPTS, str(tmp_path / "texts.jsonl"))
    assert chosen.sha256 == PROMPTS.sha256 and chosen.video_name(1, 0) == "00001-0.mp4"
    assert [chosen.text(line) for line in range(3)] == list(chosen.texts or ()) != list(PROMPTS.prompts)
    assert chosen.first(2).texts == (chosen.texts or ())[:2]
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="2 texts for 3 prompts"):
        with_texts(PROMPTS, str(tmp_path / "two.txt"))
    with pytest.raises(ConfigError, match="neither a text file"):
        with_texts(PROMPTS, str(tmp_path / "absent.txt"))


def test_texts_never_shift_to_other_prompts(tmp_path: Path) -> None:
    rows = [{"line": i, "prompt": prompt, "text": f"long {i}"} for i, prompt in enumerate(PROMPTS.prompts)]

    def texts(*lines: str, name: str = "texts.txt") -> PromptSet:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return with_texts(PROMPTS, str(tmp_path / name))

    def of_rows(*given: dict[str, Any]) -> PromptSet:
        return texts(*map(json.dumps, given), name="texts.jsonl")

    assert texts("one", "two", "three").texts == ("one", "two", "three")
    assert of_rows(*rows).texts == of_rows(*({"text": row["text"]} for row in rows)).texts
    with pytest.raises(ConfigError, match="4 texts for 3 prompts"):
        texts("one", "two", "three", "four")
    with pytest.raises(ConfigError, match=r"Text 2 of .* is blank"):
        texts("one", "", "two", "three")
    with pytest.raises(ConfigError, match=r"Row 2 of .* is of line 2"):
        of_rows(rows[0], rows[2], rows[1])
    with pytest.raises(ConfigError, match=r"Row 3 of .*'another'"):
        of_rows(*rows[:2], {**rows[2], "prompt": "another"})


def test_a_known_list_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))

    class Reply(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise IncompleteRead(b"half")

    for reply, sentence in ((io.BytesIO(b"<html>sign in"), "What came from .* has SHA-256"), (Reply(), "be fetched")):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout, reply=reply: reply)
        with pytest.raises(EnvironmentMissingError, match=sentence):
            with_texts(PROMPTS, "gpt")
    assert not list(tmp_path.rglob("gpt.txt"))


def test_extending_refuses_a_bad_limit_and_never_truncates_in_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Extension(model=str(model), max_new_tokens=4)
    for limit in (-1, 0):
        with pytest.raises(ConfigError, match="--limit must be at least 1"):
            extend(PROMPTS, tmp_path / "texts.jsonl", settings, limit=limit)
        words = [
            "prompts",
            "extend",
            "--prompts",
            "micro",
            "--out",
            str(tmp_path / "x.jsonl"),
            "--limit",
            str(limit),
            "--dry-run",
        ]
        assert isinstance(CliRunner().invoke(app, words).exception, ConfigError)
    extend(PROMPTS, tmp_path / "texts.jsonl", settings, limit=1)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"line": 1')
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("the file was rewritten in place"))
    assert extend(PROMPTS, tmp_path / "texts.jsonl", settings)["texts"] == 3


def test_models_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMissingError, match="absent"):
        extend(PROMPTS, tmp_path / "x.jsonl", Extension(model=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Extension(max_new_tokens=0)
    with pytest.raises(ConfigError, match="jsonl"):
        extend(PROMPTS, tmp_path / "x.txt", Extension())

"""Extended prompts: reproducible, resumable, recorded; a tiny random model of Qwen2's class stands in for the 7B."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from students.errors import ConfigError, EnvironmentMissingError
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


def test_models_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMissingError, match="absent"):
        extend(PROMPTS, tmp_path / "x.jsonl", Extension(model=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Extension(max_new_tokens=0)
    with pytest.raises(ConfigError, match="jsonl"):
        extend(PROMPTS, tmp_path / "x.txt", Extension())

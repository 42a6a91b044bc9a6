"""A complete Wan pipeline with random weights, small enough to build in a second and to sample in tenths."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_LENGTH, TEXT_WIDTH, CHANNELS = 12, 16, 4
WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "slowly",
    "quickly",
    "on",
    "dark",
    "light",
    "background",
]


def tiny_transformer(patch: tuple[int, int, int] = (1, 2, 2), blocks: int = 4, seed: int = 0) -> WanTransformer3DModel:
    """A Wan transformer of width 24 with ``blocks`` blocks, random weights, evaluation mode."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=patch, num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=48, num_layers=blocks, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def tiny_pipeline(folder: Path, *, patch: tuple[int, int, int] = (1, 1, 1), blocks: int = 4, seed: int = 0) -> Path:
    """Write the pipeline and its ``base.json`` into a folder and give the folder back.

    9 frames of 32x32 pixels, latents (4, 3, 4, 4), text length 12, guidance 3, flow shift 3, as the micro world's
    pipeline but smaller; captions are made of ``WORDS``.
    """
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )
    transformer = tiny_transformer(patch, blocks, seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            dropout_rate=0.0, feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True], patch_size=2, in_channels=12, out_channels=12, scale_factor_temporal=4,
        scale_factor_spatial=8, latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[0.5, 1.0, 2.0, 1.5],
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    ).save_pretrained(folder)
    facts = {
        "text_length": TEXT_LENGTH, "negative_prompt": "", "frames": 9, "height": 32, "width": 32, "fps": 8,
        "guidance": 3.0, "flow_shift": 3.0,
    }  # fmt: skip
    (folder / "base.json").write_text(json.dumps(facts))
    return folder

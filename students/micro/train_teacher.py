"""Train the micro teacher: a Wan transformer and its text encoder by flow matching, on latents of generated clips.

    python -m students.micro.train_teacher --work ~/tmd-work/teacher --vae students/micro/weights/vae \
        --out students/micro/weights --compile

Chosen by experiment: latents with few values a token, Muon for matrices and AdamW for the rest, EMA, text dropout 0.1,
time shift 3 on half of the times, and a curriculum from one object to two. Latents are made in shards of 1,024 clips, a
new shard every 64 steps, cached in ``--work``. Resumes from the last checkpoint; every step draws its items, times,
noise and dropout from (seed, step). Learning rate: warm-up, constant, lower, then linear to zero over the last fifth,
so ``--steps`` may be changed on resuming before that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from students.micro.artifacts import save_atomically, write_provenance
from students.micro.world import FPS, FRAMES, SIZE, all_attributes, make_clip

LOWER_FROM, LOWER = 7000, 0.4  # at the full rate the loss stays 0.04 above where the first decay to zero took it
TEXT_LENGTH = 16
GUIDANCE = 1.12
"""Guidance scale the teacher is used with, unless a command says otherwise."""
SHARD, NEW_SHARD_EVERY, SHARDS, SIMPLE_SHARDS = 1024, 64, 56, 16
BATCH, RATE, WARM_UP, EMA, DROPOUT, SHIFT, SEED = 32, 1.5e-3, 100, 0.999, 0.1, 3.0, 11


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over every word of the world's captions, with an end token as UMT5's has."""
    words = sorted({word for a in all_attributes() for word in a.caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def build_transformer() -> WanTransformer3DModel:
    """10 blocks of width 128, 48 tokens of 32 values a clip: 2.4M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=8, out_channels=8,
        text_dim=64, freq_dim=64, ffn_dim=384, num_layers=10, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def encode_text(encoder: UMT5EncoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, TEXT_LENGTH, 64), zero at padding: what ``WanPipeline.encode_prompt`` gives."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    out = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


class Shards:
    """Normalised latents and captions of training clips, made on first use and cached as files."""

    def __init__(self, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, folder: Path):
        self.vae, self.tokenizer, self.folder = vae.eval(), tokenizer, folder
        self.mean, self.std = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.loaded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def _make(self, index: int) -> dict[str, torch.Tensor]:
        two = 0.0 if index < SIMPLE_SHARDS else 0.75
        clips = [make_clip((SEED, index, i), held_out=False, two_objects=two) for i in range(SHARD)]
        video = torch.from_numpy(np.stack([clip for _, clip in clips])).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in video.split(64)])
        ids, mask = tokenize(self.tokenizer, [caption for caption, _ in clips])
        return {"latents": (latents - self.mean) / self.std, "ids": ids, "mask": mask}

    def draw(self, step: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """One batch (latents, ids, mask) from the shards that exist at this step."""
        while len(self.loaded) < min(SHARDS, 2 + step // NEW_SHARD_EVERY):
            path = self.folder / f"{len(self.loaded):03d}.pt"
            if not path.exists():
                save_atomically(self._make(len(self.loaded)), path)
            shard = torch.load(path, weights_only=True)
            self.loaded.append((shard["latents"], shard["ids"], shard["mask"]))
        where = rng.integers(0, len(self.loaded) * SHARD, BATCH)
        items = [tuple(part[i % SHARD] for part in self.loaded[i // SHARD]) for i in where]
        return tuple(torch.stack(parts) for parts in zip(*items, strict=True))


def rate_at(step: int, steps: int) -> float:
    """Factor on the learning rate: warm-up, constant, lower from a step on, linear to zero over the last fifth."""
    return min((step + 1) / WARM_UP, 1.0 if step < LOWER_FROM else LOWER, (steps - step) / (0.2 * steps))


def ramped_average(averages: Any, values: Any, count: Any) -> None:
    """Moving average whose decay grows to ``EMA``, so that the random start weighs nothing soon."""
    decay = min(EMA, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(averages, values, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument(
        "--init", type=Path, help="pipeline folder whose weights to start from, with no state in --work"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer and run it in bf16: needs a C++ compiler"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    vae = AutoencoderKLWan.from_pretrained(args.vae)
    tokenizer = build_tokenizer()
    encoder, transformer = build_text_encoder(len(tokenizer)), build_transformer()
    if args.init:
        encoder = UMT5EncoderModel.from_pretrained(args.init / "text_encoder")
        transformer = WanTransformer3DModel.from_pretrained(args.init / "transformer")
    model = torch.nn.ModuleDict({"text_encoder": encoder, "transformer": transformer})
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ramped_average)
    matrices = [p for n, p in transformer.named_parameters() if p.ndim == 2 and (".to_" in n or ".ffn.net" in n)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    shards = Shards(vae, tokenizer, args.work / "shards")
    empty_ids, empty_mask = tokenize(tokenizer, [""])
    checkpoint, first, seconds = args.work / "state.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    predict = torch.compile(transformer) if args.compile else transformer
    if args.compile:
        transformer.set_attention_backend("_native_math")  # torch's fused attention is slow in bf16 on a processor
    begin, smooth = time.time(), None
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=30)
    for step in bar:
        rng = np.random.default_rng((SEED, 7, step))
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        x, ids, mask = shards.draw(step, rng)
        drop = torch.rand(BATCH, 1, generator=generator) < DROPOUT
        ids, mask = torch.where(drop, empty_ids, ids), torch.where(drop, empty_mask, mask)
        u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        shifted = torch.arange(BATCH) % 2 == 0  # half the times as in sampling, for layout; half uniform, for shapes
        t = torch.where(shifted, SHIFT * u / (1 + (SHIFT - 1) * u), u).float()
        x1 = torch.randn(x.shape, generator=generator)
        t_ = t.view(-1, 1, 1, 1, 1)
        embedding = encode_text(encoder, ids, mask)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.compile):
            v = predict((1 - t_) * x + t_ * x1, 1000 * t, embedding).sample.float()
        loss = (v - (x1 - x)).square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_at(step, args.steps)
            optimizer.step()
        average.update_parameters(model)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save_atomically(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "seconds": seconds + time.time() - begin,
                },
                checkpoint,
            )
            with (args.work / "log.jsonl").open("a") as log:
                log.write(
                    json.dumps({"step": step + 1, "loss": smooth, "seconds": seconds + time.time() - begin}) + "\n"
                )
            save_pipeline(average.module, vae, tokenizer, args.out)
            write_provenance("teacher", args.out, seconds + time.time() - begin, {"step": step + 1, "loss": smooth})


def save_pipeline(model: Any, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The averaged weights as a folder that ``WanPipeline.from_pretrained`` loads, with the world's facts beside."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=model["text_encoder"], vae=vae, transformer=model["transformer"],
        scheduler=scheduler,
    ).save_pretrained(out)  # fmt: skip
    facts = {
        "text_length": TEXT_LENGTH, "negative_prompt": "", "frames": FRAMES, "height": SIZE, "width": SIZE, "fps": FPS,
        "guidance": GUIDANCE, "flow_shift": SHIFT,
    }  # fmt: skip
    (out / "base.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

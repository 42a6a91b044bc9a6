"""Train the micro world's AutoencoderKLWan: clips of 5 x 32 x 32 pixels to latents (8, 3, 8, 8).

    python -m students.micro.train_vae --work ~/tmd-work/vae --out students/micro/weights

Resumes from the last checkpoint in ``--work``; every step draws its clips from (seed, phase, step), so a resumed run
sees the same data. Loss: absolute and squared error, weighted up where the clip is colourful (objects fill a twentieth
of it), + ``KL`` x mean KL divergence to N(0, 1) per latent element. Small batches learn faster than large ones here,
and single frames (which Wan's VAE encodes as clips of length 1) teach the convolutions space at a fifth of the cost, so
the first ``IMAGE_STEPS`` steps see frames, the rest clips. A second phase trains the decoder alone, which sharpens
clips while every latent stays as it is: with ``--decoder-steps 0`` the teacher's training can start before it. The mean
and standard deviation of each latent channel are measured at the end and saved in the VAE's config, as in Wan.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from students.micro.artifacts import save_atomically, write_provenance
from students.micro.world import FRAMES, make_clip

IMAGE_STEPS, IMAGE_BATCH, STEPS, BATCH = 2000, 4, 6000, 2
DECODER_STEPS = 14000
RATE, WARM_UP, KL, OBJECTS, EDGES, SEED = 2e-3, 100, 1e-3, 6.0, 2.0, 1


def build() -> AutoencoderKLWan:
    """A small Wan VAE: patches of 2 x 2 pixels, then once down in space (4 x in all) and in time (2 x)."""
    return AutoencoderKLWan(
        base_dim=32, z_dim=8, dim_mult=[1, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[True],
        patch_size=2, in_channels=12, out_channels=12, scale_factor_temporal=2, scale_factor_spatial=4,
        latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip


def batch_of_clips(seed: int, step: int, size: int = BATCH, *, held_out: bool = False) -> torch.Tensor:
    """Clips (size, 3, 5, 32, 32) in [-1, 1], two objects in three of four."""
    clips = [make_clip((seed, step, i), held_out=held_out, two_objects=0.75)[1] for i in range(size)]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) * 2 - 1


def split_parameters(
    vae: AutoencoderKLWan,
) -> tuple[list[tuple[torch.nn.Parameter, torch.nn.Parameter]], list[torch.nn.Parameter]]:
    """Convolution kernels with a matrix (out, in * kernel) sharing their memory, for Muon; and all other parameters."""
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[:2]) > 1 and p[0].numel() > 1]
    chosen = {id(p) for p in kernels}
    pairs = [(p, torch.nn.Parameter(p.data.flatten(1))) for p in kernels]
    return pairs, [p for p in vae.parameters() if id(p) not in chosen]


def rate_at(step: int, steps: int) -> float:
    """Factor on the learning rate: warm-up, constant, linear to zero over the last third."""
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / (steps / 3))


def train_phase(vae: AutoencoderKLWan, work: Path, phase: str, steps: int) -> float:
    """Train one phase, going on from its last checkpoint in ``work``.

    Args:
        vae: trained in place.
        work: folder of the checkpoints.
        phase: "both" (encoder and decoder) or "decoder" (the encoder, and so every latent, stays as it is).
        steps: length of the phase.

    Returns:
        Seconds of training, over all resumed runs.
    """
    vae.encoder.requires_grad_(phase == "both")
    vae.quant_conv.requires_grad_(phase == "both")
    kernels, rest = split_parameters(vae)
    optimizers = [
        torch.optim.Muon([flat for _, flat in kernels], lr=RATE, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4),
    ]
    checkpoint, first, seconds = work / f"{phase}.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    begin = time.time()
    bar = tqdm(range(first, steps), desc=phase, initial=first, total=steps, mininterval=20)
    for step in bar:
        loss, error = train_step(vae, phase, step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step} of {phase}")
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for kernel, flat in kernels:
            flat.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_at(step, steps)
            optimizer.step()
        bar.set_postfix(error=f"{error.item():.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_atomically(
                {
                    "vae": vae.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                    "seconds": seconds + time.time() - begin,
                },
                checkpoint,
            )
    return seconds + time.time() - begin


def train_step(vae: AutoencoderKLWan, phase: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss to minimise and the reconstruction error in it, both scalars."""
    torch.manual_seed(SEED * 1_000_003 + step)
    images = phase == "both" and step < IMAGE_STEPS
    clips = batch_of_clips(SEED if phase == "both" else SEED + 7, step, IMAGE_BATCH if images else BATCH)
    if images:
        clips = clips[:, :, step % FRAMES].unsqueeze(2)
    with torch.set_grad_enabled(phase == "both"):
        posterior = vae.encode(clips).latent_dist
        z = posterior.sample() if phase == "both" else posterior.mode()
    difference = vae.decode(z).sample - clips
    chroma = (clips.amax(1, keepdim=True) - clips.amin(1, keepdim=True)) / 2  # 1 on objects, small elsewhere
    error = ((1 + OBJECTS * chroma) * (difference.abs() + 2 * difference.square())).mean()
    if phase == "decoder":  # edges and stillness: differences to the next pixel and to the next frame
        edges = sum(difference.diff(dim=d).abs().mean() for d in (2, 3, 4))
        return error + EDGES * edges, error
    return error + KL * posterior.kl().mean() / posterior.mean[0].numel(), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    vae = build()
    seconds = train_phase(vae, args.work, "both", args.steps)
    seconds += train_phase(vae, args.work, "decoder", args.decoder_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch_of_clips(SEED + 1, i, 64)).latent_dist.mode() for i in range(16)])
        over = (0, 2, 3, 4)
        vae.register_to_config(latents_mean=latents.mean(over).tolist(), latents_std=latents.std(over).tolist())
        held = batch_of_clips(SEED + 2, 0, 64, held_out=True)
        error = (vae.decode(vae.encode(held).latent_dist.mode()).sample.clamp(-1, 1) - held).abs().mean().item() / 2
    vae.save_pretrained(args.out / "vae")
    figures = {"steps": args.steps, "decoder_steps": args.decoder_steps, "held_out_error": error}
    write_provenance("vae", args.out, seconds, figures)
    print(f"held-out mean absolute error {error:.4f} of the pixel range")


if __name__ == "__main__":
    main()

"""The TMD student: a Wan transformer cut into a main backbone and a recurrent flow head.

The main backbone m(x_t, t, c) is the patch embedding and the first L - H blocks; it runs once per outer step. The flow
head is the last H blocks and the output layers; it runs N times per outer step, on m and on the inner sample y_s.
Everything is built from diffusers' own Wan modules (composition: no fork, no monkey-patch); new are only the fusion of
y_s into m and the embedding of s - r. Paper: "Transition Matching Distillation", arXiv 2601.09881, section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from students.errors import ConfigError
from students.nfe import check_h
from students.parallel_context import STUDENT_PLAN, join
from students.times import check_grid

FUSIONS = ("gated", "concat")
TARGETS = ("x1-x", "x")


class Features(NamedTuple):
    """What the main backbone hands to the flow head; constant over the inner steps of one outer step."""

    tokens: Tensor
    """m: (B, S, D), S tokens of width D."""
    rotary: tuple[Tensor, Tensor]
    """Rotary position embedding (cos, sin) of the token grid."""
    text: Tensor
    """The caption's embedding after the text projection, (B, text_length, D)."""


def unpatchify(tokens: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Tokens (B, S, K prod(patch)) as a volume (B, K, T, H, W), in the order of Wan's own output layer.

    Args:
        tokens: one token per patch.
        shape: (T, H, W) of the volume, each a multiple of the patch.
        patch: (p_t, p_h, p_w).
    """
    t, h, w = (size // p for size, p in zip(shape, patch, strict=True))
    volume = tokens.unflatten(2, (*patch, -1)).unflatten(1, (t, h, w))  # B t h w pt ph pw K
    return volume.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class FusionBlock(nn.Module):
    """f(y_s, s): adaptive layer norm, MLP and gated residual on the tokens of y_s.

    The modulation is the transformer's global projection of the time embedding (its shift, scale and gate of the MLP)
    plus this block's own table, as in every Wan block. The paper gives no width for the MLP; we take twice the model's.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, inner_dim=2 * dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 3, dim) / dim**0.5)

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (B, S, D) from tokens (B, S, D) and the global modulation (B, 6, D)."""
        shift, scale, gate = (self.scale_shift_table + modulation[:, 3:].float()).chunk(3, dim=1)
        normed = (self.norm(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        return (tokens.float() + self.ffn(normed).float() * gate).type_as(tokens)


class Fusion(nn.Module):
    """Brings the inner sample into the backbone's tokens.

    "gated": (1 - sigmoid(a)) m + sigmoid(a) f(y_s, s) with one learnable scalar a. "concat": a linear layer on [m, f],
    initialised to the identity for m and to N(0, 0.01^2) for f (the paper prints N(0, 0.01); we read a standard
    deviation).
    """

    def __init__(self, dim: int, eps: float, kind: str, gate: float):
        super().__init__()
        self.block = FusionBlock(dim, eps)
        self.gate: nn.Parameter | None = None
        self.mix: nn.Linear | None = None
        if kind == "gated":
            self.gate = nn.Parameter(torch.tensor(float(gate)))
        else:
            self.mix = nn.Linear(2 * dim, dim)
            with torch.no_grad():
                nn.init.eye_(self.mix.weight[:, :dim])
                nn.init.normal_(self.mix.weight[:, dim:], std=0.01)
                nn.init.zeros_(self.mix.bias)

    def forward(self, m: Tensor, y_tokens: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (B, S, D) from m (B, S, D), the tokens of y_s (B, S, D) and the modulation by s (B, 6, D)."""
        f = self.block(y_tokens, modulation)
        if self.mix is not None:
            return self.mix(torch.cat([m, f], dim=-1))
        assert self.gate is not None
        share = torch.sigmoid(self.gate.float())
        return ((1 - share) * m.float() + share * f.float()).type_as(m)


class TMDStudent(ModelMixin, ConfigMixin):
    """Main backbone and flow head made of a Wan transformer; build it with :meth:`from_teacher`.

    Weights are saved and loaded in diffusers' layout (``save_pretrained``, ``from_pretrained``). Set
    ``gradient_checkpointing = True`` to recompute each block's activations in the backward pass, and
    ``head_checkpointing = True`` to recompute the flow head as one piece at every inner step.

    Args:
        transformer: config of the teacher's ``WanTransformer3DModel`` (L = its ``num_layers``).
        h: H, number of blocks in the flow head, 1 to L - 1.
        fusion: "gated" (default) or "concat".
        target: the transition target y, "x1-x" (default) or "x".
        gate: start of the scalar a of the gated fusion.

    Raises:
        ConfigError: H outside 1 to L - 1, an unknown fusion or target, or an image-to-video transformer.
    """

    head_checkpointing: bool = False

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["WanTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["WanTransformerBlock"]
    _cp_plan: ClassVar[dict[str, Any]] = STUDENT_PLAN
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "rope", "time_embedder", "interval_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "gate",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        transformer: dict[str, Any],
        h: int,
        fusion: str = "gated",
        target: str = "x1-x",
        gate: float = -3.0,
    ) -> None:
        super().__init__()
        wan = WanTransformer3DModel(**transformer)
        blocks = len(wan.blocks)
        check_h(h, blocks)
        if fusion not in FUSIONS:
            raise ConfigError(f"The fusion {fusion!r} is unknown; choose {' or '.join(FUSIONS)}.")
        if target not in TARGETS:
            raise ConfigError(f"The transition target {target!r} is unknown; choose {' or '.join(TARGETS)}.")
        if wan.config.image_dim is not None:
            raise ConfigError(
                "TMD students need a text-to-video transformer; this one takes images (image_dim is set)."
            )
        dim = wan.config.num_attention_heads * wan.config.attention_head_dim
        self.h, self.target = h, target
        self.patch: tuple[int, int, int] = tuple(wan.config.patch_size)
        self.rope = wan.rope
        self.patch_embedding = wan.patch_embedding
        self.condition_embedder = wan.condition_embedder
        self.backbone_blocks = nn.ModuleList(wan.blocks[: blocks - h])
        self.head_blocks = nn.ModuleList(wan.blocks[blocks - h :])
        self.fuse = Fusion(dim, wan.config.eps, fusion, gate)
        self.interval_embedder = copy.deepcopy(wan.condition_embedder.time_embedder)
        nn.init.zeros_(self.interval_embedder.linear_2.weight)
        nn.init.zeros_(self.interval_embedder.linear_2.bias)
        self.norm_out = wan.norm_out
        self.scale_shift_table = wan.scale_shift_table
        self.proj_out = wan.proj_out
        self.gradient_checkpointing = False

    @classmethod
    def from_teacher(
        cls,
        transformer: WanTransformer3DModel,
        *,
        h: int,
        fusion: str = "gated",
        target: str = "x1-x",
        gate: float = -3.0,
    ) -> TMDStudent:
        """A student with copies of the teacher's weights (float32, on the CPU); the fusion is drawn from torch's global
        random state, so seed that first. The embedder of s - r starts as the time embedder with a zero last layer.

        Args:
            transformer: the teacher.
            h: H, 1 to L - 1.
            fusion: "gated" or "concat".
            target: "x1-x" or "x".
            gate: start of the scalar a.

        Raises:
            ConfigError: see the class.
        """
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        student: TMDStudent = cls(transformer=config, h=h, fusion=fusion, target=target, gate=gate)
        student.patch_embedding.load_state_dict(transformer.patch_embedding.state_dict())
        student.condition_embedder.load_state_dict(transformer.condition_embedder.state_dict())
        for mine, theirs in zip([*student.backbone_blocks, *student.head_blocks], transformer.blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())
        first_layer = transformer.condition_embedder.time_embedder.linear_1
        student.interval_embedder.linear_1.load_state_dict(first_layer.state_dict())
        student.proj_out.load_state_dict(transformer.proj_out.state_dict())
        with torch.no_grad():
            student.scale_shift_table.copy_(transformer.scale_shift_table)
        return student

    @property
    def blocks(self) -> int:
        """L, the number of blocks of the teacher."""
        return len(self.backbone_blocks) + len(self.head_blocks)

    @property
    def gate_parameter(self) -> nn.Parameter | None:
        """The scalar a of the gated fusion; None for concat."""
        return self.fuse.gate

    def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Features:
        """m(x_t, t, c): the first L - H blocks, and what else the head needs.

        Args:
            x_t: noisy latents (B, C, T, H, W).
            t: outer times (B,) in [0, 1].
            text: caption embeddings (B, text_length, D_text), zero at padding.
        """
        dtype = self.patch_embedding.weight.dtype
        rotary = self.rope(x_t)
        _, modulation, text, _ = self.condition_embedder(1000 * t.double(), text.to(dtype))
        tokens = self._run(self.backbone_blocks, self._patchify(x_t), text, modulation.unflatten(1, (6, -1)), rotary)
        return Features(tokens, rotary, text)

    def head(self, y_s: Tensor, s: Tensor, r: Tensor, features: Features) -> Tensor:
        """The flow head's output: an estimate of x1 - x, which at the start of training is the teacher's velocity.

        Args:
            y_s: inner sample (B, C, T, H, W).
            s: inner times (B,) in [0, 1].
            r: times (B,) the average velocity reaches down to, r <= s.
            features: of the same batch.

        Returns:
            (B, C, T, H, W), in the network's precision.
        """
        embedder = self.condition_embedder
        s, r = s.double(), r.double()  # 1000 (s - r) must not be taken in low precision
        at_s = self._embed_time(embedder.time_embedder, s)
        embedding = (at_s + self._embed_time(self.interval_embedder, s - r)).type_as(features.text)
        modulation = embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))
        of_s = embedder.time_proj(embedder.act_fn(at_s.type_as(features.text))).unflatten(1, (6, -1))
        tokens = self.fuse(features.tokens, self._patchify(join(self, y_s)), of_s)
        tokens = self._run(self.head_blocks, tokens, features.text, modulation, features.rotary)
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        tokens = (self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        return unpatchify(self.proj_out(tokens), y_s.shape[2:], self.patch)

    def average_velocity(
        self,
        y_s: Tensor,
        s: Tensor,
        r: Tensor,
        features: Features,
        *,
        y1: Tensor,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """u(y_s, s, r; m) of the inner flow, so that y_r = y_s - (s - r) u (Eq. 13 and 14).

        u = y1 - head for y = x1 - x. For y = x, u = (y_s - (x_t - t head)) / s: it grows without bound as s goes to 0
        and is not finite at s = 0, where no grid evaluates it.

        Args:
            y_s: inner sample (B, C, T, H, W).
            s: inner times (B,), above 0 for y = x.
            r: times (B,), r <= s.
            features: the backbone's output for the same batch.
            y1: the noise that the inner trajectory started from, shaped as y_s.
            x_t: the backbone's input, needed for y = x.
            t: its times (B,), needed for y = x.
        """
        if self.head_checkpointing and torch.is_grad_enabled():
            out = checkpoint(self.head, y_s, s, r, features, use_reentrant=False)
        else:
            out = self.head(y_s, s, r, features)
        if self.target == "x1-x":
            return y1 - out
        if x_t is None or t is None:
            raise ValueError("The target x needs the outer sample: pass x_t and t to average_velocity or rollout.")
        return (y_s - (x_t - _column(t, out) * out)) / _column(s, y_s)

    def rollout(
        self,
        features: Features,
        y1: Tensor,
        inner_grid: Tensor,
        *,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """InnerFlow(m): y <- y1; for j = N..1: y <- y - (s_j - s_{j-1}) u(y, s_j, s_{j-1}; m). Gradients flow.

        Args:
            features: the backbone's output.
            y1: inner noise (B, C, T, H, W).
            inner_grid: 0 = s_0 < ... < s_N, float64.
            x_t: the backbone's input, needed for y = x.
            t: its times (B,), needed for y = x.

        Raises:
            ConfigError: the grid is not strictly increasing from 0.
        """
        check_grid(inner_grid)
        points = inner_grid.to(y1.device, torch.float64)
        steps = inner_grid.double().diff().tolist()
        y = y1
        for j in range(len(steps), 0, -1):
            s, r = (points[k].expand(len(y1)) for k in (j, j - 1))
            y = y - steps[j - 1] * self.average_velocity(y, s, r, features, y1=y1, x_t=x_t, t=t)
        return y

    def _patchify(self, latents: Tensor) -> Tensor:
        tokens = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def _embed_time(self, embedder: TimestepEmbedding, time: Tensor) -> Tensor:
        waves = self.condition_embedder.timesteps_proj(1000 * time)
        return embedder(waves.to(embedder.linear_1.weight.dtype))

    def _run(
        self, blocks: nn.ModuleList, tokens: Tensor, text: Tensor, modulation: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, text, modulation, rotary, use_reentrant=False)
            else:
                tokens = block(tokens, text, modulation, rotary)
        return tokens


def _column(time: Tensor, like: Tensor) -> Tensor:
    """Times (B,) shaped for broadcasting over latents, in the latents' precision (at least float32)."""
    return time.to(torch.promote_types(like.dtype, torch.float32)).view(-1, 1, 1, 1, 1)

"""Discriminator heads on frozen teacher features (DMD2-v, Table 3): Conv3D, Conv1D-2D and attention.

The paper names the three and prints no structure. Conv3D follows FastGen's multiscale_down_mlp_large; the other two are
ours: the same head with its 3x3x3 convolutions factorised, and a self-attention over pooled tokens.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

DISCRIMINATORS = ("conv3d", "conv1d2d", "attention", "none")
SCALES = (1, 2, 4, 8, 16)
"""Average-pooling factors of the branches of one head, for Wan's latents."""
HIDDEN = 1024
"""Width of the MLP behind the branches."""
TOKENS = 8
"""Largest side, in tokens, of the pooled map that the attention head looks at."""
_PAPER_WIDTHS = {384: 384, 1280: 608}


def default_width(channels: int) -> int:
    """Branch width of a head for features of so many channels.

    The paper gives 68M parameters for Wan2.1 1.3B and 172M for 14B; one rule cannot give both. With three heads,
    384 channels kept at 384 make 67.9M and 1280 channels reduced to 608 make 170.8M. Other features are reduced to a
    quarter of their channels.

    Args:
        channels: Channels of the un-patchified features: 384 for 1.3B, 1280 for 14B, 128 in the micro world.
    """
    return _PAPER_WIDTHS.get(channels, max(channels // 4, 8))


class _Contiguous(nn.Module):
    """Copies to contiguous memory: GroupNorm's backward crashes on CPU for strided inputs that need no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x in contiguous memory."""
        return x.contiguous()


def _normalised(channels: int) -> list[nn.Module]:
    # A group of one channel would be normalised to a mean of zero, and the pooling after it would see nothing: so at
    # least 8 channels a group (and at most 32 groups, as FastGen).
    groups = max(count for count in range(1, 33) if channels % count == 0 and (count == 1 or channels >= 8 * count))
    return [_Contiguous(), nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2)]


class _Branch(nn.Module):
    """One scale of a head: 1x1x1 convolution, average pooling, 3x3x3 convolution, global pooling.

    Factorised, the 3x3x3 convolution is a 3x3 one in each frame, then one over three frames at each place.
    """

    def __init__(self, channels: int, width: int, scale: int, factorised: bool) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Sequential(nn.Conv3d(channels, width, 1), *_normalised(width))
        kernels = ((1, 3, 3), (3, 1, 1)) if factorised else ((3, 3, 3),)
        self.mix = nn.Sequential(
            *(nn.Conv3d(width, width, kernel, padding="same") for kernel in kernels), *_normalised(width)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Summarise (B, channels, T, H, W) as (B, width)."""
        x = self.project(feature)
        if self.scale > 1:
            kernel = [min(self.scale, side) for side in x.shape[2:]]
            x = functional.avg_pool3d(x, kernel, ceil_mode=True)  # ceil_mode: no frame or border is left out
        return self.mix(x).mean(dim=(2, 3, 4))


class _ConvolutionHead(nn.Module):
    """Branches at several scales, concatenated, and an MLP that gives one logit."""

    def __init__(self, channels: int, width: int, scales: tuple[int, ...], factorised: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_Branch(channels, width, scale, factorised) for scale in scales)
        # No dropout here, unlike FastGen: every random draw of a step comes from the trainer's generator.
        self.mlp = nn.Sequential(nn.Linear(width * len(scales), HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Judge (B, channels, T, H, W) by one logit a sample, (B, 1)."""
        return self.mlp(torch.cat([branch(feature) for branch in self.branches], dim=1))


class _AttentionHead(nn.Module):
    """Self-attention over a pooled map (at most 8 tokens a side), its mean, and an MLP that gives one logit.

    There is no position embedding: the teacher's features know their place.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv3d(channels, width, 1), *_normalised(width))
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, next(n for n in (8, 4, 2, 1) if width % n == 0), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Judge (B, channels, T, H, W) by one logit a sample, (B, 1)."""
        x = self.project(feature)
        x = functional.avg_pool3d(x, [math.ceil(side / TOKENS) for side in x.shape[2:]], ceil_mode=True)
        tokens = x.flatten(2).transpose(1, 2)
        seen = self.norm(tokens)
        return self.mlp((tokens + self.attend(seen, seen, seen, need_weights=False)[0]).mean(dim=1))


class Discriminator(nn.Module):
    """One head per feature depth, without time or text conditioning."""

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        """Hold the heads.

        Args:
            heads: Each takes a map (B, channels, T, H, W) and gives logits (B, 1).
        """
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Judge samples by their teacher features.

        Args:
            features: One map (B, channels, T, H, W) per head, shallow to deep.

        Returns:
            Logits (B, n_features), float32, large for real.
        """
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1).float()


def make_discriminator(
    kind: str, channels: int, n_features: int, width: int | None = None, scales: tuple[int, ...] = SCALES
) -> Discriminator:
    """A discriminator with new weights from torch's global random state.

    Args:
        kind: "conv3d" (the paper's default), "conv1d2d" or "attention".
        channels: Channels of each un-patchified feature map.
        n_features: Number of feature depths, so of heads.
        width: Channels inside a head; by default default_width(channels).
        scales: Pooling factors of the convolutional kinds, one branch each; cut to the sides of the feature map, so
            that small maps such as the micro world's (3, 4, 4) need no more than (1, 2, 4).
    """
    width = default_width(channels) if width is None else width
    if kind == "attention":
        return Discriminator(_AttentionHead(channels, width) for _ in range(n_features))
    return Discriminator(
        _ConvolutionHead(channels, width, scales, factorised=kind == "conv1d2d") for _ in range(n_features)
    )


def default_feature_blocks(blocks: int) -> tuple[int, ...]:
    """Depths (indices from 0) the heads look at: 15, 22, 29 of 30 blocks, as in the paper.

    Other depths take the blocks that end one half, three quarters and the whole of the transformer, which gives the
    paper's 19, 29, 39 for 40 blocks.

    Args:
        blocks: Number of transformer blocks L, at least 1.
    """
    if blocks == 30:
        return (15, 22, 29)
    return tuple(sorted({max(math.ceil(blocks * part) - 1, 0) for part in (0.5, 0.75, 1.0)}))

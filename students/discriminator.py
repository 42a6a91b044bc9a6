"""Discriminator heads on frozen teacher features (stage 2; structure of FastGen's multiscale_down_mlp_large)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALES = (1, 2, 4, 8, 16)
"""Average-pooling factors of the branches of one head, for Wan's latents."""
HIDDEN = 1024
"""Width of the MLP behind the branches."""
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
    """One scale of a head: 1x1x1 convolution, average pooling, 3x3x3 convolution, global pooling."""

    def __init__(self, channels: int, width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Sequential(nn.Conv3d(channels, width, 1), *_normalised(width))
        self.mix = nn.Sequential(nn.Conv3d(width, width, 3, padding=1), *_normalised(width))

    def forward(self, feature: Tensor) -> Tensor:
        """Summarise (B, channels, T, H, W) as (B, width)."""
        x = self.project(feature)
        if self.scale > 1:
            kernel = [min(self.scale, side) for side in x.shape[2:]]
            x = functional.avg_pool3d(x, kernel, ceil_mode=True)  # ceil_mode: no frame or border is left out
        return self.mix(x).mean(dim=(2, 3, 4))


class _Head(nn.Module):
    """Branches at several scales, concatenated, and an MLP that gives one logit."""

    def __init__(self, channels: int, width: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_Branch(channels, width, scale) for scale in scales)
        # No dropout here, unlike FastGen: every random draw of a step comes from the trainer's generator.
        self.mlp = nn.Sequential(nn.Linear(width * len(scales), HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Judge (B, channels, T, H, W) by one logit a sample, (B, 1)."""
        return self.mlp(torch.cat([branch(feature) for branch in self.branches], dim=1))


class Conv3DDiscriminator(nn.Module):
    """Conv3D heads, one per feature depth, without time or text conditioning (paper, stage 2)."""

    def __init__(
        self, channels: int, n_features: int, width: int | None = None, scales: tuple[int, ...] = SCALES
    ) -> None:
        """Build the heads.

        Args:
            channels: Channels of each un-patchified feature map.
            n_features: Number of feature depths, so of heads.
            width: Channels inside a branch; by default default_width(channels).
            scales: Pooling factors, one branch each; cut to the sides of the feature map, so that small maps such as
                the micro world's (3, 4, 4) need no more than (1, 2, 4).
        """
        super().__init__()
        width = default_width(channels) if width is None else width
        self.heads = nn.ModuleList(_Head(channels, width, scales) for _ in range(n_features))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Judge samples by their teacher features.

        Args:
            features: One map (B, channels, T, H, W) per head, shallow to deep.

        Returns:
            Logits (B, n_features), float32, large for real.
        """
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1).float()


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

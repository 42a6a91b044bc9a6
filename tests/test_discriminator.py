"""The discriminator's size, shapes and independence of samples."""

import pytest
import torch

from students.discriminator import default_feature_blocks, default_width, make_discriminator


@pytest.mark.parametrize(("channels", "paper"), [(384, 68e6), (1280, 172e6)])
def test_parameter_count_is_the_papers(channels: int, paper: float) -> None:
    with torch.device("meta"):
        discriminator = make_discriminator("conv3d", channels, 3)
    count = sum(parameter.numel() for parameter in discriminator.parameters())
    assert abs(count / paper - 1) < 0.10


def test_parameter_count_by_hand() -> None:
    """Per branch: c w + w, 2 w (norm), 27 w w + w, 2 w; MLP: scales w 1024 + 1024, 1024 + 1."""
    c, w, scales = 12, 8, 2
    count = sum(p.numel() for p in make_discriminator("conv3d", c, 3, width=w, scales=(1, 2)).parameters())
    assert count == 3 * (scales * (c * w + 27 * w * w + 6 * w) + scales * w * 1024 + 1024 + 1025)


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 2, 3), (5, 9, 7)])
def test_shapes_and_gradients(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    discriminator = make_discriminator("conv3d", 128, 3)
    features = [torch.randn(2, 128, *size, requires_grad=True) for _ in range(3)]
    logits = discriminator(features)
    assert logits.shape == (2, 3)
    grads = torch.autograd.grad(logits[:, 1].sum(), features)
    assert not grads[0].any() and not grads[2].any(), "one head looks at one depth"
    # Every position counts, the last frame of an odd number of frames included.
    assert (grads[1].abs().amax(dim=(0, 1)) > 0).all()


def test_samples_are_judged_alone() -> None:
    torch.manual_seed(0)
    discriminator = make_discriminator("conv3d", 16, 1, scales=(1, 2))
    feature = torch.randn(3, 16, 3, 4, 4)
    torch.testing.assert_close(discriminator([feature])[1:2], discriminator([feature[1:2]]))


def test_frozen_strided_features_do_not_crash() -> None:
    """Channels-last features that need no gradient once crashed GroupNorm's backward on CPU."""
    torch.manual_seed(0)
    discriminator = make_discriminator("conv3d", 16, 1, scales=(1, 2))
    feature = torch.randn(2, 3, 4, 4, 16).permute(0, 4, 1, 2, 3)
    discriminator([feature]).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in discriminator.parameters())


def test_pooling_keeps_every_frame() -> None:
    """Three frames pooled by two make two, the odd one by itself; a kernel never exceeds the map."""
    sizes: list[tuple[int, ...]] = []
    head = make_discriminator("conv3d", 8, 1, scales=(1, 2, 8)).heads[0]
    for branch in head.branches:
        branch.mix.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape[2:])))
    head(torch.randn(1, 8, 3, 4, 5))
    assert sizes == [(3, 4, 5), (2, 2, 3), (1, 1, 1)]


@pytest.mark.parametrize("width", [8, 32, 48])
def test_the_mean_of_a_channel_is_seen(width: int) -> None:
    """Normalising each channel by itself would hide it, and with it colour and brightness."""
    torch.manual_seed(0)
    discriminator = make_discriminator("conv3d", 16, 1, width=width, scales=(1, 2))
    feature = torch.randn(1, 16, 3, 4, 4)
    brighter = feature + torch.randn(1, 16, 1, 1, 1)
    assert (discriminator([feature]) - discriminator([brighter])).abs() > 1e-3


def test_number_of_features_must_fit() -> None:
    with pytest.raises(ValueError):
        make_discriminator("conv3d", 16, 2, scales=(1,))([torch.randn(1, 16, 1, 2, 2)])


def test_default_depths_and_widths() -> None:
    assert default_feature_blocks(30) == (15, 22, 29)
    assert default_feature_blocks(40) == (19, 29, 39)
    assert default_feature_blocks(10) == (4, 7, 9)
    assert default_feature_blocks(1) == (0,)
    assert (default_width(384), default_width(1280), default_width(128)) == (384, 608, 32)

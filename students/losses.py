"""Loss terms of distribution matching (DMD2, DMD2-v) as pure functions, for any student."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_FLOOR = 1e-6


def vsd_gradient(x_hat: Tensor, g_fake: Tensor, g_teacher: Tensor, norm: Literal["x_hat", "printed"]) -> Tensor:
    """Direction of variational score distillation, (g_fake - g_teacher) / norm, detached, at least float32.

    Args:
        x_hat: Student samples (B, C, T, H, W).
        g_fake: Clean estimates of the noised samples by the fake score, same shape.
        g_teacher: Those by the teacher, with guidance.
        norm: Per-sample mean of |x_hat - g_teacher| ("x_hat", as DMD2, FastGen and rCM) or of |g_fake - g_teacher|
            ("printed", as the TMD paper prints); both at least 1e-6.
    """
    precision = torch.promote_types(x_hat.dtype, torch.float32)
    x_hat, g_fake, g_teacher = (part.detach().to(precision) for part in (x_hat, g_fake, g_teacher))
    difference = g_fake - g_teacher
    scale = x_hat - g_teacher if norm == "x_hat" else difference
    return difference / scale.abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=NORM_FLOOR)


def vsd_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Half the mean squared distance to stopgrad(x_hat - gradient); its gradient in x_hat is gradient / numel.

    Args:
        x_hat: Student samples (B, C, T, H, W).
        gradient: From vsd_gradient, same shape.
    """
    x_hat = x_hat.to(gradient.dtype)
    return 0.5 * functional.mse_loss(x_hat, (x_hat - gradient).detach())


def fake_score_loss(v: Tensor, x_hat: Tensor, noise: Tensor) -> Tensor:
    """Unweighted velocity regression, mean |v - (noise - x_hat)|^2; nothing flows into the student.

    Args:
        v: The fake score's velocity at (1 - t) x_hat + t noise, (B, C, T, H, W).
        x_hat: Student samples.
        noise: Standard normal noise.
    """
    return functional.mse_loss(v, (noise - x_hat).detach())


def generator_gan_loss(fake: Tensor) -> Tensor:
    """Non-saturating loss of the student, mean over samples and heads of -log sigmoid(D(fake)).

    Args:
        fake: Logits (B, heads).
    """
    return functional.softplus(-fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Negative minimax log-likelihood, mean of -log(1 - sigmoid(D(fake))) plus mean of -log sigmoid(D(real)).

    Args:
        fake: Logits of noised student samples, (B, heads).
        real: Logits of noised data, (B, heads).
    """
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def approximate_r1(real: Tensor, perturbed: Tensor) -> Tensor:
    """Finite-difference stand-in for the R1 penalty, mean |D(real) - D(real + small noise)|^2 (as in FastGen).

    Args:
        real: Logits of noised data, (B, heads).
        perturbed: Logits of the same data, slightly perturbed before noising.
    """
    return functional.mse_loss(perturbed, real)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep parameters out of the graphs built inside, so that gradients pass through but not into the network.

    Args:
        network: Any module.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

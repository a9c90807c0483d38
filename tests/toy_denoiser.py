"""A denoiser of one matrix in float64, and batches for it: for tests that look at gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process

SIZE = 4


class Matrix(nn.Module):
    """Answers a matrix times the noisy latents; 0 until something has trained it or `seed` is given."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        start = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        if seed is not None:
            start = 0.5 * torch.randn(
                SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
        self.weight = nn.Parameter(start)

    def forward(self, x_t: Tensor) -> Tensor:
        return (x_t.double().flatten(1) @ self.weight).view_as(x_t)


def toy_denoiser(*, seed: int | None = None, reference: int | str | None = None) -> Denoiser:
    """A denoiser over 4 noise levels; `reference`: a seed of its own, "same" as the policy, or none held."""
    angle = torch.linspace(0.2, 1.3, 4, dtype=torch.float64)
    network = Matrix(seed)
    policies = {}
    if reference is not None:
        held = copy.deepcopy(network) if isinstance(reference, str) else Matrix(reference)
        policies["reference"] = FrozenCopy(held.requires_grad_(False))
    process = Process(angle.cos(), angle.sin(), "epsilon")
    return Denoiser(network, process, lambda module, x_t, t, cond: module(x_t), policies)


def toy_batch(
    target: Sequence[float] | None, *, images_a_group: int, groups: int | None = None
) -> tuple[Batch, Draws]:
    """Groups of 2x2 latents, each with a noise and a timestep of its own that its images share."""
    count = len(target) if target is not None else groups or 1
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(count * images_a_group, 1, 2, 2, generator=generator)
    noise = torch.randn(count, 1, 2, 2, generator=generator).repeat_interleave(images_a_group, 0)
    t = torch.randint(0, 4, (count,), generator=generator).repeat_interleave(images_a_group)
    batch = Batch(
        ids=[f"row-{number}" for number in range(count)],
        epoch=0,
        positions=torch.arange(count),
        latents=latents,
        cond=Conditioning({"nothing": torch.zeros(len(latents), 1)}),
        counts=torch.full((count,), images_a_group),
        target=None if target is None else torch.tensor(target),
    )
    return batch, Draws(t, noise)


def weight_gradient(denoiser: Denoiser) -> Tensor:
    """The gradient that is on the matrix, which is taken off."""
    parameter = denoiser.trainable_parameters()[0]
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad, None
    return gradient

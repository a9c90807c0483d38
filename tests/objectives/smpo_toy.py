"""A network of seven numbers with a frozen copy of it, and scored pairs for it: for the tests of SmPO."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.objectives.smpo import Plugin

PICKSCORE = {"reward_min": 0.11543526500463486, "reward_max": 0.28201571106910706}
"""The published range of PickScore cosines."""


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class Linear(nn.Module):
    """Answers `scale * x_t + shift + cond`, with dropout while it is trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.zeros(2, 3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_t: Tensor, hint: Tensor) -> Tensor:
        return self.scale * x_t + self.shift + self.dropout(hint[:, :, None])


SQUARES = torch.linspace(0.99, 0.05, 20, dtype=torch.float64)
DDPM = Process(SQUARES.sqrt(), (1.0 - SQUARES).sqrt(), "epsilon")
FLOW = Process.flow(20)


def toy(dropout: float = 0.0, process: Process = DDPM) -> Denoiser:
    """A trained network whose reference is a copy of it."""
    network = Linear(dropout)
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    return Denoiser(
        network,
        process,
        lambda module, x_t, t, cond: module(x_t, cond["hint"]),
        {"reference": FrozenCopy(frozen)},
    )


def toy_batch(rewards: list[float], target: list[float] | None, t: list[int]) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(7)
    latents, noise = (torch.randn(2 * len(t), 2, 3, generator=generator) for _ in range(2))
    batch = Batch(
        ids=[f"pair-{number}" for number in range(len(t))],
        epoch=0,
        positions=torch.arange(len(t)),
        latents=latents,
        cond=Conditioning({"hint": torch.randn(2 * len(t), 2, generator=generator)}),
        counts=torch.full((len(t),), 2),
        target=None if target is None else torch.tensor(target),
        ratings={"pickscore": torch.tensor(rewards)},
    )
    return batch, Draws(torch.tensor(t).repeat_interleave(2), noise)


def plugin(**options: Any) -> Plugin:
    return Plugin(**{"beta": 20.0, "reward_min": 0.0, "reward_max": 1.0, "inversion_steps": 4, **options})

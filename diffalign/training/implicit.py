"""Held-out implicit-reward accuracy: how often a policy's denoising errors prefer what people preferred."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.common.statistics import Interval, bootstrap_interval
from diffalign.data.batches import Batch, first_and_second
from diffalign.data.encoded import Encoded
from diffalign.data.loader import Plan, assemble
from diffalign.data.specs import LoaderSpec
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import denoising_terms, implicit_reward
from diffalign.training.sampling import fixed_draws

DRAW_SEED = 0
"""Held-out draws are the same in every run, so that runs can be compared."""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class PairJudgement:
    """What a policy says of one pair.

    Args:
        id: record id.
        target: probability that the first image is preferred.
        first: errors of the first image, `[draws]`: policy and reference.
        second: likewise of the second image.
    """

    id: str
    target: float
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    def margin(self, beta: float = 2.0) -> float:
        """Implicit reward of the preferred image minus that of the other."""
        rewards = [float(implicit_reward(*side, beta=beta).mean()) for side in (self.first, self.second)]
        difference = rewards[0] - rewards[1]
        return difference if self.target > 0.5 else -difference

    def right(self) -> float:
        """1 if the preferred image has the higher implicit reward, 0 if the lower, 1/2 on equality."""
        return _right(self.margin())

    def reference_right(self) -> float:
        """The same by the reference's errors alone: is the preferred image the one with the lower error?"""
        difference = float((self.second[1] - self.first[1]).mean())
        return _right(difference if self.target > 0.5 else -difference)


def _right(margin: float) -> float:
    return 0.5 if margin == 0.0 else float(margin > 0.0)


@torch.no_grad()
def judge(
    denoiser: Denoiser,
    encoded: Encoded,
    *,
    num_draws: int,
    batch_size: int,
    device: torch.device | str,
    context: Context = nullcontext,
    known: Sequence[int] | None = None,
) -> Iterator[PairJudgement]:
    """Judgements of the decided pairs of `encoded`; ties (target 1/2) are left out.

    Both images of a pair, and policy and reference, see the same `num_draws` stratified draws with fixed
    keys; latents are posterior means. Dropout is off. `known` are the timesteps that the base knows; None:
    all of the process.
    """
    network = denoiser.network
    timesteps = range(denoiser.process.num_timesteps) if known is None else known
    was_training = network.training
    network.eval()
    try:
        for batch in _decided_batches(encoded, batch_size):
            moved = batch.to(device)
            errors = []
            for draw in fixed_draws(batch, timesteps, num_draws, seed=DRAW_SEED):
                with context():
                    terms = denoising_terms(
                        denoiser, moved.latents, moved.cond, draw.to(device), reference=True
                    )
                assert terms.ref_err is not None
                errors.append(torch.stack([terms.err, terms.ref_err]).cpu())
            yield from _judgements(batch, torch.stack(errors, dim=-1))
    finally:
        network.train(was_training)


def accuracy(judgements: list[PairJudgement], *, level: float = 0.95) -> Interval:
    """Share of pairs judged right (equality counts half), with a bootstrap interval over pairs."""
    return bootstrap_interval(np.array([judgement.right() for judgement in judgements]), level=level)


def _decided_batches(encoded: Encoded, batch_size: int) -> Iterator[Batch]:
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(encoded.examples):
        if example.target is not None and example.target != 0.5:
            by_size.setdefault(example.size, []).append(index)
    spec = LoaderSpec(batch_size=batch_size, posterior="mean")
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            plan = Plan(epoch=0, indices=tuple(indices[start : start + batch_size]), first_position=0)
            yield assemble(encoded, plan, seed=DRAW_SEED, spec=spec)


def _judgements(batch: Batch, errors: Tensor) -> Iterator[PairJudgement]:
    """Splits errors `[2 policies, M images, draws]` into pairs."""
    assert batch.target is not None
    first, second = first_and_second(errors.transpose(0, 1))
    for row, name in enumerate(batch.ids):
        yield PairJudgement(
            name,
            float(batch.target[row]),
            first=(first[row, 0], first[row, 1]),
            second=(second[row, 0], second[row, 1]),
        )

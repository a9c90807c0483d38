"""A training run in float64, to tell rounding from mistakes; there is no such key of `train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from diffalign.diffusion.denoiser import FrozenCopy

if TYPE_CHECKING:
    from diffalign.training.loop import Run


def in_float64(run: Run) -> None:
    """Makes networks and examples of a run float64: errors and losses follow them, the loop is as it is."""
    denoiser = run.model.denoiser
    copies = [policy.network for policy in denoiser.policies.values() if isinstance(policy, FrozenCopy)]
    for network in (denoiser.network, *copies):
        network.double()
    given = run.feed.micro_batches

    def in_double(start: int, rank: int, num_ranks: int) -> Iterator[Any]:
        for batch, draws in given(start, rank, num_ranks):
            cond = type(batch.cond)({name: value.double() for name, value in batch.cond.items()})
            yield replace(batch, latents=batch.latents.double(), cond=cond), draws

    run.feed.micro_batches = in_double  # type: ignore[method-assign]


def keep(run: Run, path: Path) -> None:
    """Writes what a run trains, in the precision that it has; of a split network the first process does."""
    trained = run.model.trained_state()
    if not run.settings.shard or run.ranks.is_main:
        save_file({name: tensor.contiguous() for name, tensor in trained.items()}, path)

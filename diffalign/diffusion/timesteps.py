"""Which timesteps are trained on: every distribution is the inverse CDF of one uniform number.

A uniform `u` in [0, 1) comes from a key (seed, example, epoch, draw), so the draw does not depend on world
size, workers or resuming; stratification only changes how `u` is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.common import draws
from diffalign.diffusion.specs import TimestepSpec

__all__ = ["TimestepSpec", "keyed_uniform", "stratified_grid"]


def keyed_uniform(*key: int | str, position: int = 0, strata: int = 0) -> float:
    """A uniform number in [0, 1) for `key`; inside slice `position % strata` when stratified.

    Args:
        key: what the draw belongs to, e.g. seed, example id, epoch, draw.
        position: global index of the sample in the run.
        strata: number of slices; 0 or 1: none.
    """
    u = draws.uniform(*key)
    return ((position % strata) + u) / strata if strata > 1 else u


def stratified_grid(count: int, num_timesteps: int) -> Tensor:
    """`[count]` int64 midpoints of equal slices of the process: the fixed draws of held-out measures."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count * num_timesteps).long()

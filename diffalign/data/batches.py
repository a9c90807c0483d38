"""What an objective receives: a micro-batch of groups of images, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.common.conditioning import Conditioning


@dataclass(frozen=True)
class Batch:
    """`N` groups with `M` images in all; the images of a group are neighbours, in the record's order.

    Args:
        ids: `N` record ids.
        epoch: pass over the data set that the groups belong to; with the id it keys every draw.
        positions: `[N]` int64, global index of each group in the run.
        latents: `[M, ...]` clean latents, scaled as the network sees them.
        cond: conditioning with `M` rows.
        counts: `[N]` int64 images per group (2 for pairs, 1 for single examples).
        target: `[N]` float32: of pairs the probability that the first image is preferred, of single images
            1 when desirable and 0 when not; None for lists.
        ratings: name -> `[M]` float32, higher being better, NaN where unknown (names: `encoded.ratings`).
    """

    ids: list[str]
    epoch: int
    positions: Tensor
    latents: Tensor
    cond: Conditioning
    counts: Tensor
    target: Tensor | None = None
    ratings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def num_images(self) -> int:
        """M."""
        return len(self.latents)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on `device`; `dtype` changes the conditioning only, latents stay float32."""
        return replace(
            self,
            latents=self.latents.to(device),
            cond=self.cond.to(device=device, dtype=dtype),
            counts=self.counts.to(device),
            target=None if self.target is None else self.target.to(device),
            ratings={name: values.to(device) for name, values in self.ratings.items()},
        )


def first_and_second(values: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second image's entries of a batch of pairs, each `[N, ...]`."""
    return values[0::2], values[1::2]

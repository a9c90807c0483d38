"""How relevant each image of a list is, in [0, 1], from its scores, human ranks, votes or labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch
from diffalign.data.encoded import ratings
from diffalign.data.records import Record

BY_SCORERS = ("wins", "mean")
"""Relevances that are made of scores, of one or several scorers."""
BY_PEOPLE = ("rank", "votes", "label")
"""Relevances that are made of the rating of the same name; ratings of other names are scorers."""
RELEVANCES = (*BY_SCORERS, *BY_PEOPLE)


def present(counts: Tensor) -> Tensor:
    """Bool `[N, K]`, K the largest count: True for the first `counts[n]` places of row n."""
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def as_lists(values: Tensor, mask: Tensor) -> Tensor:
    """`[N, K]` of the `[M]` values of neighbouring images, 0 where `mask` says that there is none."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def record_relevance(record: Record, how: str, scorers: Sequence[str]) -> Tensor | None:
    """`[k]` relevance of a record's candidates, as `batch_relevance`; None where something is not known."""
    known = [ratings(candidate) for candidate in record.candidates]
    names = _names(how, scorers, [name for item in known for name in item])
    # float32 like the ratings of a batch: scores may be equal there that differ here.
    table = torch.tensor([[item.get(name, torch.nan) for item in known] for name in names])
    if not names or not bool(torch.isfinite(table).all()):
        return None
    everywhere = torch.ones(1, len(known), dtype=torch.bool)
    return _WAYS[how](table[:, None, :], everywhere)[0]


def batch_relevance(batch: Batch, how: str, scorers: Sequence[str]) -> Tensor:
    """`[N, K]` relevance of the images of a batch of lists, 0 where a list is shorter.

    Args:
        batch: lists of two or more images with `ratings`.
        how: one of RELEVANCES; `rankdpo.Plugin` says what they are.
        scorers: whose scores count; empty: all in the batch, of each list those that know all its images.

    Raises:
        UserError: a list of one image, a scorer that is not in the batch, an image without its rating.
    """
    names = _names(how, scorers, batch.ratings)
    missing = [name for name in names if name not in batch.ratings]
    if missing and how in BY_SCORERS:
        raise unknown("scorer in objective.scorers", missing[0], _names(how, (), batch.ratings))
    mask = present(batch.counts)
    if bool((batch.counts < 2).any()):
        raise UserError(f"{_first(batch, batch.counts < 2)} is a list of one picture: K = 1 compares nothing")
    if missing or not names:
        what = "scores" if how in BY_SCORERS else f"'{how}'"
        raise UserError(f"objective.phi={how}: the data has no {what} of its pictures, choose another phi")
    table = torch.stack([as_lists(batch.ratings[name], mask) for name in names])
    lacking = (~torch.isfinite(table) & mask).sum(dim=-1)  # [S, N]
    incomplete = (
        (lacking > 0) & (lacking < batch.counts) if how in BY_SCORERS and not scorers else lacking > 0
    )
    bad = incomplete.any(dim=0) | (lacking > 0).all(dim=0)
    if bool(bad.any()):
        raise UserError(
            f"{_first(batch, bad)} has a picture without a rating by {' or '.join(names)}, which "
            f"objective.phi={how} needs: leave the record out"
        )
    return _WAYS[how](table, mask)


def _names(how: str, scorers: Sequence[str], known: Iterable[str]) -> list[str]:
    """The ratings that `how` reads, given the names that there are."""
    if how not in BY_SCORERS:
        return [how]
    return list(scorers) or sorted(set(known) - set(BY_PEOPLE))


def _first(batch: Batch, flags: Tensor) -> str:
    return batch.ids[int(flags.nonzero()[0])]


def _judged(table: Tensor, mask: Tensor) -> Tensor:
    """Bool `[S, N]`: the scorers that know all images of a list."""
    return (torch.isfinite(table) | ~mask).all(dim=-1)


def _wins(table: Tensor, mask: Tensor) -> Tensor:
    """C_i / (n (k - 1)): of all comparisons by `n` scorers with the `k - 1` others, the share that i wins.

    Source: arXiv 2410.18013v2, Algorithm 1; a tie is a win of neither.
    """
    judged = _judged(table, mask)
    both = mask[:, :, None] & mask[:, None, :] & judged[:, :, None, None]
    beats = (table[..., :, None] > table[..., None, :]) & both
    asked = judged.sum(dim=0) * (mask.sum(dim=1) - 1)
    return beats.sum(dim=(0, -1)) / asked[:, None]


def _mean(table: Tensor, mask: Tensor) -> Tensor:
    """Mean over scorers of (score - list's smallest) / (list's largest - smallest); 1/2 where these agree.

    Ours; a scorer's own scale and its range over the data set do not matter.
    """
    judged = _judged(table, mask)
    low = table.where(mask, torch.full_like(table, torch.inf)).amin(dim=-1, keepdim=True)
    high = table.where(mask, torch.full_like(table, -torch.inf)).amax(dim=-1, keepdim=True)
    scaled = ((table - low) / (high - low)).where(high > low, torch.full_like(table, 0.5))
    counted = scaled.where(judged[..., None] & mask, torch.zeros_like(scaled))
    return counted.sum(dim=0) / judged.sum(dim=0)[:, None]


def _evenly(table: Tensor, mask: Tensor) -> Tensor:
    """(images behind i + half of those beside it) / (k - 1): 1 for the first, 0 for the last."""
    values = table[0]
    both = mask[:, :, None] & mask[:, None, :]
    behind = ((values[:, :, None] > values[:, None, :]) & both).sum(dim=-1)
    beside = ((values[:, :, None] == values[:, None, :]) & both).sum(dim=-1) - mask.long()
    return (behind + 0.5 * beside) / (mask.sum(dim=1, keepdim=True) - 1)


def _share_of_most(table: Tensor, mask: Tensor) -> Tensor:
    """Votes divided by the most votes in the list; 0 where nobody voted. (Absent images have 0 votes.)"""
    most = table[0].amax(dim=1, keepdim=True)
    return table[0] / most.where(most > 0, torch.ones_like(most))


def _as_it_is(table: Tensor, mask: Tensor) -> Tensor:
    return table[0]


_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wins": _wins,
    "mean": _mean,
    "rank": _evenly,
    "votes": _share_of_most,
    "label": _as_it_is,
}
"""Name -> function of a table `[S, N, K]` of ratings (one row for those by people) and the mask `[N, K]`."""

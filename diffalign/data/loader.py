"""Which examples come when: a pure function of (seed, epoch), so that any position can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.data.encoded import Encoded, Example
from diffalign.data.specs import LoaderSpec


@dataclass(frozen=True)
class Plan:
    """One micro-batch before it is put together.

    Args:
        epoch: pass over the data.
        indices: examples, all of one size.
        first_position: global index in the run of the first of them.
    """

    epoch: int
    indices: tuple[int, ...]
    first_position: int


class EpochPlans(Sequence[Plan]):
    """Micro-batches of one epoch: every example once, a batch is of one kind, the last one may be short.

    A batch comes when its last example does. Short batches go to random places, not to the end, where each
    epoch would close on rare sizes. Of a million examples three arrays are kept, no objects.

    Args:
        kinds: `[n]`, of `Encoded.kinds`.
        batch_size: examples in a full batch.
        seed: of the order.
        epoch: number of the epoch.
    """

    def __init__(self, kinds: NDArray[np.int64], batch_size: int, *, seed: int, epoch: int) -> None:
        self._epoch = epoch
        order = draws.permutation(len(kinds), seed, "order", epoch).numpy()
        by_kind = np.argsort(kinds[order], kind="stable")  # places in the order, those of a kind together
        self._members = order[by_kind]
        starts, sizes = _chunks(kinds[self._members], batch_size)
        full = np.flatnonzero(sizes == batch_size)
        ready = full[np.argsort(by_kind[starts[full] + batch_size - 1])]
        for short in np.flatnonzero(sizes < batch_size):
            first = int(self._members[starts[short]])
            place = int(draws.uniform(seed, "leftover", epoch, first) * (len(ready) + 1))
            ready = np.insert(ready, place, short)
        self._starts, self._sizes = starts[ready], sizes[ready]
        self._positions = epoch * len(kinds) + np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, number: int) -> Plan: ...

    @overload
    def __getitem__(self, number: slice) -> list[Plan]: ...

    def __getitem__(self, number: int | slice) -> Plan | list[Plan]:
        if isinstance(number, slice):
            return [self[single] for single in range(*number.indices(len(self)))]
        start = int(self._starts[number])
        members = self._members[start : start + int(self._sizes[number])]
        return Plan(self._epoch, tuple(members.tolist()), int(self._positions[number]))


def _chunks(kinds: NDArray[np.int64], batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and sizes of the batches of sorted kinds."""
    edges = np.flatnonzero(np.diff(kinds)) + 1
    first = np.repeat(np.r_[0, edges], np.diff(np.r_[0, edges, len(kinds)]))
    starts = np.flatnonzero((np.arange(len(kinds)) - first) % batch_size == 0)
    return starts, np.diff(np.r_[starts, len(kinds)])


def plans_from(encoded: Encoded, batch_size: int, *, seed: int, start: int) -> Iterator[Plan]:
    """Micro-batches number `start`, `start + 1`, ... of an endless run over the data."""
    kinds = encoded.kinds()
    per_epoch = len(_chunks(np.sort(kinds), batch_size)[0])
    epoch, skip = divmod(start, per_epoch)
    while True:
        plans = EpochPlans(kinds, batch_size, seed=seed, epoch=epoch)
        for number in range(skip, per_epoch):
            yield plans[number]
        epoch, skip = epoch + 1, 0


class _Batches(Dataset[Batch | UserError]):
    """Puts planned batches together; a map over plans, so that workers need no state.

    A mistake is returned: one that is raised in a worker comes with a traceback in its text.
    """

    def __init__(self, encoded: Encoded, spec: LoaderSpec, seed: int) -> None:
        self._encoded, self._spec, self._seed = encoded, spec, seed

    def __getitem__(self, plan: Plan) -> Batch | UserError:
        try:
            return assemble(self._encoded, plan, seed=self._seed, spec=self._spec)
        except UserError as error:
            return error


def assemble(encoded: Encoded, plan: Plan, *, seed: int, spec: LoaderSpec) -> Batch:
    """The batch of a plan; every draw is keyed by (seed, example id, epoch)."""
    latents, conds = [], []
    examples = [encoded.example(index, plan.epoch) for index in plan.indices]
    for example in examples:
        dropped = draws.uniform(seed, "caption-dropout", example.id, plan.epoch) < spec.caption_dropout
        conds.append(encoded.conditioning(example, dropped=dropped))
        for side, image in enumerate(example.images):
            key = (seed, "posterior", example.id, side, plan.epoch) if spec.posterior == "sample" else ()
            latents.append(encoded.latents(image, *key))
    targets = [example.target for example in examples]
    return Batch(
        ids=[example.id for example in examples],
        epoch=plan.epoch,
        positions=torch.arange(plan.first_position, plan.first_position + len(examples)),
        latents=torch.stack(latents),
        cond=Conditioning.cat(conds),
        counts=torch.tensor([len(example.images) for example in examples]),
        target=None if None in targets else torch.tensor(targets, dtype=torch.float32),
        ratings=_ratings(examples),
    )


def _ratings(examples: list[Example]) -> dict[str, torch.Tensor]:
    """name -> `[M]` of all names that any of the images has."""
    images = [known for example in examples for known in example.ratings]
    names = dict.fromkeys(name for known in images for name in known)
    return {name: torch.tensor([known.get(name, torch.nan) for known in images]) for name in names}


def batches(encoded: Encoded, spec: LoaderSpec, *, seed: int, start: int, step: int = 1) -> Iterator[Batch]:
    """Batches number `start`, `start + step`, ... of an endless run; `num_workers` processes make them."""
    loader = DataLoader(
        _Batches(encoded, spec, seed),
        sampler=islice(plans_from(encoded, spec.batch_size, seed=seed, start=start), 0, None, step),
        batch_size=None,
        num_workers=spec.num_workers,
        # A generator of its own: the default would take a number from the global stream, which dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def split_by_prompt(encoded: Encoded, share: float, *, seed: int) -> tuple[Encoded, Encoded]:
    """`(training, held out)`: about `share` of the prompts are held out, each prompt wholly on one side.

    Raises:
        UserError: when a side would be empty.
    """
    prompts, rows = encoded.texts()
    held = np.array([draws.uniform(seed, "held-out", prompt) < share for prompt in prompts], dtype=bool)
    sides = [np.flatnonzero(held[rows] == side).tolist() for side in (False, True)]
    if not all(sides):
        raise UserError(
            f"validation.share={share} leaves {len(sides[0])} training and {len(sides[1])} held-out "
            "examples: change the share, bring more data, or set validation.share=0 to train without"
        )
    return encoded.subset(sides[0]), encoded.subset(sides[1])

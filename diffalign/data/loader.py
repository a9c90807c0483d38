"""Which examples come when: a pure function of (seed, epoch), so that any position can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.data.cache import EncodedSet, Example
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


def epoch_plans(encoded: EncodedSet, batch_size: int, *, seed: int, epoch: int) -> list[Plan]:
    """Micro-batches of one epoch: every example once, a batch is of one size, the last may be short."""
    waiting: dict[tuple[int, ...], list[int]] = {}
    ready: list[tuple[int, ...]] = []
    for index in draws.permutation(len(encoded), seed, "order", epoch).tolist():
        example = encoded.examples[index]
        group = waiting.setdefault((*example.size, len(example.images)), [])
        group.append(index)
        if len(group) == batch_size:
            ready.append(tuple(group))
            group.clear()
    # Short batches go to random places, not to the end, where each epoch would close on rare sizes.
    for leftover in (tuple(group) for group in waiting.values() if group):
        ready.insert(int(draws.uniform(seed, "leftover", epoch, leftover[0]) * (len(ready) + 1)), leftover)
    plans, position = [], epoch * len(encoded)
    for indices in ready:
        plans.append(Plan(epoch, indices, position))
        position += len(indices)
    return plans


def plans_from(encoded: EncodedSet, batch_size: int, *, seed: int, start: int) -> Iterator[Plan]:
    """Micro-batches number `start`, `start + 1`, ... of an endless run over the data."""
    per_epoch = len(epoch_plans(encoded, batch_size, seed=seed, epoch=0))
    epoch, skip = divmod(start, per_epoch)
    while True:
        yield from epoch_plans(encoded, batch_size, seed=seed, epoch=epoch)[skip:]
        epoch, skip = epoch + 1, 0


class _Batches(Dataset[Batch]):
    """Puts planned batches together; a map over plans, so that workers need no state."""

    def __init__(self, encoded: EncodedSet, spec: LoaderSpec, seed: int) -> None:
        self._encoded, self._spec, self._seed = encoded, spec, seed

    def __getitem__(self, plan: Plan) -> Batch:
        return assemble(self._encoded, plan, seed=self._seed, spec=self._spec)


def assemble(encoded: EncodedSet, plan: Plan, *, seed: int, spec: LoaderSpec) -> Batch:
    """The batch of a plan; every draw is keyed by (seed, example id, epoch)."""
    latents, conds = [], []
    examples = [encoded.examples[index] for index in plan.indices]
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


def batches(
    encoded: EncodedSet, spec: LoaderSpec, *, seed: int, start: int, step: int = 1
) -> Iterator[Batch]:
    """Batches number `start`, `start + step`, ... of an endless run; `num_workers` processes make them."""
    loader = DataLoader(
        _Batches(encoded, spec, seed),
        sampler=islice(plans_from(encoded, spec.batch_size, seed=seed, start=start), 0, None, step),
        batch_size=None,
        num_workers=spec.num_workers,
        # A generator of its own: the default would take a number from the global stream, which dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    yield from loader


def split_by_prompt(encoded: EncodedSet, share: float, *, seed: int) -> tuple[EncodedSet, EncodedSet]:
    """`(training, held out)`: about `share` of the prompts are held out, each prompt wholly on one side.

    Raises:
        UserError: when a side would be empty.
    """
    held = {prompt for prompt in encoded.prompt_rows if draws.uniform(seed, "held-out", prompt) < share}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, example in enumerate(encoded.examples):
        sides[example.prompt in held].append(index)
    if not all(sides):
        raise UserError(
            f"validation.share={share} leaves {len(sides[0])} training and {len(sides[1])} held-out "
            "examples: change the share or bring more data"
        )
    return encoded.subset(sides[0]), encoded.subset(sides[1])

"""Which example comes when, and what is in a batch: pure functions of (seed, epoch, example)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.batches import Batch, first_and_second
from diffalign.data.encoded import EncodedSet, Example
from diffalign.data.loader import (
    EpochPlans,
    LoaderSpec,
    Plan,
    assemble,
    batches,
    plans_from,
    split_by_prompt,
)

SMALL, WIDE = (32, 32), (24, 40)


def encoded_set(count: int = 11, *, wide: int = 4, images: int = 2, prompts: int = 5) -> EncodedSet:
    """`count` examples, the first `wide` of them in another bucket; example k has prompt k mod `prompts`."""
    generator = torch.Generator().manual_seed(0)
    means, examples = [], []
    for number in range(count):
        size = WIDE if number < wide else SMALL
        first = len(means)
        means += [torch.randn(4, size[0] // 2, size[1] // 2, generator=generator) for _ in range(images)]
        examples.append(
            Example(
                id=f"row-{number}",
                prompt=f"prompt {number % prompts}",
                images=tuple(range(first, first + images)),
                size=size,
                target=1.0 if images == 2 else None,
                conditions=tuple({"size": torch.tensor([[float(size[0])]])} for _ in range(images)),
            )
        )
    return EncodedSet(
        examples,
        means,
        [torch.full_like(mean, 0.1) for mean in means],
        {f"prompt {row}": row for row in range(prompts)},
        Conditioning({"text": torch.arange(1.0, prompts + 1)[:, None]}),
        Conditioning({"text": torch.zeros(1, 1)}),
    )


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_an_epoch_holds_every_example_once(batch_size: int) -> None:
    encoded = encoded_set()
    for epoch in range(3):
        plans = EpochPlans(encoded.kinds(), batch_size, seed=0, epoch=epoch)
        indices = [index for plan in plans for index in plan.indices]
        assert sorted(indices) == list(range(11))
        for plan in plans:
            assert plan.epoch == epoch and len(plan.indices) <= batch_size
            assert len({encoded.examples[index].size for index in plan.indices}) == 1
        # 4 wide and 7 small examples: at most one short batch of each size
        assert sum(len(plan.indices) < batch_size for plan in plans) <= 2
        firsts = [plan.first_position for plan in plans]
        assert firsts == [epoch * 11 + sum(len(p.indices) for p in plans[:k]) for k in range(len(plans))]


def test_the_order_does_not_hang_on_which_example_comes_first_in_the_data() -> None:
    """Two short batches an epoch: who is inserted first follows the sizes, not the order of the source."""
    encoded = encoded_set(5, wide=3)
    turned = replace(encoded, examples=encoded.examples[::-1])
    assert (encoded.kinds() == turned.kinds()[::-1]).all() and len(set(encoded.kinds().tolist())) == 2
    assert encoded.kinds()[-1] == (32 << 40) + (32 << 20) + 2
    assert encoded.kinds()[0] == encoded.subset([4, 0]).kinds()[1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    encoded = encoded_set()
    orders = {
        (seed, epoch): tuple(
            i for plan in EpochPlans(encoded.kinds(), 2, seed=seed, epoch=epoch) for i in plan.indices
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_short_batches_do_not_gather_at_the_end_of_epochs() -> None:
    """11 examples in batches of 2 leave two batches of one size and one short one; where it lands changes."""
    encoded = encoded_set(wide=0)
    places = []
    for epoch in range(40):
        sizes = [len(plan.indices) for plan in EpochPlans(encoded.kinds(), 2, seed=0, epoch=epoch)]
        places.append(sizes.index(1))
    assert len(set(places)) == 6


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 23])
def test_resuming_is_a_slice_of_the_endless_order(start: int) -> None:
    encoded = encoded_set()
    endless = list(islice(plans_from(encoded, 2, seed=3, start=0), 40))
    assert list(islice(plans_from(encoded, 2, seed=3, start=start), 40 - start)) == endless[start:]


def equal(first: Batch, second: Batch) -> bool:
    tensors = [(first.latents, second.latents), (first.positions, second.positions)]
    tensors += [(first.counts, second.counts), (first.target, second.target)]  # type: ignore[list-item]
    tensors += [(first.cond[key], second.cond[key]) for key in first.cond]
    return (first.ids, first.epoch) == (second.ids, second.epoch) and all(
        torch.equal(a, b) for a, b in tensors
    )


def taken(encoded: EncodedSet, count: int, *, start: int = 0, **options: Any) -> list[Batch]:
    stream: Iterator[Batch] = batches(encoded, LoaderSpec(**options), seed=0, start=start)
    return list(islice(stream, count))


def test_workers_change_nothing() -> None:
    """Two processes give the bits of none, from any position; the global random stream is left alone."""
    encoded = encoded_set()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    options: dict[str, Any] = {"batch_size": 2, "caption_dropout": 0.4}
    alone = taken(encoded, 15, **options)
    helped = taken(encoded, 15, num_workers=2, **options)
    late = taken(encoded, 8, start=7, num_workers=2, **options)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert all(equal(a, b) for a, b in zip(alone[7:], late, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert {batch.epoch for batch in alone} == {0, 1, 2}


def test_what_is_in_a_batch() -> None:
    encoded = encoded_set()
    batch = assemble(encoded, Plan(2, (10, 7), 100), seed=0, spec=LoaderSpec(posterior="mean"))
    assert batch.ids == ["row-10", "row-7"] and batch.epoch == 2 and batch.positions.tolist() == [100, 101]
    assert batch.num_groups == 2 and batch.num_images == 4 and batch.counts.tolist() == [2, 2]
    assert torch.equal(batch.latents, torch.stack([encoded.means[i] for i in (20, 21, 14, 15)]))
    assert batch.target is not None and batch.target.tolist() == [1.0, 1.0]
    assert batch.cond["text"].flatten().tolist() == [1, 1, 3, 3]  # prompts 0 and 2
    assert batch.cond["size"].flatten().tolist() == [32.0] * 4
    first, second = first_and_second(batch.latents)
    assert torch.equal(first[1], encoded.means[14]) and torch.equal(second[1], encoded.means[15])
    single = assemble(encoded_set(images=1), Plan(0, (5, 6), 0), seed=0, spec=LoaderSpec())
    assert single.target is None and single.counts.tolist() == [1, 1]


def test_latents_are_drawn_anew_in_each_epoch_whoever_is_beside_them() -> None:
    encoded = encoded_set()
    spec = LoaderSpec(posterior="sample")
    together = assemble(encoded, Plan(1, (8, 9), 0), seed=0, spec=spec).latents
    alone = assemble(encoded, Plan(1, (9,), 40), seed=0, spec=spec).latents
    assert torch.equal(together[2:], alone)
    later = assemble(encoded, Plan(2, (9,), 40), seed=0, spec=spec).latents
    assert not torch.equal(later, alone)
    noise = ((alone - torch.stack([encoded.means[18], encoded.means[19]])) / 0.1).flatten()
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1  # 2048 numbers
    assert not torch.equal(noise[:1024], noise[1024:])  # each image its own


def test_a_group_loses_its_caption_as_a_whole() -> None:
    encoded = encoded_set(200, wide=0)
    spec = LoaderSpec(caption_dropout=0.3)
    texts = []
    for epoch in (0, 1):
        batch = assemble(encoded, Plan(epoch, tuple(range(200)), 0), seed=0, spec=spec)
        text = batch.cond["text"].reshape(200, 2)
        assert torch.equal(text[:, 0] == 0, text[:, 1] == 0)
        dropped = int((text[:, 0] == 0).sum())
        assert 34 <= dropped <= 86  # 60 +- 4 standard deviations of 6.5
        texts.append(text[:, 0] == 0)
    assert not torch.equal(*texts)
    assert (
        not assemble(encoded, Plan(0, (1,), 0), seed=0, spec=LoaderSpec(caption_dropout=1.0))
        .cond["text"]
        .any()
    )
    kept = assemble(encoded, Plan(0, tuple(range(200)), 0), seed=0, spec=LoaderSpec())
    assert bool((kept.cond["text"] > 0).all())


def test_prompts_are_held_out_as_a_whole() -> None:
    encoded = encoded_set(300, wide=0, prompts=100)
    train, heldout = split_by_prompt(encoded, 0.25, seed=0)
    assert len(train) + len(heldout) == 300
    sides = [{example.prompt for example in side.examples} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert 8 <= len(sides[1]) <= 42  # 25 +- 4 standard deviations of 4.3
    assert train.means is encoded.means
    again = split_by_prompt(encoded, 0.25, seed=0)[1]
    assert [example.id for example in again.examples] == [example.id for example in heldout.examples]
    other = split_by_prompt(encoded, 0.25, seed=1)[1]
    assert [example.id for example in other.examples] != [example.id for example in heldout.examples]


@pytest.mark.parametrize(
    ("share", "counts"), [(1e-9, "3 training and 0 held-out"), (1 - 1e-9, "0 training and 3")]
)
def test_a_side_without_examples_is_refused(share: float, counts: str) -> None:
    with pytest.raises(UserError, match=f"leaves {counts}.* set validation.share=0 to train without"):
        split_by_prompt(encoded_set(3), share, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "loader.batch_size is 0: use 1 or more"),
        ({"caption_dropout": 1.5}, "loader.caption_dropout is 1.5"),
        ({"caption_dropout": float("nan")}, "loader.caption_dropout is nan"),
        ({"posterior": "mode"}, "loader.posterior is 'mode': use sample or mean"),
        ({"num_workers": -1}, "loader.num_workers is -1: use 0 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoaderSpec(**options)


def test_moving_a_batch_keeps_latents_in_float32() -> None:
    batch = assemble(encoded_set(), Plan(0, (5,), 0), seed=0, spec=LoaderSpec())
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.latents.dtype == torch.float32 and moved.cond["text"].dtype == torch.bfloat16
    assert moved.ids == batch.ids and torch.equal(moved.latents, batch.latents)

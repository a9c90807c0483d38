"""Keyed draws depend on their key alone."""

import pytest
import torch

from diffalign.common import draws

SEED = 4814246684502336018
NOISE = [0.0625214, -1.7198688]


def test_frozen_values() -> None:
    """Runs of last year must be repeatable: these numbers may never change."""
    assert draws.seed_of(0, "example", 3) == SEED
    assert draws.uniform(0, "example", 3) == pytest.approx((SEED >> 10) / 2**53, abs=0)
    assert draws.normal((2,), 7, "noise").tolist() == pytest.approx(NOISE, abs=1e-6)


def test_equal_keys_agree_and_others_do_not() -> None:
    assert torch.equal(draws.normal((2, 3), 1, "a"), draws.normal((2, 3), 1, "a"))
    keys = [(1, 23), (12, 3), ("12", 3), (12, "3"), (123,), ("123",), (-1,), ("-1",), ("",), ("", "")]
    assert len({draws.seed_of(*key) for key in keys}) == len(keys)


def test_order_of_drawing_does_not_matter() -> None:
    first = draws.normal((4,), 0, 1)
    draws.normal((100,), 0, 0)
    torch.manual_seed(5)
    assert torch.equal(draws.normal((4,), 0, 1), first)


def test_ranges_and_moments() -> None:
    seeds = [draws.seed_of("range", i) for i in range(4000)]
    assert min(seeds) >= 0 and max(seeds) < 2**63 and max(seeds) > 2**62
    numbers = torch.tensor([draws.uniform("u", i) for i in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02  # standard error 0.0046
    noise = draws.normal((20000,), "n")
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02


def test_permutation() -> None:
    order = draws.permutation(10, 0, "epoch", 1)
    assert sorted(order.tolist()) == list(range(10)) and order.dtype == torch.int64
    assert order.tolist() != draws.permutation(10, 0, "epoch", 2).tolist()


@pytest.mark.parametrize("parts", [(), (1.0,), (True,), (None,), (torch.tensor(1),)])
def test_only_ints_and_strings_are_keys(parts: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        draws.seed_of(*parts)  # type: ignore[arg-type]

"""Timestep distributions against their closed-form quantiles; keyed and stratified uniforms."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.diffusion.timesteps import TimestepSpec, keyed_uniform, stratified_grid

MIDPOINTS = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
"""One uniform in the middle of each thousandth: any distribution drawn from them is exact."""


def test_uniform_draws_every_timestep_once() -> None:
    assert torch.equal(TimestepSpec().draw(MIDPOINTS, 1000), torch.arange(1000))


def test_a_range_draws_each_of_its_timesteps_equally_often() -> None:
    drawn = TimestepSpec(low=200, high=300).draw(MIDPOINTS, 1000)
    assert torch.equal(drawn.unique(), torch.arange(200, 300))
    assert drawn.bincount().max().item() == 10


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode"])
def test_the_ends_of_the_unit_interval_stay_inside(kind: Any) -> None:
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    drawn = TimestepSpec(kind=kind, low=3, high=7).draw(ends, 10)
    assert set(drawn.tolist()) <= {3, 6}
    assert drawn.dtype == torch.int64


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_quantiles(mean: float, std: float) -> None:
    """The q-quantile is sigmoid(mean + std * Phi^-1(q)): for (0, 1) and q = 0.8413, sigmoid(1) = 0.731."""
    for q in (0.05, 0.25, 0.5, NormalDist().cdf(1.0), 0.95):
        expected = 1000 / (1 + math.exp(-(mean + std * NormalDist().inv_cdf(q))))
        drawn = TimestepSpec(kind="logit_normal", mean=mean, std=std).draw(torch.tensor([q]).double(), 1000)
        assert abs(drawn.item() + 0.5 - expected) <= 0.5 + 1e-6


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29])
def test_mode_sampling_has_the_density_of_its_inverse_derivative(scale: float) -> None:
    """position = 1 - u - s (cos^2(pi u / 2) - 1 + u) falls from 1 to 0 through 1/2 at u = 1/2.

    The density at the middle is 1 / |d position / du| = 1 / (1 - s (pi/2 - 1)); for s = 1.29 it is 3.79, for
    s = -1 it is 0.637. Counted here in the 10 timesteps around the middle, by 1e6 exact midpoints.
    """
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    drawn = TimestepSpec(kind="mode", scale=scale).draw(u, 1000)
    assert bool((drawn.diff() <= 0).all())
    assert drawn[0].item() == 999
    assert drawn[-1].item() == 0
    share = ((drawn >= 495) & (drawn < 505)).double().mean().item()
    assert share / 0.01 == pytest.approx(1 / (1 - scale * (math.pi / 2 - 1)), rel=0.01)


def test_a_grid_draws_each_entry_equally_often() -> None:
    drawn = TimestepSpec(kind="grid", grid=[249, 499, 749, 999]).draw(MIDPOINTS, 1000)
    assert {t: int((drawn == t).sum()) for t in (249, 499, 749, 999)} == dict.fromkeys(
        (249, 499, 749, 999), 250
    )


def test_keyed_uniforms_depend_on_the_key_alone() -> None:
    assert keyed_uniform(7, "timestep", "a", 0) == keyed_uniform(7, "timestep", "a", 0)
    assert len({keyed_uniform(7, "timestep", name, epoch) for name in "abc" for epoch in range(3)}) == 9


@pytest.mark.parametrize("strata", [2, 5])
def test_stratified_uniforms_cycle_through_the_slices(strata: int) -> None:
    uniforms = [
        keyed_uniform(0, str(position), position=position, strata=strata) for position in range(4 * strata)
    ]
    assert [int(u * strata) for u in uniforms] == [position % strata for position in range(4 * strata)]
    within = [u * strata % 1 for u in uniforms]
    assert within == pytest.approx([keyed_uniform(0, str(position)) for position in range(4 * strata)])


def test_the_grid_of_held_out_measures() -> None:
    """4 slices of 1000 have the midpoints 125, 375, 625, 875; 3 of 10: 1.67, 5, 8.33."""
    assert stratified_grid(4, 1000).tolist() == [125, 375, 625, 875]
    assert stratified_grid(3, 10).tolist() == [1, 5, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "unifrom"}, "unknown timesteps.kind 'unifrom': did you mean 'uniform'"),
        ({"kind": "grid"}, "timesteps.grid is empty"),
        ({"kind": "logit_normal", "std": 0.0}, "timesteps.std is 0.0: use a value above 0"),
        ({"kind": "logit_normal", "std": math.nan}, "timesteps.std is nan"),
        ({"low": 5, "high": 5}, "low=5, high=5: use 0 <= low < high"),
        ({"low": -1}, "low=-1"),
        ({"kind": "mode", "scale": 3.0}, "timesteps.scale is 3.0: use a value from -1 to 1.75"),
        ({"strata": -2}, "timesteps.strata is -2: use 0 or more"),
    ],
)
def test_settings_that_make_no_distribution_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimestepSpec(**options)


GIVEN: dict[str, Any] = {
    "low": 1,
    "high": 9,
    "mean": 1.0,
    "std": 0.5,
    "scale": 0.8,
    "grid": [3],
    "shift": 3.0,
}
DRAWN = {"low", "high", "shift", "sampler_shift"}
USED = {
    "uniform": DRAWN,
    "logit_normal": DRAWN | {"mean", "std"},
    "mode": DRAWN | {"scale"},
    "grid": {"grid"},
}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("key", [*GIVEN, "sampler_shift"])
def test_keys_of_another_kind_are_refused_and_defaults_are_not(kind: str, key: str) -> None:
    value = GIVEN.get(key, True)
    needed: dict[str, Any] = {"grid": [3]} if kind == "grid" else {}
    if key in USED[kind]:
        assert getattr(TimestepSpec(kind=kind, **{**needed, key: value}), key) == value  # type: ignore[arg-type]
        return
    others = " or ".join(name for name, keys in USED.items() if key in keys)
    with pytest.raises(
        UserError,
        match=f"^timesteps.{key} means nothing in timesteps.kind={kind}: leave it out, or use "
        f"timesteps.kind={others}$",
    ):
        TimestepSpec(kind=kind, **needed, **{key: value})  # type: ignore[arg-type]
    default = getattr(TimestepSpec(), key)
    assert getattr(TimestepSpec(kind=kind, **needed, **{key: default}), key) == default  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec", [TimestepSpec(kind="grid", grid=[0, 1000]), TimestepSpec(high=1001), TimestepSpec(low=1000)]
)
def test_timesteps_beyond_the_process_are_refused(spec: TimestepSpec) -> None:
    with pytest.raises(UserError, match="1000"):
        spec.draw(MIDPOINTS[:2], 1000)

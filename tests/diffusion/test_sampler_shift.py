"""The shift of a flow's sampler: against the pipelines' own formula and the scheduler's own levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.diffusion.process import Process, SamplerShift
from diffalign.diffusion.specs import TimestepSpec
from diffalign.diffusion.timesteps import keyed_uniform

FLUX_DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""The scheduler of FLUX.1-dev; it does not read its `shift`."""

FINE = 10**9
"""So many timesteps tell levels apart that differ by 1e-9."""

MIDPOINTS = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def scheduler(**options: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**options)


def shift_of(made: Any, patch: int | None = None) -> SamplerShift:
    found = Process.from_scheduler(made, patch=patch).sampler_shift
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("pixels", "tokens", "mu"),
    [
        ((256, 256), 256, 0.5),
        ((1024, 1024), 4096, 1.15),
        ((768, 1280), 3840, 0.5 + 0.65 * (3840 - 256) / 3840),
        ((2048, 1024), 8192, 0.5 + 0.65 * (8192 - 256) / 3840),
    ],
)
def test_flux_shifts_larger_pictures_more(pixels: tuple[int, int], tokens: int, mu: float) -> None:
    """8 x 8 pixels a latent cell, 2 x 2 cells a token: e^0.5 = 1.649 at 256, e^1.15 = 3.158 at 1024."""
    cells = (pixels[0] // 8, pixels[1] // 8)
    found = shift_of(scheduler(**FLUX_DEV), patch=2).at((4, 16, *cells))
    assert found == pytest.approx(math.exp(mu), rel=1e-12)
    assert found == math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert found == shift_of(scheduler(**FLUX_DEV), patch=2).at(cells[::-1])


def test_figures_of_flux() -> None:
    found = shift_of(scheduler(**FLUX_DEV), patch=2)
    assert [round(found.at((side, side)), 3) for side in (32, 128)] == [1.649, 3.158]


def test_cells_beyond_the_last_whole_token_do_not_count() -> None:
    """As the pipelines divide: 7 x 5 cells are 3 x 2 tokens of 2 x 2, mu = 1 + 6/10 * 2."""
    options = {"base_image_seq_len": 0, "max_image_seq_len": 10, "base_shift": 1.0, "max_shift": 3.0}
    made = scheduler(use_dynamic_shifting=True, time_shift_type="linear", **options)
    assert shift_of(made, patch=2).at((7, 5)) == pytest.approx(2.2, rel=1e-14)
    assert shift_of(made, patch=1).at((7, 5)) == pytest.approx(8.0, rel=1e-14)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_sd3_has_one_shift_for_all_sizes(kind: Any) -> None:
    found = shift_of(kind(shift=3.0), patch=2)
    assert {found.at((16, side, side)) for side in (32, 64, 128)} == {3.0}
    assert shift_of(kind(shift=3.0)) == shift_of(kind(shift=3.0), patch=2)


def test_a_shift_that_is_not_read_is_not_ours() -> None:
    assert shift_of(scheduler(**{**FLUX_DEV, "shift": 7.0}), patch=2) == shift_of(
        scheduler(**FLUX_DEV), patch=2
    )


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
@pytest.mark.parametrize(
    "options",
    [{"shift": 3.0}, {"shift": 0.6}, FLUX_DEV, {**FLUX_DEV, "time_shift_type": "linear"}],
    ids=["sd3", "below 1", "flux", "linear"],
)
@pytest.mark.parametrize("cells", [(32, 32), (96, 160), (128, 128)])
def test_any_level_is_moved_where_the_scheduler_moves_it(
    kind: Any, options: dict[str, Any], cells: tuple[int, int]
) -> None:
    """The scheduler is given levels u and mu as a pipeline gives them; it computes in float32.

    With the 1000 timesteps of the process, the level is that of the scheduler rounded up to the grid.
    """
    u = torch.tensor([1e-3, 0.01, 0.1234, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)
    made = kind(**options)
    dynamic = bool(options.get("use_dynamic_shifting"))
    mu = calculate_shift((cells[0] // 2) * (cells[1] // 2), 256, 4096, 0.5, 1.15) if dynamic else None
    made.set_timesteps(sigmas=u.flip(0).tolist(), mu=mu)
    theirs = made.sigmas[:-1].flip(0).double()
    process = Process.from_scheduler(made, patch=2)
    spec = TimestepSpec(sampler_shift=True).at(process, (1, 16, *cells))
    assert (spec.draw(u, FINE) / FINE - theirs).abs().max() < 3e-7
    above = process.sigmas[spec.draw(u, 1000)] - theirs
    assert above.min() > -3e-7 and above.max() < 1e-3 + 3e-7


@pytest.mark.parametrize(
    ("options", "patch"),
    [
        (FLUX_DEV, None),
        ({**FLUX_DEV, "base_shift": None}, 2),
        ({**FLUX_DEV, "max_image_seq_len": 256}, 2),
        ({**FLUX_DEV, "shift_terminal": 0.02}, 2),
        ({"shift": 3.0, "invert_sigmas": True}, 2),
        ({"shift": 3.0, "use_karras_sigmas": True}, 2),
        ({"shift": 3.0, "use_exponential_sigmas": True}, 2),
        ({"shift": 3.0, "use_beta_sigmas": True}, 2),
    ],
)
def test_schedulers_that_do_something_else_are_refused_where_their_shift_is_asked_for(
    options: dict[str, Any], patch: int | None
) -> None:
    process = Process.from_scheduler(scheduler(**options), patch=patch)
    assert process.sampler_shift is None and process.prediction == "flow"
    TimestepSpec(shift=3.0).check(process)
    with pytest.raises(UserError, match="moves its levels by more than a shift: leave it out, or give"):
        TimestepSpec(sampler_shift=True).check(process)


def test_a_base_that_is_no_flow_has_none() -> None:
    process = Process.from_scheduler(DDIMScheduler(prediction_type="v_prediction"), patch=2)
    assert process.sampler_shift is None
    TimestepSpec(shift=3.0).check(process)
    for refuses in (
        lambda spec: spec.check(process),
        lambda spec: spec.at(process, (1, 4, 8, 8)),
    ):
        with pytest.raises(UserError, match=r"this base is none \(it predicts v_prediction\): leave it out"):
            refuses(TimestepSpec(sampler_shift=True))


def test_the_number_replaces_the_word_and_nothing_else() -> None:
    process = Process.flow(1000, SamplerShift(2.0))
    spec = TimestepSpec(kind="mode", low=3, high=900, scale=0.8, strata=4, sampler_shift=True)
    spec.check(process)
    assert spec.at(process, (1, 4, 8, 8)) == TimestepSpec(
        kind="mode", low=3, high=900, scale=0.8, strata=4, shift=2.0
    )
    assert spec.sampler_shift
    plain = TimestepSpec(shift=0.5)
    assert plain.at(process, (1, 4, 8, 8)) is plain
    with pytest.raises(ValueError, match="draw from at"):
        spec.draw(MIDPOINTS, 1000)
    with pytest.raises(UserError, match="timestep 1000 is outside"):
        TimestepSpec(high=1001, sampler_shift=True).check(process)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 3.0}, r"timesteps.shift=3.0 and timesteps.sampler_shift are both set: leave one out"),
        ({"kind": "grid", "grid": [1]}, "timesteps.sampler_shift means nothing in timesteps.kind=grid"),
    ],
)
def test_settings_that_contradict_it_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimestepSpec(sampler_shift=True, **options)


def test_a_shift_that_no_sampler_could_use_is_refused() -> None:
    """Linear in the number of tokens mu may fall below 0, where it is no shift."""
    process = Process.flow(1000, SamplerShift(1.0, slope=-0.1))
    spec = TimestepSpec(sampler_shift=True)
    assert spec.at(process, (1, 4, 3, 3)).shift == pytest.approx(0.1)
    with pytest.raises(UserError, match="use a value above 0"):
        spec.at(process, (1, 4, 4, 4))


def logit_normal_cdf(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    return lambda level: torch.special.ndtr((torch.logit(level) - mean) / std)


def mode_cdf(scale: float) -> Callable[[Tensor], Tensor]:
    """1 - u where the level 1 - u - s (cos^2(pi u / 2) - 1 + u) falls to `level`; by bisection."""

    def cdf(level: Tensor) -> Tensor:
        low, high = torch.zeros_like(level), torch.ones_like(level)
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - scale * ((1 + torch.cos(math.pi * u)) / 2 - 1 + u) > level
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - low

    return cdf


DISTRIBUTIONS: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"kind": "uniform"}, lambda level: level),
    ({"kind": "logit_normal"}, logit_normal_cdf(0.0, 1.0)),
    ({"kind": "logit_normal", "mean": -0.5, "std": 0.7}, logit_normal_cdf(-0.5, 0.7)),
    ({"kind": "mode", "scale": 1.29}, mode_cdf(1.29)),
    ({"kind": "mode", "scale": -0.9}, mode_cdf(-0.9)),
]


@pytest.mark.parametrize("shift", [0.5, 1.0, math.exp(0.5), 3.0, math.exp(1.15)])
@pytest.mark.parametrize(("options", "cdf"), DISTRIBUTIONS)
def test_shifted_levels_have_the_closed_form_distribution(
    options: dict[str, Any], cdf: Callable[[Tensor], Tensor], shift: float
) -> None:
    """P(level <= x) is the unshifted CDF at x / (x + shift (1 - x)), where the shift came from.

    Of equally spaced u the k-th smallest level has (k + 1/2) / 1000 exactly, to the fineness of the steps.
    """
    drawn = TimestepSpec(shift=shift, **options).draw(MIDPOINTS, FINE)
    rising = drawn.flip(0) if options["kind"] == "mode" else drawn
    assert bool((rising.diff() > 0).all())
    level = (rising.double() + 0.5) / FINE
    assert (cdf(level / (level + shift * (1 - level))) - MIDPOINTS).abs().max() < 1e-7


@pytest.mark.parametrize(("options", "cdf"), DISTRIBUTIONS)
def test_random_draws_have_it_too(options: dict[str, Any], cdf: Callable[[Tensor], Tensor]) -> None:
    """Of 4000 keyed draws the largest distance of the CDFs is below Kolmogorov's 1% bound 1.63 / sqrt(n)."""
    u = torch.tensor([keyed_uniform(0, "timestep", str(row)) for row in range(4000)], dtype=torch.float64)
    level = (TimestepSpec(shift=3.0, **options).draw(u, FINE).double() / FINE).sort().values
    ranks = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (cdf(level / (level + 3.0 * (1 - level))) - ranks).abs().max() < 1.63 / math.sqrt(4000)


def test_strata_are_equally_likely_parts_of_the_shifted_distribution() -> None:
    """The quarters of uniform levels end at 1/4, 1/2, 3/4; shifted by 3 they end at 0.5, 0.75, 0.9."""
    edges = torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    u = [keyed_uniform(0, str(position), position=position, strata=4) for position in range(40)]
    level = TimestepSpec(shift=3.0, strata=4).draw(torch.tensor(u, dtype=torch.float64), FINE) / FINE
    stratum = torch.arange(40) % 4
    assert bool((edges[stratum] <= level).all()) and bool((level < edges[stratum + 1]).all())

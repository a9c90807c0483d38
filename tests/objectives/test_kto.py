"""The KTO loss against numbers worked out by hand, and its baseline over the whole optimizer step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.kto import Plugin, Step, kto_logit, kto_loss
from tests.tiny_training import draws_of, make_batch, take
from tests.toy_denoiser import toy_batch, toy_denoiser, weight_gradient

EIGHT = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
"""Labels of eight images."""


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def alone(values: Tensor) -> Tensor:
    """Gathers from a single process."""
    return values


GOOD_AND_BAD = torch.tensor([True, False])


def test_by_hand() -> None:
    """err (0.30, 0.50), reference (0.45, 0.35), beta 10, z = 0.05; the first is desirable.

    g = (0.15, -0.15); logits 5 (0.15 - 0.05) = 0.5 and -5 (-0.15 - 0.05) = 1. Losses 1 - sigmoid(0.5) =
    0.3775407 and 1 - sigmoid(1) = 0.2689414, times lambda 2 and 3.
    """
    errors = column(0.30, 0.50), column(0.45, 0.35), GOOD_AND_BAD
    assert kto_logit(*errors, beta=10.0, baseline=0.05).tolist() == pytest.approx([0.5, 1.0], abs=1e-6)
    plain = kto_loss(*errors, beta=10.0, baseline=0.05)
    assert plain.dtype == torch.float32 and plain.tolist() == pytest.approx([0.3775407, 0.2689414], abs=1e-6)
    z = torch.tensor(0.05, dtype=torch.float64)
    weighted = kto_loss(*errors, beta=10.0, baseline=z, desirable_weight=2.0, undesirable_weight=3.0)
    assert weighted.dtype == torch.float32
    assert weighted.tolist() == pytest.approx([0.7550813, 0.8068243], abs=1e-6)


def test_the_baseline_of_a_batch() -> None:
    """g = (0.3, -0.1): z = 0.1, both 0.2 away on their own side. The mean of (0.1, -0.3) is cut to 0."""
    up = kto_logit(column(0.1, 0.5), column(0.4, 0.4), GOOD_AND_BAD, beta=10.0)
    assert up.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    down = kto_logit(column(0.3, 0.7), column(0.4, 0.4), GOOD_AND_BAD, beta=10.0)
    assert down.tolist() == pytest.approx([0.5, 1.5], abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, 2000.0, 1e6])
def test_half_of_lambda_where_policy_and_reference_agree(beta: float) -> None:
    err = column(0.1, 3.0)
    for baseline in (None, 0.0, torch.tensor(0.0, dtype=torch.float64)):
        loss = kto_loss(
            err,
            err,
            GOOD_AND_BAD,
            beta=beta,
            baseline=baseline,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        )
        assert loss.tolist() == [0.75, 0.25]


def test_the_convention_of_beta() -> None:
    """The authors' beta 1000 multiplies g - z itself: it is 2000 here, the default.

    Their loss at g - z = 1e-3 is 1 - sigmoid(1) = 0.2689414; the slope of the logit in err is -1000.
    """
    err = column(0.3).requires_grad_()
    good = torch.tensor([True])
    logit = kto_logit(err, column(0.302), good, beta=Plugin().beta, baseline=1e-3)
    logit.backward()
    assert err.grad is not None and err.grad.item() == -1000.0
    loss = kto_loss(err.detach(), column(0.302), good, beta=Plugin().beta, baseline=1e-3)
    assert loss.item() == pytest.approx(0.2689414, abs=1e-4)


def test_the_gradient_by_hand_and_under_the_other_label() -> None:
    """d loss / d err = y beta/2 sigmoid'(logit): 5 * 0.2350037 = 1.1750186 at logit 0.5; z is a constant.

    sigmoid' is even, so the other label turns the gradient round exactly.
    """
    slopes = []
    for label in (True, False):
        err = column(0.30, dtype=torch.float64).requires_grad_()
        z = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        ref_err = column(0.45, dtype=torch.float64)
        kto_loss(err, ref_err, torch.tensor([label]), beta=10.0, baseline=z).backward()
        assert err.grad is not None and z.grad is None
        slopes.append(err.grad.item())
    assert slopes[0] == pytest.approx(1.1750186, abs=1e-7) and slopes[1] == -slopes[0]
    err = column(0.30, 0.30).requires_grad_()  # z = max(0, mean g) is as constant
    kto_loss(err, column(0.45, 0.45), GOOD_AND_BAD, beta=10.0).sum().backward()
    assert err.grad is not None and err.grad.tolist() == [1.25, -1.25]


def test_far_out_the_loss_is_lambda_or_nothing_and_finite() -> None:
    err = column(1e4, 0.0).requires_grad_()
    loss = kto_loss(err, column(0.0, 1e4), torch.tensor([True, True]), beta=2000.0, baseline=0.0)
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0]
    assert err.grad is not None and err.grad.tolist() == [0.0, 0.0]


Process = Sequence[tuple[Batch, Draws]]
"""The micro-batches of one process in one optimizer step."""


def toy() -> Denoiser:
    """A policy that is not its reference, and better than it on most images of `toy_batch`."""
    return toy_denoiser(seed=1, reference=2)


def eight() -> tuple[Batch, Draws]:
    """Eight images in float64, so that their errors are too."""
    batch, draws = toy_batch(EIGHT, images_a_group=1)
    batch = dataclasses.replace(batch, latents=batch.latents.double())
    return batch, Draws(draws.t, draws.noise.double())


def split(*sizes: Sequence[int]) -> list[Process]:
    """Eight images over processes and micro-batches: `split([8])`, `split([4], [4])`, `split([1] * 8)`."""
    batch, draws = eight()
    processes, first = [], 0
    for each in sizes:
        micro = []
        for size in each:
            micro.append(take(batch, draws, range(first, first + size)))
            first += size
        processes.append(micro)
    assert first == 8
    return processes


def prepare_all(plugins: Sequence[Plugin], denoiser: Denoiser, processes: Sequence[Process]) -> list[Step]:
    """What `prepare` returns in each process, when all of them gather what each of them gives."""
    given: list[Tensor] = []

    def listen(values: Tensor) -> Tensor:
        given.append(values)
        return values

    for plugin, micro in zip(plugins, processes, strict=True):
        copy.deepcopy(plugin).prepare(denoiser, micro, listen)
    assert len(given) == len(processes)
    return [
        plugin.prepare(denoiser, micro, lambda values: torch.cat(given))
        for plugin, micro in zip(plugins, processes, strict=True)
    ]


def one_step(
    plugins: Sequence[Plugin], processes: Sequence[Process], denoiser: Denoiser
) -> tuple[Tensor, float]:
    """The gradient of the mean loss, summed over the processes as the loop does it, and the baseline."""
    steps = prepare_all(plugins, denoiser, processes)
    for plugin, step, micro in zip(plugins, steps, processes, strict=True):
        for batch, draws in micro:
            output = plugin.compute(denoiser, batch, draws, step)
            assert output.loss.dtype == step.baseline.dtype == torch.float64
            plugin.backward(output, 1.0 / 8.0, torch.Tensor.backward)
    baselines = {float(step.baseline) for step in steps}
    assert len(baselines) == 1
    return weight_gradient(denoiser), baselines.pop()


@pytest.mark.parametrize("baseline", ["batch", "ema"])
@pytest.mark.parametrize(
    "sizes", [([4], [4]), ([1] * 8,), ([1] * 4, [1] * 4), ([3, 1], [2, 1, 1]), ([5], [3])], ids=str
)
def test_the_step_does_not_depend_on_how_it_is_cut(baseline: Any, sizes: tuple[Sequence[int], ...]) -> None:
    """8 images at once, by 2 processes, by accumulation, unevenly by both: equal gradients in float64."""
    options: dict[str, Any] = {"beta": 4.0, "baseline": baseline, "ema_decay": 0.5}
    denoiser = toy()
    whole, z = one_step([Plugin(**options)], split([8]), denoiser)
    assert z > 0.01 and whole.abs().max() > 0.01
    parts, z_parts = one_step([Plugin(**options) for _ in sizes], split(*sizes), denoiser)
    assert z_parts == pytest.approx(z, abs=1e-12)
    torch.testing.assert_close(parts, whole, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("sizes", [([8],), ([4], [4]), ([1] * 8,)], ids=str)
def test_the_gradient_of_a_step_is_that_of_the_formula(sizes: tuple[Sequence[int], ...]) -> None:
    """mean of 1 - sigmoid(y beta/2 (g - z)) over eight images, z = max(0, mean g), written out here.

    In float32 throughout, the gradient would be 3e-8 away.
    """
    denoiser, (batch, draws) = toy(), eight()
    x_t = denoiser.process.add_noise(batch.latents, draws.noise, draws.t).flatten(1)
    weight = denoiser.trainable_parameters()[0].detach().clone().requires_grad_()
    with denoiser.policy("reference"):
        ref_err = (denoiser.predict(x_t, draws.t, batch.cond) - draws.noise.flatten(1)).square().mean(1)
    gain = ref_err - (x_t @ weight - draws.noise.flatten(1)).square().mean(1)
    z = max(0.0, gain.mean().item())
    sign = 2.0 * torch.tensor(EIGHT, dtype=torch.float64) - 1.0
    (1.0 - torch.sigmoid(sign * 2.0 * (gain - z))).mean().backward()
    found, baseline = one_step([Plugin(beta=4.0) for _ in sizes], split(*sizes), denoiser)
    assert baseline == pytest.approx(z, abs=1e-12) and z > 0.01
    assert weight.grad is not None
    torch.testing.assert_close(found, weight.grad, rtol=0.0, atol=1e-12)


def test_a_baseline_of_each_micro_batch_would_be_another_loss() -> None:
    """With z of a single image, g - z is 0 for every g above 0: the loss is lambda/2 whatever the policy."""
    denoiser, plugin = toy(), Plugin(beta=4.0)
    micro = split([1] * 8)[0]
    shared = plugin.prepare(denoiser, micro, alone)
    own = torch.cat([plugin.compute(denoiser, *each).loss for each in micro]).detach()
    whole = torch.cat([plugin.compute(denoiser, *each, shared).loss for each in micro]).detach()
    gain = torch.cat([plugin.compute(denoiser, *each).logs["gain"] for each in micro])
    assert int((gain > 0).sum()) >= 4
    assert own[gain > 0].tolist() == [0.5] * int((gain > 0).sum())
    assert float((whole - own).abs().max()) > 0.05
    assert float(shared.baseline) == pytest.approx(gain.double().mean().item(), abs=1e-12)


def test_a_batch_of_two_equals_two_singles_under_one_baseline() -> None:
    """Losses and logs, bit for bit; the baseline that is logged is the one that was given."""
    denoiser, plugin = toy(), Plugin(beta=4.0, desirable_weight=1.5, undesirable_weight=0.5)
    whole, singles = split([8])[0], split([1] * 8)[0]
    given = Step(torch.tensor(0.125, dtype=torch.float64), {})
    together = plugin.compute(denoiser, *whole[0], given)
    apart = [plugin.compute(denoiser, *each, given) for each in singles]
    assert torch.equal(together.loss, torch.cat([output.loss for output in apart]))
    assert list(together.logs) == [
        "t",
        "margin",
        "target",
        "gain",
        "signed_gain",
        "desirable",
        "baseline",
    ]
    for name, values in together.logs.items():
        assert torch.equal(values, torch.cat([output.logs[name] for output in apart])), name
        assert values.shape == (8,) and not values.requires_grad
    logs = together.logs
    assert logs["desirable"].tolist() == EIGHT and logs["baseline"].tolist() == [0.125] * 8
    sign = 2.0 * logs["desirable"] - 1.0
    assert torch.equal(logs["signed_gain"], sign * logs["gain"])
    assert torch.equal(logs["margin"], sign * 2.0 * (logs["gain"] - 0.125))
    weight = 1.0 + 0.5 * sign
    torch.testing.assert_close(together.loss.detach(), weight * torch.sigmoid(-logs["margin"]))


def test_the_moving_average_by_hand_and_through_a_checkpoint() -> None:
    """m <- m + (1 - d) (mean g - m) from 0, z = max(0, m), with d = 0.75 and the same mean g each step:

    1/4, 7/16 and 37/64 of it. A run that goes on from a checkpoint has the same third step.
    """
    denoiser, micro = toy(), split([8])[0]
    mean = float(Plugin().prepare(denoiser, micro, alone).baseline)
    plugin = Plugin(baseline="ema", ema_decay=0.75)
    assert plugin.state_dict() == {"mean_gain": 0.0}
    seen = [float(plugin.prepare(denoiser, micro, alone).baseline) for _ in range(2)]
    resumed = Plugin(baseline="ema", ema_decay=0.75)
    resumed.load_state_dict(copy.deepcopy(plugin.state_dict()))
    seen.append(float(plugin.prepare(denoiser, micro, alone).baseline))
    assert seen == pytest.approx([mean / 4.0, mean * 7.0 / 16.0, mean * 37.0 / 64.0], rel=1e-12)
    assert float(resumed.prepare(denoiser, micro, alone).baseline) == seen[-1]
    assert resumed.state_dict() == plugin.state_dict() and resumed == plugin


def test_a_mean_below_zero_gives_no_baseline_and_is_remembered() -> None:
    """Policy and reference change places: mean g < 0 and z = 0; the average is kept as it is, not cut."""
    denoiser, micro = toy_denoiser(seed=2, reference=1), split([8])[0]
    plugin = Plugin(baseline="ema", ema_decay=0.5)
    assert float(plugin.prepare(denoiser, micro, alone).baseline) == 0.0
    assert plugin.state_dict()["mean_gain"] < -0.01
    assert float(Plugin().prepare(denoiser, micro, alone).baseline) == 0.0


def test_the_reference_runs_once_a_step_and_no_gradient_is_left() -> None:
    """`prepare` asks both policies, `compute` the trained one; other draws of the batch are not mixed up."""
    denoiser, plugin = toy(), Plugin(beta=4.0)
    asked: list[bool] = []
    call = denoiser.call

    def counted(network: Any, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        asked.append(network is denoiser.network)
        return call(network, x_t, t, cond)

    denoiser.call = counted
    batch, draws = split([8])[0][0]
    shared = plugin.prepare(denoiser, [(batch, draws)], alone)
    assert asked == [False, True] and denoiser.trainable_parameters()[0].grad is None
    kept = plugin.compute(denoiser, batch, draws, shared).loss
    assert asked == [False, True, True]
    asked_anew = plugin.compute(denoiser, batch, Draws(draws.t, draws.noise), shared).loss
    assert asked == [False, True, True, False, True]
    assert torch.equal(kept, asked_anew) and kept.requires_grad
    other = Draws(draws.t, -draws.noise)
    once_more = plugin.compute(denoiser, batch, other, Step(shared.baseline, {})).loss
    assert torch.equal(plugin.compute(denoiser, batch, other, shared).loss, once_more)
    assert not torch.equal(once_more, kept)


def test_an_image_that_is_not_finite_spoils_its_own_loss_only() -> None:
    denoiser, plugin = toy(), Plugin(beta=4.0)
    micro = split([1] * 8)[0]
    micro[3][0].latents.fill_(math.nan)
    shared = plugin.prepare(denoiser, micro, alone)
    losses = torch.cat([plugin.compute(denoiser, *each, shared).loss for each in micro])
    assert losses.isfinite().tolist() == [number != 3 for number in range(8)]
    only = plugin.prepare(denoiser, [micro[3]], alone)
    assert float(only.baseline) == 0.0


@pytest.mark.parametrize("target", [[1.0, 0.0], [0.0, 1.0]])
def test_one_step_sets_the_desirable_image_apart(target: list[float]) -> None:
    """From policy = reference: both losses are exactly 1/2, and the other labels turn the gradient round."""
    denoiser, plugin = toy_denoiser(reference="same"), Plugin()
    batch, draws = toy_batch(target, images_a_group=1)

    def outputs() -> Any:
        return plugin.compute(denoiser, batch, draws, plugin.prepare(denoiser, [(batch, draws)], alone))

    before = outputs()
    assert before.loss.tolist() == [0.5, 0.5] and before.logs["gain"].tolist() == [0.0, 0.0]
    plugin.backward(before, 0.5, torch.Tensor.backward)
    gradient = weight_gradient(denoiser)
    flipped, _ = toy_batch([1.0 - value for value in target], images_a_group=1)
    plugin.backward(plugin.compute(denoiser, flipped, draws), 0.5, torch.Tensor.backward)
    assert torch.equal(weight_gradient(denoiser), -gradient)
    with torch.no_grad():
        denoiser.trainable_parameters()[0].sub_(1e-4 / gradient.norm() * gradient)
    after = outputs()
    assert after.logs["signed_gain"].mean() > 1e-6
    assert after.loss.sum() < before.loss.sum()


def test_half_of_lambda_on_a_fresh_adapter(tiny_sdxl: str) -> None:
    """Exactly so, also with dropout: a fresh adapter adds 0."""
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2, dropout=0.5), seed=0, with_reference=True)
    batch = make_batch(model, unit="single", target=torch.tensor([1.0, 0.0, 0.0, 1.0]))
    draws, plugin = draws_of(batch), Plugin(desirable_weight=1.5, undesirable_weight=0.25)
    shared = plugin.prepare(model.denoiser, [(batch, draws)], alone)
    output = plugin.compute(model.denoiser, batch, draws, shared)
    assert float(shared.baseline) == 0.0 and output.logs["margin"].tolist() == [0.0] * 4
    assert output.loss.tolist() == [0.75, 0.125, 0.125, 0.75]


def test_what_it_is() -> None:
    assert Plugin.unit == "single" and Plugin.undesirable and Plugin.uses_reference
    batch, draws = toy_batch(None, images_a_group=1, groups=2)
    with pytest.raises(UserError, match=r"^KTO needs images that are labelled desirable or not: give candid"):
        Plugin().compute(toy(), batch, draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "objective.beta is 0.0: use a value above 0"),
        ({"beta": math.nan}, "objective.beta is nan: use a value above 0"),
        ({"beta": math.inf}, "objective.beta is inf: use a value above 0"),
        ({"desirable_weight": 0.0}, "objective.desirable_weight is 0.0: use a value above 0"),
        ({"undesirable_weight": -1.0}, "objective.undesirable_weight is -1.0: use a value above 0"),
        ({"baseline": "eam"}, "unknown objective.baseline 'eam': did you mean 'ema'? known: batch, ema"),
        ({"ema_decay": 1.0}, "objective.ema_decay is 1.0: use a value in [0, 1)"),
        ({"ema_decay": math.nan}, "objective.ema_decay is nan: use a value in [0, 1)"),
        ({"error_space": "esp"}, "unknown objective.error_space 'esp': known: epsilon, native, x0"),
    ],
)
def test_bad_settings_are_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Plugin(**settings)
    assert str(caught.value) == message

"""SmPO: the smoothed preference, its loss and the plug-in around them, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.inversion import implied_noise
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.diffusion.process import Process
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.objectives.diffusion_dpo import diffusion_dpo_loss
from diffalign.objectives.smpo import Plugin, noise_statistics, smoothed_preference, smpo_loss
from tests.objectives.smpo_toy import DDPM, FLOW, PICKSCORE, column, plugin, toy, toy_batch
from tests.tiny_training import draws_of, make_batch, perturb

WAYS = [("none", "train"), ("ddim", "reference"), ("renoise", "train"), ("renoise", "reference")]
PROCESSES = [pytest.param(DDPM, id="ddpm"), pytest.param(FLOW, id="flow")]


ERRORS = column(0.30), column(0.50), column(0.45), column(0.35)
"""m = 1.5 at beta 10: see test_diffusion_dpo.py."""


def preference_of(first: Tensor, second: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return smoothed_preference(first, second, reward_min=low, reward_max=high)


def test_smoothed_preference_by_hand() -> None:
    """Rewards 8 and 4 in [2, 10] scale to 3/4 and 1/4: P = e^0.75 / (e^0.75 + e^0.25) = 1 / (1 + e^-0.5) =
    0.6224593. Over the whole range P = e / (e + 1) = 0.7310586, the largest there is within it; equal: 1/2.
    """
    first, second = column(8, 10, 5, 4), column(4, 2, 5, 8)
    found = preference_of(first, second, 2.0, 10.0)
    assert found.tolist() == pytest.approx([0.6224593, 0.7310586, 0.5, 1 - 0.6224593], abs=1e-6)
    assert found[2].item() == 0.5


def test_the_multiplier_of_beta() -> None:
    """gamma (2P - 1) = 10 tanh(difference / (2 range)) at the published range, from a tenth of a PickScore
    point (x100) to the whole range; read off as the loss's slope in err_w, which is beta/4 times it at m = 0.
    """
    differences = column(0.002, 0.005, 0.01, 0.02, 0.0333, 0.05, 0.28201571106910706 - 0.11543526500463486)
    preference = smoothed_preference(0.12 + differences, column(*[0.12] * 7), **PICKSCORE)
    err_w = torch.zeros(7, requires_grad=True)
    zero = torch.zeros(7)
    smpo_loss(err_w, zero, zero, zero, preference, beta=4.0).sum().backward()
    assert err_w.grad is not None
    assert err_w.grad.tolist() == pytest.approx([0.06, 0.15, 0.30, 0.60, 1.00, 1.49, 4.62], abs=0.005)


def test_loss_by_hand() -> None:
    """m = 1.5 and P = 0.6, gamma 10: multiplier 10 * 0.2 = 2, loss ln(1 + e^-3) = 0.0485874.

    Its slope in err_w is beta/2 * 2 * sigma(-3) = 10 * 0.0474259 = 0.474259. With P = 0.4 the second image
    wins: multiplier -2, loss ln(1 + e^3) = 3.0485874, slope -10 * sigma(3) = -9.525741.
    """
    for preference, expected, slope in ((0.6, 0.0485874, 0.474259), (0.4, 3.0485874, -9.525741)):
        err_w = column(0.30).requires_grad_()
        loss = smpo_loss(err_w, *ERRORS[1:], column(preference), beta=10.0)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert err_w.grad is not None and err_w.grad.item() == pytest.approx(slope, abs=1e-4)


def test_gamma_2_and_p_three_quarters_is_diffusion_dpo_bit_for_bit() -> None:
    """The multiplier 2 * (2 * 0.75 - 1) is exactly 1; losses and gradients, two betas, two dtypes."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        errors = [torch.rand(300, generator=generator, dtype=dtype).requires_grad_() for _ in range(4)]
        for beta in (9.0, 5000.0):
            ours = smpo_loss(*errors, torch.full((300,), 0.75), beta=beta, gamma=2.0)
            theirs = diffusion_dpo_loss(*errors, beta=beta)
            assert ours.dtype == dtype and torch.equal(ours, theirs)
            gradients = [torch.autograd.grad(loss.sum(), errors) for loss in (ours, theirs)]
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("beta", [1.0, 5000.0, 1e6])
def test_log_2_where_policy_and_reference_agree(beta: float) -> None:
    err_w, err_l = column(0.1, 0.7, 3.0), column(0.2, 0.6, 1e-4)
    loss = smpo_loss(err_w, err_l, err_w, err_l, column(0.3, 0.5, 0.9), beta=beta)
    assert torch.equal(loss, torch.full((3,), math.log(2.0)))


def test_swapping_the_images_changes_nothing_and_swapping_the_rewards_turns_the_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b, ref_a, ref_b, first, second = (
        torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(6)
    )
    preference, swapped = preference_of(first, second), preference_of(second, first)
    assert torch.allclose(preference + swapped, torch.ones_like(preference), atol=1e-15)
    loss = smpo_loss(a, b, ref_a, ref_b, preference, beta=9.0)
    assert torch.allclose(smpo_loss(b, a, ref_b, ref_a, swapped, beta=9.0), loss, atol=1e-14)
    err = a.clone().requires_grad_()  # at theta = reference, so that the sigmoid is 1/2 both times
    slopes = [
        torch.autograd.grad(smpo_loss(err, b, a, b, p, beta=9.0).sum(), err)[0] for p in (preference, swapped)
    ]
    assert torch.allclose(slopes[0], -slopes[1], atol=1e-14) and bool((slopes[0] != 0).all())


def test_equal_scores_have_no_gradient() -> None:
    err_w = column(0.30).requires_grad_()
    loss = smpo_loss(err_w, *ERRORS[1:], column(0.5), beta=5000.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2.0)) and err_w.grad is not None and err_w.grad.item() == 0.0


def test_a_range_that_is_none_is_refused() -> None:
    for low, high in ((0.3, 0.3), (0.4, 0.3), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(UserError, match=rf"rewards from {low} to {high} are no range"):
            preference_of(column(1.0), column(0.0), low, high)


def moved(denoiser: Denoiser) -> Denoiser:
    """The same with a policy that has left its reference."""
    with torch.no_grad():
        denoiser.network.scale += 0.2  # type: ignore[operator]
        denoiser.network.shift += torch.linspace(-0.3, 0.5, 6).reshape(2, 3)  # type: ignore[operator]
    return denoiser


def gradient(objective: Plugin, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
    loss = objective.compute(denoiser, batch, draws).loss.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, denoiser.trainable_parameters())])


def test_without_inversion_the_plugin_is_diffusion_dpo_bit_for_bit() -> None:
    """Rewards 100 ranges apart, P = 1 exactly on any machine, gamma 1: the multiplier is 1. Logs and all."""
    batch, draws = toy_batch([100.0, 0.0] * 2, [1.0, 1.0], [3, 12])
    ours = plugin(gamma=1.0, inversion="none", beta=5000.0).compute(moved(toy()), batch, draws)
    theirs = DPO(beta=5000.0).compute(moved(toy()), batch, draws)
    assert torch.equal(ours.loss, theirs.loss) and bool((ours.loss != math.log(2.0)).all())
    assert ours.logs.pop("beta_multiplier").tolist() == [1.0, 1.0]
    assert ours.logs.keys() == theirs.logs.keys()
    assert all(torch.equal(values, theirs.logs[name]) for name, values in ours.logs.items())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("inversion", "inverter"), WAYS)
def test_step_zero_is_log_2(inversion: Any, inverter: Any, process: Process) -> None:
    denoiser = toy(process=process)
    batch, draws = toy_batch([0.2, 0.9, 0.8, 0.1], [1.0, 0.0], [0, 19])
    output = plugin(inversion=inversion, inverter=inverter, beta=5000.0).compute(denoiser, batch, draws)
    assert torch.equal(output.loss, torch.full((2,), math.log(2.0)))
    assert output.logs["margin"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("inverter", ["train", "reference"])
def test_the_images_are_compared_under_the_noise_that_the_inverter_implies(
    inverter: Any, process: Process
) -> None:
    """Put together again from its parts; policy and reference imply different noises by now."""
    denoiser = moved(toy(dropout=0.5, process=process))
    batch, draws = toy_batch([0.2, 0.9, 0.8, 0.1], None, [5, 14])
    noises = {}
    for name in ("train", "reference"):
        with denoiser.policy(name):
            noises[name], forwards = implied_noise(denoiser, batch.latents, batch.cond, draws.t, steps=4)
    assert not torch.allclose(noises["train"], noises["reference"], atol=1e-2)
    torch.manual_seed(0)
    output = plugin(inverter=inverter).compute(denoiser, batch, draws)
    torch.manual_seed(0)  # inversion takes no random number: the dropout of the training pass is the same
    under = Draws(draws.t, noises[inverter])
    terms = denoising_terms(denoiser, batch.latents, batch.cond, under, reference=True)
    assert terms.ref_err is not None
    errors = (terms.err[0::2], terms.err[1::2], terms.ref_err[0::2], terms.ref_err[1::2])
    preference = preference_of(column(0.2, 0.8), column(0.9, 0.1))
    assert torch.equal(output.loss, smpo_loss(*errors, preference, beta=20.0))
    assert forwards.tolist() == [4, 4, 6, 6]  # levels 4, 9, 14, 19, each twice
    assert output.logs["inversion_forwards"].tolist() == [4.0, 6.0]
    expected = noise_statistics(noises[inverter], batch.latents)
    for name in ("noise_mean", "noise_std", "noise_x0_corr"):
        assert torch.allclose(output.logs[name], expected[name].reshape(2, 2).mean(1), atol=1e-6)
        assert not output.logs[name].requires_grad
    assert denoiser.network.training and output.loss.requires_grad


def test_ddim_asks_half_as_often_and_the_own_grid_asks_always_alike() -> None:
    batch, draws = toy_batch([0.2, 0.9, 0.8, 0.1], None, [5, 14])
    for options, expected in (
        ({"inversion": "ddim"}, [2.0, 3.0]),
        ({"inversion_grid": "own"}, [8.0, 8.0]),
    ):
        logs = plugin(**options).compute(toy(), batch, draws).logs
        assert logs["inversion_forwards"].tolist() == expected
    assert "noise_std" not in plugin(inversion="none").compute(toy(), batch, draws).logs


def test_noise_statistics_by_hand() -> None:
    """x0 = (0, 2), noise (1, 4): mean 2.5, std 1.5, both rise: correlation 1; turned: -1; flat x0: 0."""
    noise = column(1, 4).expand(3, 2)
    found = noise_statistics(noise, torch.tensor([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]]))
    assert found["noise_mean"].tolist() == [2.5] * 3 and found["noise_std"].tolist() == [1.5] * 3
    assert found["noise_x0_corr"].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("inversion", "inverter"), WAYS)
@pytest.mark.parametrize("order", ["reward", "label"])
def test_one_step_raises_the_winner_relative_to_the_loser(
    order: Any, inversion: Any, inverter: Any, process: Process
) -> None:
    """The winner is the second image, by reward and by label; margins are measured under fixed noises."""
    denoiser = toy(process=process)
    batch, draws = toy_batch([0.2, 0.9], [0.0], [8])
    objective = plugin(order=order, inversion=inversion, inverter=inverter)
    fixed = plugin(order=order, inversion="none")
    step = gradient(objective, denoiser, batch, draws)
    corrections = {"none": 0, "ddim": 0, "renoise": 1}[inversion]
    noise, _ = implied_noise(denoiser, batch.latents, batch.cond, draws.t, steps=4, corrections=corrections)
    under = draws if inversion == "none" else Draws(draws.t, noise)
    before = fixed.compute(denoiser, batch, under)
    with torch.no_grad():
        for parameter, change in zip(denoiser.trainable_parameters(), step.split([1, 6]), strict=True):
            parameter -= 1e-3 * change.reshape(parameter.shape)
    after = fixed.compute(denoiser, batch, under)
    assert before.logs["margin"].item() == 0.0 and after.logs["margin"].item() > 0.0
    assert after.loss.item() < before.loss.item()
    logs = after.logs
    gain = (logs["ref_err_w"] - logs["err_w"]) - (logs["ref_err_l"] - logs["err_l"])
    assert gain.item() > 0.0 and logs["ref_err_w"].item() != logs["ref_err_l"].item()


def test_what_decides_the_winner() -> None:
    """By reward the labels do not matter and swapped scores turn the gradient round; by label the reverse."""
    denoiser = toy()
    slopes: dict[tuple[str, str], Tensor] = {}
    for order in ("reward", "label"):
        for scores, rewards in (("high", [0.9, 0.2]), ("low", [0.2, 0.9])):
            for label in (1.0, 0.0):
                batch, draws = toy_batch(rewards, [label], [8])
                slopes[order, f"{scores} {label:g}"] = gradient(plugin(order=order), denoiser, batch, draws)
    straight = slopes["reward", "high 1"]
    assert bool((straight != 0).any())
    for by_reward, by_label, sign in (
        ("high 1", "high 1", 1.0),
        ("high 0", "low 1", 1.0),
        ("low 1", "high 0", -1.0),
        ("low 0", "low 0", -1.0),
    ):
        assert torch.allclose(slopes["reward", by_reward], sign * straight, atol=1e-6)
        assert torch.allclose(slopes["label", by_label], sign * straight, atol=1e-6)


def test_the_logs_call_the_winner_w() -> None:
    """Second pair: the second image has the higher score; third: equal scores teach nothing.

    -logsigmoid(margin) of the logs is the loss, and the target 1 (1/2 without a winner).
    """
    batch, draws = toy_batch([0.9, 0.2, 0.1, 0.5, 0.3, 0.3], [0.0, 0.0, 1.0], [8, 8, 8])
    output = plugin().compute(moved(toy()), batch, draws)
    logs = output.logs
    assert logs["target"].tolist() == [1.0, 1.0, 0.5] and logs["t"].tolist() == [8, 8, 8]
    assert torch.allclose(-torch.nn.functional.logsigmoid(logs["margin"]), output.loss, atol=1e-6)
    multiplier = [10 * math.tanh(0.35), 10 * math.tanh(0.2), 0.0]
    assert logs["beta_multiplier"].tolist() == pytest.approx(multiplier, abs=1e-5)
    gain = (logs["ref_err_w"] - logs["err_w"]) - (logs["ref_err_l"] - logs["err_l"])
    assert torch.allclose(logs["margin"], logs["beta_multiplier"] * 10.0 * gain, atol=1e-4)


def test_a_batch_of_two_equals_two_singles() -> None:
    """With timesteps of which one arrives earlier."""
    batch, draws = toy_batch([0.9, 0.2, 0.1, 0.5], [1.0, 1.0], [2, 17])
    denoiser = moved(toy())
    together = plugin().compute(denoiser, batch, draws).loss
    for pair in (0, 1):
        rows = slice(2 * pair, 2 * pair + 2)
        single = replace(
            batch,
            ids=batch.ids[pair : pair + 1],
            latents=batch.latents[rows],
            cond=batch.cond.rows(rows),
            counts=batch.counts[:1],
            ratings={"pickscore": batch.ratings["pickscore"][rows]},
        )
        alone = plugin().compute(denoiser, single, Draws(draws.t[rows], draws.noise[rows])).loss
        assert alone.item() == pytest.approx(together[pair].item(), rel=1e-6)


@pytest.mark.parametrize("inverter", ["train", "reference"])
def test_a_unet_in_bf16_starts_at_log_2_and_every_parameter_learns(tiny_sdxl: str, inverter: Any) -> None:
    """Under autocast, after passes without gradient, the gradient of the adapter is still there.

    At the start B is 0, so that A, which is read through B only, has a gradient of 0; once B is not, both do.
    """
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2, dropout=0.3), seed=0, with_reference=True)
    batch = make_batch(model, groups=2)
    batch.ratings["pickscore"] = column(0.9, 0.2, 0.4, 0.6)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == len(model.denoiser.trainable_parameters()) > 0

    def with_gradient() -> tuple[Any, set[str]]:
        model.network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = plugin(inverter=inverter, beta=5000.0).compute(model.denoiser, batch, draws_of(batch))
        output.loss.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
        return output, {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}

    output, reached = with_gradient()
    assert torch.equal(output.loss, torch.full((2,), math.log(2.0)))
    assert bool((output.logs["noise_std"] > 0).all())
    assert reached == {name for name in trained if ".lora_B." in name}
    perturb(list(trained.values()), 1e-3)
    output, reached = with_gradient()
    assert reached == set(trained) and bool((output.loss != math.log(2.0)).all())

"""The safeguard by hand, against autograd, and what it does to one step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch, first_and_second
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.diffusion.process import Process
from diffalign.objectives._stabilise import safeguard_lambda, scale_gradient
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.objectives.diffusion_dpo import diffusion_dpo_loss, diffusion_dpo_pull
from diffalign.objectives.dragon import Plugin as Dragon
from diffalign.objectives.smpo import Plugin as SmPO
from diffalign.objectives.smpo import smoothed_preference, smpo_loss
from tests.objectives.stabilise_toy import BETA, PLAIN_SMPO, TARGETS, far_off, gradient, pairs
from tests.tiny_training import take
from tests.toy_denoiser import toy_denoiser


@pytest.mark.parametrize(
    ("loser", "mu", "expected"),
    [
        ((2.0, 1.0), 0.0, 0.5),  # |g_w|^2 = 1, product 2: 1/2
        ((2.0, 1.0), 0.6, 0.2),  # 0.4 / 2
        ((2.0, 1.0), 1.0, 0.0),
        ((0.5, 9.0), 0.6, 0.8),  # 0.4 / 0.5
        ((0.5, 9.0), 0.0, 1.0),  # 2, cut
        ((-1.0, 3.0), 0.6, 1.0),  # against one another: the loser's ascent lowers the winner's error
        ((0.0, 5.0), 1.0, 1.0),
    ],
)
def test_lambda_by_hand(loser: tuple[float, float], mu: float, expected: float) -> None:
    """Winner (1, 0); alone, and beside another pair, which it does not see."""
    winner, other = torch.tensor([[1.0, 0.0]]), torch.tensor(loser)[None]
    assert safeguard_lambda(winner, other, mu=mu).tolist() == pytest.approx([expected])
    both = safeguard_lambda(torch.cat([other, winner]), torch.cat([other, other]), mu=mu)
    assert both.tolist() == pytest.approx([1.0 - mu, expected])


def test_a_winner_without_error_needs_no_safeguard() -> None:
    assert safeguard_lambda(torch.zeros(1, 2), torch.ones(1, 2), mu=0.6).tolist() == [1.0]


def test_a_scaled_gradient_leaves_the_value_alone() -> None:
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 9
    values.requires_grad_()
    factor = torch.linspace(0.0, 1.0, 1000, dtype=torch.float64)
    scaled = scale_gradient(values, factor)
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, factor)


class Offset(nn.Module):
    """Answers a constant of each image plus an offset that all images share."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, constant: Tensor) -> Tensor:
        return constant + self.shift


def one_pair(winner: tuple[float, float], loser: tuple[float, float], first: bool) -> tuple[Any, ...]:
    """A policy that equals its reference and a pair with these residuals; `first`: the winner comes first."""
    network = Offset()
    process = Process(torch.tensor([0.8]).double(), torch.tensor([0.6]).double(), "epsilon")
    denoiser = Denoiser(
        network,
        process,
        lambda module, x_t, t, cond: module(cond["constant"]),
        {"reference": FrozenCopy(copy.deepcopy(network).requires_grad_(False))},
    )
    noise = torch.tensor([[0.3, -0.7]], dtype=torch.float64).repeat(2, 1)
    sides = [winner, loser] if first else [loser, winner]
    batch = Batch(
        ids=["pair"],
        epoch=0,
        positions=torch.zeros(1, dtype=torch.int64),
        latents=torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64),
        cond=Conditioning({"constant": noise + torch.tensor(sides, dtype=torch.float64)}),
        counts=torch.tensor([2]),
        target=torch.tensor([1.0 if first else 0.0]),
        ratings={"pickscore": torch.tensor([0.9, 0.2] if first else [0.2, 0.9])},
    )
    return denoiser, batch, Draws(torch.zeros(2, dtype=torch.int64), noise)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "make", [DPO, Dragon, lambda **options: SmPO(**PLAIN_SMPO, **options)], ids=["dpo", "dragon", "smpo"]
)
def test_a_small_step_does_not_raise_the_winners_error(make: Any, first: bool) -> None:
    """Residuals (1, 0) and (2, 1): without a safeguard the step goes along (1, 1) and the winner's error
    rises; with mu it falls by mu of what the winner's own gradient would lower it by. The loser's error falls
    along with it, and faster: the safeguard pays with the loss, which rises.
    """
    falls, losses = {}, {}
    for mu in (None, 0.2, 0.6, 1.0):
        denoiser, batch, draws = one_pair((1.0, 0.0), (2.0, 1.0), first)
        objective = make(beta=BETA, safeguard=mu)
        before = denoising_terms(denoiser, batch.latents, batch.cond, draws, reference=False).err
        output = objective.compute(denoiser, batch, draws)
        objective.backward(output, 1.0, torch.Tensor.backward)
        with torch.no_grad():
            denoiser.network.shift -= 1e-6 * denoiser.network.shift.grad
        after = objective.compute(denoiser, batch, draws)
        err = denoising_terms(denoiser, batch.latents, batch.cond, draws, reference=False).err
        losses[mu] = (after.loss - output.loss).item()
        falls[mu] = (before - err)[0 if first else 1].item()
        if mu is not None:
            rise = after.logs["winner_rise"].item()
            assert rise == pytest.approx(-falls[mu], rel=1e-6) and after.logs["winner_rises"].item() == 0.0
            assert output.logs["safeguard_lambda"].item() == pytest.approx((1.0 - mu) / 2.0)
            assert output.logs["safeguarded"].item() == 1.0
    # (1, 0) . (1 - 2 lambda, -lambda): 1 - 2 = -1 without, mu with.
    assert falls[None] == pytest.approx(-falls[1.0], rel=1e-3) and falls[None] < 0
    assert falls[0.2] == pytest.approx(0.2 * falls[1.0], rel=1e-3)
    assert falls[0.6] == pytest.approx(0.6 * falls[1.0], rel=1e-3)
    assert losses[None] < 0 < losses[0.6]


def brute_force(denoiser: Denoiser, batch: Batch, draws: Draws, mu: float, loss_of: Any) -> Tensor:
    """Pair by pair: the errors' gradients by the matrix, the loser's times lambda of those by the outputs."""
    weight = denoiser.network.weight
    x_t = denoiser.process.add_noise(batch.latents, draws.noise, draws.t)
    target = denoiser.process.target(batch.latents, draws.noise, draws.t)
    with torch.no_grad(), denoiser.policy("reference"):
        ref_err = (denoiser.predict(x_t, draws.t, batch.cond) - target).square().flatten(1).mean(1)
    total = torch.zeros_like(weight)
    for pair in range(batch.num_groups):
        rows = slice(2 * pair, 2 * pair + 2)
        outputs = denoiser.predict(x_t[rows], draws.t[rows], batch.cond.rows(torch.arange(2)))
        errors = (outputs - target[rows]).square().flatten(1).mean(1)
        by_output = [torch.autograd.grad(e, outputs, retain_graph=True)[0][i] for i, e in enumerate(errors)]
        by_weight = [torch.autograd.grad(e, weight, retain_graph=True)[0] for e in errors]
        leaves = [e.detach().requires_grad_() for e in errors]
        slopes = torch.autograd.grad(loss_of(pair, *leaves, *ref_err[rows]), leaves)
        winner = 0 if slopes[0] > 0 else 1
        product = (by_output[0] * by_output[1]).sum()
        bound = (1.0 - mu) * by_output[winner].square().sum() / product
        factor = min(1.0, bound.item()) if product > 0 else 1.0
        total += slopes[winner] * by_weight[winner] + factor * slopes[1 - winner] * by_weight[1 - winner]
    return total


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", ["dpo", "smpo"])
def test_gradients_are_those_of_brute_force(name: str, far: bool, flow: bool) -> None:
    """In float64, over hard, soft and even targets; the loss is that without a safeguard, bit for bit."""
    batch, draws = pairs()
    assert batch.target is not None
    mu, beta = 0.6, 1.0 if far else BETA
    denoiser = far_off() if far else toy_denoiser(seed=1, reference=2)
    if flow:
        denoiser.process = Process.flow(4)

    def dpo(pair: int, *errors: Tensor) -> Tensor:
        return diffusion_dpo_loss(*errors, beta=beta, target=batch.target[pair])  # type: ignore[index]

    def smpo(pair: int, *errors: Tensor) -> Tensor:
        rewards = batch.ratings["pickscore"][2 * pair : 2 * pair + 2]
        preference = smoothed_preference(*rewards, reward_min=0.0, reward_max=1.0)
        return smpo_loss(*errors, preference, beta=beta)

    make, loss_of = (DPO, dpo) if name == "dpo" else (lambda **o: SmPO(**PLAIN_SMPO, **o), smpo)
    plain, unguarded = gradient(make(beta=beta), denoiser, batch, draws)
    guarded, output = gradient(make(beta=beta, safeguard=mu), denoiser, batch, draws)
    expected = brute_force(denoiser, batch, draws, mu, loss_of)
    assert torch.allclose(guarded, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(guarded, plain, rtol=1e-2)
    assert torch.equal(output.loss, unguarded.loss)
    shares = output.logs["safeguarded"]
    assert 0.0 < shares.mean() < 1.0 and torch.equal(shares, (output.logs["safeguard_lambda"] < 1).double())


def test_pairs_are_safeguarded_one_by_one() -> None:
    """The gradient of a batch is the sum of its pairs' own, whatever they are batched with."""
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference=2), pairs()
    objective = DPO(beta=BETA, safeguard=0.6)
    together, output = gradient(objective, denoiser, batch, draws)
    alone = [gradient(objective, denoiser, *take(batch, draws, [pair])) for pair in range(len(TARGETS))]
    assert torch.allclose(sum(one for one, _ in alone), together, rtol=1e-9, atol=1e-12)
    for name, values in output.logs.items():
        assert torch.allclose(torch.cat([one.logs[name] for _, one in alone]), values, rtol=1e-9), name


@pytest.mark.parametrize("margin", [-30.0, -0.5, 0.0, 0.5, 2.0, 60.0])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.7, 1.0, None])
def test_the_pull_is_minus_the_losss_slope(margin: float, target: float | None) -> None:
    """So also at 0.7 and m = 2, above ln(7/3), where the loss raises the error of the likelier image."""
    err = torch.tensor([-margin], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    p = None if target is None else torch.tensor([target], dtype=torch.float64)
    diffusion_dpo_loss(err, zero, zero, zero, beta=2.0, target=p).backward()  # m = -err
    assert err.grad is not None
    pull = diffusion_dpo_pull(torch.tensor([margin], dtype=torch.float64), p)
    assert pull.item() == pytest.approx(err.grad.item(), rel=1e-9, abs=1e-15)
    if (target, margin) == (0.7, 2.0):
        assert pull.item() < 0


def test_a_tie_at_the_reference_has_no_winner() -> None:
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference="same"), pairs([0.5, 1.0])
    _, output = gradient(DPO(beta=BETA, safeguard=1.0), denoiser, batch, draws)
    assert output.logs["safeguard_lambda"][0].item() == 1.0
    alone, _ = gradient(DPO(beta=BETA, safeguard=1.0), denoiser, *take(batch, draws, [0]))
    assert not alone.any()


def test_full_strength_leaves_the_winner_alone_where_the_two_agree() -> None:
    """mu = 1: lambda is 0 where the product is above 0 and 1 elsewhere, never between."""
    denoiser, (batch, draws) = far_off(), pairs([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    output = DPO(beta=1.0, safeguard=1.0).compute(denoiser, batch, draws)
    terms = denoising_terms(denoiser, batch.latents, batch.cond, draws, reference=False, keep_residual=True)
    assert terms.residual is not None and not terms.residual.requires_grad
    assert torch.equal(terms.err, terms.residual.square().flatten(1).mean(1))
    first, second = first_and_second(terms.residual)
    agree = (first * second).flatten(1).sum(1) > 0
    assert agree.any() and not agree.all()
    assert torch.equal(output.logs["safeguard_lambda"], (~agree).double())

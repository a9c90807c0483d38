"""Denoising errors, the implicit reward and the ELBO, against cases that are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from diffalign.common.conditioning import Conditioning
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import (
    Draws,
    denoising_terms,
    elbo,
    elbo_weight,
    implicit_reward,
    mean_square,
)
from diffalign.diffusion.process import Process, expand


class Constant(nn.Module):
    """A network that answers `scale * x_t + shift`."""

    def __init__(self, scale: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, x_t: Tensor) -> Tensor:
        return self.scale * x_t + self.shift


def process_of(prediction: str, *alpha_squares: float) -> Process:
    squares = torch.tensor(alpha_squares, dtype=torch.float64)
    return Process(squares.sqrt(), (1.0 - squares).sqrt(), prediction)  # type: ignore[arg-type]


def denoiser_of(
    process: Process, network: nn.Module, answer: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Denoiser:
    def call(module: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return module(x_t) if answer is None else answer(x_t, t)

    return Denoiser(network, process, call)


def cond(rows: int) -> Conditioning:
    return Conditioning({"nothing": torch.zeros(rows, 1)})


def test_terms_by_hand() -> None:
    """alpha = 0.8, sigma = 0.6, x0 = (1, 2), eps = (1, 0): x_t = (1.4, 1.6).

    A policy that answers x_t has residual x_t - eps = (0.4, 1.6), mean square (0.16 + 2.56) / 2 = 1.36; a
    reference that answers 0 has residual (-1, 0), mean square 0.5. In x0 space every residual is times -0.6 /
    0.8, so the errors are times 0.5625: 0.765 and 0.28125.
    """
    denoiser = denoiser_of(process_of("epsilon", 0.64), Constant(scale=1.0))
    denoiser.policies["reference"] = FrozenCopy(Constant())
    latents, draws = torch.tensor([[1.0, 2.0]]), Draws(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    terms = denoising_terms(denoiser, latents, cond(1), draws, reference=True)
    assert terms.err.item() == pytest.approx(1.36, abs=1e-6)
    assert terms.ref_err is not None and terms.ref_err.item() == pytest.approx(0.5, abs=1e-6)
    in_x0 = denoising_terms(denoiser, latents, cond(1), draws, reference=True, error_space="x0")
    assert in_x0.err.item() == pytest.approx(0.765, abs=1e-6)
    assert in_x0.ref_err is not None and in_x0.ref_err.item() == pytest.approx(0.28125, abs=1e-6)


def test_terms_of_a_flow_by_hand() -> None:
    """sigma = 1/4 and 1, x0 = (1, 2), eps = (1, 0), v = eps - x0 = (0, -2); policy x_t, reference 0.

    At 1/4 x_t = (1, 1.5), residual (1, 3.5), mean square 6.625; the reference's (0, 2), 2. On eps times
    (3/4)^2: 3.7265625 and 1.125; on x0 times (1/4)^2: 0.4140625 and 0.125.
    At 1 x_t = eps, residual (1, 2): 2.5, also on x0, and the noise is not in question: 0, with no gradient.
    """
    denoiser = denoiser_of(Process.flow(4), Constant(scale=1.0))
    denoiser.policies["reference"] = FrozenCopy(Constant())
    latents, noise = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[1.0, 0.0]] * 2)
    draws = Draws(torch.tensor([0, 3]), noise)
    for space, err, ref_err in (
        ("native", [6.625, 2.5], [2.0, 2.0]),
        ("epsilon", [3.7265625, 0.0], [1.125, 0.0]),
        ("x0", [0.4140625, 2.5], [0.125, 2.0]),
    ):
        terms = denoising_terms(denoiser, latents, cond(2), draws, reference=True, error_space=space)  # type: ignore[arg-type]
        assert terms.ref_err is not None
        assert terms.err.tolist() == err and terms.ref_err.tolist() == ref_err
    last = Draws(draws.t[1:], noise[1:])
    denoising_terms(
        denoiser, latents[1:], cond(1), last, reference=False, error_space="epsilon"
    ).err.backward()
    assert denoiser.network.scale.grad is not None and denoiser.network.scale.grad.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_errors_are_at_least_float32_and_as_precise_as_the_network(dtype: torch.dtype) -> None:
    denoiser = denoiser_of(process_of("epsilon", 0.64), Constant(scale=1.0).to(dtype))
    latents, noise = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[1.0, 0.0]], dtype=dtype)
    terms = denoising_terms(denoiser, latents, cond(1), Draws(torch.tensor([0]), noise), reference=False)
    assert terms.err.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        assert terms.err.item() == pytest.approx(1.36, abs=1e-12)


def test_only_the_policy_has_a_gradient() -> None:
    """d err / d shift = 2 * mean(residual) = 2 * mean(0.4, 1.6) = 2."""
    policy, frozen = Constant(scale=1.0), Constant(scale=0.5)
    denoiser = denoiser_of(process_of("epsilon", 0.64), policy)
    denoiser.policies["reference"] = FrozenCopy(frozen)  # trainable on purpose: no_grad must keep it out
    draws = Draws(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    terms = denoising_terms(denoiser, torch.tensor([[1.0, 2.0]]), cond(1), draws, reference=True)
    assert terms.ref_err is not None and not terms.ref_err.requires_grad
    terms.err.sum().backward()
    assert policy.shift.grad is not None and policy.shift.grad.item() == pytest.approx(2.0, abs=1e-5)
    assert frozen.shift.grad is None and frozen.scale.grad is None


def test_errors_are_float32_whatever_the_network_answers() -> None:
    """A half-precision answer of 1/3 is 0.33398; its error against 0 is that squared, not rounded again."""
    half = torch.tensor(1 / 3).bfloat16()
    denoiser = denoiser_of(process_of("epsilon", 0.64), Constant(), lambda x_t, t: half.expand_as(x_t))
    draws = Draws(torch.tensor([0]), torch.zeros(1, 3))
    terms = denoising_terms(denoiser, torch.ones(1, 3), cond(1), draws, reference=False)
    assert terms.err.dtype == torch.float32
    assert terms.err.item() == pytest.approx(half.item() ** 2, rel=1e-7)
    assert terms.err.item() != half.square().item()


def test_means_run_over_every_dimension_but_the_first() -> None:
    residual = torch.arange(2 * 3 * 1 * 2 * 2, dtype=torch.float64).reshape(2, 3, 1, 2, 2)
    assert mean_square(residual).tolist() == [
        sum(i * i for i in range(12)) / 12,
        sum(i * i for i in range(12, 24)) / 12,
    ]


def test_implicit_reward_by_hand() -> None:
    """beta/2 (ref_err - err) = 1000 * (0.5 - 0.4, 0.1 - 0.3) = (100, -200); mean over two draws -50."""
    err, ref_err = torch.tensor([0.4, 0.3]).double(), torch.tensor([0.5, 0.1]).double()
    assert implicit_reward(err, ref_err, beta=2000.0).tolist() == pytest.approx([100.0, -200.0])
    assert implicit_reward(err[None], ref_err[None], beta=2000.0).tolist() == pytest.approx([-50.0])


def test_elbo_by_hand() -> None:
    """alpha^2 = (0.8, 0.5, 0.2): SNR = (4, 1, 1/4), both weights are (4 - 1) / 2 = 1.5.

    A network that answers 0 leaves the residual -eps; with eps = (1, 1) the summed square is 2 and each term
    3. There are two terms (t = 1, 2): the ELBO is -6.
    """
    process = process_of("epsilon", 0.8, 0.5, 0.2)
    assert elbo_weight(process, torch.tensor([1, 2]))[0].tolist() == pytest.approx([1.5, 1.5])
    draws = [Draws(torch.tensor([t]), torch.ones(1, 2)) for t in (1, 2)]
    value = elbo(denoiser_of(process, Constant()), torch.tensor([[1.0, 3.0]]), cond(1), draws)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(-6.0, abs=1e-5)


def test_elbo_where_the_last_snr_is_zero_by_hand() -> None:
    """alpha^2 = (0.8, 0.5, 0), a v network that answers 0, x0 = (1, 3), eps = (1, 1).

    t = 2: v = -x0, so the x0 residual is -x0, summed square 10; the weight is (SNR(1) - SNR(2)) / 2 = 1/2: 5.
    t = 1: v = sqrt(1/2) (eps - x0), eps residual -(eps - x0) / 2 = (0, 1), summed square 1; the weight is
    (4 / 1 - 1) / 2: 1.5. Mean 3.25, times two terms: -6.5.
    """
    process = process_of("v_prediction", 0.8, 0.5, 0.0)
    draws = [Draws(torch.tensor([t]), torch.ones(1, 2)) for t in (1, 2)]
    denoiser = denoiser_of(process, Constant())
    value = elbo(denoiser, torch.tensor([[1.0, 3.0]]), cond(1), draws)
    assert value.item() == pytest.approx(-6.5, abs=1e-5)
    # Both timesteps in one batch: x0 space for all, and the same numbers.
    weight, space = elbo_weight(process, torch.tensor([1, 2]))
    assert space == "x0"
    assert weight.tolist() == pytest.approx([1.5, 0.5])
    together = elbo(
        denoiser, torch.tensor([[1.0, 3.0]] * 2), cond(2), [Draws(torch.tensor([1, 2]), torch.ones(2, 2))]
    )
    assert together.tolist() == pytest.approx([-3.0, -10.0], abs=1e-5)


def test_elbo_of_the_best_network_for_gaussian_data() -> None:
    """For x0 ~ N(0, 1) the best epsilon is sigma x_t; with eps = +1 and -1 its mean residual square is exact.

    residual = sigma (alpha x0 + sigma eps) - eps = alpha (sigma x0 - alpha eps), mean square over the two
    signs alpha^2 (sigma^2 x0^2 + alpha^2). The ELBO of any other answer, here 0.9 sigma x_t, is lower on
    average over the data; for x0 = +-1, which has the data's mean square, that holds exactly.
    """
    process = process_of("epsilon", 0.9, 0.7, 0.4, 0.1)

    def answering(factor: float) -> Denoiser:
        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            return factor * expand(process.alpha_sigma(t)[1], x_t).to(x_t.dtype) * x_t

        return denoiser_of(process, Constant(), answer)

    x0 = torch.tensor([[1.0], [-1.0]])
    draws = [Draws(torch.tensor([t, t]), torch.full((2, 1), sign)) for t in (1, 2, 3) for sign in (1.0, -1.0)]
    alpha_square = torch.tensor([0.7, 0.4, 0.1], dtype=torch.float64)
    snr = alpha_square / (1 - alpha_square)
    before = torch.cat([torch.tensor([9.0], dtype=torch.float64), snr[:-1]])
    expected = -((before / snr - 1) / 2 * alpha_square * ((1 - alpha_square) + alpha_square)).sum()
    best = elbo(answering(1.0), x0, cond(2), draws)
    assert best.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert elbo(answering(0.9), x0, cond(2), draws).mean() < best.mean()
    assert elbo(answering(1.1), x0, cond(2), draws).mean() < best.mean()


def posterior(process: Process, t: int, x_t: Tensor, x0: Tensor) -> Normal:
    """q(x_{t-1} | x_t, x0) of a Gaussian process, by Bayes' rule on q(x_t | x_{t-1}) and q(x_{t-1} | x0).

    x_t = (alpha_t / alpha_s) x_s + noise of variance sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, s = t - 1.
    """
    (alpha_s, alpha_t), (sigma_s, sigma_t) = (
        scale[t - 1 : t + 1] for scale in (process.alphas, process.sigmas)
    )
    slope = alpha_t / alpha_s
    step = sigma_t**2 - slope**2 * sigma_s**2
    precision = 1.0 / sigma_s**2 + slope**2 / step
    mean = (alpha_s * x0 / sigma_s**2 + slope * x_t / step) / precision
    return Normal(mean, precision.rsqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_elbo_terms_are_the_kl_divergences_of_the_steps(prediction: str) -> None:
    """Between the steps to x_{t-1} that the clean latent and the network's guess at it make, in float64.

    Of a flow at every t, at the last by itself and with others: SNR 9, 1, 1/9, 0 of four levels.
    """
    process = Process.flow(4) if prediction == "flow" else process_of("epsilon", 0.9, 0.6, 0.3, 0.1)
    network = Constant(scale=0.3, shift=0.2).double()
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([1, 2, 3])
    x_t = process.add_noise(latents, noise, t)
    guess = process.to_x0(network(x_t), x_t, t)
    terms = torch.stack(
        [
            kl_divergence(*(posterior(process, step, x_t[row], x0[row]) for x0 in (latents, guess))).sum()
            for row, step in enumerate((1, 2, 3))
        ]
    )
    denoiser = denoiser_of(process, network)
    together = elbo(denoiser, latents, cond(3), [Draws(t, noise)])
    assert torch.allclose(together, -3.0 * terms, rtol=1e-12)
    for row in range(3):
        one = slice(row, row + 1)
        value = elbo(denoiser, latents[one], cond(1), [Draws(t[one], noise[one])])
        assert value.item() == pytest.approx(-3.0 * terms[row].item(), rel=1e-12)
    spaces = [elbo_weight(process, t[row : row + 1])[1] for row in range(3)]
    assert spaces == ["epsilon", "epsilon", "x0" if prediction == "flow" else "epsilon"]


def test_elbo_has_no_term_at_zero() -> None:
    with pytest.raises(ValueError, match="t >= 1"):
        elbo_weight(process_of("epsilon", 0.8, 0.5), torch.tensor([0, 1]))


@pytest.mark.parametrize("process", [process_of("v_prediction", 0.8, 0.5, 0.2), Process.flow(3)])
def test_policy_equal_to_reference_has_equal_errors_bit_for_bit(process: Process) -> None:
    network = Constant(scale=0.3, shift=0.1)
    denoiser = denoiser_of(process, network)
    denoiser.policies["reference"] = FrozenCopy(network)
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(8, 4, 5, 5, generator=generator) for _ in range(2))
    draws = Draws(torch.randint(0, 3, (8,), generator=generator), noise)
    terms = denoising_terms(denoiser, latents, cond(8), draws, reference=True)
    assert terms.ref_err is not None and torch.equal(terms.err, terms.ref_err)

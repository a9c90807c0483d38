"""The two MaPO losses against numbers worked out by hand and against exact arithmetic."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common.config import load_recipe, make_one
from diffalign.common.errors import UserError
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.diffusion.process import Process
from diffalign.objectives.diffusion_dpo import diffusion_dpo_loss
from diffalign.objectives.mapo import FLOW_SHARE, Plugin, log_phi, mapo_logit, mapo_loss
from diffalign.stages.train import train
from tests.tiny_training import take
from tests.toy_denoiser import toy_batch, toy_denoiser, weight_gradient

LN2 = math.log(2.0)
FORMS = [{"form": "code", "beta": 0.1}, {"form": "paper", "beta": 1.0}, {"form": "paper", "beta": 1024.0}]


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def exact_phi(x: float) -> tuple[Decimal, Decimal]:
    """phi(x) and phi'(x) = (e^x - 1 - x e^x) / (e^x - 1)^2 in 80 digits."""
    with localcontext() as context:
        context.prec = 80
        number = Decimal(x)
        grown = number.exp()
        return number / (grown - 1), (grown - 1 - number * grown) / (grown - 1) ** 2


def relative(value: float, exact: Decimal) -> float:
    return float(abs((Decimal(value) - exact) / exact))


def test_the_code_by_hand() -> None:
    """s = 1/2 and errors 2 ln 2 and 4 ln 2: phi(ln 2) = ln 2 / (2 - 1), phi(ln 4) = 2 ln 2 / (4 - 1).

    With T = 10 the logit is 10 ln 2 (1 - 2/3) = 2.3104906, and -ln sigmoid of it ln(1 + 2^(-10/3)) =
    ln(1.0992126) = 0.0945941. loss = 2 ln 2 + 0.1 * 0.0945941 = 1.3862944 + 0.0094594 = 1.3957538.
    """
    errors = column(2 * LN2), column(4 * LN2)
    options: dict[str, Any] = {"beta": 0.1, "num_train_timesteps": 10}
    assert mapo_logit(*errors, **options).item() == pytest.approx(2.3104906, abs=1e-6)
    assert mapo_loss(*errors, **options).item() == pytest.approx(1.3957538, abs=1e-6)


def test_the_paper_by_hand() -> None:
    """beta = 2 and errors ln 2 and ln 4: phi^2 is 0.4804530 and 0.2135347, the logit 0.2669183.

    -ln sigmoid(0.2669183) = ln(1 + 0.7657355) = 0.5685685; loss = ln 2 + 0.5685685 / 2 = 0.9774314.
    """
    errors = column(LN2), column(2 * LN2)
    assert mapo_logit(*errors, beta=2.0, form="paper").item() == pytest.approx(0.2669183, abs=1e-6)
    assert mapo_loss(*errors, beta=2.0, form="paper").item() == pytest.approx(0.9774314, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_and_its_slope_against_exact_arithmetic(dtype: torch.dtype) -> None:
    """From 1e-12 to 90, where exp(x) is beyond float32, to the rounding of the dtype.

    phi - 1 is what a difference of two phi is made of, and phi itself what is left of it far out.
    """
    tolerance = 100 * torch.finfo(dtype).eps
    x = torch.cat(
        [torch.logspace(-12, math.log10(90.0), 300, dtype=torch.float64), column(0.499, 0.5, 0.501).double()]
    )
    x = x.to(dtype).requires_grad_()
    log_value = log_phi(x)
    log_value.exp().sum().backward()
    assert x.grad is not None
    for number, log_number, slope in zip(x.tolist(), log_value.tolist(), x.grad.tolist(), strict=True):
        phi, exact_slope = exact_phi(number)
        assert relative(math.expm1(log_number), phi - 1) < tolerance, number
        assert relative(log_number, phi.ln()) < tolerance, number
        assert relative(slope, exact_slope) < tolerance, number


@pytest.mark.parametrize("options", FORMS)
def test_float32_against_float64_from_1e_12_to_10(options: dict[str, Any]) -> None:
    """Loss and both gradients, down to where float32 of exp(x) - 1 has no digit left."""
    size = torch.logspace(-12, 1, 100, dtype=torch.float64).float()
    for ratio in (1.0, 1.25, 0.5, 1e-3):
        single = [size.clone().requires_grad_(), (ratio * size).requires_grad_()]
        double = [value.detach().double().requires_grad_() for value in single]
        losses = [mapo_loss(*errors, **options) for errors in (single, double)]  # type: ignore[misc]
        for loss in losses:
            loss.sum().backward()
        assert losses[0].dtype == torch.float32
        torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0.0)
        for value, exact in zip(single, double, strict=True):
            assert value.grad is not None and exact.grad is not None
            # The logit of "code" is 1000 times a phi, so its last digit moves a saturated gradient by 1e-4.
            torch.testing.assert_close(value.grad.double(), exact.grad, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize(("options", "slope"), [(FORMS[0], 12.5), (FORMS[1], 0.25), (FORMS[2], 0.25)])
def test_at_zero(options: dict[str, Any], slope: float) -> None:
    """phi'(0) = -1/2: the slope of g(l) = phi(s l) is -s/2, here -1/4.

    code: the logit's is 1000 * 1/4 = 250, and 0.1 * 1/2 * 250 = 12.5 for the margin against 1 for the
    winner's error. paper: beta/2 / beta / 2 = 1/4 whatever beta.
    """
    err_w, err_l = column(0.0).requires_grad_(), column(0.0).requires_grad_()
    loss = mapo_loss(err_w, err_l, **options)
    loss.backward()
    weight = 0.1 if options["form"] == "code" else 1.0 / options["beta"]
    assert loss.item() == pytest.approx(weight * LN2, rel=1e-6)
    assert err_w.grad is not None and err_w.grad.item() == pytest.approx(1.0 + slope, rel=1e-6)
    assert err_l.grad is not None and err_l.grad.item() == pytest.approx(-slope, rel=1e-6)
    x = column(0.0).requires_grad_()
    log_phi(0.5 * x).exp().backward()
    assert x.grad is not None and x.grad.item() == -0.25


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 89.0, 200.0, 1e4, 1e30])
def test_value_and_gradient_stay_finite(options: dict[str, Any], size: float) -> None:
    for pair in ((size, 0.3), (0.3, size), (size, size)):
        err_w, err_l = column(pair[0]).requires_grad_(), column(pair[1]).requires_grad_()
        loss = mapo_loss(err_w, err_l, **options)
        loss.backward()
        assert err_w.grad is not None and err_l.grad is not None
        assert bool(torch.isfinite(torch.cat([loss, err_w.grad, err_l.grad])).all()), pair


def test_small_errors_of_the_code_are_dpo_without_reference_at_beta_500() -> None:
    """1000 (phi(l_w / 2) - phi(l_l / 2)) = -250 (l_w - l_l) + 1000 O(l^2) = the logit at beta 500."""
    err_w, err_l = column(1e-6, 3e-6), column(2e-6, 1e-6)
    zero = torch.zeros(2)
    margin = (mapo_loss(err_w, err_l, beta=0.1) - err_w) / 0.1
    dpo = diffusion_dpo_loss(err_w, err_l, zero, zero, beta=500.0)
    torch.testing.assert_close(margin, dpo, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        mapo_logit(err_w, err_l, beta=0.1), -250.0 * (err_w - err_l), rtol=1e-5, atol=0.0
    )


def test_errors_three_times_as_large_need_a_third_of_s_and_three_times_beta() -> None:
    """In form "code" at any error; in form "paper", where log phi is -l/2 - l^2/24, at small ones."""
    err_w, err_l = column(1e-3, 0.3, 2.0).double(), column(2e-3, 0.1, 2.5).double()
    tripled = 3.0 * err_w, 3.0 * err_l
    published = mapo_loss(err_w, err_l, beta=0.1)
    assert torch.allclose(mapo_loss(*tripled, beta=0.3, snr_value=0.5 / 3.0), 3.0 * published, rtol=1e-12)
    small = mapo_logit(err_w[:1], err_l[:1], beta=96.0, form="paper")
    scaled = mapo_logit(tripled[0][:1], tripled[1][:1], beta=32.0, form="paper")
    assert small.item() > 0.04 and scaled.item() == pytest.approx(small.item(), rel=2e-3)


def test_errors_of_velocity_are_about_three_times_those_of_noise() -> None:
    """(1 - sigma)^2 in the mean over the levels: (T - 1)(2T - 1) / 6 T^2.

    With the best network for N(0, 1) data the variance of v = eps - x0 given x_t is 1 / (alpha^2 + sigma^2),
    in the mean pi/2, and that of eps alpha^2 times it, in the mean 1/2.
    """
    process = Process.flow(1000)
    square = process.residual_scale("epsilon", torch.arange(1000)) ** 2
    assert square.mean().item() == pytest.approx(999 * 1999 / 6e6, rel=1e-12)
    assert square.mean().item() == pytest.approx(FLOW_SHARE, rel=2e-3)
    of_velocity = 1.0 / (process.alphas**2 + process.sigmas**2)
    ratio = of_velocity.mean() / (square * of_velocity).mean()
    assert ratio.item() == pytest.approx(math.pi, rel=2e-3)


def test_the_slope_of_phi_by_hand() -> None:
    """phi'(ln 2) = (2 - 1 - 2 ln 2) / 1 = -0.3862944.

    The factor that the paper states for beta 1, (e^K - K - 1) / (e^K - 1)^2, would be 1 - ln 2 = 0.3068528.
    """
    x = column(LN2, dtype=torch.float64).requires_grad_()
    log_phi(x).exp().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(1.0 - 2.0 * LN2, abs=1e-12)


@pytest.mark.parametrize("options", FORMS[:2])
def test_the_margin_falls_with_the_winners_error_and_rises_with_the_losers(options: dict[str, Any]) -> None:
    errors = torch.linspace(0.0, 3.0, 200, dtype=torch.float64)
    fixed = torch.full_like(errors, 0.3)
    in_w = mapo_logit(errors, fixed, **options).diff()
    in_l = mapo_logit(fixed, errors, **options).diff()
    assert bool((in_w < 0).all()) and bool((in_l > 0).all())
    assert torch.equal(mapo_logit(fixed, fixed, **options), torch.zeros_like(fixed))


def test_a_large_exponent_leaves_the_margin_only_small_errors() -> None:
    """log phi = -l/2 - l^2/24 + ..., so phi^1024 has the slope -512 (1 + l/6) exp(-512 l - 42.67 l^2).

    Of the slope at 0 that is 0.3592 at an error of 0.002 and 4e-23 at 0.1.
    """
    for size in (0.002, 0.1):
        err_l = column(size, dtype=torch.float64).requires_grad_()
        mapo_loss(err_l.detach(), err_l, beta=1024.0, form="paper").backward()
        share = (1.0 + size / 6.0) * math.exp(-512.0 * size - 1024.0 / 24.0 * size**2)
        assert err_l.grad is not None and -err_l.grad.item() / 0.25 == pytest.approx(share, rel=1e-4)


def test_the_papers_logit_is_never_saturated() -> None:
    """A difference of two numbers in [0, 1]; at small errors the code's T makes it as large as one likes."""
    far = column(0.0), column(50.0)
    assert mapo_logit(*far, beta=1.0, form="paper").item() == pytest.approx(1.0, abs=1e-6)
    assert mapo_logit(*far, beta=0.1).item() == pytest.approx(1000.0, abs=1e-3)


@pytest.mark.parametrize("options", FORMS[:2])
def test_swapping_the_images_turns_the_margins_gradient_round(options: dict[str, Any]) -> None:
    """Of what is left of the loss without the winner's own error; exactly so where the errors are equal."""
    a, b = column(0.3, 0.20).requires_grad_(), column(0.3, 0.21).requires_grad_()
    forward = torch.autograd.grad((mapo_loss(a, b, **options) - a).sum(), (a, b))
    back = torch.autograd.grad((mapo_loss(b, a, **options) - b).sum(), (a, b))
    for one, other in zip(forward, back, strict=True):
        assert one[0] == -other[0] != 0.0 and bool((one.sign() == -other.sign()).all())


PLUGINS = [Plugin(**options) for options in FORMS]


def per_pair(plugin: Plugin, target: list[float] | None, groups: list[int] | None = None) -> Tensor:
    denoiser = toy_denoiser(seed=1)
    batch, draws = toy_batch(target, images_a_group=2, groups=2)
    if groups is not None:
        batch, draws = take(batch, draws, groups)
    loss = plugin.compute(denoiser, batch, draws).loss
    assert loss.dtype == torch.float32
    return loss.detach()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_batch_of_two_equals_two_singles(plugin: Plugin) -> None:
    alone = torch.cat([per_pair(plugin, [1.0, 0.0], [group]) for group in (0, 1)])
    assert torch.equal(per_pair(plugin, [1.0, 0.0]), alone)
    assert torch.equal(per_pair(plugin, None), per_pair(plugin, [1.0, 1.0]))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0 / 6.0),
        ({"snr_value": 1.2}, 0.4),
        ({"error_space": "epsilon"}, 0.5),
        ({"error_space": "x0"}, 0.5),
    ],
)
def test_the_scale_on_a_flow(options: dict[str, Any], scale: float) -> None:
    """On velocity errors a third of s; on others s.

    The errors are put together again: the network's velocity, its noise x + (1 - sigma) v or its clean latent
    x - sigma v, against eps - x0, eps and x0.
    """
    denoiser = toy_denoiser(seed=1)
    denoiser.process = Process.flow(4)
    batch, draws = toy_batch([1.0, 1.0, 1.0, 0.0], images_a_group=2)
    assert len(draws.t.unique()) > 1
    sigma = ((draws.t + 1) / 4).reshape(-1, 1, 1, 1)
    x_t = (1.0 - sigma) * batch.latents + sigma * draws.noise
    v = denoiser.network(x_t).float()
    residual = {
        "native": v - (draws.noise - batch.latents),
        "epsilon": x_t + (1.0 - sigma) * v - draws.noise,
        "x0": x_t - sigma * v - batch.latents,
    }[options.get("error_space", "native")]
    err = residual.square().flatten(1).mean(1)
    err_w, err_l = err[[0, 2, 4, 7]], err[[1, 3, 5, 6]]
    given: dict[str, Any] = {"beta": 0.3, "num_train_timesteps": 10}  # 1000 would saturate these
    loss = Plugin(**given, **options).compute(denoiser, batch, draws).loss
    assert torch.allclose(loss, mapo_loss(err_w, err_l, **given, snr_value=scale), rtol=1e-4)
    assert not torch.allclose(loss, mapo_loss(err_w, err_l, **given, snr_value=0.3), rtol=1e-2)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_label_says_which_image_is_w(plugin: Plugin) -> None:
    """Second image preferred: as if the images were swapped; 0.8 is a win, the loss knows no more of it."""
    denoiser = toy_denoiser(seed=1)
    batch, draws = toy_batch([0.0, 0.8], images_a_group=2)
    output = plugin.compute(denoiser, batch, draws)
    swapped = batch.latents[[1, 0, 2, 3]]
    plain = plugin.compute(denoiser, dataclasses.replace(batch, latents=swapped, target=None), draws)
    assert torch.equal(output.loss, plain.loss)
    assert list(output.logs) == ["t", "err_w", "err_l", "margin", "target"]
    for name, values in output.logs.items():
        assert torch.equal(values, plain.logs[name]) and not values.requires_grad
    options = {"beta": plugin.beta, "form": plugin.form}
    logit = mapo_logit(output.logs["err_w"], output.logs["err_l"], **options)  # type: ignore[arg-type]
    assert torch.equal(output.logs["margin"], logit) and output.logs["target"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("flow", [False, True])
def test_one_step_raises_the_winner_relative_to_the_loser(plugin: Plugin, flow: bool) -> None:
    """On two images, either being the winner, from a network that answers 0 (equal errors) and from another.

    No reference is held: asking for one would raise KeyError.
    """
    for seed in (None, 1):
        for target in (1.0, 0.0):
            denoiser = toy_denoiser(seed=seed)
            if flow:
                denoiser.process = Process.flow(4)
            batch, draws = toy_batch([target], images_a_group=2)
            before = plugin.compute(denoiser, batch, draws)
            plugin.backward(before, 1.0, torch.Tensor.backward)
            gradient = weight_gradient(denoiser)
            with torch.no_grad():
                denoiser.trainable_parameters()[0].sub_(1e-3 / gradient.norm() * gradient)
            after = plugin.compute(denoiser, batch, draws)
            gap = [(output.logs["err_l"] - output.logs["err_w"]).item() for output in (before, after)]
            assert gap[1] > gap[0], (seed, target)


def test_no_reference_is_held() -> None:
    assert not Plugin.uses_reference and Plugin.unit == "pair"


def record(first: float, second: float) -> Record:
    candidates = [
        Candidate(ImageRef(path=Path(name)), label=label) for name, label in (("a", first), ("b", second))
    ]
    return Record("r", "a thing", candidates)


def test_a_tie_is_never_a_win() -> None:
    """Left out of the data and counted as such; one that comes all the same is refused by name."""
    plugin = Plugin(beta=0.1)
    assert plugin.reject(record(0.5, 0.5)) == "tie"
    assert plugin.reject(record(0.6, 0.4)) is plugin.reject(record(0.0, 1.0)) is None
    batch, draws = toy_batch([1.0, 0.5], images_a_group=2)
    with pytest.raises(UserError, match=r"^MaPO cannot learn from a tie \(row-1\): use data.ties=drop$"):
        plugin.compute(toy_denoiser(seed=1), batch, draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "objective.beta is 0.0: use a value above 0"),
        ({"beta": -1.0}, "objective.beta is -1.0: use a value above 0"),
        ({"beta": math.nan}, "objective.beta is nan: use a value above 0"),
        ({"beta": math.inf}, "objective.beta is inf: use a value above 0"),
        ({"snr_value": 0.0}, "objective.snr_value is 0.0: use a value above 0"),
        ({"num_train_timesteps": 0}, "objective.num_train_timesteps is 0: use a value above 0"),
        ({"form": "cod"}, "unknown objective.form 'cod': did you mean 'code'? known: code, paper"),
        (
            {"form": "paper", "snr_value": 1.0},
            "objective.snr_value and objective.num_train_timesteps mean nothing in objective.form=paper: "
            "leave them out, or use objective.form=code",
        ),
        (
            {"error_space": "esp"},
            "unknown objective.error_space 'esp': known: epsilon, native, x0",
        ),
    ],
)
def test_bad_settings_are_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Plugin(**{"beta": 0.1, **settings})
    assert str(caught.value) == message


def test_the_pure_loss_refuses_an_unknown_form() -> None:
    with pytest.raises(UserError, match=r"unknown objective\.form 'v1'"):
        mapo_loss(column(0.1), column(0.2), beta=0.1, form="v1")  # type: ignore[arg-type]


def test_beta_must_be_given() -> None:
    words = ["objective=mapo", "model=sdxl", "model.path=base", "data=jsonl", "data.path=pairs", "out=run"]
    with pytest.raises(UserError) as caught:
        load_recipe(train, None, words)
    assert str(caught.value) == "train needs objective.beta=... (see diffalign train objective=mapo --help)"
    with pytest.raises(UserError, match=r"^objective mapo needs beta$"):
        make_one("objectives", "mapo")
    made = load_recipe(train, None, [*words, "objective.beta=0.1"]).arguments["objective"]
    assert made == Plugin(beta=0.1, form="code", snr_value=0.5, num_train_timesteps=1000)

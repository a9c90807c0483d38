"""The Diffusion-DPO loss against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.common.plugins import get
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.objectives.diffusion_dpo import Plugin, diffusion_dpo_logit, diffusion_dpo_loss, pair_logs


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


ERRORS = column(0.30), column(0.50), column(0.45), column(0.35)


def test_by_hand() -> None:
    """err (0.30, 0.50), reference (0.45, 0.35), beta 10.

    Winner 0.15 below its reference, loser 0.15 above: m = -5 * ((0.30 - 0.50) - (0.45 - 0.35)) = -5 * -0.3 =
    1.5. loss = -ln(1 / (1 + e^-1.5)) = ln(1 + 0.2231302) = 0.2014133.
    With p = 3/4 the other side is -ln sigmoid(-1.5) = 1.5 + 0.2014133: 0.2014133 + 1.5 / 4 = 0.5764133.
    """
    assert diffusion_dpo_logit(*ERRORS, beta=10.0).item() == pytest.approx(1.5, abs=1e-6)
    assert diffusion_dpo_loss(*ERRORS, beta=10.0).item() == pytest.approx(0.2014133, abs=1e-6)
    soft = diffusion_dpo_loss(*ERRORS, beta=10.0, target=column(0.75))
    assert soft.item() == pytest.approx(0.5764133, abs=1e-6)


def test_a_flow_by_hand() -> None:
    """The formula of SD3.5's public DPO: means of (v - (noise - latents))^2, beta 100 and a half.

    noise 0.5, latents 0.4 and 0.2: velocities 0.1 and 0.3. Policy 0.12, errors 0.0004 and 0.0324; reference
    0.2, errors 0.01 and 0.01. inside = -1/2 * 100 * ((0.0004 - 0.01) - (0.0324 - 0.01)) = -50 * -0.032 = 1.6,
    loss ln(1 + e^-1.6) = 0.1839010, the same at any level. On errors of noise at sigma = 1/4, 9/16 of these:
    inside 0.9, ln(1 + e^-0.9) = 0.3411538; at sigma = 1: log 2.
    """
    answer = nn.Parameter(torch.tensor(0.12))
    policy, reference = (nn.ParameterList([value]) for value in (answer, torch.tensor(0.2)))
    denoiser = Denoiser(
        policy,
        Process.flow(4),
        lambda network, x_t, t, cond: network[0].expand_as(x_t),
        {"reference": FrozenCopy(reference)},
    )
    batch = Batch(
        ids=["a", "b"],
        epoch=0,
        positions=torch.arange(2),
        latents=torch.tensor([0.4, 0.2, 0.4, 0.2]).reshape(4, 1, 1, 1).expand(4, 1, 3, 2),
        cond=Conditioning({"nothing": torch.zeros(4, 1)}),
        counts=torch.tensor([2, 2]),
        target=torch.ones(2),
    )
    draws = Draws(torch.tensor([0, 0, 3, 3]), torch.full((4, 1, 3, 2), 0.5))
    output = Plugin(beta=100.0).compute(denoiser, batch, draws)
    assert output.logs["margin"].tolist() == pytest.approx([1.6, 1.6], abs=1e-5)
    assert output.loss.tolist() == pytest.approx([0.1839010, 0.1839010], abs=1e-6)
    on_noise = Plugin(beta=100.0, error_space="epsilon").compute(denoiser, batch, draws)
    assert on_noise.loss.tolist() == pytest.approx([0.3411538, math.log(2.0)], abs=1e-6)


def test_the_convention_of_beta() -> None:
    """beta multiplies half of a difference of means: the slope of m in err_w is -beta / 2 = -2500."""
    err_w = column(0.3).requires_grad_()
    diffusion_dpo_logit(err_w, *ERRORS[1:], beta=5000.0).backward()
    assert err_w.grad is not None and err_w.grad.item() == -2500.0


def test_the_gradient_factor() -> None:
    """d loss / d m = -sigma(-m), at m = 1.5 -0.1824255, so d loss / d err_w = 5 * 0.1824255 = 0.9121276."""
    err_w = column(0.3).requires_grad_()
    diffusion_dpo_loss(err_w, *ERRORS[1:], beta=10.0).backward()
    assert err_w.grad is not None and err_w.grad.item() == pytest.approx(0.9121276, abs=1e-5)


@pytest.mark.parametrize("beta", [1.0, 2000.0, 1e6])
@pytest.mark.parametrize("target", [None, column(0.0, 0.3, 1.0)])
def test_log_2_where_policy_and_reference_agree(beta: float, target: Tensor | None) -> None:
    err_w, err_l = column(0.1, 0.7, 3.0), column(0.2, 0.6, 1e-4)
    loss = diffusion_dpo_loss(err_w, err_l, err_w, err_l, beta=beta, target=target)
    assert loss.tolist() == pytest.approx([math.log(2.0)] * 3, abs=1e-7)
    if target is None:
        assert torch.equal(loss, torch.full((3,), math.log(2.0)))


def test_swapping_the_images_and_the_label_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, ref_a, ref_b, p = (torch.rand(50, generator=generator) for _ in range(5))
    forward = diffusion_dpo_loss(a, b, ref_a, ref_b, beta=9.0, target=p)
    backward = diffusion_dpo_loss(b, a, ref_b, ref_a, beta=9.0, target=1.0 - p)
    assert torch.allclose(forward, backward, atol=1e-6)


def test_a_soft_target_pulls_the_margin_to_its_logit() -> None:
    """The loss is least where sigma(m) = p: for p = 0.8, m = ln 4; a tie wants m = 0."""
    for p, margin in ((0.8, math.log(4.0)), (0.5, 0.0)):
        err_l = column(margin / 5.0, dtype=torch.float64).requires_grad_()  # m = 10/2 * err_l
        zero = torch.zeros(1, dtype=torch.float64)
        loss = diffusion_dpo_loss(zero, err_l, zero, zero, beta=10.0, target=column(p, dtype=torch.float64))
        loss.backward()
        assert err_l.grad is not None and abs(err_l.grad.item()) < 1e-12


def test_float32_against_float64_also_far_out() -> None:
    """Margins up to +-5000: no overflow, and the relative error of float32 at most."""
    generator = torch.Generator().manual_seed(1)
    exact = [torch.rand(500, generator=generator, dtype=torch.float64) for _ in range(4)]
    target = torch.rand(500, generator=generator, dtype=torch.float64)
    loss = diffusion_dpo_loss(*(e.float() for e in exact), beta=5000.0, target=target.float())
    reference = diffusion_dpo_loss(*(e.float().double() for e in exact), beta=5000.0, target=target)
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss).all())
    assert torch.allclose(loss.double(), reference, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(UserError, match=rf"objective.beta is {beta}: use a value above 0"):
        Plugin(beta=beta)


def test_the_error_space_must_be_known() -> None:
    with pytest.raises(UserError, match=r"unknown objective\.error_space 'esp'"):
        Plugin(error_space="esp")  # type: ignore[arg-type]


def test_the_short_name() -> None:
    assert get("objectives", "dpo") is get("objectives", "diffusion-dpo") is Plugin


def test_logs_name_the_preferred_image_w() -> None:
    """Second pair: the second image is preferred (p = 0.1), so its errors are w and the margin changes sign.

    A tie (third pair) is left as it stands.
    """
    first, second = column(1, 2, 3), column(4, 5, 6)
    logs = pair_logs(
        torch.tensor([7, 7, 8, 8, 9, 9]),
        first,
        second,
        first + 10,
        second + 10,
        margin=column(0.5, 0.6, 0.7),
        target=column(1.0, 0.1, 0.5),
    )
    assert {name: values.tolist() for name, values in logs.items()} == {
        "t": [7, 8, 9],
        "err_w": [1, 5, 3],
        "err_l": [4, 2, 6],
        "ref_err_w": [11, 15, 13],
        "ref_err_l": [14, 12, 16],
        "margin": pytest.approx([0.5, -0.6, 0.7]),
        "target": pytest.approx([1.0, 0.9, 0.5]),
    }

"""Supervised fine-tuning: the denoising error itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.objectives.sft import Plugin


class Nothing(nn.Module):
    def forward(self, x_t: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


DDPM = Process(torch.tensor([0.8]).double(), torch.tensor([0.6]).double(), "epsilon")


def compute(plugin: Plugin, process: Process = DDPM) -> Tensor:
    denoiser = Denoiser(Nothing(), process, lambda network, x_t, t, cond: network(x_t))
    batch = Batch(
        ids=["a", "b"],
        epoch=0,
        positions=torch.arange(2),
        latents=torch.ones(2, 1, 1, 2),
        cond=Conditioning({"nothing": torch.zeros(2, 1)}),
        counts=torch.ones(2, dtype=torch.int64),
    )
    noise = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).reshape(2, 1, 1, 2)
    output = plugin.compute(denoiser, batch, Draws(torch.zeros(2, dtype=torch.int64), noise))
    assert torch.equal(output.logs["err_w"], output.loss) and not output.logs["err_w"].requires_grad
    return output.loss


def test_by_hand() -> None:
    """A network that answers 0 errs by eps: (1 + 4) / 2 = 2.5 and (0 + 16) / 2 = 8.

    In x0 space every residual is times sigma / alpha = 3/4, so the errors are times 9/16: 1.40625 and 4.5.
    """
    assert compute(Plugin()).tolist() == [2.5, 8.0]
    assert compute(Plugin(error_space="epsilon")).tolist() == [2.5, 8.0]
    assert compute(Plugin(error_space="x0")).tolist() == pytest.approx([1.40625, 4.5])


def test_a_flow_by_hand() -> None:
    """It errs by eps - x0, (0, 1) and (-1, 3): 0.5 and 5. At sigma 1/4 times 9/16 on eps, 1/16 on x0."""
    flow = Process.flow(4)
    assert compute(Plugin(), flow).tolist() == [0.5, 5.0]
    assert compute(Plugin(error_space="epsilon"), flow).tolist() == [0.28125, 2.8125]
    assert compute(Plugin(error_space="x0"), flow).tolist() == [0.03125, 0.3125]


def test_what_it_is() -> None:
    assert Plugin.unit == "single" and not Plugin.uses_reference
    with pytest.raises(UserError, match=r"unknown objective\.error_space 'epsilom': did you mean 'epsilon'"):
        Plugin(error_space="epsilom")  # type: ignore[arg-type]

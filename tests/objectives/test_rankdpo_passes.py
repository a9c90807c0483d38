"""RankDPO on a real network: two passes against one, ragged lists, logs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Adapters, Denoiser
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.diffusion.process import Process
from diffalign.objectives._relevance import as_lists, present
from diffalign.objectives.rankdpo import FirstPass, Plugin, discounted_gain_weights

COUNTS = [2, 4, 3]


def make_denoiser(folder: str, *, dropout: float = 0.0) -> Denoiser:
    """A tiny UNet with a trained LoRA that has left its reference, a frozen one."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are what is wanted
        for name in ("trained", "frozen"):
            config = LoraConfig(
                r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, lora_dropout=dropout
            )
            network.add_adapter(config, name)
    network.set_adapter("trained")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".trained." in name)
        if ".lora_" in name:
            parameter.data.mul_(0.05)
    angle = torch.linspace(0.05, 1.5, 1000, dtype=torch.float64)
    process = Process(angle.cos(), angle.sin(), "epsilon")
    return Denoiser(network.train(), process, call, {"reference": Adapters(("frozen",))})


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    own = next(network.parameters()).dtype
    text = cond["prompt_embeds"].to(own)
    answer: Tensor = network(x_t.to(own), t, encoder_hidden_states=text, return_dict=False)[0]
    return answer


def make_lists(counts: list[int], *, seed: int = 0) -> tuple[Batch, Draws]:
    """Lists of random latents with one t a list and a noise an image, rated by two scorers."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(counts), torch.tensor(counts)
    batch = Batch(
        ids=[f"row-{number}" for number in range(len(counts))],
        epoch=0,
        positions=torch.arange(len(counts)),
        latents=torch.randn(rows, 4, 16, 16, generator=generator),
        cond=Conditioning({"prompt_embeds": torch.randn(rows, 7, 32, generator=generator)}),
        counts=groups,
        ratings={name: torch.rand(rows, generator=generator) for name in ("a", "b")},
    )
    t = torch.randint(100, 900, (len(counts),), generator=generator).repeat_interleave(groups)
    return batch, Draws(t, torch.randn(rows, 4, 16, 16, generator=generator))


def gradient(denoiser: Denoiser, plugin: Plugin, batch: Batch, draws: Draws, scale: float = 1.0) -> Tensor:
    """The gradient that `backward` leaves, as one vector."""
    denoiser.network.zero_grad()
    plugin.backward(plugin.compute(denoiser, batch, draws), scale, torch.Tensor.backward)
    gradients = [parameter.grad for parameter in denoiser.trainable_parameters()]
    return torch.cat([grad.flatten() for grad in gradients if grad is not None])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_two_passes_give_the_gradient_of_one(tiny_sd: str, dtype: torch.dtype, bound: float) -> None:
    """At beta 5000, where logits of +-1 are differences of 4e-4 between errors near 1."""
    denoiser = make_denoiser(tiny_sd)
    denoiser.network.to(dtype)
    batch, draws = make_lists(COUNTS)
    outputs = {passes: Plugin(passes=passes).compute(denoiser, batch, draws) for passes in ("one", "two")}
    assert outputs["one"].loss.requires_grad and not outputs["two"].loss.requires_grad
    assert torch.allclose(outputs["one"].loss, outputs["two"].loss, rtol=bound)
    assert 0.05 < outputs["one"].logs["margin"].abs().max() < 20.0
    one = gradient(denoiser, Plugin(passes="one"), batch, draws, scale=0.25)
    two = gradient(denoiser, Plugin(passes="two"), batch, draws, scale=0.25)
    assert one.norm() > 0.0 and ((two - one).norm() / one.norm()).item() < bound
    quarter = gradient(denoiser, Plugin(passes="two"), batch, draws)
    assert torch.allclose(quarter, 4.0 * two, rtol=1e-5, atol=1e-6 * float(two.abs().max()))


def test_a_policy_at_its_reference_has_no_margin_and_a_gradient(tiny_sd: str) -> None:
    """Two copies of one adapter: every shift is exactly 0 at any beta, in one pass and in two."""
    denoiser = make_denoiser(tiny_sd)
    state = denoiser.network.state_dict()
    denoiser.network.load_state_dict(
        {name.replace(".frozen.", ".trained."): value for name, value in state.items() if ".frozen." in name},
        strict=False,
    )
    batch, draws = make_lists(COUNTS)
    for passes in ("one", "two"):
        output = Plugin(passes=passes).compute(denoiser, batch, draws)
        assert not output.logs["margin"].any() and torch.equal(output.logs["err_w"], output.logs["ref_err_w"])
        assert torch.allclose(output.loss.detach(), math.log(2.0) * output.logs["weight"], rtol=1e-6)
        assert output.logs["ordered"].tolist() == [0.5] * 3
        assert gradient(denoiser, Plugin(passes=passes), batch, draws).norm() > 0.0


def test_two_passes_hold_the_activations_of_one_image(tiny_sd: str) -> None:
    """Bytes kept for backward: with one pass those of the whole list, with two of one image at any time."""
    denoiser = make_denoiser(tiny_sd)
    peaks = {
        (passes, count): peak_of(lambda: gradient(denoiser, Plugin(passes=passes), *make_lists([count])))  # noqa: B023
        for passes in ("one", "two")
        for count in (2, 4)
    }
    assert peaks["one", 4] > 1.8 * peaks["one", 2]
    assert peaks["two", 4] < 1.01 * peaks["two", 2]
    assert peaks["two", 2] < 0.6 * peaks["one", 2]


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that autograd kept at a time while `work` ran."""
    alive, peak = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    assert alive == 0
    return peak


def test_the_second_pass_meets_the_dropout_of_the_first(tiny_sd: str) -> None:
    """Half of the adapter's input is dropped: without the replay the second errors would be others.

    The gradient is that of the pure loss of the very errors of the first pass, and the global stream is
    left where the first pass left it.
    """
    denoiser = make_denoiser(tiny_sd, dropout=0.5)
    batch, draws = make_lists([2, 3])
    torch.manual_seed(11)
    output = Plugin(passes="two").compute(denoiser, batch, draws)
    assert isinstance(output, FirstPass)
    stream = torch.get_rng_state()
    again = torch.stack([output.error_again(row) for row in range(5)])
    assert torch.equal(torch.get_rng_state(), stream)
    best = as_lists(again, present(batch.counts))
    assert all(err in row for err, row in zip(output.logs["err_w"], best.detach(), strict=True))
    other = torch.stack([output.error_again(row) for row in range(5)])
    assert torch.equal(again, other)
    torch.manual_seed(12)
    assert not torch.equal(output.loss, Plugin(passes="two").compute(denoiser, batch, draws).loss)


def test_the_second_pass_runs_in_the_precision_of_the_first(tiny_sd: str) -> None:
    """The loop leaves autocast before it asks for gradients; errors in float32 would be others."""
    denoiser = make_denoiser(tiny_sd)
    batch, draws = make_lists([2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Plugin(passes="two").compute(denoiser, batch, draws)
    exact = Plugin(passes="two").compute(denoiser, batch, draws)
    assert isinstance(output, FirstPass) and output.loss.dtype == torch.float32
    again = sorted(output.error_again(row).item() for row in range(2))
    assert again == sorted([float(output.logs["err_w"]), float(output.logs["err_l"])])
    assert again != sorted([float(exact.logs["err_w"]), float(exact.logs["err_l"])])


def test_lists_do_not_see_one_another(tiny_sd: str) -> None:
    """A batch of ragged lists equals its lists alone, losses and gradient."""
    denoiser = make_denoiser(tiny_sd)
    denoiser.network.double()
    batch, draws = make_lists(COUNTS)
    together = gradient(denoiser, Plugin(), batch, draws)
    losses = Plugin().compute(denoiser, batch, draws).loss
    apart = torch.zeros_like(together)
    start = 0
    for number, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        start += count
        single = Batch(
            ids=batch.ids[number : number + 1],
            epoch=0,
            positions=batch.positions[number : number + 1],
            latents=batch.latents[rows],
            cond=batch.cond.rows(rows),
            counts=batch.counts[number : number + 1],
            ratings={name: values[rows] for name, values in batch.ratings.items()},
        )
        alone = single, Draws(draws.t[rows], draws.noise[rows])
        assert torch.allclose(Plugin().compute(denoiser, *alone).loss, losses[number], rtol=1e-4)
        apart += gradient(denoiser, Plugin(), *alone)
    assert ((apart - together).norm() / together.norm()).item() < 1e-4


@pytest.mark.parametrize("passes", ["one", "two"])
def test_a_step_raises_the_better_image_over_the_worse(tiny_sd: str, passes: Any) -> None:
    denoiser = make_denoiser(tiny_sd)
    batch, draws = make_lists([2])
    plugin = Plugin(beta=100.0, scorers=["a"], passes=passes)
    before = plugin.compute(denoiser, batch, draws).logs["margin"]
    step = gradient(denoiser, plugin, batch, draws)
    start, scale = 0, 1e-2 / float(step.norm())
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters():
            parameter.sub_(scale * step[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert plugin.compute(denoiser, batch, draws).logs["margin"] > before


def test_logs_are_of_the_best_and_the_worst_image(tiny_sd: str) -> None:
    """Of the first list image 1 is best and image 0 worst; the second list has one value only."""
    denoiser = make_denoiser(tiny_sd)
    batch, draws = make_lists([3, 2])
    batch.ratings.update({"a": torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), "b": torch.zeros(5)})
    plugin = Plugin(beta=10.0, scorers=["a"])
    logs = plugin.compute(denoiser, batch, draws).logs
    assert all(values.shape == (2,) and not values.requires_grad for values in logs.values())
    terms = denoising_terms(denoiser, batch.latents, batch.cond, draws, reference=True)
    assert terms.ref_err is not None
    err, ref_err = terms.err.detach(), terms.ref_err
    assert logs["t"].tolist() == [draws.t[0].item(), draws.t[3].item()]
    assert torch.equal(logs["err_w"], err[[1, 3]]) and torch.equal(logs["err_l"], err[[0, 3]])
    assert torch.equal(logs["ref_err_w"], ref_err[[1, 3]]) and torch.equal(logs["ref_err_l"], ref_err[[0, 3]])
    shift = err - ref_err
    assert logs["margin"].tolist() == pytest.approx([-5.0 * (shift[1] - shift[0]).item(), 0.0], abs=1e-7)
    assert logs["target"].tolist() == [1.0, 0.5]
    weights = discounted_gain_weights(torch.tensor([[0.0, 1.0, 0.5]]))[0]
    assert logs["weight"].tolist() == pytest.approx([weights.sum().item() / 2, 0.0], abs=1e-6)
    right = sum(weights[i, j].item() for i, j in ((1, 2), (1, 0), (2, 0)) if shift[i] < shift[j])
    assert logs["ordered"].tolist() == pytest.approx([right / (weights.sum().item() / 2), 0.5], abs=1e-6)

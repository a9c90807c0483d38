"""Policies answer with the right weights and leave no trace, on a real UNet with real adapters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.diffusion.denoiser import Adapters, Denoiser, FrozenCopy, freeze
from diffalign.diffusion.process import Process

COND = Conditioning({"prompt_embeds": torch.linspace(-1, 1, 2 * 7 * 32).reshape(2, 7, 32)})
X_T = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8).sin()
T = torch.tensor([10, 700])


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    answer: Tensor = network(x_t, t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
    return answer


def fresh_denoiser(tiny_sd: str, *adapters: str) -> Denoiser:
    """A tiny UNet with LoRAs of these names, all of them away from zero; the first is trained."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").requires_grad_(False)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is tested
        for name in adapters:
            network.add_adapter(
                LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name
            )
    if adapters:
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(adapters[0])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(bool(adapters) and f".{adapters[0]}." in name)
    process = Process(torch.ones(1000).double(), torch.zeros(1000).double(), "epsilon")
    return Denoiser(network, process, call, {"reference": Adapters(), "old": Adapters(adapters[1:])})


def state_of(network: nn.Module) -> list[Any]:
    """Everything that a policy may touch."""
    layers = [
        (name, list(module.active_adapters), module.disable_adapters)
        for name, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    flags = [(name, parameter.requires_grad) for name, parameter in network.named_parameters()]
    return [layers, flags, network.training]


def answer(denoiser: Denoiser) -> Tensor:
    with torch.no_grad():
        return denoiser.predict(X_T, T, COND)


def base_answer(tiny_sd: str) -> Tensor:
    return answer(fresh_denoiser(tiny_sd))


@pytest.mark.parametrize("adapters", [("trained",), ("trained", "frozen")])
@pytest.mark.parametrize("policy", ["reference", "old", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_policy_leaves_no_trace(tiny_sd: str, adapters: tuple[str, ...], policy: str, fails: bool) -> None:
    denoiser = fresh_denoiser(tiny_sd, *adapters)
    before, trained = state_of(denoiser.network), answer(denoiser)
    assert any(flag for _, flag in before[1])
    if fails:
        with pytest.raises(ZeroDivisionError), denoiser.policy(policy):
            answer(denoiser)
            raise ZeroDivisionError
    else:
        with denoiser.policy(policy):
            answer(denoiser)
    assert state_of(denoiser.network) == before
    assert torch.equal(answer(denoiser), trained)


def test_a_policy_leaves_a_partly_frozen_and_switched_off_network_as_it_was(tiny_sd: str) -> None:
    denoiser = fresh_denoiser(tiny_sd, "trained", "frozen")
    layers = [module for module in denoiser.network.modules() if isinstance(module, BaseTunerLayer)]
    layers[0].enable_adapters(False)
    layers[1].set_adapter(["trained", "frozen"])
    next(denoiser.network.parameters()).requires_grad_(True)
    before = state_of(denoiser.network)
    for policy in ("reference", "old"):
        with denoiser.policy(policy):
            assert not denoiser.predict(X_T, T, COND).requires_grad
    assert state_of(denoiser.network) == before


def test_other_policies_answer_without_gradient(tiny_sd: str) -> None:
    """Their weights carry the flags of those they stand in for (equal flags, equal bits); nothing is
    recorded.

    Autocast would keep half-precision copies of such weights: not in here, and afterwards as before.
    """
    denoiser = fresh_denoiser(tiny_sd, "trained", "frozen")
    flags = {name for name, parameter in denoiser.network.named_parameters() if parameter.requires_grad}
    with torch.autocast("cpu", torch.bfloat16), denoiser.policy("old"):
        inside = {name for name, parameter in denoiser.network.named_parameters() if parameter.requires_grad}
        assert inside == {name.replace(".trained.", ".frozen.") for name in flags}
        assert not denoiser.predict(X_T, T, COND).requires_grad
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled() and torch.is_grad_enabled()
    copied = copy.deepcopy(denoiser.network)
    denoiser.policies["reference"] = FrozenCopy(freeze(copied))
    with denoiser.policy("reference"):
        assert {name for name, parameter in copied.named_parameters() if parameter.requires_grad} == flags
        assert not denoiser.predict(X_T, T, COND).requires_grad
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert denoiser.predict(X_T, T, COND).requires_grad


def test_who_answers(tiny_sd: str) -> None:
    """Base alone, one adapter, another adapter: three answers; each is what that network says on its own."""
    denoiser = fresh_denoiser(tiny_sd, "trained", "frozen")
    trained = answer(denoiser)
    with denoiser.policy("reference"):
        base = answer(denoiser)
    with denoiser.policy("old"):
        frozen = answer(denoiser)
    with denoiser.policy("train"):
        assert torch.equal(answer(denoiser), trained)
    assert torch.equal(base, base_answer(tiny_sd))
    alone = fresh_denoiser(tiny_sd, "trained", "frozen")
    alone.network.set_adapter("frozen")
    assert torch.equal(frozen, answer(alone))
    assert len({round(float(value.abs().sum()), 4) for value in (trained, base, frozen)}) == 3


def test_nested_policies(tiny_sd: str) -> None:
    """The inner one answers; "train" inside another policy would answer with the outer one: refused."""
    denoiser = fresh_denoiser(tiny_sd, "trained", "frozen")
    trained, before = answer(denoiser), state_of(denoiser.network)
    with denoiser.policy("old"):
        frozen = answer(denoiser)
        with denoiser.policy("reference"):
            assert torch.equal(answer(denoiser), base_answer(tiny_sd))
        assert torch.equal(answer(denoiser), frozen)
        with pytest.raises(RuntimeError, match="inside"), denoiser.policy("train"):
            pass
    assert state_of(denoiser.network) == before
    assert torch.equal(answer(denoiser), trained)


def test_a_frozen_copy_answers_instead_and_is_never_trained(tiny_sd: str) -> None:
    denoiser = fresh_denoiser(tiny_sd)
    denoiser.policies["reference"] = FrozenCopy(freeze(copy.deepcopy(denoiser.network)))
    denoiser.network.requires_grad_(True)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.mul_(1.1)
    before = state_of(denoiser.network)
    with pytest.raises(ZeroDivisionError), denoiser.policy("reference"):
        assert torch.equal(answer(denoiser), base_answer(tiny_sd))
        assert not denoiser.predict(X_T, T, COND).requires_grad
        raise ZeroDivisionError
    assert state_of(denoiser.network) == before
    assert not torch.equal(answer(denoiser), base_answer(tiny_sd))
    assert len(denoiser.trainable_parameters()) == len(list(denoiser.network.parameters()))


def test_an_unknown_policy_is_an_error_of_ours(tiny_sd: str) -> None:
    with pytest.raises(KeyError), fresh_denoiser(tiny_sd).policy("refrence"):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_trained_adapter_only(tiny_sd: str, checkpointing: bool) -> None:
    """With a reference pass before it, as in training; recomputed activations give the same bits."""
    denoiser = fresh_denoiser(tiny_sd, "trained", "frozen")
    denoiser.network.train()
    if checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    for policy in ("reference", "old"):
        with torch.no_grad(), denoiser.policy(policy):
            answer(denoiser)
    denoiser.predict(X_T, T, COND).square().sum().backward()
    grads = {name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None}
    assert grads and all(".trained." in name and bool(grad.any()) for name, grad in grads.items())
    plain = fresh_denoiser(tiny_sd, "trained", "frozen")
    plain.network.train()
    plain.predict(X_T, T, COND).square().sum().backward()
    for name, parameter in plain.network.named_parameters():
        assert (parameter.grad is None) == (name not in grads)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name])

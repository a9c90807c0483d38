"""The denoiser boundary: one network, several policies.

Objectives call `denoiser.predict(x_t, t, cond)` and the conversions of `denoiser.process`; whose weights
answer is chosen by `with denoiser.policy("reference"):`. A policy is either a set of adapters on the one
network (the base alone is the empty set) or a frozen copy of the network, for full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.diffusion.process import Process

Call = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Adapters:
    """A policy made of the adapters in `names` on the shared network; no name: the base alone."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrozenCopy:
    """A policy with a network of its own that is never trained."""

    network: nn.Module


@dataclass
class Denoiser:
    """A network behind the one call that every objective makes.

    Args:
        network: the trained network (after `accelerate` has wrapped it, the wrapped one).
        process: the forward process; also the holder of the named conversions.
        call: the backbone's way to call its network:
            `(network, x_t [B, ...], time [B], cond) -> [B, ...]`, the time being `process.network_time`.
        policies: named policies; "train" is always the network as it is.
    """

    network: nn.Module
    process: Process
    call: Call
    policies: dict[str, Adapters | FrozenCopy] = field(default_factory=dict)
    _copy_in_use: nn.Module | None = field(default=None, init=False, repr=False)
    _depth: int = field(default=0, init=False, repr=False)

    def predict(self, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The selected policy's native prediction, shape of `x_t`, in the dtype the network answers in."""
        return self.call(self._copy_in_use or self.network, x_t, self.process.network_time(t_B), cond)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trained network that receive gradients."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        """Selects the policy `name` for calls of `predict` inside the block.

        Every policy but "train" answers without gradient. Adapter state and every `requires_grad` are put
        back on exit, also after an exception.

        Convention: inside the block the answering weights carry the `requires_grad` of those they stand in
        for. torch multiplies a matrix that requires gradients along another path, also under `no_grad`
        (measured on 2.15): the last bits would differ, at beta 5000 in bf16 a step-0 logit of up to 0.9 on a
        tiny UNet.

        Raises:
            KeyError: a policy that was never set up (our own mistake, not a user's).
            RuntimeError: "train" inside another policy, whose weights would answer in its place.
        """
        if name == "train":
            if self._depth:
                raise RuntimeError("the policy train cannot be selected inside another policy")
            yield
            return
        policy = self.policies[name]
        previous = self._copy_in_use
        self._depth += 1
        try:
            with torch.no_grad(), _autocast_without_cache():
                if isinstance(policy, FrozenCopy):
                    self._copy_in_use = policy.network
                    with _same_flags(policy.network, self.network):
                        yield
                else:
                    self._copy_in_use = None
                    with _active_adapters(self.network, policy.names):
                        yield
        finally:
            self._copy_in_use = previous
            self._depth -= 1


@contextmanager
def _autocast_without_cache() -> Iterator[None]:
    # Autocast keeps its copies of weights that require gradients: without this, of a whole frozen network.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _same_flags(network: nn.Module, like: nn.Module) -> Iterator[None]:
    flags = {name: parameter.requires_grad for name, parameter in like.named_parameters()}
    saved = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        yield
    finally:
        for parameter, flag in saved:
            parameter.requires_grad_(flag)


@contextmanager
def _active_adapters(network: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    saved_layers = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    # peft's switches set requires_grad as a side effect (measured on 0.21: activating an adapter makes it
    # trainable, disabling makes all frozen), so the flags are remembered one by one.
    saved_flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    trained = any(flag for _, flag in saved_flags)
    try:
        for layer in layers:
            if names:
                layer.enable_adapters(True)
                layer.set_adapter(list(names), inference_mode=not trained)
            else:
                layer.enable_adapters(False)
        yield
    finally:
        for layer, active, disabled in saved_layers:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, flag in saved_flags:
            parameter.requires_grad_(flag)


@contextmanager
def without_requires_grad(network: nn.Module) -> Iterator[None]:
    """Inside the block no parameter requires gradients, as in a network that was loaded for drawing.

    `no_grad` is not enough for equal bits: see `Denoiser.policy`.
    """
    saved = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.requires_grad_(False)
        yield
    finally:
        for parameter, flag in saved:
            parameter.requires_grad_(flag)


def freeze(network: nn.Module) -> nn.Module:
    """The network itself, in evaluation mode and without gradients."""
    return network.eval().requires_grad_(False)

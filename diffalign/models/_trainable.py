"""Training of a loaded network: what is trained, what it is held against, and how both are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.common.errors import UserError, brief
from diffalign.diffusion.denoiser import Adapters, Denoiser, FrozenCopy, freeze
from diffalign.models import _adapters, _sharding
from diffalign.models._base import REFERENCE, TRAINED
from diffalign.models._parts import Backbone
from diffalign.models._spec import AdapterSpec
from diffalign.models._trained_under import Setting, as_metadata

MAX_GRAPHS = 64
"""Torch's own limit is 8: fewer than policy and reference take over the widths of one SD 1.5."""


class TrainableModel(Backbone):
    """The training half of a backbone; the other half loads, encodes and draws."""

    _moves_reference = False

    @property
    def denoiser(self) -> Denoiser:
        """The network behind the boundary."""
        raise NotImplementedError

    def check_training(self, adapter: AdapterSpec) -> None:
        """Refuses what `start_training` would, without loading the network.

        Raises:
            UserError: precision, targets or the adapter to start from do not fit the base.
        """
        if adapter.kind == "full":
            self._refuse_half_precision()
        else:
            blueprint = self.parts.blueprint(self.network_part)
            _adapters.check(blueprint, self.lora_files, self.spec.with_targets(adapter))

    def _refuse_half_precision(self) -> None:
        if self.spec.dtype != "fp32":
            raise UserError(
                f"adapter.kind=full with model.dtype={self.spec.dtype}: small updates are lost in half "
                "precision; use model.dtype=fp32 (with precision=bf16 for speed)"
            )

    def start_training(
        self, adapter: AdapterSpec, *, seed: int, with_reference: bool, moving_reference: bool = False
    ) -> None:
        """Sets up the policies "train" and "reference"; the reference is the policy as it is now.

        Args:
            adapter: what is trained.
            seed: of a fresh adapter's random half.
            with_reference: False spares the frozen copy where the objective needs none.
            moving_reference: `move_reference` will be called: the reference gets weights of its own also
                where it is the base alone.
        """
        network = self.network
        self._moves_reference = with_reference and moving_reference
        if adapter.kind == "full":
            self._refuse_half_precision()
            if with_reference:
                _take_memory(network)
                self.denoiser.policies[REFERENCE] = FrozenCopy(freeze(copy.deepcopy(network)))
            network.requires_grad_(True)
        elif adapter.init is None:
            _adapters.add_fresh(network, self.spec.with_targets(adapter), seed=seed)
            self._hold_reference(self._moves_reference)
        else:
            _adapters.add_from_file(network, self.lora_files, adapter.init, dropout=adapter.dropout)
            self._hold_reference(with_reference)
        network.train()

    def compile_blocks(self) -> None:
        """Compiles the repeated blocks of the network, and of a frozen copy, one after another, in place.

        All blocks share one count of graphs, up to MAX_GRAPHS: each width of a UNet and each shape takes one
        for the policy, one for the reference and one for held-out pairs. Past it torch runs without.

        Half precision is rounded where eager rounds it: by default a compiled block keeps float32 between its
        operations, and policy and reference, whose blocks are different graphs, round apart (measured in bf16
        on a tiny UNet with beta 5000: a step-0 logit of 1.5, and 0 this way).

        Raises:
            UserError: the network has no blocks that diffusers knows to repeat.
        """
        for network in (self.network, *self._frozen_copies()):
            # Of SD3's diffusers (0.42) only says which blocks stay in one piece: the repeated ones.
            network._repeated_blocks = network._repeated_blocks or network._no_split_modules
            try:
                network.compile_repeated_blocks(
                    recompile_limit=MAX_GRAPHS, options={"emulate_precision_casts": True}
                )
            except ValueError as error:
                raise UserError(f"compile=true: {brief(error)}; use compile=false") from error

    def shard(self) -> None:
        """Splits the network, and a frozen copy, over the processes; after `start_training`.

        Until then each process holds all of it.
        """
        for network in (self.network, *self._frozen_copies()):
            _sharding.shard(network, network.device)

    def _frozen_copies(self) -> list[Any]:
        policies = self.denoiser.policies.values()
        return [policy.network for policy in policies if isinstance(policy, FrozenCopy)]

    def _hold_reference(self, held: bool) -> None:
        """Gives the reference an adapter of its own, a copy of the trained one, if it is to be held."""
        if held:
            _adapters.add_frozen_copy(self.network, REFERENCE)
            self.denoiser.policies[REFERENCE] = Adapters((REFERENCE,))
        _adapters.activate(self.network, TRAINED)

    @torch.no_grad()
    def move_reference(self, decay: float) -> None:
        """Makes the reference `decay` times itself plus `1 - decay` times the policy, weight by weight."""
        for reference, trained in self._reference_pairs():
            if decay == 0.0:
                reference.copy_(trained)
            else:
                reference.lerp_(trained.to(reference.dtype), 1.0 - decay)

    def _reference_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of a reference that moves, with the policy's."""
        if not self._moves_reference:
            raise RuntimeError("start_training(moving_reference=True) comes first")
        policy = self.denoiser.policies[REFERENCE]
        if isinstance(policy, FrozenCopy):
            yield from zip(policy.network.parameters(), self.network.parameters(), strict=True)
            return
        ours = _adapters.adapter_state(self.network, TRAINED)
        for name, tensor in _adapters.adapter_state(self.network, REFERENCE).items():
            yield tensor, ours[name]

    def reference_state(self) -> dict[str, Tensor]:
        """The tensors of a reference that moves, by name; nothing of one that does not."""
        if not self._moves_reference:
            return {}
        policy = self.denoiser.policies[REFERENCE]
        if isinstance(policy, FrozenCopy):
            return dict(policy.network.state_dict())
        return _adapters.adapter_state(self.network, REFERENCE)

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what `reference_state` gave, in place."""
        if not self._moves_reference:
            return
        policy = self.denoiser.policies[REFERENCE]
        if isinstance(policy, FrozenCopy):
            policy.network.load_state_dict(state)
        else:
            _adapters.load_adapter_state(self.network, state, REFERENCE)

    @property
    def _trains_adapter(self) -> bool:
        return TRAINED in getattr(self.network, "peft_config", {})

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name; of a split network by `_sharding.whole`."""
        state: dict[str, Tensor] = _sharding.whole(self._own_state())
        return state

    def _own_state(self) -> dict[str, Tensor]:
        return _adapters.adapter_state(self.network) if self._trains_adapter else self.network.state_dict()

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what `trained_state` gave, in place."""
        own = self._own_state()
        state = {name: _sharding.part(tensor, own.get(name)) for name, tensor in state.items()}
        if self._trains_adapter:
            _adapters.load_adapter_state(self.network, state)
        else:
            self.network.load_state_dict(state)

    def training_settings(self) -> dict[str, Setting]:
        """What the network is trained under, by the note of it in the file of an adapter."""
        raise NotImplementedError

    def save_adapter(self, folder: str, trained: dict[str, Tensor] | None = None) -> None:
        """Writes the LoRA as diffusers loads it, or the whole network in a folder named as its part is.

        Args:
            folder: where to.
            trained: of a split network what `trained_state` gave; None: what the network holds.
        """
        if self._trains_adapter:
            state = trained or _adapters.adapter_state(self.network)
            config = _adapters.trained_config(self.network)
            self.lora_files.write(state, config, folder, as_metadata(self.training_settings()))
            return
        network = self.network
        if trained is not None:
            network = self.parts.blueprint(self.network_part)
            network.load_state_dict(trained, assign=True)
        network.save_pretrained(f"{folder}/{self.network_part}")


def _take_memory(network: nn.Module) -> None:
    """Moves the parameters out of the file they were read from, into memory that is aligned.

    A weight that starts anywhere in a file is multiplied along another path than its aligned copy, the
    reference: their answers to a single image would differ in the last bits, and step 0 not be exact.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()

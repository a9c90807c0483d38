"""LoRA on a diffusers network: fresh or from a file, held as a reference, activated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.common.draws import seed_of
from diffalign.common.errors import UserError, brief
from diffalign.models._base import TRAINED
from diffalign.models._lora_files import NOUNS, LoraFile, LoraFiles
from diffalign.models._spec import AdapterSpec


def check(network: Any, files: LoraFiles, spec: AdapterSpec) -> None:
    """Refuses what `add_fresh` and `add_from_file` would; a network without memory for weights will do."""
    if spec.init is None:
        add_fresh(network, replace(spec, dora=False), seed=0)  # DoRA needs weights to measure
    else:
        _read_trainable(files, spec.init, network)


def add_fresh(network: Any, spec: AdapterSpec, *, seed: int) -> None:
    """Adds the adapter "trained" that changes nothing yet; its random half depends on `seed` alone.

    The spec names its targets (`ModelSpec.with_targets`).
    """
    targets = list(spec.targets or ())
    _check_targets(network, targets)
    alpha: Any = spec.rank if spec.alpha is None else spec.alpha  # peft's annotation knows whole numbers only
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=targets,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        try:
            network.add_adapter(config, adapter_name=TRAINED)
        except ValueError as error:
            raise UserError(f"adapter.targets={targets}: {brief(error)}") from error
    _to_float32(network)
    if spec.dora:
        _remeasure_magnitudes(network)


def add_from_file(network: Any, files: LoraFiles, path: str, *, dropout: float) -> None:
    """Adds the adapter at `path` as "trained".

    Raises:
        UserError: no such adapter, one for another architecture, or one that also changes the text encoders.
    """
    file = _read_trainable(files, path, network)
    files.place(network, TRAINED, file, path)
    for layer in _layers(network):
        if TRAINED in layer.lora_dropout:
            layer.lora_dropout[TRAINED] = nn.Dropout(dropout) if dropout else nn.Identity()
    activate(network, TRAINED)
    _to_float32(network)
    # diffusers has brought the weights to the base's precision by now: take the file's own bits again.
    exact = files.network_state(file)
    with torch.no_grad():
        for key, tensor in adapter_state(network).items():
            tensor.copy_(exact[key])


def _read_trainable(files: LoraFiles, path: str, network: Any) -> LoraFile:
    file = files.read(path, network)
    if not files.is_of_network(file):
        raise UserError(
            f"adapter {path} also changes the text encoders: only {NOUNS[files.part]} adapters can be "
            "trained on, judged, or drawn with under encode_first; merge it into the base first"
        )
    return file


def add_frozen_copy(network: Any, name: str) -> None:
    """Adds a copy of the adapter "trained" under `name`, without dropout and without gradients."""
    config = network.peft_config[TRAINED]
    plain = {**config.to_dict(), "lora_dropout": 0.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is the purpose
        network.add_adapter(type(config)(**_known_fields(type(config), plain)), adapter_name=name)
    _to_float32(network)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in parameters.items():
            if _belongs_to(TRAINED, parameter_name):
                parameters[parameter_name.replace(f".{TRAINED}", f".{name}")].copy_(parameter)
    activate(network, TRAINED)


def activate(network: Any, name: str) -> None:
    """Makes `name` the only active and the only trainable adapter."""
    for layer in _layers(network):
        layer.enable_adapters(True)
        layer.set_adapter(name)
    for parameter_name, parameter in network.named_parameters():
        parameter.requires_grad_(_belongs_to(name, parameter_name))


def _belongs_to(adapter: str, parameter_name: str) -> bool:
    return f".{adapter}." in parameter_name or parameter_name.endswith(f".{adapter}")


def adapter_state(network: Any, name: str = TRAINED) -> dict[str, Tensor]:
    """Tensors of the adapter `name` by peft name."""
    return get_peft_model_state_dict(network, adapter_name=name)


def load_adapter_state(network: Any, state: dict[str, Tensor], name: str = TRAINED) -> None:
    """Puts tensors of `adapter_state` back in place."""
    set_peft_model_state_dict(network, state, adapter_name=name)


def trained_config(network: Any) -> dict[str, Any]:
    """peft's settings of the adapter "trained"."""
    config: dict[str, Any] = network.peft_config[TRAINED].to_dict()
    return config


def _check_targets(network: Any, targets: Sequence[str]) -> None:
    """Refuses a target that names no layer; peft itself is content when any one of them does."""
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"adapter.targets: {type(network).__name__} has no layer {target!r}; leave targets out for "
                "its attention layers (to_q, to_k, to_v, to_out.0 and those of its text)"
            )


def _to_float32(network: Any) -> None:
    # Adapter weights are masters: updates of 1e-5 vanish in half precision.
    for name, parameter in network.named_parameters():
        if ".lora_" in name and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _remeasure_magnitudes(network: Any) -> None:
    # Over a half-precision base peft rounds DoRA's magnitudes to that precision but divides by norms taken in
    # float32: the fresh adapter would change the base (at beta 5000 a step-0 logit of 2.5 on a tiny UNet,
    # measured on 0.21).
    for layer in _layers(network):
        if TRAINED in getattr(layer, "lora_magnitude_vector", {}):
            layer.lora_magnitude_vector[TRAINED].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[TRAINED].weight,
                lora_B=layer.lora_B[TRAINED].weight,
                scaling=layer.scaling[TRAINED],
            )


def _layers(network: Any) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _known_fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in values.items() if key in cls.__dataclass_fields__ and key != "peft_type"
    }

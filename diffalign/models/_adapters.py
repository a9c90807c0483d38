"""LoRA on a diffusers network: fresh, from a file, and saved so that plain diffusers loads it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.common.draws import seed_of
from diffalign.common.errors import UserError, brief
from diffalign.models._base import TRAINED
from diffalign.models._spec import AdapterSpec

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


def check(network: Any, pipeline_class: Any, spec: AdapterSpec) -> None:
    """Refuses what `add_fresh` and `add_from_file` would; a network without memory for weights will do."""
    if spec.init is None:
        add_fresh(network, replace(spec, dora=False), seed=0)  # DoRA needs weights to measure
    else:
        _read_trainable(pipeline_class, spec.init, network)


def add_fresh(network: Any, spec: AdapterSpec, *, seed: int) -> None:
    """Adds the adapter "trained" that changes nothing yet; its random half depends on `seed` alone."""
    _check_targets(network, spec.targets)
    alpha: Any = spec.rank if spec.alpha is None else spec.alpha  # peft's annotation knows whole numbers only
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=list(spec.targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        try:
            network.add_adapter(config, adapter_name=TRAINED)
        except ValueError as error:
            raise UserError(f"adapter.targets={list(spec.targets)}: {brief(error)}") from error
    _to_float32(network)
    if spec.dora:
        _remeasure_magnitudes(network)


def add_from_file(network: Any, pipeline_class: Any, path: str, *, dropout: float) -> None:
    """Adds the adapter at `path` as "trained".

    Raises:
        UserError: no such adapter, one for another architecture, or one that also changes the text encoders.
    """
    state, alphas, metadata = _read_trainable(pipeline_class, path, network)
    place(pipeline_class, path, network, TRAINED, state, alphas, metadata)
    for layer in _layers(network):
        if TRAINED in layer.lora_dropout:
            layer.lora_dropout[TRAINED] = nn.Dropout(dropout) if dropout else nn.Identity()
    activate(network, TRAINED)
    _to_float32(network)
    # diffusers has brought the weights to the base's precision by now: take the file's own bits again.
    exact = peft_names(state)
    with torch.no_grad():
        for key, tensor in adapter_state(network).items():
            tensor.copy_(exact[key])


def _read_trainable(pipeline_class: Any, path: str, network: Any) -> tuple[dict[str, Tensor], Any, Any]:
    state, alphas, metadata = read_adapter(pipeline_class, path, network)
    if any(not key.startswith("unet.") for key in state):
        raise UserError(
            f"adapter.init {path} also changes the text encoders: only UNet adapters can be trained on; "
            "merge it into the base first"
        )
    return state, alphas, metadata


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


def save(
    network: Any, pipeline_class: Any, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter "trained", or a `state` of it, so that it reloads equal."""
    write(pipeline_class, state or adapter_state(network), network.peft_config[TRAINED].to_dict(), folder)


def write(pipeline_class: Any, state: dict[str, Tensor], config: dict[str, Any], folder: str | Path) -> None:
    """Writes an adapter's tensors with peft's settings as the metadata that makes it reload equal.

    Without metadata alpha != rank, rsLoRA and DoRA reload wrong; with a dropout in the metadata, dropout
    stays active after loading (both measured on diffusers 0.42, peft 0.21). So: metadata, with dropout 0.
    """
    config = {**config, "lora_dropout": 0.0, "inference_mode": True}
    # peft holds names as sets, whose order changes with the process: sorted, equal runs write equal files.
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    pipeline_class.save_lora_weights(
        str(folder),
        unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in state.items()},
        unet_lora_adapter_metadata=metadata,
        weight_name=WEIGHTS_FILE,
    )


def read_adapter(
    pipeline_class: Any, path: str, network: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """`(state, alphas, metadata)` of an adapter in any layout that diffusers reads; it fits `network`.

    Raises:
        UserError: nothing there, not an adapter, or layers that the network lacks or has in another size.
    """
    local = Path(path)
    if not local.exists() and (local.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise UserError(f"adapter {path} does not exist: give a folder, a .safetensors file or a hub id")
    for inside, instead in (("adapter", f"give {path}/adapter"), ("unet", f"use model.unet={path}/unet")):
        if (local / inside).is_dir():
            what = "the folder of a run" if inside == "adapter" else "a whole UNet"
            raise UserError(f"{path} is {what}, not an adapter: {instead}")
    try:
        state, alphas, metadata = pipeline_class.lora_state_dict(
            path, unet_config=network.config, return_lora_metadata=True
        )
    except Exception as error:  # converting a foreign layout, or asking the hub, fails in many ways
        raise UserError(f"cannot read the adapter {path}: {brief(error)}") from error
    if not state or not all("lora" in key for key in state):
        raise UserError(
            f"{path} holds no LoRA weights: give an adapter that diffusers, kohya or diffalign wrote"
        )
    _check_fits(state, network, path)
    return state, alphas and _alphas_by_layer(alphas), metadata


def place(
    pipeline_class: Any,
    path: str,
    network: Any,
    name: str,
    state: dict[str, Tensor],
    alphas: Any,
    metadata: Any,
) -> None:
    """Adds to `network`, as `name`, what `read_adapter` has read from `path`.

    Raises:
        UserError: the tensors and the settings beside them contradict one another.
    """
    try:
        pipeline_class.load_lora_into_unet(state, alphas, network, adapter_name=name, metadata=metadata)
    except Exception as error:  # peft and torch find many things wrong, in types of many kinds
        raise UserError(f"cannot use the adapter {path}: {brief(error)}; get its whole file") from error


def _alphas_by_layer(alphas: dict[str, Any]) -> dict[str, Any]:
    """Kohya's alphas under the names of their layers.

    diffusers (0.42) names those of attention layers by their tensors; where alphas differ from layer to
    layer peft (0.21) then ignores them, with a warning.
    """
    named = {}
    for key, alpha in alphas.items():
        name = key.removesuffix(".alpha")
        for layer in peft_names({name: alpha}):
            name = f"unet.{layer.partition('.lora_')[0]}"
        named[f"{name}.alpha"] = alpha
    return named


def _check_targets(network: Any, targets: Sequence[str]) -> None:
    """Refuses a target that names no layer; peft itself is content when any one of them does."""
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"adapter.targets: {type(network).__name__} has no layer {target!r}; attention layers "
                "are to_q, to_k, to_v, to_out.0"
            )


def peft_names(state: dict[str, Any]) -> dict[str, Any]:
    """The UNet's tensors by peft's names, whichever layout (peft, older diffusers, kohya) the file has."""
    inside = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    if not inside or "lora_A" in next(iter(inside)):
        return inside
    converted: dict[str, Any] = convert_unet_state_dict_to_peft(inside)
    return converted


def _check_fits(state: dict[str, Tensor], network: Any, path: str) -> None:
    named = peft_names(state)
    for layer, ranks in _ranks(named).items():
        if len(ranks) < 2 or ranks[0] != ranks[1]:
            raise UserError(
                f"adapter {path} is not whole: the factors of {layer} do not fit one another; get it anew"
            )
    for key, value in named.items():
        for marker, axis, side in ((".lora_A.", 1, "inputs"), (".lora_B.", 0, "outputs")):
            layer_name, found, _ = key.partition(marker)
            if not found:
                continue
            weight = _weight_of(network, layer_name)
            if weight is None or weight.shape[axis] != value.shape[axis]:
                base = "has no such layer" if weight is None else f"has {weight.shape[axis]} {side} there"
                raise UserError(
                    f"adapter {path} is for another architecture: {layer_name} has {value.shape[axis]} "
                    f"{side}, the base {base}; use the base it was trained on"
                )


def _ranks(named: dict[str, Tensor]) -> dict[str, list[int]]:
    """Layer -> the rank that each of its two factors has; one number where a factor is missing."""
    found: dict[str, list[int]] = {}
    for key, value in named.items():
        for marker, axis in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
            if key.endswith(marker):
                found.setdefault(key.removesuffix(marker), []).append(value.shape[axis])
    return found


def _weight_of(network: Any, layer_name: str) -> Tensor | None:
    try:
        layer = network.get_submodule(layer_name)
    except AttributeError:
        return None
    return getattr(getattr(layer, "base_layer", layer), "weight", None)


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

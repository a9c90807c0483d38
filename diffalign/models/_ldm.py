"""The original layout of Stable Diffusion files: the names that other programs know the layers by.

Source of the names: the published SD 1.5 and SDXL files, as `diffusers.loaders.single_file_utils` (0.42)
reads them. Names go one way here, from diffusers to the original; diffusers' own loader is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.common.errors import UserError

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_PLACED = re.compile(
    r"(?P<where>down_blocks\.\d+|mid_block|up_blocks\.\d+)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


def unet_layer_name(layer: str, config: Mapping[str, Any]) -> str:
    """The original name of a UNet's layer, e.g. `input_blocks.4.1.proj_in`.

    Args:
        layer: its name in diffusers, e.g. `down_blocks.1.attentions.0.proj_in`.
        config: of the UNet; how many layers its blocks have, and which of them attend.

    Raises:
        UserError: the original layout has no such layer.
    """
    if layer in _OUTER:
        return _OUTER[layer]
    layers = config["layers_per_block"]
    found = _PLACED.fullmatch(layer)
    if found is None or not isinstance(layers, int):
        raise _no_name("UNet", layer)
    where, kind, number, rest = found["where"], found["kind"], int(found["number"]), found["rest"]
    if kind == "resnets":
        rest = _renamed(rest, _RESNET, "UNet", layer)
    if where == "mid_block":
        return f"middle_block.{2 * number if kind == 'resnets' else 2 * number + 1}.{rest}"
    block = int(where.rpartition(".")[2])
    first = block * (layers + 1)
    if where.startswith("down"):
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.{_renamed(rest, {'conv': 'op'}, 'UNet', layer)}"
        return f"input_blocks.{first + number + 1}.{'01'[kind == 'attentions']}.{rest}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][block]
        return f"output_blocks.{first + layers}.{2 if attends else 1}.{rest}"
    return f"output_blocks.{first + number}.{'01'[kind == 'attentions']}.{rest}"


def unet_state(network: Any) -> dict[str, Tensor]:
    """The UNet's tensors by their original names."""
    named = {}
    for name, tensor in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        named[f"{UNET_PREFIX}{unet_layer_name(layer, network.config)}.{leaf}"] = tensor
    return named


def vae_state(vae: Any) -> dict[str, Tensor]:
    """The VAE's tensors by their original names; its attention is made of 1x1 convolutions there."""
    blocks = len(vae.config.block_out_channels)
    named = {}
    for name, tensor in vae.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if ".attentions." in layer and leaf == "weight" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        named[f"{VAE_PREFIX}{_vae_layer_name(layer, blocks)}.{leaf}"] = tensor
    return named


def _vae_layer_name(layer: str, blocks: int) -> str:
    if layer in ("quant_conv", "post_quant_conv"):
        return layer
    side, _, inner = layer.partition(".")
    if inner in ("conv_in", "conv_out", "conv_norm_out"):
        return f"{side}.{inner.replace('conv_norm_out', 'norm_out')}"
    found = _PLACED.fullmatch(inner)
    if found is None:
        raise _no_name("VAE", layer)
    where, kind, number, rest = found["where"], found["kind"], int(found["number"]), found["rest"]
    if kind == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
    if where == "mid_block":
        if kind == "resnets":
            return f"{side}.mid.block_{number + 1}.{rest}"
        return f"{side}.mid.attn_{number + 1}.{_renamed(rest, _VAE_ATTENTION, 'VAE', layer)}"
    block = int(where.rpartition(".")[2])
    way, level = ("down", block) if where.startswith("down") else ("up", blocks - 1 - block)
    if kind == "resnets":
        return f"{side}.{way}.{level}.block.{number}.{rest}"
    if kind == "attentions":
        raise _no_name("VAE", layer)
    return f"{side}.{way}.{level}.{way}sample.{rest}"


def clip_state(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of OpenAI's CLIP text encoder, that of SD 1.x and SDXL's first, by transformers' names.

    `text_projection` is no part of that layout and is left out.
    """
    return {
        f"{prefix}text_model.{name}": tensor
        for name, tensor in _text_model(encoder).items()
        if not name.startswith("text_projection")
    }


def open_clip_state(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of SDXL's second text encoder by open_clip's names.

    Queries, keys and values are one matrix there, and the projection is the transposed one.
    """
    state = _text_model(encoder)
    named = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": state.pop("text_projection.weight").T,
    }
    while state:
        name = next(iter(state))
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None:
            raise _no_name("text encoder", name)
        layer, inner, leaf = found.groups()
        block = f"transformer.resblocks.{layer}"
        if inner.startswith("self_attn.") and inner.endswith(("q_proj", "k_proj", "v_proj")):
            parts = [state.pop(f"encoder.layers.{layer}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
            named[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
        else:
            named[f"{block}.{_renamed(inner, _OPEN_CLIP, 'text encoder', name)}.{leaf}"] = state.pop(name)
    return {f"{prefix}{name}": tensor for name, tensor in named.items()}


def _text_model(encoder: Any) -> dict[str, Tensor]:
    """The tensors without `text_model.`, which some classes and versions of transformers have in front."""
    state: dict[str, Tensor] = encoder.state_dict()
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _renamed(name: str, names: Mapping[str, str], part: str, whole: str) -> str:
    if name not in names:
        raise _no_name(part, whole)
    return names[name]


def _no_name(part: str, layer: str) -> UserError:
    return UserError(
        f"the original layout has no name for the {part}'s layer {layer}: write it in the layout of diffusers"
    )

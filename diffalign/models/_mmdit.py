"""LoRAs of SD3 and FLUX.1 transformers by the original names, which other programs know the layers by.

Source of the names: the published SD3, SD3.5 and FLUX.1 files, as `diffusers.loaders.single_file_utils`
(0.42) reads them. kohya's sd-scripts (48d368f) write `lora_unet_` in front of them and `_` for each dot;
ComfyUI (17358c8) reads that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.common.errors import UserError

_FACTORS = (".lora_A.weight", ".lora_B.weight")
_Layers = Mapping[str, tuple[str, ...]]
"""Original layer -> the layers of diffusers whose rows it holds, from above."""

_FLUX_MLP_RATIO = 4  # rows of a single block's `proj_mlp` for one of `to_q`; diffusers has no setting for it


@dataclass(frozen=True)
class _Layout:
    """The original names of one family.

    Attributes:
        outer: the layers outside the blocks.
        blocks: a list of blocks in diffusers -> its original name, and the layers of one block.
    """

    outer: _Layers
    blocks: Mapping[str, tuple[str, _Layers]]


_SD3 = _Layout(
    outer={
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    blocks={
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        )
    },
)
_FLUX = _Layout(
    outer={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "final_layer.linear": ("proj_out",),
    },
    blocks={
        "transformer_blocks": (
            "double_blocks",
            {
                "img_mod.lin": ("norm1.linear",),
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn.proj": ("attn.to_out.0",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mod.lin": ("norm1_context.linear",),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "modulation.lin": ("norm.linear",),
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
            },
        ),
    },
)


def sd3_kohya(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of an SD3 or SD3.5 LoRA as kohya's scripts name them; diffusers (0.42) cannot read these.

    A layer of several parts (queries, keys and values) is one LoRA there: `down` stacks the parts' factors,
    `up` is block diagonal, with rows of zeros for the parts that the adapter leaves alone.

    Convention: kohya multiplies `up @ down` by `alpha / rank`. Here `alpha` is the rank and `up` carries the
    scale: so parts may differ in scale, and a reader may ignore `alpha` (diffusers does in FLUX.1's final
    layer).

    Args:
        state: the factors by peft's names, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.
        scales: layer -> what its `up @ down` is multiplied by.

    Raises:
        UserError: the original layout has no such layer, or there is more than factors (DoRA, biases).
    """
    return _kohya(state, scales, _SD3)


def flux_kohya(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of a FLUX.1 LoRA as kohya's scripts name them; the rest as in `sd3_kohya`.

    diffusers (0.42) reads these, but leaves the layers outside the blocks out without a word.
    """
    return _kohya(state, scales, _FLUX)


def _kohya(state: Mapping[str, Tensor], scales: Mapping[str, float], layout: _Layout) -> dict[str, Tensor]:
    taken = {f"{layer}{factor}" for layer in scales for factor in _FACTORS}
    other = [key for key in state if key not in taken]
    if other:
        raise UserError(f"format=kohya cannot carry {other[0]}: use format=merged or diffusers")
    factors: dict[tuple[str, tuple[str, ...]], dict[str, tuple[Tensor, Tensor]]] = {}
    for layer, scale in scales.items():
        original, parts, part = _place(layer, layout)
        down, up = (state[f"{layer}{factor}"] for factor in _FACTORS)
        up = up * scale
        if _has_halves_swapped(part, down, up):
            up = torch.cat(up.chunk(2)[::-1])
        factors.setdefault((original, parts), {})[part] = (down, up)
    named = {}
    for (original, parts), known in factors.items():
        down, up = _joined(known, parts)
        name = f"lora_unet_{original.replace('.', '_')}"
        named[f"{name}.lora_down.weight"] = down
        named[f"{name}.lora_up.weight"] = up
        named[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return named


def _place(layer: str, layout: _Layout) -> tuple[str, tuple[str, ...], str]:
    """(original layer, its parts, which of them `layer` is)."""
    layers, prefix, part = layout.outer, "", layer
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    if found and found[1] in layout.blocks:
        blocks, layers = layout.blocks[found[1]]
        prefix, part = f"{blocks}.{found[2]}.", found[3]
    for original, parts in layers.items():
        if part in parts:
            return prefix + original, parts, part
    raise UserError(
        f"format=kohya: the original layout has no name for the transformer's layer {layer}; "
        "use format=diffusers"
    )


def _has_halves_swapped(part: str, down: Tensor, up: Tensor) -> bool:
    """Whether these are the rows of a scale and a shift alone, which the original has the other way round.

    So has the final layer, and the context stream of SD3's last block. The other modulations have gates and
    six or nine times as many rows as columns, in one order everywhere.
    """
    return part in ("norm_out.linear", "norm1_context.linear") and up.shape[0] == 2 * down.shape[1]


def _joined(factors: Mapping[str, tuple[Tensor, Tensor]], parts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """One (down, up) of a layer's parts; those without factors get rows of zeros."""
    if len(parts) == 1:
        return factors[parts[0]]
    heights = {part: _FLUX_MLP_RATIO if part == "proj_mlp" else 1 for part in parts}
    known, (_, up) = next(iter(factors.items()))
    height = up.shape[0] // heights[known]
    present = [factors[part] for part in parts if part in factors]
    ups = [factors[part][1] if part in factors else up.new_zeros(height * heights[part], 0) for part in parts]
    return torch.cat([down for down, _ in present]), torch.block_diag(*ups)

"""LoRAs of SD3 and FLUX.1 transformers by the original names, written and read.

Source of the names: the published SD3, SD3.5 and FLUX.1 files, as `diffusers.loaders.single_file_utils`
(0.42) reads them. kohya's sd-scripts (48d368f) write `lora_unet_` in front of them and `_` for each dot;
ComfyUI (17358c8) reads that, diffusers of SD3 nothing and of FLUX.1 the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.models._lora_files import LoraFiles

_FACTORS = (".lora_A.weight", ".lora_B.weight")
_PREFIX = "lora_unet_"
_NEEDED = {"lora_down.weight", "lora_up.weight"}
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


class KohyaFiles(LoraFiles):
    """Reads also what kohya's scripts write of a transformer.

    Args:
        pipeline_class: the diffusers pipeline.
        part: the network's name in it.
        from_kohya: `sd3_from_kohya` or `flux_from_kohya`.
    """

    def __init__(
        self, pipeline_class: Any, part: str, from_kohya: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        super().__init__(pipeline_class, part)
        self.from_kohya = from_kohya

    def _in_diffusers(
        self, state: dict[str, Tensor], network: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        if not all(key.startswith(_PREFIX) for key in state):  # those of text encoders are left to diffusers
            return super()._in_diffusers(state, network)
        return {f"{self.part}.{key}": tensor for key, tensor in self.from_kohya(state).items()}, None


def sd3_from_kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of kohya's tensors of an SD3 or SD3.5 LoRA by peft's names; the way back from `sd3_kohya`.

    A joint layer becomes one LoRA for each of its parts, of the ranks that act on it; those that nothing acts
    on get none. Scales are folded into `lora_B`, in float32 where they are not 1.

    Raises:
        UserError: the original layout has no such layer, or there is more than factors and alphas.
    """
    return _from_kohya(state, _SD3)


def flux_from_kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of kohya's tensors of a FLUX.1 LoRA by peft's names; the rest as in `sd3_from_kohya`."""
    return _from_kohya(state, _FLUX)


def _from_kohya(state: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, leaf = key.partition(".")
        found.setdefault(name, {})[leaf] = tensor
    factors: dict[str, Tensor] = {}
    for name, leaves in found.items():
        if not _NEEDED <= leaves.keys() <= _NEEDED | {"alpha"}:
            raise UserError(f"{name} has {', '.join(sorted(leaves))}, which is no LoRA of kohya's")
        prefix, parts = _parts_of(name, layout)
        down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
        scale = float(leaves.get("alpha", down.shape[0])) / down.shape[0]
        up = up if scale == 1.0 else up.float() * scale
        for part, pair in _taken_apart(down, up, parts).items():
            factors |= {f"{prefix}{part}{factor}": one for factor, one in zip(_FACTORS, pair, strict=True)}
    return factors


def _parts_of(name: str, layout: _Layout) -> tuple[str, tuple[str, ...]]:
    """What stands in front of the names of its parts, and the parts of the layer that kohya calls `name`."""
    layers, prefix, inner = layout.outer, "", name.removeprefix(_PREFIX)
    for blocks, (original, of_block) in layout.blocks.items():
        found = re.fullmatch(rf"{original}_(\d+)_(.+)", inner)
        if found:
            layers, prefix, inner = of_block, f"{blocks}.{found[1]}.", found[2]
            break
    for original, parts in layers.items():
        if original.replace(".", "_") == inner:
            return prefix, parts
    raise UserError(f"the original layout of this family has no layer {name}")


def _taken_apart(down: Tensor, up: Tensor, parts: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) of each part of a layer; none of those whose rows are zeros, while others are not."""
    if len(parts) == 1:
        swapped = _has_halves_swapped(parts[0], down, up)
        return {parts[0]: (down, torch.cat(up.chunk(2)[::-1]) if swapped else up)}
    heights = [_height_of(part) for part in parts]
    unit = up.shape[0] // sum(heights)
    pairs = {}
    for part, rows in zip(parts, up.split([unit * height for height in heights]), strict=True):
        acting = rows.any(dim=0) | ~up.any()  # a fresh LoRA acts nowhere yet
        if acting.any():
            pairs[part] = (down[acting], rows[:, acting])
    return pairs


def _height_of(part: str) -> int:
    """Rows of a part of a joint layer, for one row of the others."""
    return _FLUX_MLP_RATIO if part == "proj_mlp" else 1


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
        name = f"{_PREFIX}{original.replace('.', '_')}"
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
    known, (_, up) = next(iter(factors.items()))
    height = up.shape[0] // _height_of(known)
    present = [factors[part] for part in parts if part in factors]
    ups = [
        factors[part][1] if part in factors else up.new_zeros(height * _height_of(part), 0) for part in parts
    ]
    return torch.cat([down for down, _ in present]), torch.block_diag(*ups)

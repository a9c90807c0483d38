"""A LoRA by the original names changes the weights as it does by those of diffusers, in every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.common.errors import UserError
from diffalign.models._mmdit import flux_from_kohya, flux_kohya, sd3_from_kohya, sd3_kohya

SD3 = (SD3Transformer2DModel, sd3_kohya, convert_sd3_transformer_checkpoint_to_diffusers)
FLUX = (FluxTransformer2DModel, flux_kohya, convert_flux_transformer_checkpoint_to_diffusers)
LARGE = {"num_attention_heads": 38, "caption_projection_dim": 2432, "num_layers": 38, "qk_norm": "rms_norm"}
MEDIUM = {"num_attention_heads": 24, "caption_projection_dim": 1536, "num_layers": 24}
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
PUBLISHED: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any], int]] = {
    "sd3-medium": (SD3, MEDIUM, 2_028_328_000),
    "sd3.5-medium": (SD3, {**MEDIUM, **DUAL}, 2_243_171_520),
    "sd3.5-large": (SD3, LARGE, 8_056_627_520),
    "flux.1-dev": (FLUX, {"guidance_embeds": True}, 11_901_408_320),
}
"""What the transformers are made of, and how many parameters that gives."""


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def published(name: str) -> tuple[Any, dict[str, nn.Module]]:
    """The network without memory and its layers."""
    (network_class, _, _), config, parameters = PUBLISHED[name]
    with init_empty_weights():
        network = network_class(**config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    return network, layers_of(network)


def drawn_factors(layers: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Random factors by peft's names; ranks 1, 2, 3 and scales differ from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    state, scales = {}, {}
    for number, (name, layer) in enumerate(layers.items()):
        rank, (rows, columns, *kernel) = 1 + number % 3, layer.weight.shape
        shapes = {"A": (rank, columns, *kernel), "B": (rows, rank, *(1 for _ in kernel))}
        for letter, shape in shapes.items():
            state[f"{name}.lora_{letter}.weight"] = torch.randn(
                shape, generator=generator, dtype=torch.float64
            )
        scales[name] = 0.25 * (1 + number % 5)
    return state, scales


def probed(down: Tensor, up: Tensor) -> Tensor:
    """`up @ down` times a fixed vector: as telling as the dense change, and small at the true widths."""
    down = down.flatten(1)
    return up.flatten(1) @ (down @ torch.linspace(-1, 2, down.shape[1], dtype=down.dtype).cos())


def dense(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


Change = Callable[[Tensor, Tensor], Tensor]


def peft_changes(state: dict[str, Tensor], scales: dict[str, float], change: Change) -> dict[str, Tensor]:
    """Each layer's change by its name in diffusers."""
    return {
        name: change(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) * scale
        for name, scale in scales.items()
    }


def kohya_changes(named: dict[str, Tensor], change: Change) -> dict[str, Tensor]:
    """Each layer's change by its name in kohya's file, scaled as kohya and ComfyUI scale."""
    names = {key.partition(".")[0] for key in named}
    leaves = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(named) == {f"{name}.{leaf}" for name in names for leaf in leaves}
    return {
        name: change(down, named[f"{name}.lora_up.weight"]) * (named[f"{name}.alpha"] / down.shape[0])
        for name in names
        for down in [named[f"{name}.lora_down.weight"]]
    }


class Original(dict[str, Any]):
    """A file of the original layout, as diffusers' converters read it: each weight is that layer's change.

    Biases and norms, which no LoRA changes, are zeros; so are the weights without a change.
    """

    def __init__(self, changes: dict[str, Tensor], config: Any) -> None:
        blocks = [f"joint_blocks.{i}.x_block" for i in range(config["num_layers"])]
        blocks += [f"joint_blocks.{i}.x_block.attn2." for i in config.get("dual_attention_layers", ())]
        if "num_single_layers" in config:
            blocks = [f"double_blocks.{i}.img" for i in range(config["num_layers"])]
            blocks += [f"single_blocks.{i}.linear" for i in range(config["num_single_layers"])]
            blocks += ["guidance_in"] if config["guidance_embeds"] else []
        super().__init__({name: None for name in blocks} | {"context_embedder.weight": torch.zeros(1)})
        self.changes, self.unread, self.unchanged = changes, set(changes), set[str]()

    def pop(self, key: str, *_: Any) -> Any:
        layer, _, leaf = key.rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}"
        if name in self.changes and leaf == "weight":
            self.unread.remove(name)
            return self.changes[name]
        if leaf == "weight" and not layer.endswith((".ln_q", ".ln_k")):
            self.unchanged.add(layer)
        return torch.zeros(21504)


def read_back(name: str, named: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Original]:
    """What diffusers makes of the kohya file's changes, by its own names; and the file."""
    original = Original(kohya_changes(named, probed), config)
    converted = PUBLISHED[name][0][2](original)
    return {key.removesuffix(".weight"): value for key, value in converted.items()}, original


def assert_equal_changes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for layer, change in expected.items():
        torch.testing.assert_close(found[layer], change, rtol=1e-9, atol=1e-9, msg=layer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_of_the_published_networks_has_its_place(name: str) -> None:
    """Names, order of the parts, swapped halves: diffusers' own reader of published files brings all back."""
    network, layers = published(name)
    state, scales = drawn_factors(layers)
    found, original = read_back(name, PUBLISHED[name][0][1](state, scales), network.config)
    assert not original.unread
    assert not original.unchanged
    assert_equal_changes(found, peft_changes(state, scales, probed))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sd3-medium", ["attn.to_q", "attn.to_v"]),
        ("sd3-medium", ["attn.add_k_proj"]),
        ("sd3.5-medium", ["attn2.to_k"]),
        ("flux.1-dev", ["attn.to_v", "attn.to_k"]),
        ("flux.1-dev", ["proj_mlp"]),
        ("flux.1-dev", ["attn.to_q", "proj_mlp", "attn.add_v_proj"]),
    ],
)
def test_layers_that_the_adapter_leaves_alone_stay_as_they_are(name: str, targets: list[str]) -> None:
    network, layers = published(name)
    chosen = {layer: module for layer, module in layers.items() if layer.endswith(tuple(targets))}
    assert len(chosen) >= 13
    state, scales = drawn_factors(chosen)
    found, original = read_back(name, PUBLISHED[name][0][1](state, scales), network.config)
    assert not original.unread
    assert_equal_changes(found, peft_changes(state, scales, probed))
    assert not any(found[layer].any() for layer in layers if layer not in chosen)


def test_a_trained_sd3_changes_the_weights_as_peft_does() -> None:
    """Real adapters, convolution and rsLoRA among them: the weights that peft merges are the reference."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).double()
    layers = list(layers_of(network))
    before = {name: network.get_submodule(name).weight.detach().clone() for name in layers}
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=layers,
        rank_pattern={"to_k": 2},
        init_lora_weights=False,
    )
    network.add_adapter(config)
    state = {
        key: value.double()
        for key, value in get_peft_model_state_dict(network, adapter_name="default").items()
    }
    scales = {name: network.get_submodule(name).scaling["default"] for name in layers}
    named = sd3_kohya(state, scales)
    network.fuse_lora()
    network.unload_lora()
    original = Original(kohya_changes(named, dense), network.config)
    found = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert not original.unread
    assert not original.unchanged
    for name in layers:
        merged = network.get_submodule(name).weight
        torch.testing.assert_close(before[name] + found[f"{name}.weight"], merged, rtol=1e-6, atol=1e-6)


def as_diffusers_reads(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The changes of what diffusers makes of a kohya file of FLUX.1; it applies no alphas to them."""
    state: Any = FluxPipeline.lora_state_dict(named)
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    layers = {key.partition(".lora_")[0] for key in state}
    return peft_changes(state, dict.fromkeys(layers, 1.0), probed)


@pytest.mark.parametrize("targets", [[""], ["attn.to_q", "attn.to_v"], ["proj_mlp"]])
def test_diffusers_reads_the_flux_file(targets: list[str]) -> None:
    _, layers = published("flux.1-dev")
    chosen = {layer: module for layer, module in layers.items() if layer.endswith(tuple(targets))}
    state, scales = drawn_factors(chosen)
    found = as_diffusers_reads(flux_kohya(state, scales))
    assert_equal_changes(found, peft_changes(state, scales, probed))
    assert not any(change.any() for layer, change in found.items() if layer not in chosen)


def test_diffusers_reads_parts_of_one_rank_at_that_rank() -> None:
    """It takes a block diagonal apart again, where the ranks let it see one."""
    _, layers = published("flux.1-dev")
    chosen = [
        f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    state = {
        f"{name}.{factor}.weight": torch.ones(shape)
        for name in chosen
        for rows, columns in [layers[name].weight.shape]
        for factor, shape in {"lora_A": (2, columns), "lora_B": (rows, 2)}.items()
    }
    read: Any = FluxPipeline.lora_state_dict(flux_kohya(state, dict.fromkeys(chosen, 1.0)))
    assert {key: tensor.shape for key, tensor in read.items()} == {
        f"transformer.{key}": tensor.shape for key, tensor in state.items()
    }


def factor_changes(factors: dict[str, Tensor], change: Change) -> dict[str, Tensor]:
    """Each layer's change by factors whose scale is 1."""
    layers = {key.partition(".lora_")[0] for key in factors}
    return peft_changes(factors, dict.fromkeys(layers, 1.0), change)


@pytest.mark.parametrize("targets", ["", "attn.to_v"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read(name: str, targets: str) -> None:
    """Every layer of the published networks; each at its own rank, and none but those."""
    _, layers = published(name)
    chosen = {layer: module for layer, module in layers.items() if layer.endswith(targets)}
    state, scales = drawn_factors(chosen)
    from_kohya = flux_from_kohya if name.startswith("flux") else sd3_from_kohya
    factors = from_kohya(PUBLISHED[name][0][1](state, scales))
    assert {key: tensor.shape for key, tensor in factors.items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    assert_equal_changes(factor_changes(factors, probed), peft_changes(state, scales, probed))


def trained_by_kohya(layers: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Dense factors of original layers by (rows, columns), of alphas other than the rank."""
    generator, named = torch.Generator().manual_seed(0), {}
    for number, (layer, (rows, columns)) in enumerate(layers.items()):
        named[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
        named[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        named[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0 + number)
    return named


def test_blocks_of_flux_are_read_as_diffusers_reads_them() -> None:
    named = trained_by_kohya(
        {
            "double_blocks_3_img_attn_qkv": (3 * 3072, 3072),
            "double_blocks_18_txt_mlp_0": (12288, 3072),
            "single_blocks_37_linear1": (3 * 3072 + 12288, 3072),
            "single_blocks_0_modulation_lin": (3 * 3072, 3072),
        }
    )
    ours = factor_changes(flux_from_kohya(named), probed)
    theirs = as_diffusers_reads(dict(named))
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for layer, change in ours.items():
        torch.testing.assert_close(change, theirs[layer], rtol=1e-4, atol=1e-3)


def test_outer_layers_keep_their_alpha() -> None:
    """By hand: scale 1/2; the halves of the final modulation stand the other way round in the original."""
    named = {
        "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": torch.tensor([[1.0, 2], [0, 1]]),
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": torch.tensor(
            [[2.0, 0], [0, 2], [4, 0], [0, 4]]
        ),
        "lora_unet_final_layer_adaLN_modulation_1.alpha": torch.tensor(1.0),
    }
    for from_kohya in (sd3_from_kohya, flux_from_kohya):
        factors = from_kohya(named)
        assert {key: tensor.tolist() for key, tensor in factors.items()} == {
            "norm_out.linear.lora_A.weight": [[1, 2], [0, 1]],
            "norm_out.linear.lora_B.weight": [[2, 0], [0, 2], [1, 0], [0, 1]],
        }


def test_a_fresh_lora_of_kohya_has_all_parts() -> None:
    named = trained_by_kohya({"joint_blocks_0_x_block_attn_qkv": (6, 2)})
    named["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"].zero_()
    factors = sd3_from_kohya(named)
    assert {key: tuple(tensor.shape) for key, tensor in factors.items()} == {
        f"transformer_blocks.0.attn.to_{part}.lora_{side}.weight": shape
        for part in "qkv"
        for side, shape in {"A": (4, 2), "B": (2, 4)}.items()
    }


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (("joint_blocks", "double_blocks"), "has no layer lora_unet_double_blocks_0_x_block_attn_qkv"),
        (("x_block", "y_block"), "has no layer lora_unet_joint_blocks_0_y_block_attn_qkv"),
        (("lora_up", "hada_w1"), "has alpha, hada_w1.weight, lora_down.weight, which is no LoRA of kohya's"),
    ],
)
def test_what_is_no_lora_of_kohya(rename: tuple[str, str], told: str) -> None:
    named = trained_by_kohya({"joint_blocks_0_x_block_attn_qkv": (6, 2)})
    with pytest.raises(UserError, match=told):
        sd3_from_kohya({key.replace(*rename): tensor for key, tensor in named.items()})


def test_fused_layer_by_hand() -> None:
    """Keys are missing; queries have rank 1 and scale 2, values rank 2 and scale 1/2."""
    state = {
        "transformer_blocks.7.attn.to_v.lora_A.weight": torch.tensor([[1.0, 2], [3, 4]]),
        "transformer_blocks.7.attn.to_v.lora_B.weight": torch.tensor([[2.0, 4], [6, 8]]),
        "transformer_blocks.7.attn.to_q.lora_A.weight": torch.tensor([[5.0, 6]]),
        "transformer_blocks.7.attn.to_q.lora_B.weight": torch.tensor([[1.0], [2]]),
    }
    kept = {key: tensor.clone() for key, tensor in state.items()}
    scales = {"transformer_blocks.7.attn.to_v": 0.5, "transformer_blocks.7.attn.to_q": 2.0}
    for kohya, layer in [
        (sd3_kohya, "joint_blocks_7_x_block_attn_qkv"),
        (flux_kohya, "double_blocks_7_img_attn_qkv"),
    ]:
        named = kohya(state, scales)
        assert {key: tensor.tolist() for key, tensor in named.items()} == {
            f"lora_unet_{layer}.lora_down.weight": [[5, 6], [1, 2], [3, 4]],
            f"lora_unet_{layer}.lora_up.weight": [
                [2, 0, 0],
                [4, 0, 0],
                [0] * 3,
                [0] * 3,
                [0, 1, 2],
                [0, 3, 4],
            ],
            f"lora_unet_{layer}.alpha": 3.0,
        }
    assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    ("kohya", "layer"),
    [
        (sd3_kohya, "x_embedder"),
        (sd3_kohya, "single_transformer_blocks.0.proj_out"),
        (sd3_kohya, "transformer_blocks.0.attn.to_z"),
        (sd3_kohya, "transformer_blocks.norm1.linear"),
        (flux_kohya, "pos_embed.proj"),
        (flux_kohya, "transformer_blocks.0.attn2.to_q"),
        (flux_kohya, "single_transformer_blocks.0.attn.to_out.0"),
        (flux_kohya, "other_blocks.0.proj_out"),
    ],
)
def test_a_layer_without_an_original_name_is_refused(kohya: Any, layer: str) -> None:
    state = {f"{layer}.lora_A.weight": torch.ones(1, 2), f"{layer}.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(
        UserError, match=rf"no name for the transformer's layer {layer}; use format=diffusers$"
    ):
        kohya(state, {layer: 1.0})


@pytest.mark.parametrize("extra", ["lora_magnitude_vector", "lora_B.bias"])
@pytest.mark.parametrize("kohya", [sd3_kohya, flux_kohya])
def test_more_than_factors_is_refused(kohya: Any, extra: str) -> None:
    state = {f"proj_out.{leaf}": torch.ones(2, 2) for leaf in ("lora_A.weight", "lora_B.weight", extra)}
    with pytest.raises(UserError, match=rf"^format=kohya cannot carry proj_out\.{extra}: use format=merged"):
        kohya(state, {"proj_out": 1.0})

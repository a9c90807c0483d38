"""What is exported loads in plain diffusers with equal pictures; every layer of a true network has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.common import draws
from diffalign.common.errors import UserError
from diffalign.models import load_model
from diffalign.models._export import Lora, kohya_state
from diffalign.models._ldm import unet_layer_name
from diffalign.models._spec import AdapterSpec
from tests.tiny_training import perturb

PLAIN: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
KEYS = [("a red ring", 0), ("two cats", 1)]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *(
        "time_emb_proj",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "conv_in",
        "conv_out",
        "linear_1",
        "linear_2",
    ),
]
SPECS = {
    "alpha": AdapterSpec(rank=4, alpha=7.5, dropout=0.5),
    "rslora": AdapterSpec(rank=3, rslora=True, alpha=2),
    "everything": AdapterSpec(rank=2, rslora=True, targets=EVERYTHING),
    "dora": AdapterSpec(rank=3, dora=True),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What the UNets of SD 1.5 (859,520,964 parameters) and SDXL base 1.0 (2,567,463,684) are made of."""


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backbone, folder of its tiny pipeline)."""
    return request.param, request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def plain(base: tuple[str, str]) -> Any:
    """The pipeline as a user of diffusers loads it."""
    return quiet(PLAIN[base[0]].from_pretrained(base[1]))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any) -> Tensor:
    latents = torch.stack([draws.normal((4, 16, 16), "initial", *key) for key in KEYS])
    prompts = [prompt for prompt, _ in KEYS]
    images = pipeline(prompt=prompts, latents=latents, num_inference_steps=2, output_type="pt").images
    assert isinstance(images, Tensor)
    return images


def drawn_by_us(model: Any) -> Tensor:
    latents = model.sample([p for p, _ in KEYS], [seed for _, seed in KEYS], num_inference_steps=2)
    images = model.decode(latents)
    assert isinstance(images, Tensor)
    return images


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def trained(base: tuple[str, str], spec: AdapterSpec, folder: Path) -> Any:
    """A model whose adapter has moved far from its start; saved to `folder`."""
    model: Any = load_model(*base)
    model.start_training(spec, seed=0, with_reference=False)
    perturb(model.denoiser.trainable_parameters(), 0.05)
    model.save_adapter(str(folder))
    model.network.eval()
    return model


def weighted(base: tuple[str, str], path: Path, weight: float) -> Any:
    """A model that draws with the adapter at `path`."""
    model: Any = load_model(*base)
    model.load_adapter(str(path), weight=weight)
    return model


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def drawn_in_diffusers(plain: Any, folder: Path) -> Tensor:
    """The pictures of plain diffusers with the one adapter file in `folder`.

    Gradients are switched off first: torch multiplies along another path where a weight could get one, as
    after loading a kohya file, and that alone moves pictures by 1e-6.
    """
    (file,) = folder.iterdir()
    plain.load_lora_weights(folder, weight_name=file.name)
    plain.unet.requires_grad_(False)
    images = drawn_by(plain)
    plain.unload_lora_weights()
    return images


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["alpha", "everything"])
def test_an_exported_adapter_draws_the_same_pictures_in_plain_diffusers(
    kind: str,
    layout: str,
    base: tuple[str, str],
    plain: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of layers outside the blocks, which kohya's own scripts never look at, export says so."""
    ours = drawn_by_us(trained(base, SPECS[kind], made(tmp_path / "trained")))
    assert largest_difference(ours, drawn_by_us(load_model(*base))) > 0.01
    out = made(tmp_path / "out")
    load_model(*base).export_adapter(str(tmp_path / "trained"), str(out), layout=layout)
    assert largest_difference(drawn_in_diffusers(plain, out), ours) <= 1e-6
    said = "kohya's own scripts leave out conv_in, time_embedding.linear_1" in capsys.readouterr().err
    assert said == ((kind, layout) == ("everything", "kohya"))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_the_weight_is_in_the_file(layout: str, base: tuple[str, str], plain: Any, tmp_path: Path) -> None:
    """At strength 1 it acts as the adapter does at that weight; its tensors are the very same."""
    trained(base, SPECS["rslora"], made(tmp_path / "trained"))
    ours = drawn_by_us(weighted(base, tmp_path / "trained", -0.4))
    out = made(tmp_path / "out")
    load_model(*base).export_adapter(str(tmp_path / "trained"), str(out), layout=layout, weight=-0.4)
    assert largest_difference(drawn_in_diffusers(plain, out), ours) <= 1e-6
    (before,), (file,) = (tmp_path / "trained").iterdir(), out.iterdir()
    stored = {tensor.flatten()[0].item() for tensor in load_file(before).values()}
    assert {t.flatten()[0].item() for k, t in load_file(file).items() if not k.endswith("alpha")} == stored


def test_alphas_by_hand(base: tuple[str, str], tmp_path: Path) -> None:
    """rsLoRA scales by alpha / sqrt(rank), kohya by alpha / rank: alpha 6 of rank 4 becomes 12."""
    trained(base, AdapterSpec(rank=4, alpha=6, rslora=True), made(tmp_path / "trained"))
    for weight, alpha in ((1.0, 12.0), (0.5, 6.0)):
        out = made(tmp_path / f"out{weight}")
        load_model(*base).export_adapter(
            str(tmp_path / "trained"), str(out), layout="kohya", weight=weight, dtype="bf16"
        )
        state = load_file(out / "lora.safetensors")
        alphas = {key: tensor for key, tensor in state.items() if key.endswith(".alpha")}
        assert {tensor.item() for tensor in alphas.values()} == {alpha} and len(alphas) * 3 == len(state)
        for key, tensor in state.items():
            assert tensor.dtype == (torch.float32 if key in alphas else torch.bfloat16)


def test_layers_of_different_ranks_and_alphas(base: tuple[str, str], plain: Any, tmp_path: Path) -> None:
    """An adapter of kohya with several alphas; diffusers would take the most frequent one for all."""
    first = made(tmp_path / "first")
    trained(base, SPECS["alpha"], made(tmp_path / "trained"))
    load_model(*base).export_adapter(str(tmp_path / "trained"), str(first), layout="kohya")
    state = load_file(first / "lora.safetensors")
    layer = next(key for key in state if key.endswith("attn2_to_k.lora_down.weight")).partition(".")[0]
    for side, cut in (("lora_down", (slice(2),)), ("lora_up", (slice(None), slice(2)))):
        state[f"{layer}.{side}.weight"] = state[f"{layer}.{side}.weight"][cut].contiguous()
    state[f"{layer}.alpha"] = torch.tensor(3.75)
    save_file(state, tmp_path / "uneven.safetensors")
    ours = drawn_by_us(weighted(base, tmp_path / "uneven.safetensors", 1.0))
    for layout in ("kohya", "diffusers"):
        out = made(tmp_path / layout)
        load_model(*base).export_adapter(str(tmp_path / "uneven.safetensors"), str(out), layout=layout)
        assert largest_difference(drawn_in_diffusers(plain, out), ours) <= 1e-6


def test_a_dora_keeps_its_metadata_or_is_refused(base: tuple[str, str], plain: Any, tmp_path: Path) -> None:
    ours = drawn_by_us(trained(base, SPECS["dora"], made(tmp_path / "trained")))
    out = made(tmp_path / "out")
    with pytest.raises(UserError, match=r"format=kohya cannot carry a DoRA: .* use format=merged"):
        load_model(*base).export_adapter(str(tmp_path / "trained"), str(out), layout="kohya")
    assert not list(out.iterdir())
    load_model(*base).export_adapter(str(tmp_path / "trained"), str(out), layout="diffusers")
    assert largest_difference(drawn_in_diffusers(plain, out), ours) <= 1e-6
    with safe_open(next(out.iterdir()), "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.use_dora"] is True


def test_biases_are_not_dropped_silently() -> None:
    factors = {f"a.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    lora = Lora({**factors, "a.lora_B.bias": torch.zeros(2)}, {"use_dora": False}, {"a": 1.0})
    with pytest.raises(UserError, match=r"format=kohya cannot carry a\.lora_B\.bias"):
        kohya_state(lora, str)


@pytest.mark.parametrize("kind", ["everything", "dora"])
def test_merged_weights_draw_the_same_pictures(kind: str, base: tuple[str, str], tmp_path: Path) -> None:
    """As a whole pipeline; the base's own weights are elsewhere untouched, bit for bit."""
    trained(base, SPECS[kind], made(tmp_path / "trained"))
    ours = drawn_by_us(weighted(base, tmp_path / "trained", 0.5))
    load_model(*base).export_pipeline(str(tmp_path / "out"), adapter=str(tmp_path / "trained"), weight=0.5)
    pipeline = quiet(PLAIN[base[0]].from_pretrained(tmp_path / "out"))
    assert largest_difference(drawn_by(pipeline), ours) <= 1e-5
    before, after = load_model(*base).network.state_dict(), pipeline.unet.state_dict()  # type: ignore[attr-defined]
    assert before.keys() == after.keys()
    changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed and all(key.endswith(".weight") for key in changed)
    if kind != "everything":
        assert all(any(f".{target}." in key for target in ATTENTION) for key in changed)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in Path(base[1]).iterdir()
    )


def test_the_precision_of_a_pipeline(base: tuple[str, str], tmp_path: Path) -> None:
    load_model(*base).export_pipeline(str(tmp_path / "out"), dtype="fp16")
    files = list((tmp_path / "out").glob("*/*.safetensors"))
    assert len(files) >= 3
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), None, "holds NaN or infinity: export what an earlier step has trained"),
        (1e6, "fp16", "is too large for dtype=fp16: use dtype=bf16 or fp32"),
    ],
)
def test_weights_that_cannot_be_drawn_with(
    value: float, dtype: str | None, told: str, tiny_sd: str, tmp_path: Path
) -> None:
    trained(("sd", tiny_sd), SPECS["alpha"], made(tmp_path / "trained"))
    (path,) = (tmp_path / "trained").iterdir()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    next(iter(state.values())).fill_(value)
    save_file(state, path, metadata=metadata)
    model: Any = load_model("sd", tiny_sd)
    for layout in ("kohya", "diffusers"):
        with pytest.raises(UserError, match=told):
            model.export_adapter(str(path), str(tmp_path), layout=layout, dtype=dtype)
    with pytest.raises(UserError, match=told):
        model.export_pipeline(str(tmp_path / "out"), adapter=str(path), dtype=dtype)


def test_adapters_of_text_encoders_are_refused(tiny_sd: str, tmp_path: Path) -> None:
    trained(("sd", tiny_sd), SPECS["alpha"], made(tmp_path / "trained"))
    (path,) = (tmp_path / "trained").iterdir()
    state = load_file(path)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    state |= {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(state, path)
    with pytest.raises(
        UserError, match="changes the text encoders: only adapters of the UNet can be exported"
    ):
        load_model("sd", tiny_sd).export_adapter(str(path), str(tmp_path), layout="kohya")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_of_the_true_network_has_a_name_that_diffusers_reads_back(name: str) -> None:
    """SD 1.5 as kohya's scripts train it, by diffusers' names; SDXL by those of its file."""
    with init_empty_weights():
        network: Any = UNet2DConditionModel(**PUBLISHED[name])
    layers = [
        layer
        for layer, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert len(layers) == {"sd": 282, "sdxl": 794}[name]
    factors = {
        f"{layer}.lora_{side}.weight": torch.full((1,), float(number))
        for number, layer in enumerate(layers)
        for side in "AB"
    }
    lora = Lora(factors, {"use_dora": False}, dict.fromkeys(layers, 3.0))

    def name_of(layer: str) -> str:
        return layer if name == "sd" else unet_layer_name(layer, network.config)

    state = kohya_state(lora, name_of)
    assert len(state) == 3 * len(layers)
    read, alphas = PLAIN[name].lora_state_dict(dict(state), unet_config=network.config)
    back = convert_unet_state_dict_to_peft({key.removeprefix("unet."): t for key, t in read.items()})
    assert back.keys() == factors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in factors.items())
    assert len(alphas) == len(layers) and set(alphas.values()) == {3.0}


def test_names_of_the_sdxl_file_by_hand() -> None:
    """Some of those that one finds in sd_xl_base_1.0.safetensors and in kohya's adapters of it."""
    config = PUBLISHED["sdxl"] | {"layers_per_block": 2}
    for ours, theirs in (
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        ("up_blocks.2.resnets.2.conv1", "output_blocks.8.0.in_layers.2"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ):  # fmt: skip
        assert unet_layer_name(ours, config) == theirs
    sd = {"layers_per_block": 2, "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)}
    assert unet_layer_name("up_blocks.0.upsamplers.0.conv", sd) == "output_blocks.2.1.conv"
    for foreign in (
        "class_embedding.linear_1",
        "down_blocks.0.resnets.0.time_mixer",
        "down_blocks.0.motion.0.x",
    ):
        with pytest.raises(UserError, match=f"no name for the UNet's layer {foreign}"):
            unet_layer_name(foreign, config)

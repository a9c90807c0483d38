"""Saved adapters load in plain diffusers with equal pictures; what is no adapter for this base is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.common import draws
from diffalign.common.errors import UserError
from diffalign.models import load_model
from diffalign.models._spec import ATTENTION, AdapterSpec
from tests.tiny_training import draws_of, make_batch, perturb

KEYS = [("a red ring", 0), ("two cats", 1)]
FILE = "pytorch_lora_weights.safetensors"

PLAIN: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}

SAVED = {
    "alpha": AdapterSpec(rank=4, alpha=7.5),
    "rslora": AdapterSpec(rank=4, rslora=True, alpha=3),
    "dora": AdapterSpec(rank=3, dora=True),
    "dropout": AdapterSpec(rank=2, dropout=0.5),
    "dora-dropout": AdapterSpec(rank=2, dora=True, dropout=0.5, alpha=2),
    "convolutions": AdapterSpec(rank=2, targets=["to_q", "conv1", "proj_in"]),
}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backbone, folder of its tiny pipeline)."""
    return request.param, request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def plain(base: tuple[str, str]) -> Any:
    """The pipeline as a user of diffusers loads it, who has never heard of this package."""
    pipeline = PLAIN[base[0]].from_pretrained(base[1])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any) -> list[bytes]:
    latents = torch.stack([draws.normal((4, 16, 16), "initial", *key) for key in KEYS])
    pictures = pipeline(prompt=[prompt for prompt, _ in KEYS], latents=latents, num_inference_steps=2).images
    return [np.asarray(picture).tobytes() for picture in pictures]


def drawn_by_us(model: Any) -> list[bytes]:
    pictures = model.generate([p for p, _ in KEYS], [seed for _, seed in KEYS], num_inference_steps=2)
    return [np.asarray(picture).tobytes() for picture in pictures]


@pytest.fixture(scope="module")
def base_pictures(plain: Any) -> list[bytes]:
    return drawn_by(plain)


def trained(base: tuple[str, str], spec: AdapterSpec, folder: Path) -> Any:
    """A model whose adapter has moved far from its start; saved to `folder`."""
    model: Any = load_model(*base)
    model.start_training(spec, seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.3)
    model.save_adapter(str(folder))
    model.network.eval()
    return model


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_adapter_draws_the_same_pictures_in_plain_diffusers(
    kind: str, base: tuple[str, str], plain: Any, base_pictures: list[bytes], tmp_path: Path
) -> None:
    """Bit for bit, twice in a row; likewise through `load_adapter`; and without it the base is back."""
    ours = drawn_by_us(trained(base, SAVED[kind], tmp_path))
    assert ours != base_pictures
    for _ in range(2):
        plain.load_lora_weights(tmp_path)
        assert drawn_by(plain) == ours
        plain.unload_lora_weights()
    again: Any = load_model(*base)
    if kind == "alpha":
        assert drawn_by_us(again) == base_pictures
    again.load_adapter(str(tmp_path))
    assert drawn_by_us(again) == ours
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.target_modules"] == sorted(SAVED[kind].targets or ATTENTION)  # equal bytes


def test_a_full_network_draws_the_same_pictures_in_plain_diffusers(
    base: tuple[str, str], tmp_path: Path
) -> None:
    """As the UNet of a plain pipeline, and as `model.unet` of ours (the folder, or the one above it)."""
    model = trained(base, AdapterSpec(kind="full"), tmp_path)
    ours = drawn_by_us(model)
    pipeline = PLAIN[base[0]].from_pretrained(
        base[1], unet=UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    )
    pipeline.set_progress_bar_config(disable=True)
    assert drawn_by(pipeline) == ours
    for own in (tmp_path, tmp_path / "unet"):
        assert drawn_by_us(load_model(*base, unet=str(own))) == ours
    assert load_model(*base, unet=str(tmp_path)).fingerprint() != load_model(*base).fingerprint()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # plain diffusers warns of the second
def test_adapters_add_up_by_weight(base: tuple[str, str], plain: Any, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        model: Any = load_model(*base)
        model.start_training(SAVED["alpha"], seed=number, with_reference=False)
        perturb(model.denoiser.trainable_parameters(), 0.3, seed=number)
        model.save_adapter(str(tmp_path / name))
    ours: Any = load_model(*base)
    ours.load_adapter(str(tmp_path / "a"), weight=0.5)
    ours.load_adapter(str(tmp_path / "b"), weight=-1.0)
    plain.load_lora_weights(tmp_path / "a", adapter_name="first")
    plain.load_lora_weights(tmp_path / "b", adapter_name="second")
    plain.set_adapters(["first", "second"], [0.5, -1.0])
    expected = drawn_by(plain)
    plain.unload_lora_weights()
    assert drawn_by_us(ours) == expected


def answers(model: Any) -> tuple[Tensor, Tensor]:
    batch = make_batch(model, groups=1)
    draw = draws_of(batch)
    with torch.no_grad():
        policy = model.denoiser.predict(batch.latents, draw.t, batch.cond)
        with model.denoiser.policy("reference"):
            return policy, model.denoiser.predict(batch.latents, draw.t, batch.cond)


@pytest.mark.parametrize("kind", ["dora-dropout", "full"])
def test_what_a_run_saved_can_be_judged(kind: str, base: tuple[str, str], tmp_path: Path) -> None:
    """`load_policy`: the trained weights answer as "train", the base as "reference"."""
    spec = AdapterSpec(kind="full") if kind == "full" else SAVED[kind]
    wanted = answers(trained(base, spec, tmp_path))
    model: Any = load_model(*base)
    model.load_policy(str(tmp_path))
    found = answers(model)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert not torch.equal(found[0], found[1])
    assert not model.denoiser.trainable_parameters()


@pytest.fixture
def kohya(tiny_sd: str, tmp_path: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """An adapter in the layout of kohya's scripts, and its tensors by our names."""
    trained(("sd", tiny_sd), AdapterSpec(rank=3, alpha=5, targets=["to_q", "conv1"]), tmp_path)
    stored, renamed = load_file(tmp_path / FILE), {}
    for key, value in stored.items():
        layer, _, side = key.removeprefix("unet.").partition(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{name}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
        renamed[f"{name}.alpha"] = torch.tensor(5.0)
    path = tmp_path / "kohya.safetensors"
    save_file(renamed, path)
    yield path, stored


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_of_kohya_can_be_trained_on(
    dtype: str, kohya: tuple[Path, dict[str, Tensor]], tiny_sd: str
) -> None:
    path, stored = kohya
    model: Any = load_model("sd", tiny_sd, dtype=dtype)
    model.start_training(AdapterSpec(init=str(path)), seed=0, with_reference=True)
    state = model.trained_state()
    assert {f"unet.{name}" for name in state} == set(stored)
    assert all(torch.equal(tensor, stored[f"unet.{name}"]) for name, tensor in state.items())
    scalings = [layer.scaling["trained"] for layer in model.network.modules() if hasattr(layer, "scaling")]
    assert scalings and set(scalings) == {5 / 3}


def test_dropout_of_a_continued_adapter_is_the_one_asked_for(tiny_sd: str, tmp_path: Path) -> None:
    """On the policy only: its frozen copy answers without."""
    trained(("sd", tiny_sd), SAVED["dropout"], tmp_path)
    model: Any = load_model("sd", tiny_sd)
    model.start_training(AdapterSpec(init=str(tmp_path), dropout=0.9), seed=0, with_reference=True)
    layers = [layer for layer in model.network.modules() if hasattr(layer, "lora_dropout")]
    assert {layer.lora_dropout["trained"].p for layer in layers} == {0.9}
    assert {type(layer.lora_dropout["reference"]) for layer in layers} == {torch.nn.Identity}
    first, second = answers(model), answers(model)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_qq"], "UNet2DConditionModel has no layer 'to_qq'; leave targets out for its at"),
        (["norm1"], r"adapter\.targets=\['norm1'\]: Target module .* is not supported"),
    ],
)
def test_targets_that_cannot_be_adapted(targets: list[str], message: str, tiny_sd: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model("sd", tiny_sd).start_training(AdapterSpec(targets=targets), seed=0, with_reference=True)


def broken_file(folder: Path, kind: str) -> str:
    """Turns the adapter in `folder` into something that is none, or none for this base."""
    path = folder / FILE
    state = load_file(path)
    layer = next(key for key in state if key.endswith("attn2.to_k.lora_A.weight"))
    if kind == "wrong inputs":
        state[layer] = torch.zeros(2, 48)
    elif kind == "wrong outputs":
        state[layer.replace("lora_A", "lora_B")] = torch.zeros(17, 2)
    elif kind == "wrong layers":
        state = {key.replace("mid_block", "middle_block"): value for key, value in state.items()}
    elif kind == "text encoder":
        state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
        state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 2)
    elif kind == "half a layer":
        del state[layer.replace("lora_A", "lora_B")]
    elif kind == "factors of two ranks":
        state[layer] = state[layer][:1].clone()
    elif kind == "a vector":
        state[layer] = state[layer][0].clone()
    elif kind == "more than a LoRA":
        state["unet.conv_in.alpha"] = torch.ones(())
    elif kind == "of a transformer":
        state = {key.replace("unet.", "transformer."): value for key, value in state.items()}
    elif kind == "without prefix":
        state = {key.removeprefix("unet."): value for key, value in state.items()}
    elif kind == "DoRA of kohya":
        state = {"lora_unet_conv_in.lora_down.weight": state[layer]}
        state["lora_unet_conv_in.dora_scale"] = torch.ones(8, 1)
    elif kind == "no adapter":
        state = {"conv_in.weight": torch.zeros(2, 2)}
    metadata = {"format": "pt"}
    if kind == "settings of another rank":
        with safe_open(path, "pt") as file:
            metadata = {
                name: text.replace('"unet.r": 2', '"unet.r": 3') for name, text in file.metadata().items()
            }
    save_file(state, path, metadata=metadata)
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:300])
    if kind == "empty folder":
        path.unlink()
    if kind == "several files":
        for name in ("b", "a"):
            shutil.copy(path, folder / f"{name}.safetensors")
        path.unlink()
    return str(folder / "nowhere" if kind == "missing" else folder)


REFUSED = {
    "wrong inputs": r"another architecture: .*attn2\.to_k has 48 inputs, the base has 32 inputs there; use "
    "the",
    "wrong outputs": r"another architecture: .*attn2\.to_k has 17 outputs, the base has 16 outputs there",
    "wrong layers": r"another architecture: middle_block.*, the base has no such layer",
    "text encoder": "also changes the text encoders: only UNet adapters can be trained on",
    "half a layer": r"is not whole: the factors of .*attn2\.to_k do not fit one another; get it anew",
    "factors of two ranks": r"is not whole: the factors of .*attn2\.to_k do not fit one another",
    "settings of another rank": "cannot use the adapter .*size mismatch.*; get its whole file",
    "a vector": r"is not whole: the factors of .*attn2\.to_k do not fit one another",
    "more than a LoRA": "holds unet.conv_in.alpha beside its LoRA weights, which cannot be read: give an",
    "of a transformer": "of another family, or .*: StableDiffusionPipeline has no place for its transformer",
    "without prefix": r"of a layout that cannot be read: .* has no place for its down_blocks\.1\.",
    "DoRA of kohya": "cannot read the adapter .*: it is a DoRA in the layout of kohya",
    "several files": r"it holds several files \(a\.safetensors, b\.safetensors\); give one that diffusers",
    "no adapter": "holds no LoRA weights|cannot read the adapter",
    "torn": "cannot read the adapter",
    "empty folder": "cannot read the adapter",
    "missing": "nowhere does not exist: give a folder, a .safetensors file or a hub id",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_adapter_for_this_base_is_refused_in_one_line(
    kind: str, tiny_sd: str, tmp_path: Path
) -> None:
    trained(("sd", tiny_sd), AdapterSpec(rank=2), tmp_path)
    path = broken_file(tmp_path, kind)
    model: Any = load_model("sd", tiny_sd)
    with pytest.raises(UserError, match=REFUSED[kind]):
        model.start_training(AdapterSpec(init=path), seed=0, with_reference=True)
    if kind != "text encoder":  # for drawing, text encoders may be adapted too
        with pytest.raises(UserError, match=REFUSED[kind]):
            model.load_adapter(path)


@pytest.mark.parametrize("path", ["", "nowhere.safetensors", "runs/nowhere.safetensors", "~/nowhere"])
def test_a_path_that_is_no_hub_id_is_not_asked_for(path: str, tiny_sd: str) -> None:
    model: Any = load_model("sd", tiny_sd)
    with pytest.raises(UserError, match=r"adapter .*does not exist: give a folder, a \.safetensors file or"):
        model.load_adapter(path)


@pytest.mark.parametrize(("layer", "width"), [(0, 99), (9, 32)])
def test_factors_that_do_not_fit_a_text_encoder(
    layer: int, width: int, tiny_sd: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, without the report of transformers."""
    name = f"text_encoder.text_model.encoder.layers.{layer}.self_attn.q_proj.lora_"
    state = {f"{name}A.weight": torch.zeros(2, width), f"{name}B.weight": torch.zeros(width, 2)}
    save_file(state, tmp_path / FILE)
    model: Any = load_model("sd", tiny_sd)
    with pytest.raises(UserError, match=r"which also changes the text encoders: .*; use the base it was"):
        model.load_adapter(str(tmp_path))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lroa"}, "unknown adapter.kind 'lroa': did you mean 'lora'"),
        ({"rank": 0}, "adapter.rank is 0: use 1 or more"),
        ({"dropout": 1.0}, r"adapter.dropout is 1.0: use a value in \[0, 1\)"),
        ({"dropout": float("nan")}, "adapter.dropout is nan"),
        ({"alpha": 0.0}, "adapter.alpha is 0.0: use a value above 0"),
        ({"targets": []}, "adapter.targets is empty"),
        ({"kind": "full", "init": "somewhere"}, "adapter.init is set with adapter.kind=full"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterSpec(**options)


def test_names_are_saved_in_one_order(tiny_sdxl: str, tmp_path: Path) -> None:
    """peft keeps them as a set, whose order is another in every process."""
    import json

    from safetensors import safe_open

    from diffalign.models.sdxl import Plugin

    model = Plugin(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    model.save_adapter(str(tmp_path))
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ("adapter", r"is the folder of a run, not an adapter: give .*/adapter"),
        ("unet", r"is a whole UNet, not an adapter: use model\.unet=.*/unet"),
    ],
)
def test_a_folder_one_level_off_is_told_apart(inside: str, told: str, tiny_sdxl: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir()
    model: Any = load_model("sdxl", tiny_sdxl)
    with pytest.raises(UserError, match=told):
        model.load_adapter(str(tmp_path))

"""Stable Diffusion 3 beside plain diffusers: equal latents, adapters, networks, files; T5 left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.common import draws
from diffalign.common.errors import UserError
from diffalign.common.manifest import recipe_identity
from diffalign.models import _ldm, load_model
from diffalign.models._lora_files import notes_of
from diffalign.models._spec import JOINT_ATTENTION, AdapterSpec
from diffalign.models.sd3 import Plugin
from tests.tiny_training import perturb

KEYS = [("a red ring", 0), ("two cats on a mat", 1)]
LENGTH = 12
ALL = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
T5, NO = ("text_encoder_3", "tokenizer_3"), [None, None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline that a single file can hold: its CLIP encoders differ in width, the first projects by 1."""
    folder = tmp_path_factory.mktemp("sd3") / "base"
    Plugin.tiny(folder, text_widths=(12, 20))
    path = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "text_projection.weight": torch.eye(12)}, path, {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def plain(base: str) -> Any:
    """The pipeline as a user of diffusers loads it."""
    return quiet(StableDiffusion3Pipeline.from_pretrained(base))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(path: str, **options: Any) -> Any:
    return load_model("sd3", path, **{"max_sequence_length": LENGTH, **options})


def drawn_by(pipeline: Any, **options: Any) -> Tensor:
    """Latents of a plain pipeline that was given our initial noise and nothing else of ours."""
    noise = torch.stack([draws.normal((16, 16, 16), "initial", *key) for key in KEYS])
    latents: Tensor = pipeline(
        [prompt for prompt, _ in KEYS],
        latents=noise,
        max_sequence_length=LENGTH,
        **{"output_type": "latent", "num_inference_steps": 3, **options},
    ).images
    return latents


def drawn_by_us(model: Any, **options: Any) -> Tensor:
    latents: Tensor = model.sample(
        [prompt for prompt, _ in KEYS], [seed for _, seed in KEYS], **{"num_inference_steps": 3, **options}
    )
    return latents


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"guidance_scale": 3.5}])
def test_latents_are_those_of_plain_diffusers(options: dict[str, Any], base: str, plain: Any) -> None:
    theirs = drawn_by(plain, **options)
    assert torch.equal(drawn_by_us(ours(base), **options), theirs)
    if not options:
        negative = drawn_by(plain, negative_prompt=["a cube"] * 2)
        assert torch.equal(drawn_by_us(ours(base), negative_prompt="a cube"), negative)
        assert not torch.equal(negative, theirs)


def test_pictures_are_those_of_plain_diffusers(base: str, plain: Any) -> None:
    model = ours(base)
    pictures = model.generate(
        [prompt for prompt, _ in KEYS], [seed for _, seed in KEYS], num_inference_steps=2
    )
    theirs = drawn_by(plain, num_inference_steps=2, output_type="pil")
    for one, other in zip(pictures, theirs, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_t5_left_out_counts_as_zeros(base: str, plain: Any) -> None:
    """Bit for bit as the pipeline with `text_encoder_3=None`; neither loaded nor part of the identity."""
    without = quiet(StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None))
    model = ours(base, use_t5=False)
    theirs = drawn_by(without)
    assert torch.equal(drawn_by_us(model), theirs) and not torch.equal(theirs, drawn_by(plain))
    assert "text_encoder_3" not in model.parts._loaded
    embeds = model.encode_prompts(["a ring"])["prompt_embeds"]
    assert embeds.shape == (1, 77 + LENGTH, 40)
    assert not embeds[:, 77:].any() and embeds[:, :77, :32].any() and not embeds[:, :77, 32:].any()
    assert model.encoder_fingerprint() != ours(base).encoder_fingerprint()


def test_without_t5_prompts_are_encoded_without_building_the_transformer(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even an empty one: that takes seconds at full size, for each batch of prompts."""
    model = ours(base, use_t5=False)
    expected = model.encode_prompts(["a ring"])
    monkeypatch.setattr(SD3Transformer2DModel, "__init__", lambda *_, **__: 1 / 0)
    again = ours(base, use_t5=False).encode_prompts(["a ring"])
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_pipeline_without_t5(base: str, tmp_path: Path) -> None:
    path = str(shutil.copytree(base, tmp_path / "small"))
    index = Path(path, "model_index.json")
    whole = json.loads(index.read_text())
    told = "has no text_encoder_3, tokenizer_3: the pipeline is not whole; get all of it; or give model.use_t"
    for gone in (
        {name: whole[name] for name in whole if name[-2:] != "_3"},
        {**whole, **dict.fromkeys(T5, NO)},
    ):
        index.write_text(json.dumps(gone))
        with pytest.raises(UserError, match=told):
            ours(path)
    assert torch.equal(drawn_by_us(ours(path, use_t5=False)), drawn_by_us(ours(base, use_t5=False)))


def test_what_is_not_t5_cannot_be_left_out(base: str, tmp_path: Path) -> None:
    path = str(shutil.copytree(base, tmp_path / "small"))
    index = Path(path, "model_index.json")
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({**whole, **dict.fromkeys(T5, NO), "tokenizer_2": NO}))
    with pytest.raises(UserError, match=r"has no .*: the pipeline is not whole; get all of it$"):
        ours(path)
    index.write_text(json.dumps({**whole, **dict.fromkeys(T5, NO), "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="tokenizer_3: it is a FluxPipeline; choose the model name that fits"):
        ours(path)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3", "tokenizer_3"])
def test_a_pipeline_without_the_folder_of_an_encoder(part: str, base: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(base, tmp_path / "small"))
    shutil.rmtree(path / part)
    remedy = "; or give model.use_t5=false" if part in T5 else ""
    told = f"^{path / part} does not exist: get the whole pipeline{remedy}$"
    with pytest.raises(UserError, match=told):
        ours(str(path)).encode_prompts(["a ring"])
    if part in T5:
        assert len(ours(str(path), use_t5=False).encode_prompts(["a ring"])["pooled"]) == 1


def test_a_shift_that_goes_with_the_size(tmp_path: Path) -> None:
    """As plain diffusers samples, and as the process says to the training levels: 2 x 2 cells are a token."""
    options = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    path = Plugin.tiny(tmp_path / "base", **options).path
    model = ours(path)
    plain = quiet(StableDiffusion3Pipeline.from_pretrained(path))
    assert torch.equal(drawn_by_us(model), drawn_by(plain))
    mu = 0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256)
    assert model.process.sampler_shift.at((16, 16, 16)) == pytest.approx(np.exp(mu))


def test_there_is_no_size_conditioning(base: str) -> None:
    assert ours(base).size_conditioning((1, 2), (3, 4), (5, 6)) == {}


@pytest.mark.parametrize("length", [0, 513])
def test_a_length_that_the_pipeline_refuses(length: int) -> None:
    with pytest.raises(UserError, match=rf"model\.max_sequence_length is {length}: use 1 to 512"):
        Plugin(path="somewhere", max_sequence_length=length)


def test_a_cache_is_of_one_length_of_prompts(base: str) -> None:
    """The network is the same one, and so are its adapters."""
    short, long = ours(base), ours(base, max_sequence_length=LENGTH + 1)
    assert short.encoder_fingerprint() != long.encoder_fingerprint()
    for use_t5 in (True, False):  # the parts say which: so caches of earlier versions have it
        model = ours(base, use_t5=use_t5)
        parts = {name: model.parts.identity(name) for name in (*model.encoder_parts, "vae")}
        wanted = recipe_identity({"parts": recipe_identity(parts), "max_sequence_length": LENGTH})
        assert model.encoder_fingerprint() == wanted
    assert short.fingerprint() == long.fingerprint()
    embeds = long.encode_prompts(["a ring"])["prompt_embeds"]
    assert embeds.shape == (1, 77 + LENGTH + 1, 40)


def test_long_prompts_are_told_for_each_encoder(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP's tokens are letters here (and two marks), as are T5's (with a mark, and the spaces)."""
    model = ours(base)
    model.say_too_long(["a ring", "a ring on a mat", "a cube " * 20])
    first, second = capsys.readouterr().err.splitlines()
    assert (
        "1 of 3 prompts have more than the 77 tokens that text_encoder and text_encoder_2 read; the" in first
    )
    assert "2 of 3 prompts have more than the 12 tokens that text_encoder_3 read; the rest" in second
    ours(base, use_t5=False).say_too_long(["a ring", "a cube " * 20])
    assert (
        "1 of 2 prompts have more than the 77 tokens that the text encoders read" in capsys.readouterr().err
    )


# Training

SAVED = {
    "alpha": AdapterSpec(rank=4, alpha=7.5),
    "rslora": AdapterSpec(rank=4, rslora=True, alpha=3),
    "dora": AdapterSpec(rank=3, dora=True, dropout=0.5),
    "outer": AdapterSpec(rank=2, targets=["to_q", "pos_embed.proj", "proj_out", "norm1.linear"]),
}


def trained(base: str, spec: AdapterSpec, folder: Path) -> Any:
    model = ours(base)
    model.start_training(spec, seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.2)
    folder.mkdir(exist_ok=True)
    model.save_adapter(str(folder))
    model.network.eval()
    return model


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_adapter_in_plain_diffusers(kind: str, base: str, plain: Any, tmp_path: Path) -> None:
    """Bit for bit; likewise through `load_adapter`; and without it the base is back."""
    latents = drawn_by_us(trained(base, SAVED[kind], tmp_path))
    before = drawn_by(plain)
    plain.load_lora_weights(tmp_path)
    theirs = drawn_by(plain)
    plain.unload_lora_weights()
    assert torch.equal(theirs, latents) and torch.equal(drawn_by(plain), before)
    assert not torch.allclose(before, latents, atol=1e-3)
    again = ours(base)
    again.load_adapter(str(tmp_path))
    assert torch.equal(drawn_by_us(again), latents)


def test_all_attention_is_trained_by_default(base: str, tmp_path: Path) -> None:
    """That of the text beside that of the picture, and the second one of the first block."""
    model = trained(base, AdapterSpec(rank=2), tmp_path)
    layers = {name.partition(".lora_")[0] for name in model.trained_state()}
    first = {f"transformer_blocks.0.attn.{name}" for name in JOINT_ATTENTION}
    second = {f"transformer_blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    last = {f"transformer_blocks.1.attn.{name}" for name in JOINT_ATTENTION if name != "to_add_out"}
    assert layers == first | second | last  # the last block gives no text


def test_a_full_network_in_plain_diffusers(base: str, tmp_path: Path) -> None:
    latents = drawn_by_us(trained(base, AdapterSpec(kind="full"), tmp_path))
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    plain = quiet(StableDiffusion3Pipeline.from_pretrained(base, transformer=transformer))
    assert torch.equal(drawn_by(plain), latents)
    assert torch.equal(drawn_by_us(ours(base, transformer=str(tmp_path))), latents)
    policy = ours(base)
    policy.load_policy(str(tmp_path))
    assert policy.denoiser.network is not policy.network


def test_a_merged_pipeline_in_plain_diffusers(base: str, tmp_path: Path) -> None:
    latents = drawn_by_us(trained(base, SAVED["rslora"], tmp_path / "adapter"))
    ours(base).export_pipeline(str(tmp_path / "out"), adapter=str(tmp_path / "adapter"))
    plain = quiet(StableDiffusion3Pipeline.from_pretrained(tmp_path / "out"))
    assert torch.allclose(drawn_by(plain), latents, atol=1e-4)


def test_the_layouts_of_other_programs(base: str, tmp_path: Path) -> None:
    trained(base, SAVED["rslora"], tmp_path / "adapter")
    trained(base, SAVED["dora"], tmp_path / "dora")
    ours(base).export_adapter(str(tmp_path / "adapter"), str(tmp_path), layout="kohya")
    names = set(load_file(tmp_path / "lora.safetensors"))
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in names
    with pytest.raises(UserError, match="format=kohya cannot carry a DoRA"):
        ours(base).export_adapter(str(tmp_path / "dora"), str(tmp_path), layout="kohya")
    with pytest.raises(UserError, match="single_file=true: that layout is not written for StableDiffusion3"):
        ours(base).export_pipeline(str(tmp_path), single_file=True)


def test_kohyas_layout_is_read_here_and_diffusers_is_said_to_read_nothing(
    base: str, plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With layers outside the blocks and alphas: as the adapter that it was written from."""
    spec = AdapterSpec(rank=2, alpha=3, targets=["to_q", "to_v", "pos_embed.proj", "norm_out.linear"])
    latents = drawn_by_us(trained(base, spec, tmp_path / "adapter"))
    ours(base).export_adapter(str(tmp_path / "adapter"), str(tmp_path), layout="kohya")
    told = capsys.readouterr().err
    assert "diffusers loads nothing of lora.safetensors of this family: for it use format=diffusers" in told
    assert "kohya's own scripts leave out pos_embed.proj, norm_out.linear; ComfyUI loads them\n" in told
    file = tmp_path / "lora.safetensors"
    assert notes_of(file)["ss_network_module"] == "networks.lora_sd3"
    model = ours(base)
    model.load_adapter(str(file))
    assert torch.allclose(drawn_by_us(model), latents, atol=1e-5)
    assert not torch.allclose(drawn_by(plain), latents, atol=1e-3)
    policy = ours(base)
    policy.start_training(AdapterSpec(init=str(file)), seed=0, with_reference=False)
    policy.network.eval()
    assert torch.allclose(drawn_by_us(policy), latents, atol=1e-5)


def test_what_acts_in_diffusers_alone_is_said(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, told in (("rslora", "leave its alphas aside; for them use format=kohya"), ("dora", "its DoRA")):
        trained(base, SAVED[kind], tmp_path / kind)
        ours(base).export_adapter(str(tmp_path / kind), str(tmp_path / "out"), layout="diffusers")
        assert told in capsys.readouterr().err
    trained(base, AdapterSpec(rank=2), tmp_path / "plain")
    ours(base).export_adapter(str(tmp_path / "plain"), str(tmp_path / "out"), layout="diffusers")
    assert "aside" not in capsys.readouterr().err


def test_a_transformer_of_another_base(base: str, tiny_sd: str, tmp_path: Path) -> None:
    shutil.copytree(f"{base}/transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for changes, told in (
        ({"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel, SD3Transformer2DModel is"),
        ({"in_channels": 4}, "takes 4 channels, its VAE gives 16: use a text-to-image base"),
        (
            {"joint_attention_dim": 64},
            "text embeddings of width 64, the base's are of width 40: use the base",
        ),
        ({"pooled_projection_dim": 64}, "text embeddings of width 64, the base's are of width 40: use the"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=told):
            ours(base).load_policy(str(tmp_path))
        # As the user's own network: it is compared with the one beside the text encoders.
        with pytest.raises(UserError, match=told):
            ours(base, transformer=str(tmp_path))
    (path.parent / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a part of no class, SD3Transformer2DModel is wanted"):
        ours(base, transformer=str(tmp_path))
    with pytest.raises(
        UserError, match="has no text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, tra"
    ):
        ours(tiny_sd)


# Single files

INNER = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_q": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn2.to_q": "x_block.attn2.qkv",
}
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


def original_transformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of Stability's file: queries, keys and values in one, last shifts first."""
    named = {"pos_embed": state["pos_embed.pos_embed"]}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        inner = "" if found is None else found[2]
        if name == "pos_embed.pos_embed" or re.search(r"(to|add)_[kv](_proj)?$", inner):
            continue
        if re.search(r"(to|add)_q(_proj)?$", inner):
            others = [name.replace("_q", f"_{letter}") for letter in "kv"]
            tensor = torch.cat([tensor, *(state[other] for other in others)])
        if layer in ("norm_out.linear", "transformer_blocks.1.norm1_context.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        to = OUTER[layer] if found is None else f"joint_blocks.{found[1]}.{INNER[inner]}"
        named[f"{to}.{leaf}"] = tensor
    return named


@pytest.fixture(scope="module")
def original(plain: Any) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors by the names of the published files."""
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    texts = {
        part: {f"text_encoders.{to}.transformer.{name}": value for name, value in tensors.items()}
        for part, to in encoders.items()
        for tensors in [getattr(plain, part).state_dict()]
    }
    del texts["text_encoder"]["text_encoders.clip_l.transformer.text_projection.weight"]  # as in theirs
    return {
        **texts,
        "transformer": original_transformer(plain.transformer.state_dict()),
        "vae": _ldm.vae_state(plain.vae),
    }


def write(path: Path, original: dict[str, dict[str, Tensor]], *parts: str, raw: bool = False) -> str:
    prefix = "" if raw else "model.diffusion_model."
    state = {f"{prefix}{name}": tensor for name, tensor in original["transformer"].items()}
    for part in parts:
        state |= original[part]
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def other(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline of the same shapes and another content."""
    return Plugin.tiny(tmp_path_factory.mktemp("sd3") / "other", seed=1, text_widths=(12, 20)).path


@pytest.mark.parametrize("held", [(), ("vae",), ALL[:3], ALL], ids=["alone", "vae", "clips", "all"])
def test_a_single_file(held: tuple[str, ...], base: str, other: str, original: Any, tmp_path: Path) -> None:
    """It draws and encodes as the pipeline that it was made of; what it lacks is that of `model.config`."""
    file = write(tmp_path / "file.safetensors", original, *held, raw=not held)
    whole, single, mixed = ours(base), ours(file, config=base), ours(file, config=other)
    assert torch.equal(drawn_by_us(single), drawn_by_us(whole))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(single.encode_images(images)[0], whole.encode_images(images)[0])
    stranger = ours(other)
    for part in ALL:
        from_config = mixed.parts[part].state_dict()
        wanted = (whole if part in held else stranger).parts[part].state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in from_config.items()), part
    assert (mixed.fingerprint() != single.fingerprint()) == (held != ALL)
    assert single.fingerprint() == ours(file, config=base).fingerprint() != whole.fingerprint()


def test_what_is_told_of_the_parts_of_a_file(base: str, original: Any, tmp_path: Path) -> None:
    """Those in it are told by its content and their configuration, the others as those of any pipeline."""
    file = write(tmp_path / "file.safetensors", original, "vae")
    single, whole = ours(file, config=base), ours(base)
    for part in ALL[1:]:
        assert single.parts.identity(part) == whole.parts.identity(part)
    assert single.parts.identity("vae").keys() == {"file", "config"}
    assert single.parts.identity("transformer")["file"] == single.parts.identity("vae")["file"]


def test_an_adapter_trained_on_a_single_file(base: str, plain: Any, original: Any, tmp_path: Path) -> None:
    model = ours(write(tmp_path / "file.safetensors", original, "vae"), config=base)
    model.start_training(SAVED["alpha"], seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.2)
    model.save_adapter(str(tmp_path / "adapter"))
    model.network.eval()
    plain.load_lora_weights(tmp_path / "adapter")
    theirs = drawn_by(plain)
    plain.unload_lora_weights()
    assert torch.equal(drawn_by_us(model), theirs)


def test_single_files_that_cannot_be_read(base: str, original: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "file.safetensors", original, "vae", "text_encoder")
    bare = Path(shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    ours(file, config=str(bare)).parts["text_encoder"]
    with pytest.raises(
        UserError, match=r"\(text_encoder_3\): .*; \S+file.safetensors has none, give a whole p"
    ):
        ours(file, config=str(bare)).parts["text_encoder_3"]
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(file).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read \S+torn.safetensors: .*; get the whole file"):
        ours(str(torn), config=base).fingerprint()
    state = load_file(file)
    gone = next(name for name in state if name.startswith("text_encoders.clip_l.") and name.endswith("bias"))
    short = tmp_path / "short.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != gone}, short)
    with pytest.raises(UserError, match=r"short.safetensors \(text_encoder\) lacks 1 weights of a CLIPText"):
        ours(str(short), config=base).parts["text_encoder"]
    save_file({name: tensor for name, tensor in state.items() if "context_embedder" not in name}, short)
    with pytest.raises(
        UserError, match=r"cannot load \S+short.safetensors \(transformer\): .*; give the whole"
    ):
        ours(str(short), config=base).parts["transformer"]

"""Bases that cannot be used say so in one line; own VAEs and UNets take the place of the base's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.common.errors import UserError
from diffalign.models import load_model

# diffusers asks the hub with an argument that huggingface_hub no longer knows.
ASKS_THE_HUB = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")


@pytest.fixture
def copied(tiny_sdxl: str, tmp_path: Path) -> Path:
    """A pipeline of one's own to break."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**content, **changes}.items() if value != "gone"})
    )


def use(name: str, path: str, **options: Any) -> None:
    """What every stage does first."""
    model: Any = load_model(name, path, **options)
    model.fingerprint()
    assert model.denoiser and model.encode_prompts(["a"]) and model.parts["vae"]


@ASKS_THE_HUB
def test_paths_that_hold_no_pipeline(tiny_sd: str, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "nowhere does not exist: give a diffusers pipeline folder or a hub id"),
        (tmp_path, "has no model_index.json: give the folder of a whole diffusers pipeline"),
        (Path(tiny_sd) / "model_index.json", r"is a file, but no \.safetensors: give a diffusers pipeline f"),
        ("models/base.safetensors", "does not exist: give a diffusers pipeline folder or a hub id"),
    ):
        with pytest.raises(UserError, match=message):
            use("sd", str(path))
    with pytest.raises(UserError, match="cannot read the pipeline somebody/something"):  # the network is off
        use("sd", "somebody/something")


def put_on_hub(cache: Path, repo: str, folder: str | Path, *, commit: str) -> None:
    """Makes `commit` the head of `repo` in a local copy of the hub."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty local copy of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@ASKS_THE_HUB
def test_a_hub_base_is_told_by_its_commit(hub: Path, tiny_sd: str) -> None:
    """When the hub moves on, a loaded base stays what it was, and the next one is another."""
    put_on_hub(hub, "org/base", tiny_sd, commit="a" * 40)
    first: Any = load_model("sd", "org/base")
    known = first.fingerprint()
    put_on_hub(hub, "org/base", tiny_sd, commit="b" * 40)
    assert first.fingerprint() == known == load_model("sd", "org/base", revision="a" * 40).fingerprint()
    assert load_model("sd", "org/base").fingerprint() != known
    shutil.rmtree(hub / "models--org--base" / "snapshots" / ("b" * 40))
    assert first.denoiser and first.encode_prompts(["a"]) and first.parts["vae"]


@ASKS_THE_HUB
def test_an_own_part_from_the_hub_has_its_own_commit(hub: Path, tiny_sd: str) -> None:
    """A published UNet may lie in a subfolder (DPO-SDXL does); the base's revision is not its own."""
    put_on_hub(hub, "org/nested", Path(tiny_sd), commit="a" * 40)
    put_on_hub(hub, "org/flat", Path(tiny_sd) / "unet", commit="b" * 40)
    for repo, commit, subfolder in (("org/nested", "a", "unet"), ("org/flat", "b", None)):
        model: Any = load_model("sd", tiny_sd, unet=repo, revision="v2", variant="fp16")
        assert model.parts.source("unet") == (repo, subfolder, commit * 40)
        identity = {"hub": repo, "part": "unet", "commit": commit * 40, "variant": None}
        assert model.parts.identity("unet") == identity
        assert model.network


def test_another_family(tiny_sd: str, tiny_sdxl: str) -> None:
    with pytest.raises(UserError, match="has no text_encoder_2, tokenizer_2: it is a StableDiff"):
        use("sdxl", tiny_sd)
    with pytest.raises(UserError, match="takes size conditioning: use model=sdxl"):
        use("sd", tiny_sdxl)
    with pytest.raises(UserError, match=f"the UNet of {tiny_sd}/unet takes no size conditioning, so it"):
        use("sdxl", tiny_sdxl, unet=f"{tiny_sd}/unet")
    with pytest.raises(UserError, match="unknown model 'sdx': did you mean"):
        use("sdx", tiny_sd)


def test_a_base_without_an_expected_part(copied: Path) -> None:
    edit_json(copied / "model_index.json", vae=[None, None])
    with pytest.raises(UserError, match=r"has no vae: the pipeline is not whole; get all of it$"):
        use("sdxl", str(copied))


def test_a_base_without_the_weights_of_a_part(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load .*copy \(unet\)"):
        use("sdxl", str(copied))
    (copied / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read the unet config of"):
        use("sdxl", str(copied))


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer_2", "scheduler"])
def test_a_base_without_the_folder_of_a_part(part: str, copied: Path) -> None:
    shutil.rmtree(copied / part)
    with pytest.raises(UserError, match=rf"^{copied / part} does not exist: get the whole pipeline$"):
        use("sdxl", str(copied))


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_a_torn_weight_file(part: str, copied: Path) -> None:
    (path,) = (copied / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"cannot load .*copy \({part}\)"):
        use("sdxl", str(copied))


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_encoder", ["transformers", "CLIPTextMoodel"]),
        ("text_encoder_2", ["transformres", "CLIPTextModel"]),
        ("scheduler", ["diffusers", "NoScheduler"]),
    ],
)
def test_a_part_of_a_class_that_nobody_has(part: str, entry: list[str], copied: Path) -> None:
    edit_json(copied / "model_index.json", **{part: entry})
    with pytest.raises(UserError, match=rf"cannot load .*copy \({part}\): .*({'|'.join(entry)})"):
        use("sdxl", str(copied))


def test_weights_that_do_not_fit_their_config(copied: Path) -> None:
    edit_json(copied / "unet" / "config.json", cross_attention_dim=48)
    with pytest.raises(UserError, match=r"cannot load .*copy \(unet\)"):
        use("sdxl", str(copied))


def test_inpainting_and_refiner_bases(copied: Path, tiny_sd: str, tmp_path: Path) -> None:
    edit_json(copied / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(UserError, match="is an SDXL refiner"):
        use("sdxl", str(copied))
    edit_json(copied / "model_index.json", requires_aesthetics_score="gone")
    inpainting = {"sd": Path(shutil.copytree(tiny_sd, tmp_path / "inpainting")), "sdxl": copied}
    for name, folder in inpainting.items():
        edit_json(folder / "unet" / "config.json", in_channels=9)
        with pytest.raises(UserError, match="takes 9 channels, its VAE gives 4: inpainting and depth bases"):
            use(name, str(folder))


def test_a_process_that_is_not_supported(copied: Path) -> None:
    edit_json(copied / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type is 'sample'"):
        use("sdxl", str(copied))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vae": "/nowhere/vae"},
            "model.vae /nowhere/vae does not exist: give a diffusers folder or a hub id",
        ),
        ({"unet": "./nowhere"}, "model.unet ./nowhere does not exist"),
        ({"variant": "fp16"}, "cannot load .*fp16"),
        ({"dtype": "float16"}, "unknown model.dtype 'float16'"),
        ({"vae_dtype": "fp8"}, "unknown model.vae_dtype 'fp8'"),
        ({"attention": "flash"}, "unknown model.attention 'flash'"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str, tiny_sdxl: str) -> None:
    with pytest.raises(UserError, match=message):
        use("sdxl", tiny_sdxl, **options)


def test_xformers_where_it_is_not_installed(tiny_sdxl: str) -> None:
    with pytest.raises(UserError, match=r"model\.attention=xformers: .*; install diffalign"):
        use("sdxl", tiny_sdxl, attention="xformers")


def test_an_own_vae_of_another_class(tiny_sdxl: str) -> None:
    with pytest.raises(
        UserError, match=r"the vae of .*unet is a UNet2DConditionModel, AutoencoderKL is want"
    ):
        use("sdxl", tiny_sdxl, vae=f"{tiny_sdxl}/unet")


def test_an_own_vae_encodes_and_decodes(tiny_sdxl: str, copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    bias = "decoder.conv_out.bias"
    weights[bias] = weights[bias] + 100.0
    save_file(weights, path, metadata={"format": "pt"})
    latents = torch.zeros(1, 4, 16, 16)
    assert load_model("sdxl", tiny_sdxl).decode(latents).mean() < 0.9
    for own in (copied / "vae", copied):
        white = load_model("sdxl", tiny_sdxl, vae=str(own)).decode(latents)
        assert torch.equal(white, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("vae_dtype", ["fp32", "bf16"])
def test_the_vae_has_a_precision_of_its_own(vae_dtype: str, tiny_sdxl: str) -> None:
    model: Any = load_model("sdxl", tiny_sdxl, dtype="bf16", vae_dtype=vae_dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[vae_dtype]
    assert {parameter.dtype for parameter in model.parts["vae"].parameters()} == {wanted}
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    mean, std = model.encode_images(torch.rand(1, 3, 32, 32))
    assert mean.dtype == std.dtype == model.decode(mean).dtype == torch.float32


def test_size_conditioning(tiny_sd: str, tiny_sdxl: str) -> None:
    """SDXL: original (height, width), crop (top, left), target (height, width), as in the pipeline."""
    assert load_model("sd", tiny_sd).size_conditioning((1, 2), (3, 4), (5, 6)) == {}
    model: Any = load_model("sdxl", tiny_sdxl)
    rows = model.size_conditioning((1, 2), (3, 4), (5, 6))
    assert rows["time_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    pipeline = model.pipeline(*model.encoder_parts, "unet")
    theirs = pipeline._get_add_time_ids((1, 2), (3, 4), (5, 6), torch.float32, text_encoder_projection_dim=24)
    assert torch.equal(rows["time_ids"], theirs)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_weight_file_that_lacks_a_tensor(part: str, copied: Path) -> None:
    """Both libraries would fill the hole with random numbers and go on."""
    (path,) = (copied / part).glob("*.safetensors")
    tensors = load_file(path)
    gone = next(key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2)
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != gone}, path, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weights of a"):
        use("sdxl", str(copied))

"""A single file is a base, and what is exported as one is read back bit for bit."""

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
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from tests.models.test_export import PLAIN, SPECS, drawn_by_us, largest_difference, made, trained, weighted
from tests.tiny_training import perturb


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_sd: str) -> Any:
    """(backbone, pipeline, file of it); SDXL's text encoders are told apart by their width, so it differs."""
    folder, path = tmp_path_factory.mktemp("whole"), tiny_sd
    if request.param == "sdxl":
        path = SDXL.tiny(folder / "base", text_widths=(12, 20)).path
    load_model(request.param, path).export_pipeline(str(folder), single_file=True)
    return request.param, path, str(folder / "model.safetensors")


def test_a_single_file_is_read_by_diffusers_bit_for_bit(whole: tuple[str, str, str]) -> None:
    name, path, file = whole
    theirs = PLAIN[name].from_single_file(file, config=path, safety_checker=None)
    ours = PLAIN[name].from_pretrained(path)
    for part, network in ours.components.items():
        if isinstance(network, torch.nn.Module):
            found = theirs.components[part].state_dict()
            assert found.keys() == network.state_dict().keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items()), part


def test_a_single_file_is_a_base(whole: tuple[str, str, str]) -> None:
    """It trains, draws and is adapted as the folder it was made of; its identity is its own."""
    name, path, file = whole
    folder: Any = load_model(name, path)
    single: Any = load_model(name, file, config=path)
    assert torch.equal(drawn_by_us(single), drawn_by_us(folder))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(single.encode_images(images)[0], folder.encode_images(images)[0])
    assert not any(p.requires_grad for p in single.network.parameters()) and not single.network.training
    assert single.fingerprint() != folder.fingerprint()
    assert single.fingerprint() == load_model(name, file, config=path).fingerprint()
    half: Any = load_model(name, file, config=path, dtype="bf16")
    assert half.network.dtype == torch.bfloat16 and half.parts["vae"].dtype == torch.float32


def test_an_adapter_trained_on_a_single_file(whole: tuple[str, str, str], tmp_path: Path) -> None:
    name, path, file = whole
    model: Any = load_model(name, file, config=path)
    model.start_training(SPECS["rslora"], seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.1)
    model.save_adapter(str(tmp_path))
    model.network.eval()
    assert torch.equal(drawn_by_us(weighted((name, path), tmp_path, 1.0)), drawn_by_us(model))


def test_the_single_file_of_merged_weights(whole: tuple[str, str, str], tmp_path: Path) -> None:
    name, path, file = whole
    trained((name, path), SPECS["alpha"], made(tmp_path / "trained"))
    ours = drawn_by_us(weighted((name, path), tmp_path / "trained", 1.0))
    out = made(tmp_path / "out")
    model: Any = load_model(name, file, config=path)
    model.export_pipeline(str(out), adapter=str(tmp_path / "trained"), single_file=True)
    merged: Any = load_model(name, str(out / "model.safetensors"), config=path)
    assert largest_difference(drawn_by_us(merged), ours) <= 1e-5


def test_own_parts_take_the_place_of_the_files(whole: tuple[str, str, str], tmp_path: Path) -> None:
    name, path, file = whole
    trained((name, path), AdapterSpec(kind="full"), made(tmp_path / "full"))
    own: Any = load_model(name, file, config=path, unet=str(tmp_path / "full"))
    assert torch.equal(drawn_by_us(own), drawn_by_us(load_model(name, path, unet=str(tmp_path / "full"))))
    assert own.fingerprint() != load_model(name, file, config=path).fingerprint()


def test_the_configuration_is_part_of_the_identity(whole: tuple[str, str, str], tmp_path: Path) -> None:
    """The VAE's factor stands nowhere in the file."""
    name, path, file = whole
    other = Path(shutil.copytree(path, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors")))
    same = load_model(name, file, config=str(other)).fingerprint()
    assert same == load_model(name, file, config=path).fingerprint()
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.3}))
    assert load_model(name, file, config=str(other)).fingerprint() != same


def part_of(name: str, file: str, config: str, part: str) -> Any:
    model: Any = load_model(name, file, config=config)
    return model.parts[part]


def test_single_files_that_cannot_be_read(whole: tuple[str, str, str], tmp_path: Path) -> None:
    name, path, file = whole
    state = load_file(file)
    short = tmp_path / "short.safetensors"
    for part, start, told in (
        (
            "unet",
            "model.diffusion_model.",
            r"cannot load \S+short.safetensors \(unet\): .*; give the whole file",
        ),
        ("text_encoder", "co", r"short.safetensors \(text_encoder\) lacks 1 weights of a CLIPTextModel, e.g"),
    ):
        gone = next(key for key in state if key.startswith(start) and key.endswith(".bias"))
        save_file({key: tensor for key, tensor in state.items() if key != gone}, short)
        with pytest.raises(UserError, match=told):
            part_of(name, str(short), path, part)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(file).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot load .*torn.safetensors \(vae\)"):
        part_of(name, str(torn), path, "vae")
    adapter = made(tmp_path / "adapter")
    trained((name, path), SPECS["alpha"], adapter)
    with pytest.raises(UserError, match=r"cannot load .*\(unet\)|lacks \d+ weights"):
        part_of(name, str(next(adapter.iterdir())), path, "unet")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
def test_configurations_that_cannot_be_used(whole: tuple[str, str, str], tmp_path: Path) -> None:
    name, path, file = whole
    (tmp_path / "base.ckpt").write_bytes(b"")
    for given, options, told in (
        (path, {"config": path}, "model.config is set, but model.path .* is no single file: leave it out"),
        (
            file,
            {"config": "/nowhere/at/all"},
            "model.config /nowhere/at/all does not exist: give a diffusers",
        ),
        (file, {"config": str(tmp_path)}, "has no model_index.json: give the folder of a whole"),
        (file, {"config": file}, "model.config .* is a file: give a diffusers pipeline folder"),
        (str(tmp_path / "base.ckpt"), {}, "is a file, but no .safetensors: give a diffusers pipeline folder"),
        (file, {}, r"cannot read the pipeline sta\S+/stable-diff.*; .* give others with model\.config="),
    ):
        with pytest.raises(UserError, match=told):
            load_model(name, given, **options)


def test_a_text_encoder_that_has_no_single_file(tiny_sd: str, tmp_path: Path) -> None:
    """SD 2.x: the file holds a layer more than the pipeline has."""
    copy = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    (copy / "text_encoder" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(
        UserError, match=r"single_file: .* SD 2\.x files is not written: leave single_file out"
    ):
        load_model("sd", str(copy)).export_pipeline(str(made(tmp_path / "out")), single_file=True)


def test_a_file_of_a_network_that_predicts_v_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout has no place for it, and programs that load the file take its network to predict noise."""
    for prediction in ("epsilon", "v_prediction"):
        path = SDXL.tiny(tmp_path / prediction, text_widths=(12, 20), prediction_type=prediction).path
        load_model("sdxl", path).export_pipeline(str(made(tmp_path / f"{prediction}-out")), single_file=True)
        said = "cannot say that its network predicts v_prediction" in capsys.readouterr().err
        assert said == (prediction == "v_prediction")

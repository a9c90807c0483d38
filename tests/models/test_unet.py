"""What SD and SDXL share: what is not finite or does not fit is refused, the VAE keeps its own precision."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.models import load_model
from diffalign.models._base import NonFinitePicture


@pytest.fixture
def model(tiny_sd: str) -> Any:
    return load_model("sd", tiny_sd)


def draw(model: Any) -> list[Any]:
    pictures: list[Any] = model.generate(["a ring", "a cube"], [7, 8], num_inference_steps=1)
    return pictures


def test_a_network_that_diverges_draws_nothing(model: Any) -> None:
    model.network.conv_out.bias.data[0] = torch.nan
    with pytest.raises(NonFinitePicture, match="of 'a ring' with seed 7 is not finite; the network diverges"):
        draw(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_vae_that_overflows_draws_nothing(value: float, model: Any) -> None:
    """Neither black (NaN as a whole number) nor white (infinity, clamped)."""
    model.parts["vae"].decoder.conv_out.bias.data[1] = value
    decoded = model.decode(torch.zeros(1, 4, 16, 16))
    assert decoded[:, 1].isnan().all() and decoded[:, [0, 2]].isfinite().all()
    with pytest.raises(NonFinitePicture, match="of 'a ring' with seed 7 is not finite; the VAE overflows"):
        draw(model)


def test_the_vae_keeps_its_precision_under_autocast(model: Any) -> None:
    """As when sample pictures are drawn while training; bit for bit."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = model.encode_images(images)
    decoded = model.decode(mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.decode(mean), decoded)
        assert all(map(torch.equal, model.encode_images(images), (mean, std)))


def test_long_prompts_are_counted_once_and_not_printed_whole(
    model: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers prints what it cuts off, padding of the whole batch included; the reader needs the count."""
    short, long = "a ring", "a cube " * 60
    model.say_too_long([])
    model.say_too_long([short])
    assert capfd.readouterr().err == ""
    model.say_too_long([short, long, long + "!"])
    told = capfd.readouterr().err
    assert told.startswith("2 of 3 prompts have more than the 77 tokens") and told.count("\n") == 1
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "handlers", [handler])
    model.encode_prompts([short, long])
    assert not records


def test_a_full_unet_of_another_base_is_no_policy(
    model: Any, tiny_sd: str, tiny_sdxl: str, tmp_path: Path
) -> None:
    """Said before its weights are loaded, let alone data encoded."""
    with pytest.raises(UserError, match=f"the UNet of {tiny_sdxl} takes size conditioning: use model=sdxl"):
        model.load_policy(tiny_sdxl)
    with pytest.raises(UserError, match=f"the UNet of {tiny_sd} takes no size conditioning"):
        load_model("sdxl", tiny_sdxl).load_policy(tiny_sd)
    path = Path(shutil.copytree(f"{tiny_sd}/unet", tmp_path / "unet")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 1024}))
    with pytest.raises(UserError, match="takes text embeddings of width 1024, the base's are of width"):
        model.load_policy(str(tmp_path))
    assert model.network is model.denoiser.network
    with pytest.raises(UserError, match="takes text embeddings of width 1024, the base's are of width"):
        load_model("sd", tiny_sd, unet=str(tmp_path))
    with pytest.raises(UserError, match="is a AutoencoderKL, UNet2DConditionModel is wanted: use the model"):
        load_model("sd", tiny_sd, unet=f"{tiny_sd}/vae")


def test_a_base_without_a_unet_takes_ones_own(tiny_sd: str, tmp_path: Path) -> None:
    """There is none beside the text encoders to compare it with."""
    base = Path(shutil.copytree(tiny_sd, tmp_path / "base"))
    shutil.rmtree(base / "unet")
    loaded: Any = load_model("sd", str(base), unet=f"{tiny_sd}/unet")
    assert loaded.network.config.cross_attention_dim == 32


def test_a_full_unet_as_policy_is_set_up_as_the_base_is(tiny_sd: str) -> None:
    model: Any = load_model("sd", tiny_sd, gradient_checkpointing=True)
    model.load_policy(tiny_sd)
    assert model.denoiser.network is not model.network and model.denoiser.network.is_gradient_checkpointing


def test_no_prompt_is_the_empty_one_or_zeros(tiny_sd: str, tiny_sdxl: str) -> None:
    """What guidance of SD and of SDXL starts from."""
    sd, sdxl = load_model("sd", tiny_sd), load_model("sdxl", tiny_sdxl)
    dropped = sd.encode_dropped_prompt()
    assert torch.equal(dropped["prompt_embeds"], sd.encode_prompts([""])["prompt_embeds"])
    assert not any(tensor.any() for tensor in sdxl.encode_dropped_prompt().values())

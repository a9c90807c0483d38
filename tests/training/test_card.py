"""The model card: its code gives the very pictures of the recipe, whatever base the recipe is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.common import draws, plugins
from diffalign.models import load_model
from diffalign.models._spec import AdapterSpec
from diffalign.models.pixart import Plugin as PixArt
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training.card import Exported, export_card, model_card
from tests.tiny_training import perturb


def card(model: dict[str, Any], *, kind: str = "lora", data: Any = "jsonl") -> str:
    recipe = {"model": model, "objective": {"name": "sft"}, "adapter": {"kind": kind}, "data": data}
    return model_card(
        recipe, base_identity="0123", counts={"used": 1, "asked": 1, "dropped": {}}, summary={"steps": 1}
    )


def test_what_was_learned_from() -> None:
    model = {"name": "sdxl", "path": "org/base"}
    assert "for 1 steps on 1 examples (1 rows read)." in card(model)
    assert "for 1 steps on its own pictures of 1 prompts." in card(model, data=None)


def code(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", plugins.names("models"))
def test_every_backbone_names_its_own_pipeline(name: str) -> None:
    backbone: Any = plugins.get("models", name)
    source = code(card({"name": name, "path": "org/base"}))
    assert f'pipeline = {backbone.pipeline_name}.from_pretrained("org/base")' in source


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_code_draws_the_picture_of_the_recipe(kind: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    """With a VAE and a UNet of one's own, each by itself or in the folder above it: bit for bit."""
    other = SDXL.tiny(tmp_path / "other", seed=1).path
    options: dict[str, Any] = {"vae": f"{other}/vae", "unet": other}
    model: Any = load_model("sdxl", tiny_sdxl, **options)
    model.start_training(AdapterSpec(kind=kind, rank=2), seed=0, with_reference=False)
    perturb(model.denoiser.trainable_parameters(), 0.1)
    model.save_adapter(str(tmp_path / "trained"))
    model.network.eval()
    (ours,) = model.generate(["a ring"], [0], num_inference_steps=1)
    source = code(card({"name": "sdxl", "path": tiny_sdxl, **options}, kind=kind))
    scope: dict[str, Any] = {"noise": draws.normal((1, 4, 16, 16), "initial", "a ring", 0)}
    source = source.replace("path/to/this/folder", str(tmp_path / "trained"))
    exec(source.replace('"a prompt"', '"a ring", num_inference_steps=1, latents=noise'), scope)
    assert np.array_equal(np.asarray(scope["image"]), np.asarray(ours))


def test_the_code_loads_an_adapter_through_peft_where_diffusers_cannot(tmp_path: Path) -> None:
    """Bit for bit; the smallest base has no size in the list that the pipeline draws at by default."""
    base = PixArt.tiny(tmp_path / "base").path
    model: Any = load_model("pixart", base)
    model.start_training(AdapterSpec(rank=2, alpha=3), seed=0, with_reference=False)
    perturb(model.denoiser.trainable_parameters(), 0.3)
    model.save_adapter(str(tmp_path / "trained"))
    model.network.eval()
    source = code(card({"name": "pixart", "path": base}))
    source = source.replace("path/to/this/folder", str(tmp_path / "trained"))
    settings = "num_inference_steps=1, latents=noise, use_resolution_binning=False, output_type='latent'"
    scope: dict[str, Any] = {"noise": draws.normal((1, 4, 16, 16), "initial", "a ring", 0)}
    exec(source.replace('"a prompt"', f'"a ring", clean_caption=False, {settings}'), scope)
    assert torch.equal(scope["image"], model.sample(["a ring"], [0], num_inference_steps=1)[0])


def test_what_diffusers_loads_of_kohyas_layout_is_said() -> None:
    """No code, and no library for the hub to show code of, where it would load nothing without a word."""
    cards = {
        name: export_card(Exported("kohya", "lora.safetensors", {"name": name, "path": "org/base"}, "0123"))
        for name in ("sdxl", "flux", "sd3")
    }
    assert "as any LoRA. With diffusers:" in cards["sdxl"]
    assert "With diffusers, which leaves out layers outside the blocks:" in cards["flux"]
    for name in ("sdxl", "flux"):
        assert "library_name: diffusers" in cards[name]
        assert 'load_lora_weights("path/to/this/folder", weight_name="lora.safe' in code(cards[name])
    assert "diffusers loads nothing of it." in cards["sd3"]
    assert "```python" not in cards["sd3"] and "library_name" not in cards["sd3"]
    model = {"name": "sd3", "path": "org/base"}
    assert "library_name: diffusers" in export_card(Exported("adapter", None, model, "0123"))


def test_revision_and_variant_are_named() -> None:
    source = code(card({"name": "sd", "path": "org/base", "revision": "v2", "variant": "fp16"}))
    assert 'from_pretrained("org/base", revision="v2", variant="fp16")' in source

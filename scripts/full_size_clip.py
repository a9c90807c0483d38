"""CLIP models at their true size with random weights, in the layouts that scorers are published in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' conversion between layouts

from tests.tiny_clip import full_tokenizer, renamed


def random_state(arch: str, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of an architecture in open_clip's names, large enough that texts and pictures matter."""
    torch.manual_seed(seed)
    model = open_clip.create_model(arch, require_pretrained=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            parameter.data *= 1.5
    model.logit_scale.data.fill_(4.6052)  # ln 100
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def write_state_dict(path: Path, arch: str, seed: int = 0) -> Path:
    """Writes a file like HPS v2's: tensors under `state_dict`; returns its path."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": random_state(arch, seed)}, path)
    return path


def write_transformers(folder: Path, arch: str, seed: int = 0) -> Path:
    """Writes the same tensors as PickScore's are: a CLIPModel with CLIP's tokenizer; returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    settings = open_clip.get_model_config(arch)
    model = CLIPModel(clip_config(settings))
    model.load_state_dict(renamed(random_state(arch, seed)), strict=True)
    model.save_pretrained(folder)
    full_tokenizer().save_pretrained(folder)
    return folder


def clip_config(settings: dict[str, Any]) -> CLIPConfig:
    """transformers' description of a model that open_clip describes by `settings`."""
    act = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    towers = []
    for tower, heads in (("text_cfg", None), ("vision_cfg", settings["vision_cfg"].get("head_width", 64))):
        given = settings[tower]
        width = given["width"]
        towers.append(
            {
                "hidden_size": width,
                "num_hidden_layers": given["layers"],
                "num_attention_heads": given["heads"] if heads is None else width // heads,
                "intermediate_size": int(width * given.get("mlp_ratio", 4.0)),
                "hidden_act": act,
                "projection_dim": settings["embed_dim"],
            }
        )
    text, vision = towers
    tokenizer = full_tokenizer()
    text |= {"vocab_size": settings["text_cfg"].get("vocab_size", 49408)}
    text |= {"max_position_embeddings": settings["text_cfg"].get("context_length", 77)}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision |= {key: settings["vision_cfg"][key] for key in ("image_size", "patch_size")}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings["embed_dim"])

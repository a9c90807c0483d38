"""A small random ImageReward in the published layout, and its formulas in plain tensor code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "photo", "at", "night", ",", "!")
VOCABULARY = {token: place for place, token in enumerate(SPECIAL + WORDS)}
PIXELS, PATCH, SEEN, READ, LAYERS, HEADS, POSITIONS = 32, 8, 128, 128, 2, 4, 40
MEAN, STD = 0.16717362830052426, 1.0333394966054072


def tensors(positions: int = POSITIONS, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint in the published layout, with what is saved there and not used."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def put(name: str, *shape: int, size: float | None = None) -> None:
        size = shape[-1] ** -0.5 if size is None else size
        state[name] = size * torch.randn(shape, generator=draw)

    def linear(name: str, out: int, wide: int) -> None:
        put(f"{name}.weight", out, wide, size=1.2 * wide**-0.5)
        put(f"{name}.bias", out, size=0.1)

    def norm(name: str, wide: int) -> None:
        put(f"{name}.weight", wide, size=0.2)
        state[f"{name}.weight"] += 1
        put(f"{name}.bias", wide, size=0.1)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    # Small at the start, so that the eps of the first layer norm shows.
    put(f"{vision}.cls_token", 1, 1, SEEN, size=0.02)
    put(f"{vision}.pos_embed", 1, (PIXELS // PATCH) ** 2 + 1, SEEN, size=0.02)
    put(f"{vision}.patch_embed.proj.weight", SEEN, 3, PATCH, PATCH, size=0.001)
    put(f"{vision}.patch_embed.proj.bias", SEEN, size=0.02)
    for layer in (f"{vision}.blocks.{index}" for index in range(LAYERS)):
        norm(f"{layer}.norm1", SEEN)
        linear(f"{layer}.attn.qkv", 3 * SEEN, SEEN)
        linear(f"{layer}.attn.proj", SEEN, SEEN)
        norm(f"{layer}.norm2", SEEN)
        linear(f"{layer}.mlp.fc1", 96, SEEN)
        linear(f"{layer}.mlp.fc2", SEEN, 96)
    norm(f"{vision}.norm", SEEN)
    state[f"{text}.embeddings.position_ids"] = torch.arange(positions)[None]
    put(f"{text}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, READ, size=1e-3)
    put(f"{text}.embeddings.position_embeddings.weight", positions, READ, size=1e-3)
    norm(f"{text}.embeddings.LayerNorm", READ)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(LAYERS)):
        for kind, source in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{kind}.self.query", READ, READ)
            linear(f"{layer}.{kind}.self.key", READ, source)
            linear(f"{layer}.{kind}.self.value", READ, source)
            linear(f"{layer}.{kind}.output.dense", READ, READ)
            norm(f"{layer}.{kind}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", 80, READ)
        linear(f"{layer}.output.dense", READ, 80)
        norm(f"{layer}.output.LayerNorm", READ)
    linear("blip.vision_proj", 16, SEEN)
    linear("blip.text_proj", 16, READ)
    for place, (wide, narrow) in zip(
        (0, 2, 4, 6, 7), ((READ, 12), (12, 8), (8, 6), (6, 4), (4, 1)), strict=True
    ):
        linear(f"mlp.layers.{place}", narrow, wide)
    return state


def config(positions: int = POSITIONS) -> dict:
    return {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": READ,
        "intermediate_size": 80,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": len(VOCABULARY) + 2,
        "encoder_width": 768,  # wrong in the published file, too: nobody reads it
        "add_cross_attention": True,
    }


def write(folder: Path, state: dict | None = None, med_config: dict | None = None) -> dict[str, str]:
    """Writes a checkpoint and its vocabulary; returns the options that load it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors() if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config() if med_config is None else med_config))
    words = folder / "words"
    words.mkdir(exist_ok=True)
    (words / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return {"path": str(folder), "tokenizer": str(words)}


# The independent path: explicit formulas on the checkpoint's tensors, one pair at a time, no padding.


def pixels_by_hand(image: Image.Image) -> torch.Tensor:
    width, height = image.size
    short = min(width, height)
    new = (int(PIXELS * width / short), int(PIXELS * height / short))
    left, top = (round((side - PIXELS) / 2) for side in new)
    fitted = image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + PIXELS, top + PIXELS))
    values = (np.asarray(fitted) / 255 - (0.48145466, 0.4578275, 0.40821073)) / (
        0.26862954,
        0.26130258,
        0.27577711,
    )
    return torch.from_numpy(values).float().permute(2, 0, 1)


def ids_by_hand(prompt: str, length: int = 35) -> list[int]:
    for mark in ",!":
        prompt = prompt.replace(mark, f" {mark} ")
    words = [VOCABULARY.get(word, VOCABULARY["[UNK]"]) for word in prompt.lower().split()]
    return [VOCABULARY["[CLS]"], *words[: length - 2], VOCABULARY["[SEP]"]]


def plain(
    state: dict,
    image: Image.Image,
    prompt: str,
    *,
    heads: int = HEADS,
    length: int = 35,
    eps: float = 1e-6,
    text_eps: float = 1e-12,
    tanh: bool = False,
    last_norm: bool = True,
) -> torch.Tensor:
    """Returns the text's first token after the last layer, [width]."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        if tanh:
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        out = []
        for one_q, one_k, one_v in zip(*(each.chunk(heads, -1) for each in (q, k, v)), strict=True):
            out.append((one_q @ one_k.T / math.sqrt(one_q.shape[-1])).softmax(-1) @ one_v)
        return torch.cat(out, -1)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patches = pixels_by_hand(image).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(-1, 3 * PATCH * PATCH)
    weight = state[f"{vision}.patch_embed.proj.weight"].flatten(1)
    seen = patches @ weight.T + state[f"{vision}.patch_embed.proj.bias"]
    seen = torch.cat([state[f"{vision}.cls_token"][0], seen]) + state[f"{vision}.pos_embed"][0]
    for layer in (f"{vision}.blocks.{index}" for index in range(LAYERS)):
        q, k, v = linear(norm(seen, f"{layer}.norm1", eps), f"{layer}.attn.qkv").chunk(3, -1)
        seen = seen + linear(attend(q, k, v, SEEN // 64), f"{layer}.attn.proj")
        inner = gelu(linear(norm(seen, f"{layer}.norm2", eps), f"{layer}.mlp.fc1"))
        seen = seen + linear(inner, f"{layer}.mlp.fc2")
    if last_norm:
        seen = norm(seen, f"{vision}.norm", eps)
    ids = ids_by_hand(prompt, length)
    words = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    read = words + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    read = norm(read, f"{text}.embeddings.LayerNorm", text_eps)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(LAYERS)):
        for kind in ("attention", "crossattention"):
            source = read if kind == "attention" else seen
            q = linear(read, f"{layer}.{kind}.self.query")
            k, v = (linear(source, f"{layer}.{kind}.self.{each}") for each in ("key", "value"))
            out = linear(attend(q, k, v, heads), f"{layer}.{kind}.output.dense")
            read = norm(read + out, f"{layer}.{kind}.output.LayerNorm", text_eps)
        inner = gelu(linear(read, f"{layer}.intermediate.dense"))
        read = norm(read + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", text_eps)
    return read[0]


def fused(state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the head as one affine map, in float64: the product of its matrices, the sum of its biases."""
    weight, bias = torch.eye(READ, dtype=torch.float64), torch.zeros(READ, dtype=torch.float64)
    for place in (0, 2, 4, 6, 7):
        step = state[f"mlp.layers.{place}.weight"].double()
        weight, bias = step @ weight, step @ bias + state[f"mlp.layers.{place}.bias"].double()
    return weight[0], bias[0]


def rewards(state: dict, images: list[Image.Image], prompts: list[str], **knobs) -> torch.Tensor:
    weight, bias = fused(state)
    rows = [plain(state, image, prompt, **knobs) for image, prompt in zip(images, prompts, strict=True)]
    return ((torch.stack([row.double() @ weight + bias for row in rows]) - MEAN) / STD).float()

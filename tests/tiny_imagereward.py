"""A random ImageReward in the published layout, small or of true size, and its formulas in tensor code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "photo", "at", "night", ",", "!")
VOCABULARY = {token: place for place, token in enumerate(SPECIAL + WORDS)}


@dataclass(frozen=True)
class Sizes:
    """Of both encoders: what is seen is the picture, what is read the text."""

    pixels: int = 32
    patch: int = 8
    seen: int = 128
    seen_layers: int = 2
    seen_inner: int = 96
    read: int = 128
    read_layers: int = 2
    read_inner: int = 80
    heads: int = 4
    words: int = len(VOCABULARY)
    head: tuple[int, ...] = (12, 8, 6, 4)
    first: float = 1e-3  # of embeddings: small, so that the eps of the first layer norm shows


TINY = Sizes()
TRUE = Sizes(224, 16, 1024, 24, 4096, 768, 12, 3072, 12, 30522, (1024, 128, 64, 16), 0.02)
"""ViT-L/16 and BERT-base."""

READ, HEADS, POSITIONS = TINY.read, TINY.heads, 40
MEAN, STD = 0.16717362830052426, 1.0333394966054072


def tensors(positions: int = POSITIONS, seed: int = 0, sizes: Sizes = TINY) -> dict[str, torch.Tensor]:
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
    put(f"{vision}.cls_token", 1, 1, sizes.seen, size=0.02)
    put(f"{vision}.pos_embed", 1, (sizes.pixels // sizes.patch) ** 2 + 1, sizes.seen, size=0.02)
    put(f"{vision}.patch_embed.proj.weight", sizes.seen, 3, sizes.patch, sizes.patch, size=0.001)
    put(f"{vision}.patch_embed.proj.bias", sizes.seen, size=0.02)
    for layer in (f"{vision}.blocks.{index}" for index in range(sizes.seen_layers)):
        norm(f"{layer}.norm1", sizes.seen)
        linear(f"{layer}.attn.qkv", 3 * sizes.seen, sizes.seen)
        linear(f"{layer}.attn.proj", sizes.seen, sizes.seen)
        norm(f"{layer}.norm2", sizes.seen)
        linear(f"{layer}.mlp.fc1", sizes.seen_inner, sizes.seen)
        linear(f"{layer}.mlp.fc2", sizes.seen, sizes.seen_inner)
    norm(f"{vision}.norm", sizes.seen)
    state[f"{text}.embeddings.position_ids"] = torch.arange(positions)[None]
    put(f"{text}.embeddings.word_embeddings.weight", sizes.words + 2, sizes.read, size=sizes.first)
    put(f"{text}.embeddings.position_embeddings.weight", positions, sizes.read, size=sizes.first)
    norm(f"{text}.embeddings.LayerNorm", sizes.read)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(sizes.read_layers)):
        for kind, source in (("attention", sizes.read), ("crossattention", sizes.seen)):
            linear(f"{layer}.{kind}.self.query", sizes.read, sizes.read)
            linear(f"{layer}.{kind}.self.key", sizes.read, source)
            linear(f"{layer}.{kind}.self.value", sizes.read, source)
            linear(f"{layer}.{kind}.output.dense", sizes.read, sizes.read)
            norm(f"{layer}.{kind}.output.LayerNorm", sizes.read)
        linear(f"{layer}.intermediate.dense", sizes.read_inner, sizes.read)
        linear(f"{layer}.output.dense", sizes.read, sizes.read_inner)
        norm(f"{layer}.output.LayerNorm", sizes.read)
    linear("blip.vision_proj", 16, sizes.seen)
    linear("blip.text_proj", 16, sizes.read)
    widths = (sizes.read, *sizes.head, 1)
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{place}", narrow, wide)
    return state


def config(positions: int = POSITIONS, sizes: Sizes = TINY) -> dict:
    return {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": sizes.read,
        "intermediate_size": sizes.read_inner,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.read_layers,
        "vocab_size": sizes.words + 2,
        "encoder_width": 768,  # wrong in the published file, too: nobody reads it
        "add_cross_attention": True,
    }


def write(
    folder: Path, state: dict | None = None, med_config: dict | None = None, sizes: Sizes = TINY
) -> dict[str, str]:
    """Writes a checkpoint and its vocabulary; returns the options that load it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(sizes=sizes) if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(
        json.dumps(config(sizes=sizes) if med_config is None else med_config)
    )
    words = folder / "words"
    words.mkdir(exist_ok=True)
    known = [*VOCABULARY, *(f"[unused{place}]" for place in range(sizes.words - len(VOCABULARY)))]
    (words / "vocab.txt").write_text("\n".join(known) + "\n")
    return {"path": str(folder), "tokenizer": str(words)}


# The independent path: explicit formulas on the checkpoint's tensors, one pair at a time, no padding.


def pixels_by_hand(image: Image.Image, pixels: int) -> torch.Tensor:
    width, height = image.size
    short = min(width, height)
    new = (int(pixels * width / short), int(pixels * height / short))
    left, top = (round((side - pixels) / 2) for side in new)
    fitted = image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + pixels, top + pixels))
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
    sizes: Sizes = TINY,
    heads: int | None = None,
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
    patches = pixels_by_hand(image, sizes.pixels)
    patches = patches.unfold(1, sizes.patch, sizes.patch).unfold(2, sizes.patch, sizes.patch)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(-1, 3 * sizes.patch**2)
    weight = state[f"{vision}.patch_embed.proj.weight"].flatten(1)
    seen = patches @ weight.T + state[f"{vision}.patch_embed.proj.bias"]
    seen = torch.cat([state[f"{vision}.cls_token"][0], seen]) + state[f"{vision}.pos_embed"][0]
    for layer in (f"{vision}.blocks.{index}" for index in range(sizes.seen_layers)):
        q, k, v = linear(norm(seen, f"{layer}.norm1", eps), f"{layer}.attn.qkv").chunk(3, -1)
        seen = seen + linear(attend(q, k, v, sizes.seen // 64), f"{layer}.attn.proj")
        inner = gelu(linear(norm(seen, f"{layer}.norm2", eps), f"{layer}.mlp.fc1"))
        seen = seen + linear(inner, f"{layer}.mlp.fc2")
    if last_norm:
        seen = norm(seen, f"{vision}.norm", eps)
    ids = ids_by_hand(prompt, length)
    words = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    read = words + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    read = norm(read, f"{text}.embeddings.LayerNorm", text_eps)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(sizes.read_layers)):
        for kind in ("attention", "crossattention"):
            source = read if kind == "attention" else seen
            q = linear(read, f"{layer}.{kind}.self.query")
            k, v = (linear(source, f"{layer}.{kind}.self.{each}") for each in ("key", "value"))
            out = linear(attend(q, k, v, heads or sizes.heads), f"{layer}.{kind}.output.dense")
            read = norm(read + out, f"{layer}.{kind}.output.LayerNorm", text_eps)
        inner = gelu(linear(read, f"{layer}.intermediate.dense"))
        read = norm(read + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", text_eps)
    return read[0]


def fused(state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the head as one affine map, in float64: the product of its matrices, the sum of its biases."""
    width = state["mlp.layers.0.weight"].shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for place in (0, 2, 4, 6, 7):
        step = state[f"mlp.layers.{place}.weight"].double()
        weight, bias = step @ weight, step @ bias + state[f"mlp.layers.{place}.bias"].double()
    return weight[0], bias[0]


def rewards(state: dict, images: list[Image.Image], prompts: list[str], **knobs) -> torch.Tensor:
    weight, bias = fused(state)
    rows = [plain(state, image, prompt, **knobs) for image, prompt in zip(images, prompts, strict=True)]
    return ((torch.stack([row.double() @ weight + bias for row in rows]) - MEAN) / STD).float()

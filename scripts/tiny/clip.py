"""tiny-clip: an open_clip model that ranks captions of scenes, in open_clip's own folder layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    Scene,
    caption,
    draw,
    is_held_out,
    parse,
    sample_scene,
)
from scripts.tiny.bank import Bank
from scripts.tiny.loop import Clock, plan_of, train
from scripts.tiny.settings import Settings
from scripts.tiny.tokenizer import load_tokenizer, save_tokenizer

CONTEXT = 48  # tokens of a text; captions have at most 20


def model_config(settings: Settings, vocabulary: int) -> dict[str, Any]:
    """open_clip's `model_cfg`: small transformers, on 8 px patches and (causal) on tokens."""
    return {
        "embed_dim": settings.clip_embed,
        "vision_cfg": {
            "image_size": 64,
            "layers": settings.clip_layers,
            "width": settings.clip_width,
            "head_width": min(32, settings.clip_width),
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tiny-clip",  # open_clip reads the tokenizer from the model's folder instead
            "width": settings.clip_width,
            "heads": max(1, settings.clip_width // 32),
            "layers": max(1, settings.clip_layers - 1),
        },
    }


def wrong_scene(scene: Scene, rng: np.random.Generator, *, seen_only: bool = False) -> tuple[Scene, str]:
    """A scene that differs from `scene` in one word or in the order of its words, and what differs.

    seen_only: no held-out combination in it. Training needs it: a combination only ever met in wrong
    captions is learned to be wrong.
    """
    kinds = ["colour", "shape", "background", "binding" if scene.relation else "count"]
    kinds += ["position"] if scene.relation else []
    while True:
        kind = kinds[int(rng.integers(len(kinds)))]
        index = int(rng.integers(len(scene.objects)))
        objects, relation, background = list(scene.objects), scene.relation, scene.background
        if kind == "colour":
            objects[index] = replace(objects[index], colour=str(rng.choice(list(COLOURS))))
        elif kind == "shape":
            objects[index] = replace(objects[index], shape=str(rng.choice(SHAPES)))
        elif kind == "count":
            objects[index] = replace(objects[index], count=int(rng.integers(1, MAX_COUNT + 1)))
        elif kind == "binding":
            first, second = objects
            objects = [replace(first, colour=second.colour), replace(second, colour=first.colour)]
        elif kind == "position":
            relation = str(rng.choice(RELATIONS))
        else:
            background = str(rng.choice(list(BACKGROUNDS)))
        try:
            changed = Scene(tuple(objects), background, relation)
        except ValueError:  # two objects of one colour or one shape: not a scene
            continue
        if changed != scene and not (seen_only and is_held_out(changed)):
            return changed, kind


class Contrast:
    """The loss of one step: each picture against the batch's captions and one almost right each."""

    def __init__(self, settings: Settings, model: nn.Module, bank: Bank, tokenizer: Any) -> None:
        self.settings, self.model, self.bank, self.tokenizer = settings, model, bank, tokenizer
        self.rows = bank.right_rows()

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids: int64 [B, CONTEXT]."""
        encoded = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True)
        return torch.tensor(encoded.input_ids)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = self.rows[torch.randint(len(self.rows), (self.settings.clip_batch,))]
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
        captions = [self.bank.captions[row] for row in rows.tolist()]
        scenes = [parse(text) for text in captions]
        wrongs = [wrong_scene(scene, rng, seen_only=True)[0] for scene in scenes]
        pixels = self.bank.pixels(rows)
        pixels = pixels + 0.05 * torch.rand(()) * torch.randn_like(pixels)
        # Plain attention for training, as for the UNet.
        with sdpa_kernel(SDPBackend.MATH):
            images = functional.normalize(self.model.encode_image(pixels).float(), dim=-1)
        texts = self.tokens([*captions, *(caption(scene, rng) for scene in wrongs)])
        with sdpa_kernel(SDPBackend.MATH):
            embedded = functional.normalize(self.model.encode_text(texts).float(), dim=-1)
        scale = self.model.logit_scale.exp().clamp(max=100)
        logits = scale * images @ embedded.T
        # A caption of another row that means the same is no wrong answer: it leaves the sum.
        numbers: dict[Scene, int] = {}
        meaning = torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in (*scenes, *wrongs)])
        same = meaning[: len(rows), None] == meaning
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(rows))
        right = (logits.argmax(dim=1) == target).float().mean().item()
        square = logits[:, : len(rows)]
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(square.T, target)) / 2
        return loss, {"top1": right}


def build_clip(settings: Settings, bank: Bank, out: Path, clock: Clock) -> Path:
    """The folder `out`/tiny-clip, trained as far as needed. Raises OutOfTime (saved) when time is over."""
    from open_clip.model import CLIP

    tokenizer = load_tokenizer(out / "work" / "tokenizer")
    config = model_config(settings, len(tokenizer))
    torch.manual_seed(settings.seed)
    model = CLIP(**config)
    own = {"ema": 0.99, "warmup": 100, "weight_decay": 0.05}
    plan = plan_of(settings, "clip", steps=settings.clip_steps, lr=settings.clip_lr, **own)
    loss = Contrast(settings, model, bank, tokenizer)
    averaged = train(plan, nn.ModuleDict({"clip": model}), loss, folder=out / "work", clock=clock)
    folder = _export(averaged["clip"], config, tokenizer, out)
    clock.say("clip: " + describe_ranking(folder, 100 if len(bank.captions) > 1000 else 8))
    return folder


def _export(model: nn.Module, config: dict[str, Any], tokenizer: Any, out: Path) -> Path:
    """Writes open_clip_config.json, open_clip_model.safetensors (fp16) and the tokenizer."""
    from safetensors.torch import save_file

    folder = out / "tiny-clip"
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "size": 64,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    save_tokenizer(tokenizer, out / "work" / "tokenizer", folder)
    return folder


@torch.no_grad()
def describe_ranking(folder: Path, n: int) -> str:
    """One line: how often the stored model ranks right captions first, on fresh held-out drawings.

    Retrieval: the right caption first among the captions of all `n` different scenes. Wrong captions: the
        right
    one above one that differs in a single clause, by clause.
    """
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    rng = np.random.default_rng(90_002)
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = sample_scene(rng, split="heldout")
        if scene not in scenes:
            scenes.append(scene)
    pixels = torch.stack([preprocess(draw(scene, rng)) for scene in scenes])
    images = model.encode_image(pixels, normalize=True)
    texts = model.encode_text(tokenizer([caption(scene) for scene in scenes]), normalize=True)
    own = (images * texts).sum(dim=1)
    top1 = ((images @ texts.T).argmax(dim=1) == torch.arange(n)).float().mean().item()
    parts: dict[str, list[bool]] = {}
    for _ in range(10):
        wrongs = [wrong_scene(scene, rng) for scene in scenes]
        embedded = model.encode_text(tokenizer([caption(scene) for scene, _ in wrongs]), normalize=True)
        above = own > (images * embedded).sum(dim=1)
        for (_, kind), right in zip(wrongs, above.tolist(), strict=True):
            parts.setdefault(kind, []).append(right)
    words = ", ".join(f"{kind} {np.mean(rights):.3f}" for kind, rights in sorted(parts.items()))
    return f"retrieval {top1:.3f} of {n}; right caption above a wrong one: {words}"

"""Random CLIP models of a few thousand weights, in every public layout, for tests without downloads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

WORDS = ("a", "red", "blue", "circle", "square", "on", "white", "background", "left", "of", "one", "photo")
WIDTH, LAYERS, EMBED, PIXELS, PATCH = 32, 2, 24, 32, 8


def tiny_tokenizer() -> CLIPTokenizer:
    """A real CLIPTokenizer: the bytes, as many word ends, merges for a few words, two special tokens."""
    symbols = list(open_clip.tokenizer.bytes_to_unicode().values())
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
            pieces = ["".join(merge), *pieces[2:]]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def full_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer in transformers' class, from the vocabulary file that open_clip ships."""
    path = Path(open_clip.tokenizer.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = list(open_clip.tokenizer.bytes_to_unicode().values())
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(merge) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def model_config(vocab_size: int, *, own_tokenizer: bool, quick_gelu: bool) -> dict:
    """open_clip's description of the tiny model."""
    text = {"context_length": 16, "vocab_size": vocab_size, "width": WIDTH, "heads": 2, "layers": LAYERS}
    if own_tokenizer:
        text["hf_tokenizer_name"] = "local"
    vision = {"image_size": PIXELS, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": PATCH}
    return {"embed_dim": EMBED, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


def write_open_clip(
    folder: Path, *, own_tokenizer: bool = True, quick_gelu: bool = False, seed: int = 0
) -> Path:
    """Writes a random model in open_clip's checkpoint layout; returns the folder."""
    tokenizer = tiny_tokenizer()
    config = model_config(
        len(tokenizer) if own_tokenizer else 49408, own_tokenizer=own_tokenizer, quick_gelu=quick_gelu
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = json.loads(json.dumps(config))
        model = open_clip.CLIP(**{**arguments, "vision_cfg": arguments["vision_cfg"]}).eval()
        for parameter in model.parameters():  # the usual start is too small for the texts to matter
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.logit_scale.data.fill_(2.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.2, 0.1],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    if own_tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def write_transformers(source: Path, folder: Path) -> Path:
    """Writes the model of an open_clip folder in the layout of transformers; returns the folder."""
    model_cfg = json.loads((source / "open_clip_config.json").read_text())["model_cfg"]
    own = "hf_tokenizer_name" in model_cfg["text_cfg"]
    tokenizer = tiny_tokenizer() if own else full_tokenizer()
    act = "quick_gelu" if model_cfg["quick_gelu"] else "gelu"
    shared = {
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "hidden_act": act,
    }
    shared |= {"num_attention_heads": 2, "projection_dim": EMBED}
    text = shared | {"vocab_size": model_cfg["text_cfg"]["vocab_size"], "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = shared | {"image_size": PIXELS, "patch_size": PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)
    from safetensors.torch import load_file

    model = CLIPModel(config)
    model.load_state_dict(renamed(load_file(source / "open_clip_model.safetensors")), strict=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "size": {"shortest_edge": PIXELS},
        "crop_size": {"height": PIXELS, "width": PIXELS},
        "resample": 3,
    }
    settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors under transformers' names: fused q, k, v taken apart, projections transposed."""
    result = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",  # the misspelling is transformers'
        "vision_model.post_layernorm": "visual.ln_post",
    }
    pairs = dict(norms)
    for ours, theirs in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        depth = sum(key.startswith(f"{theirs}.resblocks.") for key in state if key.endswith("ln_1.weight"))
        for layer in range(depth):
            to, source = f"{ours}.encoder.layers.{layer}", f"{theirs}.resblocks.{layer}"
            pairs |= {f"{to}.layer_norm1": f"{source}.ln_1", f"{to}.layer_norm2": f"{source}.ln_2"}
            pairs |= {f"{to}.mlp.fc1": f"{source}.mlp.c_fc", f"{to}.mlp.fc2": f"{source}.mlp.c_proj"}
            pairs |= {f"{to}.self_attn.out_proj": f"{source}.attn.out_proj"}
            for kind in ("weight", "bias"):
                parts = state[f"{source}.attn.in_proj_{kind}"].chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    result[f"{to}.self_attn.{name}_proj.{kind}"] = part.contiguous()
    for to, source in pairs.items():
        for kind in ("weight", "bias"):
            result[f"{to}.{kind}"] = state[f"{source}.{kind}"]
    return result

"""SigLIP scores: scales, text preparation and pooling by hand, layouts agree, other models are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from tests.tiny_clip import write_open_clip, write_transformers

PIXELS, PATCH, WIDTH, LAYERS, LENGTH, SCALE, BIAS = 32, 8, 32, 2, 12, 1.3, -0.7
PROMPTS = [
    "a red circle",
    "two blue squares left of a photo",
    "zebra crossing",
    "",
    "green",
    "a red circle on a very long and winding road through a valley of many words",
]
SIZES = [(40, 64), (64, 64), (90, 50), (1, 1), (33, 32), (20, 200)]


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (high, wide, 3), dtype=np.uint8)) for wide, high in SIZES]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, <eos> after each text, <pad> 0, as Gemma's; no lower-casing of its own."""
    alphabet = [chr(code) for code in range(33, 127)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", "▁", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def write_siglip(folder: Path, **tokenizer_config: object) -> Path:
    """Writes a random SiglipModel in the layout of transformers; returns the folder."""
    tokenizer = tiny_tokenizer()
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    text |= {"projection_size": WIDTH, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    vision = shared | {"image_size": PIXELS, "patch_size": PATCH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
        for parameter in model.parameters():  # biases and norms would start at 0 and 1
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.logit_scale.data.fill_(SCALE)
    model.logit_bias.data.fill_(BIAS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"size": {"height": PIXELS, "width": PIXELS}, "resample": 2}
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if tokenizer_config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    return folder


def contract_case(folder: Path):
    return {"path": str(write_siglip(folder / "tiny"))}, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("siglip") / "tiny")


def pixels_by_hand(images: list[Image.Image], filter_: Image.Resampling) -> torch.Tensor:
    """The pictures squashed by PIL, mean and std 0.5."""
    squashed = [np.asarray(image.resize((PIXELS, PIXELS), filter_), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 127.5 - 1


def ids_by_hand(texts: list[str]) -> torch.Tensor:
    """The texts' characters, cut, <eos>, then <pad> to the full length."""
    rows = []
    for text in texts:
        letters = [3 if letter == " " else 4 + ord(letter) - 33 for letter in text.lower()][: LENGTH - 1]
        rows.append([*letters, 1, *[0] * (LENGTH - 1 - len(letters))])
    return torch.tensor(rows)


def test_logits_are_the_models_own(folder):
    model = SiglipModel.from_pretrained(folder).eval()
    pixels = pixels_by_hand(pictures(), Image.Resampling.BILINEAR)
    with torch.no_grad():
        theirs = model(input_ids=ids_by_hand(PROMPTS), pixel_values=pixels).logits_per_image.diagonal()
    ours = load_scorer("siglip", path=str(folder), scale="logits")
    torch.testing.assert_close(ours(pictures(), PROMPTS), theirs, rtol=0, atol=1e-5)


def test_scales_by_hand(folder):
    cosine, logits, probability = (
        load_scorer("siglip", path=str(folder), scale=scale) for scale in ("cosine", "logits", "probability")
    )
    image, text = cosine.embed_images(pictures()), cosine.embed_texts(PROMPTS)
    expected = torch.stack([image[i] @ text[i] for i in range(6)])
    torch.testing.assert_close(cosine(pictures(), PROMPTS), expected, rtol=0, atol=1e-6)
    by_hand = np.exp(SCALE) * expected + BIAS
    torch.testing.assert_close(logits(pictures(), PROMPTS), by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        probability(pictures(), PROMPTS), 1 / (1 + torch.exp(-by_hand)), rtol=0, atol=1e-5
    )


def test_the_attention_pool_by_hand(folder):
    """One learnt query over all patches, then a residual MLP: plain tensor code on the file's tensors."""
    state = load_file(folder / "model.safetensors")
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    pixels = pixels_by_hand(pictures(), Image.Resampling.BILINEAR)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / (WIDTH / 2) ** 0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = patches.flatten(1, 2) @ state["embeddings.patch_embedding.weight"].flatten(1).T
    x = x + state["embeddings.patch_embedding.bias"] + state["embeddings.position_embedding.weight"]
    for layer in range(LAYERS):
        name = f"encoder.layers.{layer}"
        y = norm(x, f"{name}.layer_norm1")
        y = attend(*(linear(y, f"{name}.self_attn.{part}_proj") for part in "qkv"))
        x = x + linear(y, f"{name}.self_attn.out_proj")
        x = x + mlp(norm(x, f"{name}.layer_norm2"), f"{name}.mlp")
    x = norm(x, "post_layernorm")
    weights, biases = (
        state["head.attention.in_proj_weight"].chunk(3),
        state["head.attention.in_proj_bias"].chunk(3),
    )
    query = state["head.probe"].expand(len(x), -1, -1)
    y = attend(*(part @ w.T + b for part, w, b in zip((query, x, x), weights, biases, strict=True)))
    y = linear(y, "head.attention.out_proj")
    pooled = (y + mlp(norm(y, "head.layernorm"), "head.mlp"))[:, 0]
    ours = load_scorer("siglip", path=str(folder)).embed_images(pictures())
    torch.testing.assert_close(ours, F.normalize(pooled, dim=-1), rtol=0, atol=1e-5)


def test_the_resizing_is_the_folders(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "bicubic")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3}))
    image = pictures()[:1]
    for path, kernel in ((folder, Image.Resampling.BILINEAR), (other, Image.Resampling.BICUBIC)):
        prepared = load_scorer("siglip", path=str(path)).towers.preprocess(image)
        torch.testing.assert_close(prepared, pixels_by_hand(image, kernel), rtol=0, atol=1e-6)
    (other / "preprocessor_config.json").unlink()  # without settings: SigLIP's, not CLIP's
    prepared = load_scorer("siglip", path=str(other)).towers.preprocess(image)
    expected = pixels_by_hand(image, Image.Resampling.BICUBIC)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    # A bare number is of both sides.
    (other / "preprocessor_config.json").write_text(json.dumps({"size": PIXELS, "resample": 3}))
    prepared = load_scorer("siglip", path=str(other)).towers.preprocess(image)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)


def test_texts_are_lower_cased_unless_the_tokenizer_says_not_to(folder, tmp_path):
    scorer = load_scorer("siglip", path=str(folder))
    upper = [prompt.upper() for prompt in PROMPTS]
    torch.testing.assert_close(scorer.embed_texts(upper), scorer.embed_texts(PROMPTS), rtol=0, atol=1e-6)
    cased = load_scorer("siglip", path=str(write_siglip(tmp_path / "cased", do_lower_case=False)))
    assert (cased.embed_texts(["RED"]) - cased.embed_texts(["red"])).abs().max() > 1e-3
    torch.testing.assert_close(cased.embed_texts(["red"]), scorer.embed_texts(["red"]), rtol=0, atol=1e-6)


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_says(folder, tmp_path):
    left = write_siglip(tmp_path / "left", padding_side="left")
    ours, theirs = (load_scorer("siglip", path=str(path)) for path in (folder, left))
    torch.testing.assert_close(theirs.embed_texts(PROMPTS), ours.embed_texts(PROMPTS), rtol=0, atol=1e-6)
    alone = torch.cat([load_scorer("siglip", path=str(left)).embed_texts([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(alone, ours.embed_texts(PROMPTS), rtol=0, atol=1e-5)


def test_open_clips_layout_gives_one_score(folder, tmp_path):
    """The same weights under open_clip's and timm's names, with the tokenizer of the folder."""
    if not timm.is_model("vit_tiny_siglip_of_tests"):
        timm.models.register_model(vit_tiny_siglip_of_tests)
    text = {"context_length": LENGTH, "vocab_size": len(tiny_tokenizer()), "width": WIDTH, "heads": 2}
    text |= {"layers": LAYERS, "mlp_ratio": 4.0, "no_causal_mask": True, "proj_bias": True}
    text |= {"pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    text |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision = {"image_size": PIXELS, "timm_model_name": "vit_tiny_siglip_of_tests"}
    vision |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    config = {"embed_dim": WIDTH, "init_logit_bias": -10, "custom_text": True}
    config |= {"vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    other = tmp_path / "open_clip"
    tiny_tokenizer().save_pretrained(other)
    (other / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(renamed(load_file(folder / "model.safetensors")), other / "open_clip_model.safetensors")
    for scale in ("cosine", "logits", "probability"):
        ours, theirs = (load_scorer("siglip", path=str(path), scale=scale) for path in (folder, other))
        torch.testing.assert_close(ours(pictures(), PROMPTS), theirs(pictures(), PROMPTS), rtol=0, atol=1e-5)


def vit_tiny_siglip_of_tests(pretrained: bool = False, **options: object) -> torch.nn.Module:
    """timm's ViT of SigLIP at tiny size, with transformers' GELU; timm's own names compute it exactly."""
    assert not pretrained
    pooling = {name: options[name] for name in ("num_classes", "global_pool")}
    return timm.models.VisionTransformer(
        img_size=PIXELS,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=2,
        act_layer="gelu_tanh",
        class_token=False,
        **pooling,
    )


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a SiglipModel under the names of open_clip (text) and timm (pictures)."""
    result = {
        "logit_scale": state["logit_scale"].reshape(()),
        "logit_bias": state["logit_bias"].reshape(()),
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.trunk.pos_embed": state["vision_model.embeddings.position_embedding.weight"][None],
        "visual.trunk.attn_pool.latent": state["vision_model.head.probe"],
    }
    pairs = {
        "text.ln_final": "text_model.final_layer_norm",
        "text.text_projection": "text_model.head",
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.trunk.norm": "vision_model.post_layernorm",
        "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
        "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
        "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
        "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    }
    kinds = ("weight", "bias")
    for layer in range(LAYERS):
        text, vision = f"text.transformer.resblocks.{layer}", f"visual.trunk.blocks.{layer}"
        of_text, of_vision = (f"{tower}_model.encoder.layers.{layer}" for tower in ("text", "vision"))
        pairs |= {f"{text}.ln_1": f"{of_text}.layer_norm1", f"{text}.ln_2": f"{of_text}.layer_norm2"}
        pairs |= {f"{text}.mlp.c_fc": f"{of_text}.mlp.fc1", f"{text}.mlp.c_proj": f"{of_text}.mlp.fc2"}
        pairs |= {f"{text}.attn.out_proj": f"{of_text}.self_attn.out_proj"}
        pairs |= {
            f"{vision}.norm1": f"{of_vision}.layer_norm1",
            f"{vision}.norm2": f"{of_vision}.layer_norm2",
        }
        pairs |= {f"{vision}.mlp.{fc}": f"{of_vision}.mlp.{fc}" for fc in ("fc1", "fc2")}
        pairs |= {f"{vision}.attn.proj": f"{of_vision}.self_attn.out_proj"}
        for kind in kinds:
            for to, source in (
                (f"{text}.attn.in_proj_{kind}", of_text),
                (f"{vision}.attn.qkv.{kind}", of_vision),
            ):
                parts = [state[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                result[to] = torch.cat(parts)
    for to, source in pairs.items():
        result |= {f"{to}.{kind}": state[f"{source}.{kind}"] for kind in kinds}
    for kind in kinds:
        query, key, value = state[f"vision_model.head.attention.in_proj_{kind}"].chunk(3)
        result[f"visual.trunk.attn_pool.q.{kind}"] = query.clone()
        result[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat([key, value])
    return {key: value.contiguous() for key, value in result.items()}


def test_the_two_layouts_clean_texts_differently():
    """Stated in the docstring: open_clip drops punctuation of SigLIP 2's texts, transformers keeps it."""
    assert open_clip.get_model_config("ViT-B-16-SigLIP2")["text_cfg"]["tokenizer_kwargs"] == {
        "clean": "canonicalize"
    }
    assert open_clip.tokenizer.get_clean_fn("canonicalize")("A Zebra, at night!") == "a zebra at night"


def test_other_models_are_refused(folder, tmp_path):
    def error(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_scorer("siglip", path=str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    clip = write_open_clip(tmp_path / "clip")
    assert "no SigLIP model (it has no logit bias): use scorer clip" in error(clip)
    assert "no SigLIP model" in error(write_transformers(clip, tmp_path / "clip_hf"))
    for kind, message in (("siglip2", "NaFlex"), ("bert", "'bert', not 'clip' or 'siglip'")):
        other = shutil.copytree(folder, tmp_path / kind)
        (other / "config.json").write_text(json.dumps({"model_type": kind}))
        assert message in error(other)
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["vision_model.head.probe"], state["logit_bias"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert "siglip weights" in error(broken)
    assert "lack 2 tensors of their config, first logit_bias" in error(broken)
    (broken / "tokenizer.json").unlink()
    assert "no tokenizer files" in error(broken)


def test_a_load_writes_no_notes(folder, tmp_path, caplog):
    """Published text configs leave out the token ids; transformers then warns of CLIP's, at every load."""
    published = shutil.copytree(folder, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del config["text_config"][name]
    (published / "config.json").write_text(json.dumps(config))
    transformers.utils.logging.enable_propagation()
    verbosity = transformers.utils.logging.get_verbosity()
    try:
        SiglipModel.from_pretrained(published)
        assert "eos_token_id" in caplog.text
        caplog.clear()
        scorer = load_scorer("siglip", path=str(published))
    finally:
        transformers.utils.logging.disable_propagation()
    assert caplog.text == "" and transformers.utils.logging.get_verbosity() == verbosity
    same = load_scorer("siglip", path=str(folder))
    torch.testing.assert_close(scorer.embed_texts(PROMPTS), same.embed_texts(PROMPTS), rtol=0, atol=1e-6)


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'probability'"):
        load_scorer("siglip", path="x", scale="probabilty")

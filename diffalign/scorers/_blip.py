"""BLIP with a reward head, from a checkpoint in ImageReward's layout: picture and text in, one number out.

The text encoder looks at the picture in each of its layers (cross attention), so that picture and text have
no features of their own to compare: the pair is read as one.

Layout: a flat state dict, `blip.visual_encoder.*` in timm's names, `blip.text_encoder.*` in BERT's,
`mlp.layers.{0,2,4,6,7}.*`. Sizes are those of the tensors, checked one by one: the published code loads with
strict=False (THUDM/ImageReward, ImageReward/utils.py, load), and random numbers stand in for what is lacking.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.scorers._weights import content_of, hub_folder, hub_identity, settings_in

CONFIG = "med_config.json"
"""The text encoder's description beside the published weights."""

MLP_LAYERS = (0, 2, 4, 6, 7)
"""Where the head's linear layers stand in its sequence; between them was dropout, and no activation."""

HEAD_WIDTH = 64
"""Width of an attention head of every ViT and BERT that BLIP is built of."""

IGNORED = frozenset(
    {
        "blip.vision_proj.weight",  # BLIP's contrastive projections: the reward does not pass through them
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
        "blip.text_encoder.embeddings.position_ids",  # 0, 1, 2, ...: old transformers saved the counter
    }
)

VISION_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("post_layernorm", "norm"),
)
"""transformers' names of the parts of the picture's encoder, and the checkpoint's."""

WORDS = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
"""Files of a repository that make a tokenizer of BERT."""

EXTRA_TOKENS = ("[DEC]", "[ENC]")
"""What BLIP adds to BERT's vocabulary (models/BLIP/blip.py, init_tokenizer); neither is used in scoring."""


class BlipReward(torch.nn.Module):
    """The network: both encoders, and the head in float32 whatever the encoders compute in.

    Attributes:
        image_size: height and width of its pictures.
        positions: tokens that a text may have at most.
        vocabulary: tokens that it knows.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], widths: list[int]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        pairs = zip(MLP_LAYERS, widths[:-1], widths[1:], strict=True)
        self.mlp = torch.nn.Sequential(
            OrderedDict((str(place), torch.nn.Linear(wide, narrow)) for place, wide, narrow in pairs)
        )
        self.image_size: int = vision["image_size"]
        self.positions: int = text["max_position_embeddings"]
        self.vocabulary: int = text["vocab_size"]

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the head's output, float32 [B], of pixels [B, 3, H, W] and token ids and mask [B, L]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        out: torch.Tensor = self.mlp(read[:, 0].float())
        return out.squeeze(1)

    def place(self, device: str, dtype: torch.dtype) -> None:
        """Moves the encoders to `device` in `dtype`, the head in float32."""
        self.to(device)
        encoders: tuple[torch.nn.Module, ...] = (self.vision, self.text)
        for encoder in encoders:
            encoder.to(dtype)


def build(tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> BlipReward:
    """Returns the network of a checkpoint's tensors, frozen, in evaluation mode, in float32 on the CPU.

    Args:
        tensors: by the checkpoint's own names.
        config: the content of med_config.json; what it lacks is as in BERT-base.
        name: of the weights, for messages.

    Raises:
        UserError: a tensor is lacking, unknown or of a wrong shape, or the config says another size.
    """
    sizes = _Sizes(tensors, name)
    vision = _vision_config(sizes, name)
    text = _text_config(sizes, config, vision["hidden_size"], name)
    heads = [sizes.of(f"mlp.layers.{place}.weight", 2) for place in MLP_LAYERS]
    try:
        with torch.device("meta"):
            model = BlipReward(vision, text, [text["hidden_size"], *(out for out, _ in heads[:-1]), 1])
    except Exception as error:  # an unknown activation, a text for a number: libraries agree on no type
        raise UserError(f"{CONFIG} beside {name} describes no text encoder: {brief(error)}") from error
    wanted = {published_name(ours): (ours, tensor.shape) for ours, tensor in model.state_dict().items()}
    _check(tensors, {theirs: shape for theirs, (_, shape) in wanted.items()}, name)
    state = {ours: tensors[theirs].float() for theirs, (ours, _) in wanted.items()}
    model.load_state_dict(state, strict=True, assign=True)
    # The only buffer that is no weight; without memory until now.
    places = torch.arange(model.positions)[None]
    model.text.embeddings.register_buffer("position_ids", places, persistent=False)
    return model.requires_grad_(False).eval()


def published_name(ours: str) -> str:
    """Returns the checkpoint's name of a tensor of the network."""
    part, rest = ours.split(".", 1)
    if part == "mlp":
        return f"mlp.layers.{rest}"
    if part == "text":
        return f"blip.text_encoder.{rest}"
    for transformers_name, timm_name in VISION_NAMES:
        rest = rest.replace(transformers_name, timm_name)
    return f"blip.visual_encoder.{rest}"


class _Sizes:
    """Sizes of a checkpoint's tensors; one that is lacking or has another number of dimensions is refused."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name

    def of(self, key: str, dimensions: int) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        if key not in self.tensors:
            raise UserError(f"weights {self.name} lack {key}: give a checkpoint in ImageReward's layout")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != dimensions:
            raise UserError(
                f"weights {self.name}: {key} has shape {list(shape)}, not {dimensions} dimensions: "
                "it is no checkpoint in ImageReward's layout"
            )
        return shape

    def count(self, prefix: str) -> int:
        """Returns how many layers are numbered after a prefix: one more than the highest number."""
        rests = [key[len(prefix) :] for key in self.tensors if key.startswith(prefix)]
        return 1 + max(
            (int(rest.split(".")[0]) for rest in rests if rest.split(".")[0].isdecimal()), default=-1
        )


def _vision_config(sizes: _Sizes, name: str) -> dict[str, Any]:
    """Returns the picture encoder's sizes.

    Convention: layer norms have eps 1e-6 (models/BLIP/vit.py); transformers' own default is 1e-5.
    """
    _, positions, width = sizes.of("blip.visual_encoder.pos_embed", 3)
    patch = sizes.of("blip.visual_encoder.patch_embed.proj.weight", 4)[-1]
    grid = math.isqrt(max(0, positions - 1))
    if grid * grid + 1 != positions:
        raise UserError(
            f"weights {name}: {positions} places of a picture are no square of patches and one more"
        )
    return {
        "hidden_size": width,
        "intermediate_size": sizes.of("blip.visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": sizes.count("blip.visual_encoder.blocks."),
        "num_attention_heads": _heads(width, None, name),
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def _text_config(sizes: _Sizes, config: dict[str, Any], seen: int, name: str) -> dict[str, Any]:
    """Returns the text encoder's sizes; `seen` is the width of the picture's features.

    Convention: the config's `encoder_width` is not read: the published code overwrites it, too
    (models/BLIP/blip_pretrain.py), since the file says 768 and the weights have 1024.
    """
    prefix = "blip.text_encoder"
    vocabulary, width = sizes.of(f"{prefix}.embeddings.word_embeddings.weight", 2)
    measured = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": sizes.of(f"{prefix}.embeddings.position_embeddings.weight", 2)[0],
        "intermediate_size": sizes.of(f"{prefix}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "num_hidden_layers": sizes.count(f"{prefix}.encoder.layer."),
    }
    for key, value in measured.items():
        if config.get(key, value) != value:
            raise UserError(
                f"weights {name} have {key} {value}, but {CONFIG} beside them says {config[key]}: "
                "they do not belong together"
            )
    return measured | {
        "encoder_hidden_size": seen,
        "num_attention_heads": _heads(width, config.get("num_attention_heads"), name),
        "hidden_act": config.get("hidden_act", "gelu"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        # Nothing is generated; transformers would warn of places beyond a small vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "sep_token_id": None,
    }


def _heads(width: int, said: Any, name: str) -> int:
    """Returns the number of attention heads: as said, else as in BLIP."""
    if said is None and width % HEAD_WIDTH:
        raise UserError(
            f"weights {name}: width {width} is no multiple of {HEAD_WIDTH}, the width of an attention head"
        )
    heads = width // HEAD_WIDTH if said is None else said
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"weights {name}: width {width} cannot be shared by {heads} attention heads")
    return heads


def _check(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Size], name: str) -> None:
    """Checks that the tensors are those wanted, each in its shape; those of no use here are known by name."""
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise UserError(f"weights {name} lack {len(missing)} tensors of ImageReward, first {missing[0]}")
    extra = sorted(tensors.keys() - wanted.keys() - IGNORED)
    if extra:
        raise UserError(
            f"weights {name} hold {len(extra)} tensors that ImageReward has not, first {extra[0]}: "
            "give a checkpoint in its layout"
        )
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise UserError(
                f"weights {name}: {key} has shape {list(tensors[key].shape)}, which should be {list(shape)}"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of a med_config.json, nothing where there is none.

    Raises:
        UserError: it is no mapping.
    """
    if not path.is_file():
        return {}
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping: give the text encoder's description, or remove it")
    return content


def open_tokenizer(place: str, vocabulary: int) -> tuple[Any, str]:
    """Returns BERT's tokenizer with BLIP's two tokens added at the end, and what identifies its vocabulary.

    Args:
        place: a folder with vocab.txt or tokenizer.json, or a hub id.
        vocabulary: how many tokens the weights know.

    Raises:
        UserError: nothing usable is there, or it has another number of tokens.
    """
    from transformers import BertTokenizer

    folder = Path(place).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise UserError(f"tokenizer {folder} has no vocab.txt and no tokenizer.json: put one there")
    try:
        if folder.is_dir():
            identity = content_of(*settings_in(folder))
        else:
            folder = hub_folder(place, None, lambda listing: [name for name in listing if name in WORDS])
            identity = hub_identity(folder)
        tokenizer = BertTokenizer.from_pretrained(str(folder))
    except Exception as error:  # a torn file, no network: libraries agree on no type
        raise UserError(
            f"tokenizer '{place}' does not load: {brief(error)}: give tokenizer=, a folder with vocab.txt"
        ) from error
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise UserError(
            f"tokenizer '{place}' has {len(tokenizer)} tokens with {' and '.join(EXTRA_TOKENS)}, but the "
            f"weights know {vocabulary}: give tokenizer=, the vocabulary that they were trained with"
        )
    return tokenizer, identity

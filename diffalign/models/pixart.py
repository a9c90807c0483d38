"""PixArt-Sigma: a diffusion transformer that predicts noise, and one T5 whose padding is masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.models._base import Model
from diffalign.models._spec import TransformerSpec
from diffalign.models._transformer import TransformerModel

_PUBLISHED_AS = "Transformer2DModel"
"""What the published bases, which are older than the class of its own, call their network."""


@dataclass
class Plugin(TransformerSpec):
    """PixArt-Sigma and its fine-tunes, 256 to 2048 pixels.

    Args:
        max_sequence_length: tokens of a prompt that T5 reads.
    """

    max_sequence_length: int = 300

    pipeline_name: ClassVar[str] = "PixArtSigmaPipeline"
    default_config: ClassVar[str | None] = None
    network_class: ClassVar[str] = "PixArtTransformer2DModel"
    adapter_layout: ClassVar[Literal["diffusers", "peft"]] = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_sequence_length < 1:
            raise UserError(f"model.max_sequence_length is {self.max_sequence_length}: use 1 or more")
        if self.attention == "xformers":
            # Widths that are no multiple of 8 fail (huggingface/diffusers issue 9637, open): 300 is none.
            raise UserError(
                "model.attention=xformers: it cannot take the text mask of PixArt in half precision; "
                "use model.attention=sdpa"
            )

    def part_class(self, name: str) -> Any:
        """Of the transformer one that takes adapters."""
        if name != self.network_part:
            return None
        from diffalign.models._pixart import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    def load(self, device: str = "cpu") -> Model:
        """The model on `device`; its parts load when first used."""
        return PixArt(self, device)

    @classmethod
    def tiny(cls, folder: str | Path, **options: Any) -> Plugin:
        """A random pipeline of the smallest size, written to `folder`, for tests."""
        from diffalign.models import _tiny_dit

        _tiny_dit.write_pixart(Path(folder), **options)
        return cls(path=str(folder), max_sequence_length=24)


class PixArt(TransformerModel):
    """Conditioning keys: `prompt_embeds` [B, n, c] and `prompt_attention_mask` [B, n], int64, 1 for a token.

    Departures from the pipeline's own defaults: prompts are not cleaned (`clean_caption=False`; it writes
    them in small letters all the same), and pictures are drawn at their very size, not at the nearest of a
    list of sizes and then resized (`use_resolution_binning=False`).
    """

    encoder_parts = ("text_encoder", "tokenizer")
    text_widths = ("caption_channels",)
    text_masks: Mapping[str, str] = {"prompt_embeds": "prompt_attention_mask"}
    spec: Plugin

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The noise that the transformer predicts; inputs are brought to the dtype of its first layer.

        Convention: the network answers with twice the channels. The first half is the noise; the other, a
        variance that its authors trained and that no sampler here reads, is left alone: nothing trains on it.
        """
        dtype = next(network.parameters()).dtype
        output: Tensor = network(
            x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_attention_mask"],
            timestep=t_B,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def check_network(self, config: dict[str, Any], path: str) -> None:
        """Refuses what is no PixArt, and PixArt-Alpha of 1024 pixels, which is told sizes besides."""
        if config.get("_class_name") == _PUBLISHED_AS and config.get("norm_type") == "ada_norm_single":
            config = {**config, "_class_name": self.spec.network_class}
        super().check_network(config, path)
        told = config.get("use_additional_conditions")
        if told or (told is None and config["sample_size"] == 128):  # so diffusers reads it
            raise UserError(
                f"the transformer of {path} is told sizes and aspect ratios, so it is PixArt-Alpha: use a "
                "PixArt-Sigma"
            )

    def pipeline(self, *names: str) -> Any:
        """A diffusers pipeline that holds the parts `names`; saved, it says that they are diffusers' own."""
        pipeline = super().pipeline(*names)
        if self.network_part in names:
            pipeline.register_to_config(**{self.network_part: ("diffusers", self.spec.network_class)})
        return pipeline

    def sampling_options(self) -> dict[str, Any]:
        """See the departures of this class."""
        return {
            "clean_caption": False,
            "use_resolution_binning": False,
            "max_sequence_length": self.spec.max_sequence_length,
        }

    def prompt_limits(self) -> dict[str, int]:
        """As the recipe says: T5 itself has no limit."""
        return {"tokenizer": self.spec.max_sequence_length}

    @torch.no_grad()
    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        embeds, mask, negative_embeds, negative_mask = self.pipeline(*self.encoder_parts).encode_prompt(
            prompts,
            device=self.device,
            negative_prompt=negative_prompt or "",
            clean_caption=False,
            max_sequence_length=self.spec.max_sequence_length,
        )
        cond = Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})
        negative = {"prompt_embeds": negative_embeds, "prompt_attention_mask": negative_mask}
        return cond, Conditioning(negative)

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {
            **cond,
            "negative_prompt": None,  # the default is a text, which embeddings may not stand beside
            **{f"negative_{name}": tensor for name, tensor in negative.items()},
        }

    def encoder_settings(self) -> dict[str, Any]:
        """The length that prompts are cut at."""
        return {"max_sequence_length": self.spec.max_sequence_length}

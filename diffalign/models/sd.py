"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.models import _ldm
from diffalign.models._base import Model
from diffalign.models._spec import UNetSpec
from diffalign.models._unet import UNetModel


@dataclass
class Plugin(UNetSpec):
    """Stable Diffusion 1.x, 2.x and their fine-tunes."""

    pipeline_name: ClassVar[str] = "StableDiffusionPipeline"
    default_config: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    def load(self, device: str = "cpu") -> Model:
        """The model on `device`; its parts load when first used."""
        return StableDiffusion(self, device)

    @classmethod
    def tiny(cls, folder: str | Path, **options: Any) -> Plugin:
        """A random pipeline of the smallest size, written to `folder`, for tests."""
        from diffalign.models import _tiny

        _tiny.write_sd(Path(folder), **options)
        return cls(path=str(folder))


class StableDiffusion(UNetModel):
    """Conditioning key: `prompt_embeds` [B, 77, c]."""

    encoder_parts = ("text_encoder", "tokenizer")

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The UNet's native prediction; inputs are brought to the dtype of its first layer."""
        dtype = next(network.parameters()).dtype
        output: Tensor = network(
            x_t.to(dtype), t_B, encoder_hidden_states=cond["prompt_embeds"].to(dtype), return_dict=False
        )[0]
        return output

    def check_family(self, unet_config: dict[str, Any], path: str) -> None:
        """Refuses UNets with SDXL's extra conditioning."""
        if unet_config.get("addition_embed_type") is not None:
            raise UserError(f"the UNet of {path} takes size conditioning: use model=sdxl")

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @torch.no_grad()
    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        embeds, negative_embeds = self.pipeline(*self.encoder_parts).encode_prompt(
            prompts,
            self.device,
            1,
            True,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        )
        return Conditioning({"prompt_embeds": embeds}), Conditioning({"prompt_embeds": negative_embeds})

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}

    def kohya_layer_name(self, layer: str) -> str:
        """That of diffusers, whose UNet kohya's scripts train here."""
        return layer

    def original_encoder_state(self) -> dict[str, Tensor]:
        """The text encoder by the names of the SD 1.5 file.

        Raises:
            UserError: the base is an SD 2.x, whose file holds a layer that pipelines leave out.
        """
        encoder = self.parts["text_encoder"]
        if encoder.config.hidden_act != "quick_gelu":  # OpenAI's CLIP is the one that has it
            raise UserError(
                f"single_file: the text encoder of {self.spec.path} is not that of SD 1.x, and the layout of "
                "SD 2.x files is not written: leave single_file out"
            )
        return _ldm.clip_state(encoder, "cond_stage_model.transformer.")

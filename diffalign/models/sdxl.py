"""SDXL: two CLIP text encoders, size conditioning, zeroed embeddings for the empty prompt."""

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
from diffalign.models._pipeline import pooled_arguments, pooled_pair
from diffalign.models._spec import UNetSpec
from diffalign.models._unet import UNetModel


@dataclass
class Plugin(UNetSpec):
    """SDXL base and its fine-tunes (not the refiner)."""

    pipeline_name: ClassVar[str] = "StableDiffusionXLPipeline"
    default_config: ClassVar[str] = "stabilityai/stable-diffusion-xl-base-1.0"

    def load(self, device: str = "cpu") -> Model:
        """The model on `device`; its parts load when first used."""
        return SDXL(self, device)

    @classmethod
    def tiny(cls, folder: str | Path, **options: Any) -> Plugin:
        """A random pipeline of the smallest size, written to `folder`, for tests."""
        from diffalign.models import _tiny

        _tiny.write_sdxl(Path(folder), **options)
        return cls(path=str(folder))


class SDXL(UNetModel):
    """Conditioning keys: `prompt_embeds` [B, 77, c], `pooled` [B, p] and `time_ids` [B, 6]."""

    encoder_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The UNet's native prediction; inputs are brought to the dtype of its first layer."""
        dtype = next(network.parameters()).dtype
        output: Tensor = network(
            x_t.to(dtype),
            t_B,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            added_cond_kwargs={"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["time_ids"]},
            return_dict=False,
        )[0]
        return output

    def check_family(self, unet_config: dict[str, Any], path: str) -> None:
        """Refuses UNets without SDXL's pooled-text and size conditioning, and the refiner."""
        if unet_config.get("addition_embed_type") != "text_time":
            raise UserError(f"the UNet of {path} takes no size conditioning, so it is not SDXL: use model=sd")
        if self.parts.index.get("requires_aesthetics_score"):
            raise UserError(
                f"{self.spec.path} is an SDXL refiner, which is conditioned otherwise: use the base"
            )

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        zeros = self.parts.index.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}

    @torch.no_grad()
    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        encoded = self.pipeline(*self.encoder_parts).encode_prompt(
            prompts,
            device=self.device,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        )
        return pooled_pair(encoded)

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        return pooled_arguments(cond, negative)

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, Tensor]:
        """`time_ids` `[1, 6]`: original (height, width), crop (top, left), target (height, width); pixels."""
        return {"time_ids": torch.tensor([[*original, *crop, *target]], dtype=torch.float32)}

    def kohya_layer_name(self, layer: str) -> str:
        """The original one: kohya's scripts train SDXL in the layout of its file."""
        return _ldm.unet_layer_name(layer, self.parts.config("unet"))

    def check_single_file(self) -> None:
        """Refuses two text encoders of one width: diffusers (0.42) tells them apart in a file by it alone."""
        width = self.parts["text_encoder"].config.hidden_size
        if width == self.parts["text_encoder_2"].config.hidden_size:
            raise UserError(
                f"both text encoders of {self.spec.path} are {width} wide, and diffusers would mix them up "
                "in one file: use single_file=false"
            )

    def original_encoder_state(self) -> dict[str, Tensor]:
        """Both text encoders by the names of the SDXL file."""
        return {
            **_ldm.clip_state(self.parts["text_encoder"], "conditioner.embedders.0.transformer."),
            **_ldm.open_clip_state(self.parts["text_encoder_2"], "conditioner.embedders.1.model."),
        }

"""Stable Diffusion 3 and 3.5: a rectified flow, three text encoders, of which T5 may be left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.models._base import Model
from diffalign.models._export import Lora, check_kohya
from diffalign.models._lora_files import LoraFiles
from diffalign.models._mmdit import KohyaFiles, sd3_from_kohya, sd3_kohya
from diffalign.models._pipeline import pooled_arguments, pooled_pair
from diffalign.models._spec import JOINT_ATTENTION, TransformerSpec
from diffalign.models._transformer import TransformerModel

MOST_TOKENS = 512
"""That the pipeline lets T5 read."""


@dataclass
class Plugin(TransformerSpec):
    """Stable Diffusion 3 Medium, 3.5 Medium and Large, and their fine-tunes.

    Args:
        max_sequence_length: tokens of a prompt that T5 reads, 512 at most; the CLIP encoders read 77.
        use_t5: false leaves T5 out, which then counts as zeros, as in the pipeline: less memory, and prompts
            are understood a little worse.
    """

    max_sequence_length: int = 256
    use_t5: bool = True

    pipeline_name: ClassVar[str] = "StableDiffusion3Pipeline"
    default_config: ClassVar[str] = "stabilityai/stable-diffusion-3-medium-diffusers"
    network_class: ClassVar[str] = "SD3Transformer2DModel"
    attention_layers: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    kohya_in_diffusers: ClassVar[Literal["all", "blocks", "none"]] = "none"
    file_may_lack: ClassVar[dict[str, tuple[str, ...]]] = {
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    }
    left_out_by: ClassVar[dict[str, str]] = {"text_encoder_3": "use_t5", "tokenizer_3": "use_t5"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_sequence_length <= MOST_TOKENS:
            raise UserError(
                f"model.max_sequence_length is {self.max_sequence_length}: use 1 to {MOST_TOKENS}"
            )

    def load(self, device: str = "cpu") -> Model:
        """The model on `device`; its parts load when first used."""
        return StableDiffusion3(self, device)

    @classmethod
    def tiny(cls, folder: str | Path, **options: Any) -> Plugin:
        """A random pipeline of the smallest size, written to `folder`, for tests."""
        from diffalign.models import _tiny_dit

        _tiny_dit.write_sd3(Path(folder), **options)
        return cls(path=str(folder), max_sequence_length=12)


class StableDiffusion3(TransformerModel):
    """Conditioning keys: `prompt_embeds` [B, n + m, c] of CLIP's n and T5's m tokens, `pooled` [B, p]."""

    encoder_parts: tuple[str, ...] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_widths = ("joint_attention_dim", "pooled_projection_dim")
    kohya_module = "networks.lora_sd3"
    spec: Plugin

    def __init__(self, spec: Plugin, device: str = "cpu") -> None:
        if spec.use_t5:
            self.encoder_parts = (*self.encoder_parts, *spec.left_out_by)
        super().__init__(spec, device)

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The transformer's velocity; inputs are brought to the dtype of its first layer."""
        dtype = next(network.parameters()).dtype
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=t_B,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output

    @property
    def lora_files(self) -> LoraFiles:
        """Those of the pipeline's class, and of kohya's scripts."""
        return KohyaFiles(self.pipeline_class, self.network_part, sd3_from_kohya)

    def kohya_state(self, lora: Lora) -> dict[str, Tensor]:
        """By the names that kohya's scripts train SD3 under; refuses what that layout cannot carry."""
        check_kohya(lora)
        return sd3_kohya(lora.state, lora.scales)

    def prompt_limits(self) -> dict[str, int]:
        """Tokens that each encoder reads."""
        limits = super().prompt_limits()
        return {**limits, **({"tokenizer_3": self.spec.max_sequence_length} if self.spec.use_t5 else {})}

    def encoder_settings(self) -> dict[str, Any]:
        """The length that prompts are cut at, and whether T5 reads them."""
        return {"max_sequence_length": self.spec.max_sequence_length, "use_t5": self.spec.use_t5}

    def pipeline_options(self) -> dict[str, Any]:
        """None in the place of T5 where it is left out."""
        return {} if self.spec.use_t5 else dict.fromkeys(self.spec.left_out_by)

    @torch.no_grad()
    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        pipeline = self.pipeline(*self.encoder_parts)
        if not self.spec.use_t5:
            # Of it the width alone is read, which the zeros in T5's place have.
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self._base_config))
        encoded = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            max_sequence_length=self.spec.max_sequence_length,
        )
        return pooled_pair(encoded)

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        return pooled_arguments(cond, negative)

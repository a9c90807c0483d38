"""FLUX.1 dev and schnell: rectified flows over packed latents, distilled in guidance or in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.models._base import Model
from diffalign.models._export import Lora, check_kohya
from diffalign.models._lora_files import LoraFiles
from diffalign.models._mmdit import KohyaFiles, flux_from_kohya, flux_kohya
from diffalign.models._parts import quiet_libraries
from diffalign.models._spec import JOINT_ATTENTION, TransformerSpec
from diffalign.models._trained_under import GUIDANCE_NOTE, Setting
from diffalign.models._transformer import TransformerModel

PACK = 2
"""Latent cells a side that the pipeline packs into one token."""
GUIDANCE = 3.5
"""The pipeline's own `guidance_scale`."""
MOST_TOKENS = 512
SCHNELL_STEPS = 4


@dataclass
class Plugin(TransformerSpec):
    """FLUX.1 dev and schnell, and their fine-tunes.

    `guidance_scale` of this family is a number that the network is told, not a strength of classifier-free
    guidance: there is no negative prompt. schnell is told none.

    Args:
        max_sequence_length: tokens of a prompt that T5 reads, 512 at most; null: 512, of a base without
            guidance embedding (schnell) 256.
        train_guidance: the guidance that a base with guidance embedding (dev) is told in training, policy and
            reference alike; null: 3.5, what the pipeline draws with by default.

    Convention: preferences are trained where pictures are drawn, at 3.5, as are the DreamBooth scripts of
    diffusers (58eb52c); the guide of sd-scripts (48d368f) advises 1.0.
    """

    max_sequence_length: int | None = None
    train_guidance: float | None = None

    pipeline_name: ClassVar[str] = "FluxPipeline"
    default_config: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    network_class: ClassVar[str] = "FluxTransformer2DModel"
    attention_layers: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    kohya_in_diffusers: ClassVar[Literal["all", "blocks", "none"]] = "blocks"
    file_may_lack: ClassVar[dict[str, tuple[str, ...]]] = {
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        length, guidance = self.max_sequence_length, self.train_guidance
        if length is not None and not 1 <= length <= MOST_TOKENS:
            raise UserError(f"model.max_sequence_length is {length}: use 1 to {MOST_TOKENS}")
        if guidance is not None and not (guidance >= 0.0 and math.isfinite(guidance)):
            raise UserError(f"model.train_guidance is {guidance}: use a number of at least 0, such as 3.5")
        if self.attention == "xformers":
            raise UserError(
                "model.attention=xformers: diffusers has no such attention for FLUX; leave it out"
            )

    def load(self, device: str = "cpu") -> Model:
        """The model on `device`; its parts load when first used."""
        return Flux(self, device)

    @classmethod
    def tiny(cls, folder: str | Path, **options: Any) -> Plugin:
        """A random pipeline of the smallest size, written to `folder`, for tests."""
        from diffalign.models import _tiny_dit

        _tiny_dit.write_flux(Path(folder), **options)
        return cls(path=str(folder), max_sequence_length=12)


class Flux(TransformerModel):
    """Conditioning keys: `prompt_embeds` [B, n, c] of T5, `pooled` [B, p] of CLIP.

    Packing, guidance and position ids stay in here: latents are `[B, 16, h, w]` outside.
    """

    encoder_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_widths = ("joint_attention_dim", "pooled_projection_dim")
    no_guidance = None
    kohya_module = "networks.lora_flux"
    spec: Plugin

    def __init__(self, spec: Plugin, device: str = "cpu") -> None:
        super().__init__(spec, device)
        self._ids: dict[tuple[Any, ...], Tensor] = {}
        if spec.train_guidance is not None and not self.takes_guidance:
            raise UserError(
                f"model.train_guidance={spec.train_guidance:g}: {spec.path} has no guidance embedding (as "
                "FLUX.1-schnell has none): leave it out"
            )

    @property
    def takes_guidance(self) -> bool:
        """Whether the base has a guidance embedding: dev has; schnell, distilled to few steps, has none."""
        takes: bool = self._base_config.get("guidance_embeds", False)
        return takes

    @property
    def distilled_steps(self) -> int | None:
        """As the spec says; of a base without guidance embedding 4, to which schnell was distilled."""
        return self.spec.distilled_steps or (None if self.takes_guidance else SCHNELL_STEPS)

    @property
    def train_guidance(self) -> float | None:
        """What the network is told in training; None where it is told nothing."""
        if not self.takes_guidance:
            return None
        return GUIDANCE if self.spec.train_guidance is None else self.spec.train_guidance

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt that T5 reads."""
        return self.spec.max_sequence_length or (MOST_TOKENS if self.takes_guidance else 256)

    # Geometry

    def patch_size(self, network_config: dict[str, Any]) -> int:
        """Latents a side of a token; the configuration's `patch_size` counts packed ones."""
        return PACK

    def base_resolution(self, network_config: dict[str, Any]) -> int:
        """Pixels a side that the VAE was made for, as is the transformer, which does not say it."""
        side: int = self.parts.config("vae")["sample_size"]
        return side

    def latent_inputs(self, config: dict[str, Any]) -> int:
        """Channels of the unpacked latents that a transformer takes."""
        channels: int = config["in_channels"]
        return channels // PACK**2

    def check_network(self, config: dict[str, Any], path: str) -> None:
        """Refuses also a transformer that is told guidance beside one that is not."""
        super().check_network(config, path)
        if config.get("guidance_embeds", False) != self.takes_guidance:
            has, base = ("no", "a") if self.takes_guidance else ("a", "no")
            raise UserError(
                f"the transformer of {path} has {has} guidance embedding, the base {base}: use the base that "
                "it was trained from"
            )

    # Predicting and sampling

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The transformer's velocity; inputs are brought to the dtype of its first layer, as is the time."""
        dtype = next(network.parameters()).dtype
        embeds = cond["prompt_embeds"].to(dtype)
        output: Tensor = network(
            hidden_states=self.to_pipeline(x_t.to(dtype)),
            timestep=t_B.to(dtype) / 1000,
            guidance=self._guidance(x_t),
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self._positions(x_t, dtype),
            return_dict=False,
        )[0]
        height, width = (side * self.latent_scale for side in x_t.shape[-2:])
        return self.from_pipeline(output, height, width)

    def _guidance(self, x_t: Tensor) -> Tensor | None:
        if self.train_guidance is None:
            return None
        guidance = torch.full([1], self.train_guidance, device=x_t.device, dtype=torch.float32)
        return guidance.expand(x_t.shape[0])

    def _positions(self, x_t: Tensor, dtype: torch.dtype) -> Tensor:
        """The pipeline's own ids of the tokens, `[n, 3]`; made once for a size."""
        key = (*(side // PACK for side in x_t.shape[-2:]), x_t.device, dtype)
        if key not in self._ids:
            self._ids[key] = self.pipeline_class._prepare_latent_image_ids(x_t.shape[0], *key)
        return self._ids[key]

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Tokens `[B, h/2 w/2, 4c]` of latents `[B, c, h, w]`."""
        packed: Tensor = self.pipeline_class._pack_latents(latents, *latents.shape)
        return packed

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents `[B, c, h, w]` of the tokens of a picture of that many pixels."""
        unpacked: Tensor = self.pipeline_class._unpack_latents(latents, height, width, self.latent_scale)
        return unpacked

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Levels of the pipeline's own, and always a shift; for trying a scheduler out."""
        if scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": 1.0}
        return {"sigmas": np.linspace(1.0, 1.0 / steps, steps), "mu": 1.0}

    # Prompts

    def prompt_limits(self) -> dict[str, int]:
        """Tokens of a prompt that T5 reads; CLIP gives a summary of the first 77."""
        return {"tokenizer_2": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning with one row a prompt; made by the pipeline's own `encode_prompt`."""
        with quiet_libraries():
            return self._encode(prompts)

    def encode_dropped_prompt(self) -> Conditioning:
        """One row: the empty prompt. No guidance of the pipeline uses it."""
        return self.encode_prompts([""])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline(*self.encoder_parts).encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning({"prompt_embeds": embeds, "pooled": pooled})

    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        if negative_prompt is not None:
            raise UserError(
                "negative_prompt: FLUX.1 is told its guidance, and nothing leads it away from a prompt; "
                "leave it out"
            )
        return self._encode(prompts), self._encode([""]).rows([0] * len(prompts))

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["prompt_embeds"], "pooled_prompt_embeds": cond["pooled"]}

    def encoder_settings(self) -> dict[str, Any]:
        """The length that prompts are cut at."""
        return {"max_sequence_length": self.max_sequence_length}

    # Guidance of training and of drawing

    def sample(self, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
        """As every backbone's.

        Raises:
            UserError: a guidance above 1 for a base that is told none.
        """
        guidance = options.get("guidance_scale")
        if not self.takes_guidance and guidance is not None and guidance > 1.0:
            raise UserError(
                f"guidance_scale={guidance:g}: {self.spec.path} has no guidance embedding (as FLUX.1-schnell "
                "has none): leave it out"
            )
        return super().sample(prompts, seeds, **options)

    def training_settings(self) -> dict[str, Setting]:
        """Also the guidance, of a base that is told one."""
        settings = super().training_settings()
        if self.train_guidance is not None:
            settings[GUIDANCE_NOTE] = Setting("model.train_guidance", self.train_guidance)
        return settings

    def drawing_settings(self, guidance_scale: float | None) -> dict[str, Setting]:
        """Also the guidance, of a base that is told one."""
        settings = super().drawing_settings(guidance_scale)
        if self.takes_guidance:
            told = GUIDANCE if guidance_scale is None else guidance_scale
            settings[GUIDANCE_NOTE] = Setting("guidance_scale", float(told))
        return settings

    @property
    def lora_files(self) -> LoraFiles:
        """Those of the pipeline's class, and of kohya's scripts whole."""
        return KohyaFiles(self.pipeline_class, self.network_part, flux_from_kohya)

    def kohya_state(self, lora: Lora) -> dict[str, Tensor]:
        """Each layer of the original network as one LoRA."""
        check_kohya(lora)
        return flux_kohya(lora.state, lora.scales)

"""Random pipelines of the smallest size, in the exact layout of the real ones, for tests of the real code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_sdxl(
    folder: Path, *, seed: int = 0, text_widths: tuple[int, int] = (16, 16), **scheduler_options: Any
) -> None:
    """Writes a random SDXL pipeline for 32-pixel images (latents 4 x 16 x 16)."""
    torch.manual_seed(seed)
    text, words = text_config(text_widths[0]), tokenizer()
    text_2 = text_config(text_widths[1], projection=24)
    unet = UNet2DConditionModel(
        **_unet_config(cross_attention_dim=sum(text_widths)),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, **scheduler_options),
    )
    pipeline.save_pretrained(folder)


def write_sd(folder: Path, *, seed: int = 0, **scheduler_options: Any) -> None:
    """Writes a random SD 1.x pipeline for 32-pixel images (latents 4 x 16 x 16)."""
    torch.manual_seed(seed)
    pipeline: Any = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(text_config(32)),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**_unet_config(cross_attention_dim=32)),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, **scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def _unet_config(cross_attention_dim: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 2,
        "use_linear_projection": True,
    }


def small_vae() -> AutoencoderKL:
    """A VAE with 4 channels, as those of SD and SDXL."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.2,
    )


def text_config(width: int, projection: int | None = None) -> CLIPTextConfig:
    """A CLIP text encoder of that many channels."""
    return CLIPTextConfig(
        vocab_size=400,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=398,
        eos_token_id=399,
        pad_token_id=399,
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: printable ASCII, each symbol with and without the end-of-word mark."""
    symbols = [chr(code) for code in range(33, 127)]
    words = symbols + [f"{symbol}</w>" for symbol in symbols]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 398, "<|endoftext|>": 399}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)

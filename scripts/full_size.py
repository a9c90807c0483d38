"""SDXL at its true size with random weights: nothing to download, every shape and cost as in the real
thing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.models import _tiny

UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The published config of SDXL base 1.0: 2.57e9 parameters."""

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}

TEXT = ((768, 3072, 12, 12, 768), (1280, 5120, 32, 20, 1280))
"""Width, feed-forward width, layers, heads and projection of the two encoders."""


def write(folder: Path, *, seed: int = 0, whole_encoders: bool = True) -> None:
    """Writes the pipeline in bf16 (5.1 GB of UNet, 1.6 GB of encoders) unless the folder already holds it."""
    if (folder / "model_index.json").is_file():
        return
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoders = [_text_encoder(index, whole_encoders) for index in (0, 1)]
        tokenizer = _tiny.tokenizer()
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**VAE),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(**UNET),
            scheduler=EulerDiscreteScheduler(**_tiny.BETAS),
        )
    finally:
        torch.set_default_dtype(default)
    pipeline.save_pretrained(folder)


def _text_encoder(index: int, whole: bool) -> torch.nn.Module:
    width, inner, layers, heads, projection = TEXT[index]
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers if whole else 2,
        num_attention_heads=heads,
        projection_dim=projection,
        bos_token_id=398,
        eos_token_id=399,
        pad_token_id=399,
    )
    return (CLIPTextModel, CLIPTextModelWithProjection)[index](config)

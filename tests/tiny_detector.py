"""A random Mask2Former of 113,000 weights, for tests without downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

LABELS = ("dog", "cat", "mouse")


def write_detector(folder: Path) -> Path:
    """Writes a random Mask2Former that is sure of its classes (LABELS); returns the folder."""
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        id2label=dict(enumerate(LABELS)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        model.class_predictor.weight.data *= 40
    model.save_pretrained(folder)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32)
    processor.save_pretrained(folder)
    return folder

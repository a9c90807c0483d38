"""The bank of pictures that all parts train on: scenes of the train split, a third of them drawn wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.scenes import FAULTS, caption, draw, draw_faulty, sample_scene
from scripts.tiny.settings import Settings


@dataclass(frozen=True)
class Bank:
    """images: uint8 [n, 64, 64, 3]; captions: n texts; faults: n names of faults, "" for a right picture."""

    images: np.ndarray
    captions: list[str]
    faults: list[str]

    def pixels(self, rows: Tensor | list[int]) -> Tensor:
        """The pictures of some rows: float32 [B, 3, 64, 64] in [-1, 1]."""
        picked = torch.from_numpy(self.images[np.asarray(rows)])
        return picked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()

    def right_rows(self) -> Tensor:
        """The rows whose picture is what the caption says: int64 [k]."""
        return torch.tensor([row for row, fault in enumerate(self.faults) if not fault])


def make_bank(settings: Settings, folder: Path) -> Bank:
    """The bank of these settings, drawn on the first call and read back from `folder` afterwards.

    Row i is drawn from a generator seeded with (seed, i): its scene is of the train split, so no held-out
    combination of colour and shape is asked for; a faulty drawing may show one under another caption, as the
    web may.
    """
    images_file, text_file = folder / "bank.npy", folder / "bank.json"
    if text_file.exists():
        captions, faults = json.loads(text_file.read_text(encoding="utf-8"))
        return Bank(np.load(images_file, mmap_mode="r"), captions, faults)
    images = np.empty((settings.bank, 64, 64, 3), dtype=np.uint8)
    captions, faults = [], []
    for row in range(settings.bank):
        rng = np.random.default_rng([settings.seed, row])
        scene = sample_scene(rng, split="train")
        fault = FAULTS[int(rng.integers(len(FAULTS)))] if rng.random() < settings.faulty_share else ""
        picture = draw_faulty(scene, rng, fault) if fault else draw(scene, rng)
        images[row] = np.asarray(picture)
        captions.append(caption(scene, rng))
        faults.append(fault)
    np.save(images_file, images)
    text_file.write_text(json.dumps([captions, faults]), encoding="utf-8")  # last: it says "complete"
    return Bank(images, captions, faults)

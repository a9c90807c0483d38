"""How often pictures are what the prompt says, on combinations that were kept out of training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image

STEPS, GUIDANCE, BATCH = 20, 4.0, 50
PROBE_SEED = 90_001  # prompts for choosing the step; not those of the demo


def sample(pipeline: Any, prompts: list[str], **options: Any) -> list[Image.Image]:
    """One picture per prompt; picture i starts from noise seeded with i; `options` go to the pipeline."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options}
    images = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
        with torch.no_grad():
            result = pipeline(part, generator=generators, **settings)
        images.extend(result.images)
    return images


def describe_accuracy(pipeline: Any, n: int, *, sheet: Path, **options: Any) -> str:
    """One line: the accuracy on `n` held-out prompts, by clause and in all; 40 pictures go to `sheet`.

    `options` go to the pipeline.
    """
    from diffalign.scenes import sample_prompts
    from diffalign.scenes.grade import grade

    prompts = sample_prompts(n, seed=PROBE_SEED, split="heldout")
    began = time.monotonic()
    images = sample(pipeline, prompts, **options)
    seconds = (time.monotonic() - began) / n
    contact_sheet(images[:40], prompts[:40]).save(sheet)
    grades = [grade(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    parts: dict[str, list[bool]] = {}
    for graded in grades:
        for clause in graded.clauses:
            parts.setdefault(clause.kind, []).append(clause.right)
    clauses = ", ".join(f"{kind} {sum(rights) / len(rights):.2f}" for kind, rights in parts.items())
    accuracy = sum(graded.accurate for graded in grades) / n
    return f"accuracy {accuracy:.2f} on {n} held-out prompts ({clauses}), {seconds:.3f} s a picture"


def contact_sheet(images: list[Image.Image], captions: list[str], columns: int = 8) -> Image.Image:
    """All pictures, twice as large, with their captions below."""
    from PIL import Image, ImageDraw

    width, height = 140, 176
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(page)
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * width + 4, index // columns * height + 2
        page.paste(image.resize((128, 128), Image.Resampling.NEAREST), (x, y))
        words, lines = text.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 22:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x, y + 130), "\n".join(lines[:3]), fill="black", font_size=10, spacing=1)
    return page

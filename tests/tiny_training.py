"""Batches, pairs and models of the smallest size for tests of objectives, models and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet, Example
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.select import Group
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.diffusion.specs import TimestepSpec
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.training.feed import Offline
from diffalign.training.loop import Run
from diffalign.training.sampling import training_draws
from diffalign.training.setup import accelerator_for
from diffalign.training.specs import CheckpointSpec, OptimizerSpec, Settings
from diffalign.training.watch import Watch

IMAGES_A_GROUP = {"pair": 2, "list": 3, "single": 1}


def perturb(parameters: Sequence[Tensor], scale: float, *, seed: int = 0) -> None:
    """Adds keyed noise, so that an adapter is not the one that changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def make_batch(model: Any, *, unit: str = "pair", groups: int = 4, target: Tensor | None = None) -> Batch:
    """Groups of random latents for `model`.

    Pairs prefer their first image unless `target` says otherwise, every second single image is desirable, and
    the images of a list are rated in falling order.
    """
    per_group = IMAGES_A_GROUP[unit]
    prompts = [f"a picture of {name}" for name in "abcdefgh"[:groups] for _ in range(per_group)]
    sizes = model.size_conditioning((32, 32), (0, 0), (32, 32))
    rows = {name: row.repeat(len(prompts), 1) for name, row in sizes.items()}
    generator = torch.Generator().manual_seed(5)
    if unit == "pair" and target is None:
        target = torch.ones(groups)
    if unit == "single" and target is None:
        target = (torch.arange(groups) % 2 == 0).float()
    return Batch(
        ids=[f"row-{number}" for number in range(groups)],
        epoch=0,
        positions=torch.arange(groups),
        latents=torch.randn(len(prompts), model.latent_channels, 16, 16, generator=generator),
        cond=Conditioning({**model.encode_prompts(prompts), **rows}),
        counts=torch.full((groups,), per_group),
        target=target,
        ratings={"pickscore": _scores(unit, groups, target)},
    )


def _scores(unit: str, groups: int, target: Tensor | None) -> Tensor:
    """`[M]` scores in [0, 1] that agree with the preferences."""
    if unit == "list" or target is None:
        return torch.tensor([0.9, 0.5, 0.1]).repeat(groups)
    if unit == "single":
        return target
    return torch.stack([0.2 + 0.6 * target, 0.8 - 0.6 * target], dim=1).flatten()


def draws_of(batch: Batch, *, seed: int = 0) -> Draws:
    """The draws that training would use; of a process they ask its length alone."""
    return training_draws(batch, TimestepSpec(), Process.flow(1000), seed=seed)


def take(batch: Batch, draws: Draws, groups: Sequence[int]) -> tuple[Batch, Draws]:
    """The chosen groups of a batch whose groups are equally large, with their draws, in the given order."""
    size = batch.num_images // batch.num_groups
    rows = torch.tensor([group * size + image for group in groups for image in range(size)])
    chosen = torch.tensor(groups)
    return (
        Batch(
            ids=[batch.ids[group] for group in groups],
            epoch=batch.epoch,
            positions=batch.positions[chosen],
            latents=batch.latents[rows],
            cond=batch.cond.rows(rows),
            counts=batch.counts[chosen],
            target=None if batch.target is None else batch.target[chosen],
            ratings={name: values[rows] for name, values in batch.ratings.items()},
        ),
        Draws(draws.t[rows], draws.noise[rows]),
    )


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random picture of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_pair(
    name: str,
    *,
    prompt: str = "a thing",
    target: float = 1.0,
    images: tuple[Image.Image, Image.Image] | None = None,
    size: tuple[int, int] = (32, 32),
) -> Group:
    """A usable pair with random pictures keyed by its name."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name))
    chosen = images or (picture(2 * seed, size), picture(2 * seed + 1, size))
    candidates = [Candidate(ImageRef(name=f"{name}:{side}")) for side in (0, 1)]
    return Group(name, Record(name, prompt, candidates), tuple(candidates), chosen, target)


def make_set(
    model: Any,
    count: int = 12,
    *,
    unit: str = "pair",
    targets: Sequence[float] = (1.0,),
    prompts: int = 4,
    rated: bool = False,
) -> EncodedSet:
    """Random latents in the place of encoded pictures; example k has the prompt k mod `prompts`.

    Single pictures have labels as pairs do; where `rated`, all pictures have scores that agree with them.
    """
    per_group = IMAGES_A_GROUP[unit]
    generator = torch.Generator().manual_seed(2)
    means = list(torch.randn(per_group * count, model.latent_channels, 16, 16, generator=generator))
    sizes = model.size_conditioning((32, 32), (0, 0), (32, 32))
    texts = [f"a picture of {name}" for name in "abcdefgh"[:prompts]]
    examples = [
        Example(
            id=f"row-{number}",
            prompt=texts[number % prompts],
            images=tuple(range(per_group * number, per_group * (number + 1))),
            size=(32, 32),
            target=targets[number % len(targets)] if unit != "list" else None,
            conditions=(sizes,) * per_group,
            ratings=_ratings(unit, targets[number % len(targets)]) if rated else (),
        )
        for number in range(count)
    ]
    return EncodedSet(
        examples,
        means,
        [torch.full_like(mean, 0.1) for mean in means],
        {text: row for row, text in enumerate(texts)},
        model.encode_prompts(texts),
        model.encode_dropped_prompt(),
    )


def _ratings(unit: str, target: float) -> tuple[dict[str, float], ...]:
    label = None if unit == "list" else torch.tensor([target])
    return tuple({"pickscore": score} for score in _scores(unit, 1, label).tolist())


def make_run(model: Any, train_set: EncodedSet, out: Path, **changes: Any) -> Run:
    """A run of Diffusion-DPO over `train_set` with a model that is already set up for training."""
    accelerator = accelerator_for("fp32")
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        name: changes.pop(name)
        for name in ("objective", "identity", "heldout", "embedded")
        if name in changes
    }
    settings = Settings(
        **{
            "preprocess": PreprocessSpec(batch_size=4),
            "num_steps": 8,
            "log_every": 2,
            "loader": LoaderSpec(batch_size=2),
            "optimizer": OptimizerSpec(lr=1e-3),
            "checkpoint": CheckpointSpec(every=3),
            **changes,
        }
    )
    return Run(
        model=model,
        objective=parts.get("objective", DPO(beta=2000.0)),
        feed=Offline(train_set, settings, model.process),
        out=out,
        identity=parts.get("identity", "this run"),
        accelerator=accelerator,
        settings=settings,
        watch=Watch(settings, parts.get("heldout"), parts.get("embedded"), out, accelerator),
    )

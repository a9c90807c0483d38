"""Encoded examples in memory: each picture and each prompt goes through its encoder once, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.buckets import Size, bucket_sizes, fit, place
from diffalign.data.records import Candidate
from diffalign.data.select import Group
from diffalign.data.specs import PreprocessSpec

PROMPT_BATCH = 32


class Encoder(Protocol):
    """The part of a model that encoding needs."""

    size_multiple: int
    default_resolution: int

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`(mean, std)` of scaled latents."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """One row a prompt."""
        ...

    def say_too_long(self, prompts: list[str]) -> None:
        """Says how many prompts are longer than the encoders read."""
        ...

    def encode_dropped_prompt(self) -> Conditioning:
        """One row for "no prompt"."""
        ...

    def size_conditioning(self, original: Size, crop: Size, target: Size) -> dict[str, Tensor]:
        """Rows that tell the network about sizes."""
        ...


@dataclass(frozen=True)
class Example:
    """One group of images in an `EncodedSet`.

    Args:
        id: record id.
        prompt: its text.
        images: indices of its pictures.
        size: bucket (height, width) in pixels.
        target: as in `select.Group`.
        conditions: per image, what the network is told about sizes.
        ratings: per image, what is known of its worth (see `ratings`).
        meta: fields of the record that measures may be split by.
    """

    id: str
    prompt: str
    images: tuple[int, ...]
    size: Size
    target: float | None
    conditions: tuple[dict[str, Tensor], ...]
    ratings: tuple[dict[str, float], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSet:
    """Latents and text embeddings of a list of examples.

    Args:
        examples: in the order of the source.
        means: posterior mean of each picture, `[c, h, w]` float32, scaled.
        stds: posterior standard deviation, likewise.
        prompt_rows: text -> row of `prompts`.
        prompts: conditioning of the unique prompts, one row each.
        dropped: conditioning of "no prompt", one row.
    """

    examples: list[Example]
    means: list[Tensor]
    stds: list[Tensor]
    prompt_rows: dict[str, int]
    prompts: Conditioning
    dropped: Conditioning

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, indices: Iterable[int]) -> EncodedSet:
        """The chosen examples over the same tensors."""
        return replace(self, examples=[self.examples[index] for index in indices])

    def latents(self, image: int, *key: int | str) -> Tensor:
        """A draw from the posterior of a picture for `key`, or its mean when no key is given; `[c, h, w]`."""
        if not key:
            return self.means[image]
        return self.means[image] + self.stds[image] * draws.normal(tuple(self.stds[image].shape), *key)

    def conditioning(self, example: Example, *, dropped: bool) -> Conditioning:
        """One row per image of the example; all share the prompt, or all have it dropped."""
        row = self.dropped if dropped else self.prompts.rows([self.prompt_rows[example.prompt]])
        return Conditioning.cat([Conditioning({**row, **sizes}) for sizes in example.conditions])


def ratings(candidate: Candidate) -> dict[str, float]:
    """What a record knows of a picture's worth, higher being better: scores by scorer's name, "label",
    "votes" and "rank" (negated: rank 1 is the best).
    """
    known = {name: score.oriented for name, score in candidate.scores.items()}
    for name, value in (("label", candidate.label), ("votes", candidate.votes)):
        if value is not None:
            known[name] = float(value)
    if candidate.rank is not None:
        known["rank"] = -float(candidate.rank)
    return known


def encode(groups: Iterable[Group], encoder: Encoder, spec: PreprocessSpec, *, seed: int) -> EncodedSet:
    """The groups as examples.

    Raises:
        UserError: a picture whose latents are not finite (named by its group), or more data than the memory
            limit.
    """
    store = _Store(encoder, spec)
    sizes = bucket_sizes(spec.resolution or encoder.default_resolution, encoder.size_multiple, spec.buckets)
    examples: list[Example] = []
    for group in groups:
        if spec.size_conditioning == "per_image" and len(group.images) > 1:
            raise UserError("preprocess.size_conditioning=per_image gives labels away in groups: use target")
        pictures = list(group.images)
        placement = place(pictures, sizes, spec, seed, group.id)
        rows, conditions = [], []
        for picture in pictures:
            original = (picture.height, picture.width)
            pixels, corner = fit(picture, placement)
            if spec.size_conditioning == "target":
                original, corner = placement.size, (0, 0)
            rows.append(store.add(pixels, group.id))
            conditions.append(encoder.size_conditioning(original, corner, placement.size))
        examples.append(
            Example(
                id=group.id,
                prompt=group.record.prompt,
                images=tuple(rows),
                size=placement.size,
                target=group.target,
                conditions=tuple(conditions),
                ratings=tuple(map(ratings, group.candidates)),
                meta={**group.record.meta, "models": [c.model for c in group.candidates]},
            )
        )
    store.flush()
    prompt_rows = {
        prompt: row for row, prompt in enumerate(dict.fromkeys(example.prompt for example in examples))
    }
    return EncodedSet(
        examples,
        store.means,
        store.stds,
        prompt_rows,
        _encode_prompts(list(prompt_rows), encoder, store),
        encoder.encode_dropped_prompt().to("cpu"),
    )


def encode_prompts(prompts: list[str], encoder: Encoder, spec: PreprocessSpec) -> Conditioning:
    """One row a prompt, on the CPU. UserError beyond the memory limit."""
    return _encode_prompts(prompts, encoder, _Store(encoder, spec))


def _encode_prompts(prompts: list[str], encoder: Encoder, store: _Store) -> Conditioning:
    encoder.say_too_long(prompts)
    parts = []
    for start in range(0, len(prompts), PROMPT_BATCH):
        parts.append(encoder.encode_prompts(prompts[start : start + PROMPT_BATCH]).to("cpu"))
        store.count(sum(tensor.nbytes for tensor in parts[-1].values()))
    return Conditioning.cat(parts)


class _Store:
    """Encodes pictures in batches of one size and keeps the latents; equal pictures are encoded once."""

    def __init__(self, encoder: Encoder, spec: PreprocessSpec) -> None:
        self.means: list[Tensor] = []
        self.stds: list[Tensor] = []
        self._encoder, self._spec = encoder, spec
        self._known: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._waiting: dict[tuple[int, ...], list[tuple[int, Tensor, str]]] = {}
        self._bytes = 0

    def add(self, pixels: Tensor, name: str) -> int:
        """The index that the latents of `pixels` will have."""
        key = (tuple(pixels.shape[1:]), hashlib.blake2b(pixels.numpy().tobytes()).digest())
        if key in self._known:
            return self._known[key]
        index = self._known[key] = len(self.means)
        self.means.append(pixels)
        self.stds.append(pixels)
        waiting = self._waiting.setdefault(tuple(pixels.shape), [])
        waiting.append((index, pixels, name))
        if len(waiting) >= self._spec.batch_size:
            self._encode(waiting)
        return index

    def flush(self) -> None:
        """Encodes what is still waiting."""
        for waiting in self._waiting.values():
            self._encode(waiting)

    def count(self, num_bytes: int) -> None:
        """Adds to the memory used; refuses beyond the limit."""
        self._bytes += num_bytes
        if self._bytes > self._spec.memory_limit_gb * 1e9:
            raise UserError(
                f"{len(self.means)} encoded pictures exceed "
                f"preprocess.memory_limit_gb={self._spec.memory_limit_gb}: "
                "set data.limit, lower preprocess.resolution, or raise the limit"
            )

    def _encode(self, waiting: list[tuple[int, Tensor, str]]) -> None:
        if not waiting:
            return
        means, stds = self._encoder.encode_images(torch.stack([pixels for _, pixels, _ in waiting]))
        for (index, _, name), mean, std in zip(waiting, means.cpu(), stds.cpu(), strict=True):
            if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise UserError(
                    f"the VAE gives latents that are not finite for {name}: use model.vae_dtype=fp32, or a "
                    "VAE that is fixed for half precision (model.vae=...)"
                )
            self.means[index], self.stds[index] = mean, std
            self.count(mean.nbytes + std.nbytes)
        waiting.clear()

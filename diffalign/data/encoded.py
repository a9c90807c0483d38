"""Encoded examples as a loader reads them: in memory here, on disk in `cache.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.data.buckets import Size
from diffalign.data.records import Candidate


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
        prompt_row: where a cache keeps its text.
    """

    id: str
    prompt: str
    images: tuple[int, ...]
    size: Size
    target: float | None
    conditions: tuple[dict[str, Tensor], ...]
    ratings: tuple[dict[str, float], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    prompt_row: int = -1


class Encoded(Protocol):
    """Examples with latents and text embeddings, wherever they are kept."""

    @property
    def examples(self) -> Sequence[Example]:
        """In the order of the source."""
        ...

    def __len__(self) -> int: ...

    def example(self, index: int, epoch: int) -> Example:
        """The example as it is shown in an epoch: with the pictures of one of its variants."""
        ...

    def latents(self, image: int, *key: int | str) -> Tensor:
        """A draw from the posterior of a picture for `key`, or its mean when no key is given; `[c, h, w]`."""
        ...

    def conditioning(self, example: Example, *, dropped: bool) -> Conditioning:
        """One row per image of the example; all share the prompt, or all have it dropped."""
        ...

    def kinds(self) -> NDArray[np.int64]:
        """`[n]`: examples of one kind can stand in one batch: bucket and number of images are equal."""
        ...

    def texts(self) -> tuple[Sequence[str], NDArray[np.int64]]:
        """The distinct prompts, and which of them each example has, `[n]`."""
        ...

    def subset(self, indices: Iterable[int]) -> Encoded:
        """The chosen examples over the same tensors."""
        ...


@dataclass(frozen=True)
class EncodedSet:
    """Latents and text embeddings of a list of examples in memory; an `Encoded`.

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

    def example(self, index: int, epoch: int) -> Example:
        """The example, the same in every epoch."""
        return self.examples[index]

    def kinds(self) -> NDArray[np.int64]:
        """`[n]`, equal where bucket and number of images are."""
        found = [(*example.size, len(example.images)) for example in self.examples]
        return numbered(*np.array(found, dtype=np.int64).reshape(-1, 3).T)

    def texts(self) -> tuple[list[str], NDArray[np.int64]]:
        """The distinct prompts of the examples, and which of them each has."""
        rows: dict[str, int] = {}
        found = [rows.setdefault(example.prompt, len(rows)) for example in self.examples]
        return list(rows), np.array(found, dtype=np.int64)

    def latents(self, image: int, *key: int | str) -> Tensor:
        """A draw from the posterior of a picture for `key`, or its mean when no key is given; `[c, h, w]`."""
        if not key:
            return self.means[image]
        return self.means[image] + self.stds[image] * draws.normal(tuple(self.stds[image].shape), *key)

    def conditioning(self, example: Example, *, dropped: bool) -> Conditioning:
        """One row per image of the example; all share the prompt, or all have it dropped."""
        row = self.dropped if dropped else self.prompts.rows([self.prompt_rows[example.prompt]])
        return with_sizes(row, example)


def numbered(
    height: NDArray[np.int64], width: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`[n]` kinds. Their numbers hang on nothing else: the order of short batches follows them."""
    return (height << 40) + (width << 20) + images


def with_sizes(prompt: Conditioning, example: Example) -> Conditioning:
    """One row per image of the example: the prompt's, with what the network is told about sizes."""
    return Conditioning.cat([Conditioning({**prompt, **sizes}) for sizes in example.conditions])


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

"""Pictures and prompts through the encoders, each once, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.buckets import Placement, Size, TooMuchCropped, bucket_sizes, fit, place
from diffalign.data.encoded import EncodedSet, Example, ratings
from diffalign.data.select import Group, Unusable, UsableGroups
from diffalign.data.specs import PreprocessSpec

PROMPT_BATCH = 32
KEY_BYTES = 16
EMPTY = torch.empty(0)
LARGEST = 4
"""Resolutions above so many times the base's own are slips of the finger that fill the memory."""

Place = TypeVar("Place")


class Encoder(Protocol):
    """The part of a model that encoding needs."""

    size_multiple: int
    default_resolution: int

    text_masks: Mapping[str, str]
    """Tensor of `encode_prompts` -> the mask `[B, n]` there; rows `[:, k]` that it hides (0) never matter."""

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
class Cut:
    """A picture as the network will see it.

    Args:
        key: identity of its pixels.
        pixels: `[3, H, W]` uint8.
        told: original size, crop corner and target size that the network is told of.
    """

    key: bytes
    pixels: Tensor
    told: tuple[Size, Size, Size]


@dataclass(frozen=True)
class Fitted:
    """A group whose pictures are cut to one bucket.

    Args:
        group: without its decoded pictures.
        size: the bucket.
        variants: crops and flips of the group, each with its pictures in the record's order.
    """

    group: Group
    size: Size
    variants: tuple[tuple[Cut, ...], ...]


@dataclass(frozen=True)
class Fitter:
    """Cuts the pictures of groups.

    Args:
        sizes: the buckets.
        spec: how.
        seed: of crops and flips.
        variants: how many crops and flips of each group.
    """

    sizes: list[Size]
    spec: PreprocessSpec
    seed: int
    variants: int = 1

    def __call__(self, group: Group) -> Fitted:
        """The group, cut. Unusable where it would lose too much; UserError for sizes that tell the label."""
        if self.spec.size_conditioning == "per_image" and len(group.images) > 1:
            raise UserError("preprocess.size_conditioning=per_image gives labels away in groups: use target")
        try:
            placements = [self._place(group, variant) for variant in range(self.variants)]
        except TooMuchCropped as error:
            raise Unusable("too_much_cropped") from error
        variants = (tuple(self._cut(picture, where) for picture in group.images) for where in placements)
        return Fitted(replace(group, images=()), placements[0].size, tuple(variants))

    def _place(self, group: Group, variant: int) -> Placement:
        """A crop of its own for each variant; every second one is mirrored, where flips are wanted."""
        first = place(group.images, self.sizes, self.spec, self.seed, group.id)
        if not variant:
            return first
        drawn = place(group.images, self.sizes, self.spec, self.seed, group.id, variant)
        return replace(drawn, flip=self.spec.flip and first.flip != bool(variant % 2))

    def _cut(self, picture: Image.Image, placement: Placement) -> Cut:
        pixels, corner = fit(picture, placement)
        key = hashlib.sha256(repr(placement.size).encode())  # most processors have instructions for it
        content: Any = pixels.numpy()
        key.update(content)
        told = ((picture.height, picture.width), corner, placement.size)
        if self.spec.size_conditioning == "target":
            told = (placement.size, (0, 0), placement.size)
        return Cut(key.digest()[:KEY_BYTES], pixels, told)


def fitter(encoder: Encoder, spec: PreprocessSpec, *, seed: int, variants: int = 1) -> Fitter:
    """What cuts groups to the buckets of a base. UserError for a resolution that is not meant."""
    resolution = spec.resolution or encoder.default_resolution
    if resolution > LARGEST * encoder.default_resolution:
        raise UserError(
            f"preprocess.resolution is {resolution}, the base's own is {encoder.default_resolution}: use at "
            f"most {LARGEST} times that"
        )
    sizes = bucket_sizes(resolution, encoder.size_multiple, spec.buckets)
    return Fitter(sizes, spec, seed, variants)


class PictureEncoder(Generic[Place]):
    """Encodes pictures in batches of one size.

    Args:
        encoder: the model.
        batch_size: pictures at once.
        keep: takes the place of a picture, and mean and standard deviation of its latents (float32, CPU).
    """

    def __init__(
        self, encoder: Encoder, batch_size: int, keep: Callable[[Place, Tensor, Tensor], None]
    ) -> None:
        self._encoder, self._batch_size, self._keep = encoder, batch_size, keep
        self._waiting: dict[tuple[int, ...], list[tuple[Place, Tensor, str]]] = {}

    def add(self, place: Place, pixels: Tensor, name: str) -> None:
        """Takes a picture `[3, H, W]` uint8; `name` stands in messages.

        Raises:
            UserError: latents that are not finite.
        """
        waiting = self._waiting.setdefault(tuple(pixels.shape), [])
        waiting.append((place, pixels, name))
        if len(waiting) >= self._batch_size:
            self._encode(waiting)

    def flush(self) -> None:
        """Encodes what is still waiting."""
        for waiting in self._waiting.values():
            self._encode(waiting)

    def _encode(self, waiting: list[tuple[Place, Tensor, str]]) -> None:
        if not waiting:
            return
        pixels = torch.stack([pixels for _, pixels, _ in waiting]).float().div_(255.0)
        means, stds = self._encoder.encode_images(pixels)
        for (where, _, name), mean, std in zip(waiting, means.cpu(), stds.cpu(), strict=True):
            if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise UserError(
                    f"the VAE gives latents that are not finite for {name}: use model.vae_dtype=fp32, or a "
                    "VAE that is fixed for half precision (model.vae=...)"
                )
            self._keep(where, mean, std)
        waiting.clear()


def encode(
    groups: UsableGroups | Iterable[Group],
    encoder: Encoder,
    spec: PreprocessSpec,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> EncodedSet:
    """The groups as examples in memory; `advance` is told of each.

    Raises:
        UserError: a picture whose latents are not finite (named by its group), or more data than the memory
            limit.
    """
    memory = _Memory(spec)
    pictures = PictureEncoder(encoder, spec.batch_size, memory.keep)
    examples: list[Example] = []
    for fitted in fit_groups(groups, fitter(encoder, spec, seed=seed)):
        group, (cuts,) = fitted.group, fitted.variants
        images = []
        for cut in cuts:
            place, is_new = memory.place(cut.key)
            if is_new:
                pictures.add(place, cut.pixels, group.id)
            images.append(place)
        examples.append(
            Example(
                id=group.id,
                prompt=group.record.prompt,
                images=tuple(images),
                size=fitted.size,
                target=group.target,
                conditions=tuple(encoder.size_conditioning(*cut.told) for cut in cuts),
                ratings=tuple(map(ratings, group.candidates)),
                meta={**group.record.meta, "models": [c.model for c in group.candidates]},
            )
        )
        advance(1)
    pictures.flush()
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    return EncodedSet(
        examples,
        memory.means,
        memory.stds,
        {prompt: row for row, prompt in enumerate(prompts)},
        _encode_prompts(prompts, encoder, memory),
        encoder.encode_dropped_prompt().to("cpu"),
    )


def fit_groups(groups: UsableGroups | Iterable[Group], fitter: Fitter) -> Iterator[Fitted]:
    """The groups, cut, and decoded ahead where they come from records."""
    return groups.made(fitter) if isinstance(groups, UsableGroups) else map(fitter, groups)


def encode_prompts(prompts: list[str], encoder: Encoder, spec: PreprocessSpec) -> Conditioning:
    """One row a prompt, on the CPU. UserError beyond the memory limit."""
    return _encode_prompts(prompts, encoder, _Memory(spec))


def _encode_prompts(prompts: list[str], encoder: Encoder, memory: _Memory) -> Conditioning:
    encoder.say_too_long(prompts)
    parts = []
    for part in prompt_batches(prompts, encoder):
        memory.count(sum(tensor.nbytes for tensor in part.values()))
        parts.append(part)
    return Conditioning.cat(parts)


def prompt_batches(prompts: Sequence[str], encoder: Encoder) -> Iterator[Conditioning]:
    """The prompts' conditioning on the CPU, so many rows at a time."""
    for start in range(0, len(prompts), PROMPT_BATCH):
        yield encoder.encode_prompts(list(prompts[start : start + PROMPT_BATCH])).to("cpu")


class _Memory:
    """Keeps latents by their place; equal pictures have one."""

    def __init__(self, spec: PreprocessSpec) -> None:
        self.means: list[Tensor] = []
        self.stds: list[Tensor] = []
        self._limit_gb = spec.memory_limit_gb
        self._known: dict[bytes, int] = {}
        self._bytes = 0

    def place(self, key: bytes) -> tuple[int, bool]:
        """The place of a picture, and whether it is new."""
        if key in self._known:
            return self._known[key], False
        place = self._known[key] = len(self.means)
        self.means.append(EMPTY)
        self.stds.append(EMPTY)
        return place, True

    def keep(self, place: int, mean: Tensor, std: Tensor) -> None:
        """Takes the latents of a picture."""
        self.means[place], self.stds[place] = mean, std
        self.count(mean.nbytes + std.nbytes)

    def count(self, num_bytes: int) -> None:
        """Adds to the memory used; refuses beyond the limit."""
        self._bytes += num_bytes
        if self._bytes > self._limit_gb * 1e9:
            raise UserError(
                f"{len(self.means)} encoded pictures exceed preprocess.memory_limit_gb={self._limit_gb:g}: "
                "write them to disk with diffalign cache, set data.limit, lower preprocess.resolution, or "
                "raise the limit"
            )

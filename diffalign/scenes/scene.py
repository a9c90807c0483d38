"""Scenes as data: vocabulary, held-out combinations, sampling.

A `Scene` holds exactly what its caption says and nothing else (where an object lies is the drawing's
business), so that `parse(caption(scene)) == scene`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffalign.common.errors import UserError

Split = Literal["train", "heldout", "any"]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 228, 40),
    "green": (35, 150, 55),
    "cyan": (40, 200, 215),
    "blue": (35, 70, 220),
    "purple": (125, 45, 170),
    "pink": (250, 125, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (15, 15, 15),
}
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MAX_COUNT = 4

# Seven of the 48 (colour, shape) combinations; every shape and seven of the eight colours lose one or two, so
# each word is still seen in training, only not together.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "ring"),
        ("orange", "cross"),
        ("yellow", "circle"),
        ("green", "diamond"),
        ("cyan", "triangle"),
        ("blue", "square"),
        ("purple", "circle"),
    }
)

# How often a sampled scene is one object, several equal objects, or two different objects with a relation.
_KINDS = ("single", "several", "pair")
_KIND_SHARES = (0.3, 0.35, 0.35)


@dataclass(frozen=True)
class SceneObject:
    """One kind of object of a scene: `count` equal objects of one shape and colour.

    `size` is "small", "large" or None (the caption does not say). Raises UserError on a value outside the
    vocabulary.
    """

    shape: str
    colour: str
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _known("shape", self.shape, SHAPES)
        _known("colour", self.colour, tuple(COLOURS))
        if self.size is not None:
            _known("size", self.size, SIZES)
        if not 1 <= self.count <= MAX_COUNT:
            raise UserError(f"count {self.count} of a scene object is out of range: use 1 to {MAX_COUNT}")


@dataclass(frozen=True)
class Scene:
    """What a caption says: one kind of object, or two objects with a relation of the first to the second.

    Raises UserError when objects and relation do not fit together: two objects differ in colour and shape,
    have count 1 and no size word, and carry a relation; one kind of object carries none.
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None

    def __post_init__(self) -> None:
        _known("background", self.background, tuple(BACKGROUNDS))
        if self.relation is not None:
            _known("relation", self.relation, RELATIONS)
        if len(self.objects) not in (1, 2) or (len(self.objects) == 2) != (self.relation is not None):
            raise UserError(
                f"a scene of {len(self.objects)} objects with relation {self.relation!r}: use one object "
                "without a relation or two objects with one"
            )
        if len(self.objects) == 2:
            first, second = self.objects
            if first.colour == second.colour or first.shape == second.shape:
                raise UserError(
                    f"the two objects of a scene are both {first.colour} or both a {first.shape}: use two "
                    "colours and two shapes"
                )
            if any(item.count != 1 or item.size is not None for item in self.objects):
                raise UserError(
                    "the objects of a scene with a relation have count 1 and no size: leave both out"
                )

    @property
    def total(self) -> int:
        """The number of objects in the picture, 1 to 4."""
        return sum(item.count for item in self.objects)


def _known(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {kind} {value!r} in a scene: use one of {', '.join(known)}")


def is_held_out(scene: Scene) -> bool:
    """True when at least one object of the scene is a held-out (colour, shape) combination."""
    return any((item.colour, item.shape) in HELD_OUT for item in scene.objects)


def _combinations(held_out: bool) -> list[tuple[str, str]]:
    """The (colour, shape) combinations that are (or are not) held out, in a fixed order."""
    return [
        (colour, shape) for colour in COLOURS for shape in SHAPES if ((colour, shape) in HELD_OUT) == held_out
    ]


_TRAIN = _combinations(held_out=False)
_HELD = _combinations(held_out=True)
_POOLS: dict[str, list[tuple[str, str]]] = {"train": _TRAIN, "heldout": _HELD, "any": _TRAIN + _HELD}


def sample_scene(rng: np.random.Generator, *, split: Split) -> Scene:
    """A random scene; equal generators give equal scenes.

    split: "train" never holds a held-out (colour, shape) combination, "heldout" at least one, "any" is free.
    Raises UserError on another split.
    """
    _known("split", split, tuple(_POOLS))
    kind = str(rng.choice(_KINDS, p=_KIND_SHARES))
    background = str(rng.choice(list(BACKGROUNDS)))
    colour, shape = _POOLS[split][int(rng.integers(len(_POOLS[split])))]
    if kind != "pair":
        count = 1 if kind == "single" else int(rng.integers(2, MAX_COUNT + 1))
        size = (None, "small", "large")[int(rng.integers(3))]
        return Scene((SceneObject(shape, colour, size, count),), background)
    # The partner of a held-out combination may be any combination, as a user's prompt would mix known and
    # new.
    pool = _POOLS["train" if split == "train" else "any"]
    partners = [(c, s) for c, s in pool if c != colour and s != shape]
    other_colour, other_shape = partners[int(rng.integers(len(partners)))]
    pair = [SceneObject(shape, colour), SceneObject(other_shape, other_colour)]
    if rng.random() < 0.5:
        pair.reverse()
    return Scene(tuple(pair), background, RELATIONS[int(rng.integers(len(RELATIONS)))])

"""Captions of scenes, and their exact inverse."""

from __future__ import annotations

import re

import numpy as np

from diffalign.common.errors import UserError
from diffalign.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    sample_scene,
)

NUMBERS: dict[int, str] = {1: "one", 2: "two", 3: "three", 4: "four"}
_PLURALS: dict[str, str] = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

_SINGLE = rf"(?:an?|one) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SEVERAL = (
    rf"({'|'.join(list(NUMBERS.values())[1:])}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) "
    rf"({'|'.join(_PLURALS.values())})"
)
_ONE = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_TAIL = rf"(?: on a|,) ({'|'.join(BACKGROUNDS)}) background"
_SINGLE_CAPTION = re.compile(_SINGLE + _TAIL)
_SEVERAL_CAPTION = re.compile(_SEVERAL + _TAIL)
_PAIR_CAPTION = re.compile(rf"{_ONE} (?:to the )?({'|'.join(RELATIONS)}) {_ONE}{_TAIL}")


def describe(item: SceneObject) -> str:
    """The words of one kind of object: "a small red circle", "three blue crosses"."""
    words = [item.colour, item.shape if item.count == 1 else _PLURALS[item.shape]]
    if item.size is not None:
        words.insert(0, item.size)
    if item.count > 1:
        return " ".join([NUMBERS[item.count], *words])
    return " ".join([_article(words[0]), *words])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The caption of a scene: the plain wording, or with `rng` one of several wordings that mean the same."""
    plain = rng is None
    text = describe(scene.objects[0])
    if rng is not None and scene.relation is None and scene.total == 1 and rng.random() < 0.25:
        text = "one " + text.split(" ", 1)[1]
    if scene.relation is not None:
        relation = scene.relation
        if rng is not None and relation.endswith(" of") and rng.random() < 0.3:
            relation = "to the " + relation
        text = f"{text} {relation} {describe(scene.objects[1])}"
    if plain or (rng is not None and rng.random() < 0.75):
        return f"{text} on a {scene.background} background"
    return f"{text}, {scene.background} background"


def parse(text: str) -> Scene:
    """The scene that a caption means: the inverse of `caption` for each of its wordings.

    Case and outer or repeated blanks do not matter. Raises UserError on any other text.
    """
    words = " ".join(text.lower().split())
    if match := _SINGLE_CAPTION.fullmatch(words):
        size, colour, shape, background = match.groups()
        return Scene((SceneObject(shape, colour, size),), background)
    if match := _SEVERAL_CAPTION.fullmatch(words):
        number, size, colour, plural, background = match.groups()
        count = next(key for key, word in NUMBERS.items() if word == number)
        shape = next(key for key, word in _PLURALS.items() if word == plural)
        return Scene((SceneObject(shape, colour, size, count),), background)
    match = _PAIR_CAPTION.fullmatch(words)
    if match is None or ("to the" in words and match.group(3) in ("above", "below")):
        raise UserError(
            f"not a scene caption: {text!r}; write for example 'two small red circles on a white background' "
            "or 'a red circle left of a blue square on a gray background'"
        )
    colour, shape, relation, other_colour, other_shape, background = match.groups()
    return Scene((SceneObject(shape, colour), SceneObject(other_shape, other_colour)), background, relation)


def sample_prompts(n: int, *, seed: int, split: Split) -> list[str]:
    """`n` different captions of random scenes, plainly worded, shuffled; equal arguments give equal lists.

    Slices of one list are disjoint sets of prompts with the same mix of scenes (the list is shuffled, because
    rare kinds of scenes run out while it is being filled); lists of two seeds may overlap.
    Raises UserError when n is negative or more than the grammar yields.
    """
    rng = np.random.default_rng([seed, 7])
    found: dict[str, None] = {}
    for _ in range(100 + 40 * max(n, 0)):
        if len(found) >= n:
            break
        found[caption(sample_scene(rng, split=split))] = None
    if n < 0 or len(found) < n:
        raise UserError(f"{n} different {split} prompts cannot be sampled: use 0 to about {len(found)}")
    prompts = list(found)
    return [prompts[index] for index in rng.permutation(len(prompts))]


def vocabulary() -> list[str]:
    """Every word of every caption, sorted (no punctuation)."""
    words = {
        "a",
        "an",
        "on",
        "background",
        "to",
        "the",
        *SHAPES,
        *_PLURALS.values(),
        *COLOURS,
        *BACKGROUNDS,
        *SIZES,
    }
    words.update(word for relation in RELATIONS for word in relation.split())
    words.update(NUMBERS[count] for count in range(1, MAX_COUNT + 1))
    return sorted(words)


__all__ = ["NUMBERS", "caption", "describe", "parse", "sample_prompts", "vocabulary"]

"""Grades: does a picture show what its caption says, clause by clause."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffalign.scenes.caption import NUMBERS, parse
from diffalign.scenes.draw import LARGE_FROM
from diffalign.scenes.look import SeenObject, View, look
from diffalign.scenes.scene import Scene, SceneObject

KINDS: tuple[str, ...] = ("object", "colour", "count", "position", "other")
_SIZE_SLACK = 0.8  # px around the dividing radius in which both size words are right
_APART = 6.0  # px that two centres must be apart along their relation


@dataclass(frozen=True)
class ClauseResult:
    """One statement of a caption; kind is one of `KINDS` ("other": size and background)."""

    kind: str
    text: str
    right: bool


@dataclass(frozen=True)
class Grade:
    """The answers to all clauses. `problem` says why a picture shows no scene at all, else it is None."""

    clauses: tuple[ClauseResult, ...]
    problem: str | None = None

    @property
    def accurate(self) -> bool:
        """True when every clause is right."""
        return all(clause.right for clause in self.clauses)

    @property
    def score(self) -> float:
        """Share of the clauses that are right, 0 to 1."""
        return sum(clause.right for clause in self.clauses) / len(self.clauses)

    def by_kind(self) -> dict[str, float]:
        """Share of right clauses for each kind that the caption has, 0 to 1."""
        found: dict[str, list[bool]] = {}
        for clause in self.clauses:
            found.setdefault(clause.kind, []).append(clause.right)
        return {kind: sum(found[kind]) / len(found[kind]) for kind in KINDS if kind in found}


def grade(image: Image.Image | np.ndarray, wanted: Scene | str) -> Grade:
    """The grade of a picture (see `look` for what it may be) against a scene or its caption.

    A picture that shows no scene (empty, noise, texture, clutter) has every clause wrong. Anything besides
    the wanted objects makes the count wrong. Raises UserError when a caption is not one of the scene grammar.
    """
    return judge(look(image), wanted)


def judge(view: View, wanted: Scene | str) -> Grade:
    """The grade of a picture that has been looked at already; see `grade`."""
    scene = parse(wanted) if isinstance(wanted, str) else wanted
    clauses = _alike_clauses(scene, view) if scene.relation is None else _pair_clauses(scene, view)
    ground = ClauseResult("other", f"{scene.background} background", view.background == scene.background)
    clauses.append(ground)
    if view.problem is not None:
        clauses = [ClauseResult(clause.kind, clause.text, False) for clause in clauses]
    return Grade(tuple(clauses), view.problem)


def _alike_clauses(scene: Scene, view: View) -> list[ClauseResult]:
    """Clauses on one kind of object: they must hold for every object in the picture."""
    item, seen = scene.objects[0], view.objects
    clauses = [
        ClauseResult("object", item.shape, bool(seen) and all(one.shape == item.shape for one in seen)),
        ClauseResult("colour", item.colour, bool(seen) and all(one.colour == item.colour for one in seen)),
        ClauseResult("count", NUMBERS[item.count], len(seen) == item.count and view.specks == 0),
    ]
    if item.size is not None:
        fits = bool(seen) and all(_has_size(one, item.size) for one in seen)
        clauses.append(ClauseResult("other", item.size, fits))
    return clauses


def _pair_clauses(scene: Scene, view: View) -> list[ClauseResult]:
    """Clauses on two objects and their relation, for the best match of seen to wanted objects."""
    first, second = scene.objects
    pair = _best_match(first, second, view.objects)
    clauses: list[ClauseResult] = []
    for item, one in zip(scene.objects, pair, strict=True):
        has_shape = one is not None and one.shape == item.shape
        has_colour = one is not None and one.colour == item.colour
        bound = ClauseResult("colour", f"{item.colour} {item.shape}", has_shape and has_colour)
        clauses += [ClauseResult("object", item.shape, has_shape), bound]
    clauses.append(ClauseResult("count", "two in all", len(view.objects) == 2 and view.specks == 0))
    relation = f"{first.shape} {scene.relation} {second.shape}"
    clauses.append(ClauseResult("position", relation, _related(pair[0], pair[1], str(scene.relation))))
    return clauses


def _best_match(
    first: SceneObject, second: SceneObject, seen: tuple[SeenObject, ...]
) -> tuple[SeenObject | None, SeenObject | None]:
    """The seen objects that stand for the wanted: shape decides, then colour; None where neither agrees."""

    def agreement(item: SceneObject, one: SeenObject | None) -> int:
        if one is None:
            return 0
        return 2 * (one.shape == item.shape) + (one.colour == item.colour)

    pairs = itertools.permutations([*seen, None, None], 2)
    best = max(pairs, key=lambda pair: agreement(first, pair[0]) + agreement(second, pair[1]))
    return (
        best[0] if agreement(first, best[0]) else None,
        best[1] if agreement(second, best[1]) else None,
    )


def _related(first: SeenObject | None, second: SeenObject | None, relation: str) -> bool:
    """True when the first object lies as the relation says: mostly along its axis, at least `_APART` px."""
    if first is None or second is None:
        return False
    right, down = first.x - second.x, first.y - second.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("left of", "above"):
        along = -along
    return along >= _APART and along > abs(across)


def _has_size(one: SeenObject, size: str) -> bool:
    if size == "large":
        return one.radius > LARGE_FROM - _SIZE_SLACK
    return one.radius < LARGE_FROM + _SIZE_SLACK

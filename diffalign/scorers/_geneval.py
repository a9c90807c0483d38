"""The rule of GenEval: are the objects that a prompt asks for among those that a detector found.

Source: Ghosh et al., "GenEval", NeurIPS 2023; djghosh13/geneval at af4902f, evaluation/evaluate_images.py
(evaluate_image, evaluate, relative_position), whose verdicts these functions give. In its words and numbers:

    kept        boxes of more than 0.3 confidence (0.9 where the prompt's tag is `counting`), the 16 most
                confident of each class, most confident first; boxes may overlap
    include     at least `count` boxes of the class; of more, only the first `count` are looked at further
    color       each of these has the colour
    position    each of these is on that side of each of those of an earlier clause, `[relation, its index]`;
                fails where that clause failed itself
    exclude     fewer than `count` boxes of the class

A clause whose count fails has no colour or position, and one whose colour fails no position.

Nothing but lists and numbers here: no picture, no network.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffalign.common.errors import UserError, unknown

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_BOXES = 16
POSITION_THRESHOLD = 0.1

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
KEYS = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}
"""What a clause may say."""
KINDS = ("object", "count", "color", "position")

Box = tuple[float, float, float, float, float]
"""Left, top, right, bottom in pixels, and the confidence."""


class Detected(NamedTuple):
    """One object that was found: its box, with its mask [H, W] and its colour where these are known."""

    box: Box
    mask: Any = None
    color: str | None = None


Objects = dict[str, list[Detected]]
"""Class -> what was found of it, most confident first."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one picture.

    Attributes:
        correct: every clause is fulfilled; GenEval's verdict.
        clauses: of each clause its kind (one of KINDS) and whether it is fulfilled.
        reasons: one line for each unfulfilled demand.
    """

    correct: bool
    clauses: list[tuple[str, bool]]
    reasons: list[str]

    def share(self, kind: str | None = None) -> float:
        """Returns the share of clauses (of one kind) that are fulfilled, NaN where there are none."""
        marks = [fulfilled for each, fulfilled in self.clauses if kind in (None, each)]
        return sum(marks) / len(marks) if marks else math.nan


def judge(
    metadata: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detected]],
    color_of: Callable[[str, Sequence[Detected]], list[str]],
) -> Verdict:
    """Returns the verdict on a picture with these objects.

    Clauses are counted as follows. Each `include` asks for an object (at least one box); where its `count` is
    above 1, or an `exclude` names its class, for a count (neither too few nor too many); for a color and for
    a position where it says so. An `exclude` of a class that no `include` names is a count of its own.

    Args:
        metadata: GenEval's description of a prompt, as `checked` returns it.
        objects: class -> what was kept of it (`most_confident`).
        color_of: colours of some objects of a class; asked only where there are enough of them.
    """
    clauses: list[tuple[str, bool]] = []
    reasons: list[str] = []

    def mark(kind: str, fulfilled: bool, reason: str) -> bool:
        clauses.append((kind, fulfilled))
        if not fulfilled:
            reasons.append(reason)
        return fulfilled

    limits = _limits(metadata)
    matched: list[Sequence[Detected] | None] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, ())
        first = found[:count]
        good = len(found) >= count
        mark("object", bool(found), f"no {name}")
        limit = limits.pop(name, None)
        if count > 1 or limit is not None:
            fits = good and (limit is None or len(found) < limit)
            mark("count", fits, f"{len(found)} of {name}, not {_span(count, limit)}")
        if "color" in wanted:
            color = wanted["color"]
            seen = color_of(name, first) if good else []
            good = mark(
                "color", good and all(each == color for each in seen), f"{name} not {color} but {seen}"
            )
        if "position" in wanted:
            relation, index = wanted["position"]
            target = matched[index]
            good = good and target is not None
            good = good and all(relation in relations(a.box, b.box) for a in first for b in target or ())
            mark("position", good, f"{name} not {relation} the object of clause {index}")
        matched.append(first if good else None)
    for name, limit in limits.items():
        number = len(objects.get(name, ()))
        mark("count", number < limit, f"{number} of {name}, not {_span(0, limit)}")
    return Verdict(not reasons, clauses, reasons)


def _limits(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns class -> the number of boxes from which on there are too many."""
    limits: dict[str, int] = {}
    for excluded in metadata.get("exclude", ()):
        name, count = excluded["class"], excluded["count"]
        limits[name] = min(count, limits.get(name, count))
    return limits


def _span(least: int, limit: int | None) -> str:
    """Returns how many boxes there should be, in words."""
    return f"{least} or more" if limit is None else f"{least} to {limit - 1}"


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Returns where box `a` lies as seen from box `b`: up to two of RELATIONS, none where they are too close.

    On each axis a tenth of both sizes is taken off the offset of the centres; what is left, divided by the
    length of the whole offset (not of what is left), must exceed 1/2. Boxes of one centre have nothing left
    and no relation: nothing is divided by 0.
    """
    kept, offsets = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        margin = POSITION_THRESHOLD * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        kept.append(math.copysign(max(abs(offset) - margin, 0.0), offset))
        offsets.append(offset)
    if max(map(abs, kept)) < 1e-3:
        return set()
    length = math.sqrt(offsets[0] * offsets[0] + offsets[1] * offsets[1])
    x, y = kept[0] / length, kept[1] / length
    sides = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, holds in zip(RELATIONS, sides, strict=True) if holds}


def most_confident(found: Sequence[Detected], tag: str | None) -> list[Detected]:
    """Returns what the rule keeps of one class, most confident first."""
    threshold = _single(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    return [each for each in by_confidence(found) if _single(each.box[4]) > threshold][:MOST_BOXES]


def _single(number: float) -> float:
    """Returns the number in single precision, in which GenEval compares: a float32 0.3 is not above 0.3."""
    return ctypes.c_float(number).value


def by_confidence(found: Sequence[Detected]) -> list[Detected]:
    """Returns the most confident first, equals in the order given.

    GenEval leaves the order of equals to numpy's sort, which is not the same everywhere.
    """
    return sorted(found, key=lambda each: -each.box[4])


def given_objects(context: Mapping[str, Any]) -> Objects:
    """Returns the `detections` of a context with its `colors`, as objects; all of them, in order.

    Raises:
        UserError: something else than five finite numbers for a box, or than a text for a colour, or more
            colours than boxes.
    """
    detections, colors = context["detections"], context.get("colors", {})
    if not isinstance(detections, Mapping) or not isinstance(colors, Mapping):
        raise UserError("detections (and colors) must be mappings of class names to lists")
    objects: Objects = {}
    for name, boxes in _without_none(detections).items():
        try:
            objects[str(name)] = by_confidence([_as_box(box) for box in boxes])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"detections of '{name}' are no list of boxes [left, top, right, bottom, confidence]"
            ) from error
    for name, listed in _without_none(colors).items():
        found = objects.get(str(name), [])
        known = list(listed) if isinstance(listed, Iterable) and not isinstance(listed, str) else None
        if known is None or not all(isinstance(color, str) for color in known):
            raise UserError(f"colors of '{name}' are no list of texts: give one for each box")
        if len(known) > len(found):
            raise UserError(f"colors of '{name}' name {len(known)}, but it has {len(found)} boxes")
        for place, color in enumerate(known):
            found[place] = found[place]._replace(color=color)
    return objects


def _as_box(box: Any) -> Detected:
    """Returns a box of a context as an object; ValueError, TypeError or OverflowError where it is none."""
    if isinstance(box, str | bytes):
        raise TypeError("a text")
    left, top, right, bottom, confidence = (float(number) for number in box)
    if not all(math.isfinite(number) for number in (left, top, right, bottom, confidence)):
        raise ValueError("not finite")
    return Detected((left, top, right, bottom, confidence))


def _without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping without what is None: tables write so what a row does not have."""
    return {key: value for key, value in given.items() if value is not None}


def checked(context: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a context without what is None, its description of the prompt being one that the rule reads.

    Raises:
        UserError: no clause at all, one that the rule cannot read, or a tag that is none of GenEval's; says
            which.
    """
    known = _without_none(context)
    tag = known.get("tag") or None
    if tag is not None and tag not in TAGS:
        raise unknown("tag", tag, TAGS)
    for kind in KEYS:
        clauses = known.get(kind, [])
        if not isinstance(clauses, Sequence) or not all(isinstance(each, Mapping) for each in clauses):
            raise UserError(f"{kind} must be a list of clauses {{class, count}}")
        known[kind] = [_without_none(clause) for clause in clauses]
        for index, clause in enumerate(known[kind]):
            _check_clause(clause, kind, index)
    if not known["include"] and not known["exclude"]:
        raise UserError("no clause to judge by: the context needs include: [{class, count}]")
    return known


def _check_clause(clause: Mapping[str, Any], kind: str, index: int) -> None:
    """Checks one clause."""
    where = f"clause {index} of {kind}"
    for key in clause:
        if key not in KEYS[kind]:
            raise unknown(f"key of {where}", key, KEYS[kind])
    count = clause.get("count")
    if not isinstance(clause.get("class"), str):
        raise UserError(f"{where} has no class: name an object")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where} has count {count!r}: use a whole number of 1 or more")
    if kind == "include":
        if count > MOST_BOXES:
            raise UserError(
                f"{where} has count {count}, but {MOST_BOXES} boxes of a class are kept at most: use no more"
            )
        _check_details(clause, index, where)


def _check_details(clause: Mapping[str, Any], index: int, where: str) -> None:
    """Checks colour and position of an `include` clause."""
    if "color" in clause and clause["color"] not in COLORS:
        raise unknown(f"color of {where}", clause["color"], COLORS)
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise UserError(f"{where} has position {position!r}: use [relation, index of an earlier clause]")
    relation, target = position
    if relation not in RELATIONS:
        raise unknown(f"relation of {where}", relation, RELATIONS)
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        raise UserError(f"{where} is placed by clause {target!r}: use the index of an earlier one, from 0")

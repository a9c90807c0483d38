"""From answers about two pictures to values of the pictures of one prompt, and from rows to scores."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffalign.scorers._base import Scores
from diffalign.scorers._judge_prompts import Question, Rubric
from diffalign.scorers._pixels import as_pictures

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.scorers._base import Images


@dataclass(frozen=True)
class Result:
    """What became of one question.

    Attributes:
        read: what was read, by part.
        problem: None, or one line saying why no value could be read.
        answered: an answer came.
    """

    read: dict[str, float]
    problem: str | None
    answered: bool


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt.

    Attributes:
        count: of the pictures.
        even: pairs of places whose pictures are equal: nothing is asked about them.
        shown: pairs of places that are shown, in this order.
        questions: about each of these.
    """

    count: int
    even: list[tuple[int, int]]
    shown: list[tuple[int, int]]
    questions: list[Question]


def group_of(images: Images, prompt: str, rubric: Rubric, both_orders: bool) -> Group:
    """Returns the pictures of a prompt with the questions about every two of them."""
    pictures = as_pictures(images)
    pixels = [_digest(picture) for picture in pictures]
    even, shown = [], []
    for one, two in itertools.combinations(range(len(pictures)), 2):
        if pixels[one] == pixels[two]:
            even.append((one, two))
        elif both_orders:
            shown += [(one, two), (two, one)]
        else:  # not the order in which they came: values would depend on it, as judges like the first place
            shown.append((one, two) if pixels[one] < pixels[two] else (two, one))
    asked = [rubric.question(prompt, pictures[one], pictures[two]) for one, two in shown]
    return Group(len(pictures), even, shown, asked)


def _digest(picture: Image.Image) -> bytes:
    """Returns a short name of a picture's pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()


def shares_of(group: Group, results: Sequence[Result], parts: tuple[str, ...]) -> Scores:
    """Returns the scores of a group: the mean share of each picture against the others."""
    names = ("", *parts)
    tie = Result(dict.fromkeys(names, 0.5), None, answered=True)
    asked = [*zip(group.shown, results, strict=True), *((pair, tie) for pair in group.even)]
    rows: list[dict[str, float]] = []
    errors: list[str | None] = []
    for place in range(group.count):
        about = [(pair, result) for pair, result in asked if place in pair]
        row = {name: _mean_share(place, about, name) for name in names}
        rows.append({**row, **counts([result for _, result in about])})
        alone = "a judge of pairs needs two pictures of a prompt, and this is the only one"
        problem = next((result.problem for _, result in about if result.problem), alone)
        errors.append(problem if math.isnan(row[""]) else None)
    return scores_of(rows, errors, parts)


def _mean_share(place: int, about: Sequence[tuple[tuple[int, int], Result]], name: str) -> float:
    """Returns the mean of a picture's shares against the others; NaN without one.

    Those of one pair, in both orders, are averaged first, and count only where all could be read.
    """
    of_pair: dict[int, list[float]] = {}
    for (one, two), result in about:
        share = result.read[name]
        of_pair.setdefault(two if one == place else one, []).append(share if one == place else 1 - share)
    means = [sum(shares) / len(shares) for shares in of_pair.values()]
    legal = [mean for mean in means if not math.isnan(mean)]
    return sum(legal) / len(legal) if legal else math.nan


def counts(results: Sequence[Result]) -> dict[str, float]:
    """Returns how many answers could not be read, and how many did not come."""
    unanswered = sum(not result.answered for result in results)
    return {
        "unparsed": sum(result.problem is not None for result in results) - unanswered,
        "unanswered": unanswered,
    }


def scores_of(
    rows: Sequence[Mapping[str, float]], errors: list[str | None], parts: tuple[str, ...]
) -> Scores:
    """Returns rows of numbers by name as scores; "" is the value."""
    names = ("", *parts, "unparsed", "unanswered")
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in names}
    return Scores(columns.pop(""), parts=columns, errors=errors)

"""GenEval's rule by hand: each kind of clause, each quirk, each refusal."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers._geneval import relations
from tests.tiny_clip import write_open_clip
from tests.tiny_detector import write_detector


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (90, 50), (40, 64), (33, 32), (64, 100), (128, 64)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def contract_case(folder: Path):
    options = {
        "detector": str(write_detector(folder / "detector")),
        "color_model": str(write_open_clip(folder / "clip")),
        "scale": "share",
    }
    two = {"include": [asked("dog", color="red"), asked("cat", position=["left of", 0])]}
    found = {"dog": [box(30, 10, 20)], "cat": [box(2, 10, 20), box(4, 8, 20, 0.5)]}
    given = two | {"detections": found}
    plain = {"include": [asked("dog", 2), asked("mouse")]}
    return options, pictures(), None, [given, plain, two, two, given | {"detections": {}}, plain]


def asked(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def box(left: float, top: float, side: float = 10, confidence: float = 0.95) -> list[float]:
    return [left, top, left + side, top + side, confidence]


def scores_of(detections: dict, include=(), exclude=(), *, tag="", colors=None, scale="correct"):
    """The scores of one picture with these boxes."""
    context = {"include": list(include), "exclude": list(exclude), "tag": tag, "detections": detections}
    if colors is not None:
        context["colors"] = colors
    return load_scorer("geneval", scale=scale).score([Image.new("RGB", (64, 64))], context=[context])


def value_of(*arguments, **options) -> float:
    scores = scores_of(*arguments, **options)
    assert scores.errors == [None]
    return scores.values.item()


def test_an_object_must_be_there_with_more_than_the_threshold():
    assert value_of({"dog": [box(0, 0, confidence=0.31)]}, [asked("dog")]) == 1
    assert value_of({"dog": [box(0, 0, confidence=0.3)]}, [asked("dog")]) == 0
    assert value_of({"dog": [box(0, 0, confidence=float(np.float32(0.3)))]}, [asked("dog")]) == 0
    assert value_of({"cat": [box(0, 0)]}, [asked("dog")]) == 0
    # Counting wants more than 0.9.
    assert value_of({"dog": [box(0, 0, confidence=0.89)]}, [asked("dog")], tag="counting") == 0
    assert value_of({"dog": [box(0, 0, confidence=0.91)]}, [asked("dog")], tag="counting") == 1
    assert value_of({"dog": [box(0, 0, confidence=0.89)]}, [asked("dog")], tag="colors") == 1


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 0), (16, 0)])
def test_a_number_must_be_neither_too_small_nor_excluded(number, expected):
    found = {"dog": [box(20 * i, 0) for i in range(number)]}
    assert value_of(found, [asked("dog", 3)], [asked("dog", 4)], tag="counting") == expected
    # Without an exclude, more than asked for is right.
    assert value_of(found, [asked("dog", 3)]) == float(number >= 3)


def test_at_most_sixteen_boxes_of_a_class_are_kept():
    found = {"dog": [box(i, 0) for i in range(40)]}
    assert value_of(found, [asked("dog", 16)]) == 1
    assert value_of(found, [asked("dog")], [asked("dog", 17)]) == 1


def test_an_excluded_class_that_nobody_asked_for_must_stay_below_its_count():
    found = {"dog": [box(0, 0)], "cat": [box(0, 0), box(9, 9)]}
    assert value_of(found, [asked("dog")], [asked("cat", 3)]) == 1
    assert value_of(found, [asked("dog")], [asked("cat", 2)]) == 0
    assert value_of(found, [], [asked("cat", 2)]) == 0
    assert value_of(found, [asked("dog")], [asked("cat", 5), asked("cat", 1)]) == 0
    assert value_of(found, [asked("dog")], [asked("cat", 1), asked("cat", 5)]) == 0


def test_only_the_most_confident_boxes_are_asked_for_their_colour():
    found = {"dog": [box(0, 0, confidence=0.4), box(20, 0, confidence=0.8)]}
    # Colours stand in the order of confidence, not of the boxes.
    red_first, blue_first = {"dog": ["red", "blue"]}, {"dog": ["blue", "red"]}
    assert value_of(found, [asked("dog", color="red")], colors=red_first) == 1
    assert value_of(found, [asked("dog", color="red")], colors=blue_first) == 0
    assert value_of(found, [asked("dog", 2, color="red")], colors=red_first) == 0
    assert value_of(found, [asked("dog", 2, color="red")], colors={"dog": ["red", "red"]}) == 1
    # Equals keep their order.
    equal = {"dog": [box(0, 0), box(20, 0)]}
    assert value_of(equal, [asked("dog", color="red")], colors=red_first) == 1


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (50, 0, {"right of"}),
        (-50, 0, {"left of"}),
        (0, 50, {"below"}),  # y grows downwards
        (0, -50, {"above"}),
        (50, 50, {"right of", "below"}),
        (-50, -50, {"left of", "above"}),
        (0, 0, set()),  # one centre: nothing is divided by 0
        (2, 0, set()),  # a tenth of both widths is 2: nothing is left
        (2.5, 0, set()),  # 0.5 is left of 2.5: not above a half
        (5, 0, {"right of"}),  # 3 of 5
        (4, 0, set()),  # 2 of 4 is a half, and not above it
        # Divided by the whole offset (50): 28 and 38 are more than a half of it ...
        (30, 40, {"right of", "below"}),
        # ... and 22 of 50 is not, though it is a half of what is left (22, 42) and more.
        (24, 44, {"below"}),
    ],
)
def test_relations_by_hand(left, top, expected):
    """Two boxes of 10 x 10: the margin is 0.1 * (10 + 10) = 2 pixels on each axis."""
    assert relations(box(100 + left, 100 + top), box(100, 100)) == expected


def test_the_margin_is_that_of_each_axis():
    wide, small = [0, 0, 200, 10, 1], [0, 30, 200, 40, 1]
    assert relations(small, wide) == {"below"}
    # 30 to the right of boxes 200 wide: the margin is 40.
    assert relations([30, 0, 230, 10, 1], wide) == set()


def test_a_position_holds_for_every_box_looked_at_and_every_one_of_its_target():
    clauses = [asked("dog", 2), asked("cat", 2, position=["right of", 0])]
    dogs = [box(0, 0), box(0, 40)]
    assert value_of({"dog": dogs, "cat": [box(100, 0), box(100, 40)]}, clauses) == 1
    assert value_of({"dog": dogs, "cat": [box(100, 0), box(-100, 40)]}, clauses) == 0
    assert value_of({"dog": [box(0, 0), box(200, 0)], "cat": [box(100, 0), box(100, 40)]}, clauses) == 0
    # Further boxes than those that are asked for are not looked at.
    more = [box(100, 0), box(100, 40), box(-100, 0, confidence=0.5)]
    assert value_of({"dog": dogs, "cat": more}, clauses) == 1


def test_a_target_that_failed_itself_fails_what_is_placed_by_it():
    found = {"dog": [box(0, 0)], "cat": [box(100, 0)]}
    clauses = [asked("dog", color="red"), asked("cat", position=["right of", 0])]
    assert value_of(found, clauses, colors={"dog": ["red"]}) == 1
    scores = scores_of(found, clauses, colors={"dog": ["blue"]}, scale="share")
    assert scores.values.item() == 0.5  # both objects, no colour, no place
    assert scores.parts["position"].item() == 0
    # A count that fails is no target, though a box is there.
    few = [asked("dog", 2), asked("cat", position=["right of", 0])]
    assert scores_of(found, few, scale="share").parts["position"].item() == 0
    # The index is that of the clause, not of what was found.
    three = [asked("dog"), asked("mouse"), asked("cat", position=["right of", 0])]
    scores = scores_of(found, three, scale="share")
    assert scores.parts["position"].item() == 1 and scores.values.item() == pytest.approx(3 / 4)


def test_share_and_parts_by_hand():
    found = {"dog": [box(0, 0), box(20, 0)], "cat": [box(100, 0)]}
    clauses = [
        asked("dog", 3),
        asked("cat", color="red", position=["left of", 0]),
        asked("mouse", color="blue"),
    ]
    scores = scores_of(found, clauses, [asked("bird", 1)], colors={"cat": ["red"]}, scale="share")
    # Objects: dog, cat, not mouse. Counts: not 3 dogs; no bird. Colours: cat, not mouse. Place: dogs failed.
    assert scores.values.item() == pytest.approx((2 + 1 + 1 + 0) / (3 + 2 + 2 + 1))
    parts = {name: part.item() for name, part in scores.parts.items()}
    assert parts == {
        "correct": 0,
        "object": pytest.approx(2 / 3),
        "count": 0.5,
        "color": 0.5,
        "position": 0,
    }
    assert scores.errors == [None]
    alone = scores_of(found, [asked("cat")], scale="share")
    assert alone.values.item() == 1 and alone.parts["object"].item() == 1
    assert all(alone.parts[name].isnan().all() for name in ("count", "color", "position"))


def test_counting_has_one_count_with_both_its_ends():
    def share(number: int) -> float:
        found = {"dog": [box(20 * i, 0) for i in range(number)]}
        return value_of(found, [asked("dog", 2)], [asked("dog", 3)], tag="counting", scale="share")

    assert [share(number) for number in range(4)] == [0, 0.5, 1, 0.5]


def test_a_verdict_says_its_reasons():
    context = {"include": [asked("dog", 2)], "detections": {"dog": [box(0, 0)]}}
    verdict = load_scorer("geneval").verdict(Image.new("RGB", (8, 8)), context)
    assert not verdict.correct and verdict.reasons == ["1 of dog, not 2 or more"]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"include": [asked("dog")]}, "give the scorer a detector"),
        ({"detections": {}}, "no clause to judge by"),
        ({"include": [asked("dog", color="red")], "detections": {"dog": [box(0, 0)]}}, "color_model=openai"),
        (
            {"include": [asked("dog", color="red")], "detections": {"dog": [box(0, 0)]}, "colors": {}},
            "colors of 'dog' name 0, but 1",
        ),
        ({"include": "dog", "detections": {}}, "include must be a list"),
        ({"include": [{"count": 1}], "detections": {}}, "clause 0 of include has no class"),
        ({"include": [asked("dog", 0)], "detections": {}}, "count 0: use a whole number"),
        ({"exclude": [asked("dog", True)], "detections": {}}, "clause 0 of exclude has count True"),
        ({"include": [asked("dog", color=3)], "detections": {}}, "unknown color of clause 0 of include '3'"),
        ({"include": [asked("dog", 17)], "detections": {}}, "count 17, but 16 boxes"),
        (
            {"include": [asked("dog", colour="red")], "detections": {}},
            "key .* 'colour': did you mean 'color'",
        ),
        ({"exclude": [asked("dog", color="red")], "detections": {}}, "unknown key of clause 0 of exclude"),
        ({"include": [asked("dog")], "tag": "Counting", "detections": {}}, "did you mean 'counting'"),
        ({"include": [asked("dog")], "tag": ["counting"], "detections": {}}, "unknown tag"),
        (
            {
                "include": [asked("dog", color="Red")],
                "detections": {"dog": [box(0, 0)]},
                "colors": {"dog": ["red"]},
            },
            "did you mean 'red'",
        ),
        ({"include": [asked("dog")], "detections": {"dog": ["12345"]}}, "boxes .left, top"),
        ({"include": [asked("dog")], "detections": {"dog": [[10**400, 0, 1, 1, 0.9]]}}, "boxes .left, top"),
        ({"include": [asked("dog", position="left of")], "detections": {}}, "use .relation, index"),
        ({"include": [asked("dog", position=["left", 0])], "detections": {}}, "did you mean 'left of'"),
        ({"include": [asked("dog", position=["left of", 0])], "detections": {}}, "placed by clause 0"),
        ({"include": [asked("dog")], "detections": [box(0, 0)]}, "must be mappings"),
        ({"include": [asked("dog")], "detections": {"dog": [[0, 0, 1, 1]]}}, "boxes .left, top"),
        ({"include": [asked("dog")], "detections": {"dog": [[0, 0, 1, math.nan, 1]]}}, "boxes .left, top"),
        (
            {"include": [asked("dog")], "detections": {"dog": [box(0, 0)]}, "colors": {"dog": [1]}},
            "no list of texts",
        ),
        (
            {"include": [asked("dog")], "detections": {"dog": [box(0, 0)] * 3}, "colors": {"dog": "red"}},
            "colors of 'dog' are no list of texts",
        ),
        (
            {"include": [asked("dog")], "detections": {"dog": [box(0, 0)]}, "colors": {"dog": 5}},
            "colors of 'dog' are no list of texts",
        ),
        (
            {
                "include": [asked("dog")],
                "detections": {"dog": [box(0, 0)]},
                "colors": {"dog": ["red", "blue"]},
            },
            "colors of 'dog' name 2, but it has 1 boxes",
        ),
        (
            {"include": [asked("dog")], "detections": {"dog": [box(0, 0)]}, "colors": {"dogs": ["red"]}},
            "colors of 'dogs' name 1, but it has 0 boxes",
        ),
    ],
)
def test_what_cannot_be_judged_is_nan_and_says_why(context, message):
    right = {"include": [asked("dog")], "detections": {"dog": [box(0, 0)]}}
    scores = load_scorer("geneval").score([Image.new("RGB", (8, 8))] * 2, context=[context, right])
    assert scores.values.isnan().tolist() == [True, False] and scores.values[1] == 1
    with pytest.raises(UserError, match=message):
        raise UserError(scores.errors[0])
    assert scores.errors[1] is None
    assert all(part[0].isnan() for part in scores.parts.values())


def test_what_is_none_counts_as_left_out():
    """Tables write so what a row does not have."""
    nothing = {"color": None, "position": None}
    context = {
        "include": [asked("dog", **nothing), asked("cat", 2, **nothing)],
        "exclude": None,
        "tag": None,
        "detections": {"dog": [box(0, 0)], "cat": [box(0, 0), box(9, 9)], "bird": None},
        "colors": {"dog": None, "cat": ["red", "blue"]},
    }
    picture = [Image.new("RGB", (64, 64))]
    scores = load_scorer("geneval").score(picture, context=[context])
    assert scores.values.tolist() == [1] and scores.errors == [None]
    without = load_scorer("geneval").score(
        picture, context=[{"exclude": [asked("dog", 1, **nothing)], "include": None, "detections": None}]
    )
    assert "give the scorer a detector" in without.errors[0]

"""Verdicts by the columns of the prompts' file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffalign.data.pictures import ImageRef
from diffalign.data.records import Score
from diffalign.evaluation._table import category_table
from diffalign.evaluation.categories import MOST_COLUMNS, MOST_VALUES, NOT_GIVEN, breakdown, category_columns
from diffalign.evaluation.pairs import Pair, Shot
from diffalign.evaluation.report import verdicts


def pairs_of(metas: list[dict[str, Any]], gains: list[float] | None = None, seeds: int = 1) -> list[Pair]:
    def shot(index: int, seed: int, value: float) -> Shot:
        scores = {"s": Score(value, "share", "1")}
        image = ImageRef(Path("x.png"))
        return Shot(f"{index}", f"{index}", f"prompt {index}", seed, image, scores, meta=metas[index])

    wins = gains or [1.0] * len(metas)
    return [
        Pair(shot(k, seed, 0.0), shot(k, seed, wins[k])) for k in range(len(metas)) for seed in range(seeds)
    ]


def test_two_categories_by_hand() -> None:
    metas = [{"Category": "Animals"}, {"Category": "Animals"}, {"Category": "People"}, {}]
    pairs = pairs_of(metas, [0.5, 0.25, -0.5, 0.0], seeds=2)
    found = breakdown(pairs, verdicts(pairs))["Category"]
    assert list(found) == ["Animals", "People", NOT_GIVEN]
    animals, people, rest = found.values()
    assert (animals.prompts, animals.pairs, animals.win_rate["s"].estimate) == (2, 4, 1.0)
    assert animals.difference["s"].estimate == 0.375 and animals.difference["s"].n == 4
    assert people.win_rate["s"].estimate == 0.0 and rest.win_rate["s"].estimate == 0.5
    assert sum(category.pairs for category in found.values()) == len(pairs)


def test_a_tie_epsilon_holds_in_categories_too() -> None:
    pairs = pairs_of([{"tag": "a"}, {"tag": "b"}, {"tag": "b"}], [0.05, 0.5, 0.5])
    found = breakdown(pairs, verdicts(pairs), tie_epsilon=0.1)["tag"]
    assert found["a"].win_rate["s"].estimate == 0.5 and found["b"].win_rate["s"].estimate == 1


def test_columns_that_are_no_categories_are_left_out() -> None:
    count = MOST_VALUES + 5
    metas = [
        {
            "style": ("photo", "anime")[k % 2],
            "hard": k % 3 == 0,
            "level": k % 4,
            "note": f"note {k}",  # as many values as prompts
            "bucket": k % (MOST_VALUES + 1),  # too many
            "same": "x",
            "include": [{"class": "dog"}],
        }
        for k in range(count)
    ]
    found = category_columns(pairs_of(metas))
    assert list(found) == ["style", "hard", "level"]
    assert set(found["hard"]) == {"True", "False"} and found["level"][:5] == ["0", "1", "2", "3", "0"]
    assert category_columns(pairs_of([{"id": "a"}, {"id": "b"}])) == {}


def test_a_category_without_a_score_says_nothing_of_the_scorer() -> None:
    pairs = pairs_of([{"tag": "a"}, {"tag": "a"}, {"tag": "b"}], [0.5, 0.5, float("nan")])
    found = breakdown(pairs, verdicts(pairs))["tag"]
    assert found["b"].pairs == 1 and found["b"].win_rate == {} and found["a"].win_rate["s"].n == 2


def test_columns_are_bounded() -> None:
    metas = [{f"c{j}": k % 2 for j in range(MOST_COLUMNS + 2)} for k in range(4)]
    pairs = pairs_of(metas)
    assert list(breakdown(pairs, verdicts(pairs))) == [f"c{j}" for j in range(MOST_COLUMNS)]


def test_few_are_those_with_scores() -> None:
    """Of a category of eleven prompts ten are scored, of the other two of twelve."""
    metas = [{"Category": "a"}] * 11 + [{"Category": "b"}] * 12
    gains = [1.0] * 10 + [math.nan] + [1.0] * 2 + [math.nan] * 10
    pairs = pairs_of(metas, gains)
    found = breakdown(pairs, verdicts(pairs))["Category"]
    assert {name: (c.prompts, c.scored) for name, c in found.items()} == {
        "a": (11, {"s": 10}),
        "b": (12, {"s": 2}),
    }
    assert [row[1] for row in category_table("Category", found).rows] == ["11", "12 (few)"]

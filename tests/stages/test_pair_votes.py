"""`pair by=[...]`: several scorers vote; margins of their own; a lot that keeps some pairs of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.errors import UserError
from diffalign.stages.pair import pair
from tests.scored_pictures import manifest, picture, run, write


def scored(name: str, prompt: str, **values: float) -> dict[str, Any]:
    """A row with the scores of several scorers; of "far" lower is better."""
    scores = {
        scorer: {"value": value, "scale": scorer, "version": "1", "higher_is_better": scorer != "far"}
        for scorer, value in values.items()
    }
    return picture(name, prompt, None, scores=scores)


# cat: a and b for p0, far for p1. dog: a for p2, far for p3, b for neither. fish: all for p5.
ROWS = [
    scored("p0", "cat", a=0.9, b=5.0, far=3.0),
    scored("p1", "cat", a=0.1, b=2.0, far=1.0),
    scored("p2", "dog", a=0.9, b=2.0, far=3.0),
    scored("p3", "dog", a=0.1, b=2.0, far=1.0),
    scored("p4", "fish", a=0.1, b=2.0, far=3.0),
    scored("p5", "fish", a=0.9, b=5.0, far=1.0),
]


def votes(tmp_path: Path) -> dict[str, list[int]]:
    """Record -> the votes of its candidates."""
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "preferences.jsonl").read_text().splitlines()]
    return {row["id"]: [candidate["votes"] for candidate in row["candidates"]] for row in rows}


def test_the_majority_decides_and_a_draw_is_a_tie(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    assert run(tmp_path, "by=[a,b,far]") == [("p0|p1", 1.0), ("p4|p5", 0.0)]
    assert votes(tmp_path) == {"p0|p1": [2, 1], "p4|p5": [0, 3]}
    found = manifest(tmp_path)
    assert found["dropped"] == {"tie": ["p2|p3"]} and found["counts"]["pairs_asked"] == 3
    assert found["scorers"] == ["a", "b", "far"] and "scorer" not in found
    row = json.loads((tmp_path / "pairs" / "preferences.jsonl").read_text().splitlines()[0])
    assert row["source"] == "pair:a+b+far"


def test_soft_labels_are_shares_of_the_votes(tmp_path: Path) -> None:
    """2 of 3; 1 of 3 and a half; 0 of 3."""
    write(tmp_path / "scored", ROWS)
    labels = dict(run(tmp_path, "by=[a,b,far]", "ties=soft"))
    assert labels == {"p0|p1": pytest.approx(2 / 3), "p2|p3": 0.5, "p4|p5": 0.0}
    assert votes(tmp_path) == {"p0|p1": [2, 1], "p2|p3": [1, 1], "p4|p5": [0, 3]}


def test_each_scorer_has_a_margin_of_its_own(tmp_path: Path) -> None:
    """Of cat b differs by 3, which is the margin and counts; with 3.1 it abstains: 1 against 1."""
    write(tmp_path / "scored", ROWS)
    words = ("by=[a,b,far]", "ties=soft")
    assert dict(run(tmp_path, *words, "margin={b: 3}"))["p0|p1"] == pytest.approx(2 / 3)
    other = tmp_path / "other"
    write(other / "scored", ROWS)
    assert dict(run(other, *words, "margin={b: 3.1}")) == {
        "p0|p1": 0.5,
        "p2|p3": 0.5,
        "p4|p5": pytest.approx(0.5 / 3),
    }
    single = tmp_path / "single"
    write(single / "scored", ROWS)
    assert run(single, "by=b", "margin={b: 3}") == [("p0|p1", 1.0), ("p4|p5", 0.0)]


def test_best_and_worst_by_the_sum_of_wins(tmp_path: Path) -> None:
    """Wins over the other two, ties half: p0 2 + 0, p1 0.5 + 2, p2 0.5 + 1. So p1 (2.5) against p2 (1.5)."""
    rows = [
        scored("p0", "cat", a=0.9, b=1.0),
        scored("p1", "cat", a=0.1, b=3.0),
        scored("p2", "cat", a=0.1, b=2.0),
    ]
    write(tmp_path / "scored", rows)
    assert run(tmp_path, "by=[a,b]", "ties=soft") == [("p1|p2", 0.75)]
    assert votes(tmp_path) == {"p1|p2": [1, 0]}


def test_lists_are_ranked_by_the_sum_of_wins(tmp_path: Path) -> None:
    """2, 2.5 and 1.5 wins as above; votes are the wins without the halves."""
    rows = [
        scored("p0", "cat", a=0.9, b=1.0),
        scored("p1", "cat", a=0.1, b=3.0),
        scored("p2", "cat", a=0.1, b=2.0),
    ]
    write(tmp_path / "scored", rows)
    path = pair(images=str(tmp_path / "scored"), out=str(tmp_path / "pairs"), how="lists", by=["a", "b"])
    row = json.loads(path.read_text())
    assert [one["rank"] for one in row["candidates"]] == [2.0, 1.0, 3.0]
    assert [one["votes"] for one in row["candidates"]] == [2, 2, 1]


def test_one_scorer_in_a_list_is_that_scorer(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    assert run(tmp_path, "by=[far]") == [("p0|p1", 0.0), ("p2|p3", 0.0), ("p4|p5", 0.0)]
    row = json.loads((tmp_path / "pairs" / "preferences.jsonl").read_text().splitlines()[0])
    assert "votes" not in row["candidates"][0] and manifest(tmp_path)["scorer"] == "far"


def test_a_lot_keeps_some_pairs_of_each_prompt(tmp_path: Path) -> None:
    """It depends on seed and prompt alone: other prompts in the file change nothing."""
    rows = [scored(f"p{i}", "ab"[i % 2], a=float(i)) for i in range(12)]  # 15 pairs a prompt
    write(tmp_path / "scored", rows)
    kept = [name for name, _ in run(tmp_path, "how=all_pairs", "max_pairs=4")]
    every = write(tmp_path / "all" / "scored", rows) and [
        n for n, _ in run(tmp_path / "all", "how=all_pairs")
    ]
    assert len(kept) == 8 and [name for name in every if name in kept] == kept
    counts = manifest(tmp_path)["counts"]
    assert counts["dropped"] == {"over_max_pairs": 22} and counts["pairs_asked"] == 30
    write(tmp_path / "one" / "scored", rows[::2])
    assert [name for name, _ in run(tmp_path / "one", "how=all_pairs", "max_pairs=4")] == kept[:4]
    write(tmp_path / "seed" / "scored", rows)
    assert [n for n, _ in run(tmp_path / "seed", "how=all_pairs", "max_pairs=4", "seed=1")] != kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["by=[]"], "by=[] names no scorer"),
        (["by=[a,a]"], "by names 'a' twice: a scorer has one vote"),
        (["by=[a,c]"], "unknown scorer of"),
        (["by=[a,b]", "margin=0.1"], "margin=0.1 is one number for 2 scorers: give each its own"),
        (["by=[a,b]", "margin={far: 1}"], "unknown scorer in margin 'far'"),
        (["by=[a,b]", "margin={a: -1}"], "give a difference of scores of at least 0"),
        (["by=[a,b]", "how=lists", "margin={a: 1}"], "has no meaning with how=lists"),
        (["by=a", "max_pairs=2"], "max_pairs has no meaning with how=best_worst"),
        (["by=a", "how=all_pairs", "max_pairs=0"], "max_pairs=0: give a number of pairs"),
        (["by=a", "cache=x"], "pair reads cache with data= only"),
        (["by=a", "scorers=[jpeg]"], "pair reads scorers with data= only"),
        (["by=a", "data=jsonl", "data.path=x"], "pair needs images= (scored pictures) or data="),
    ],
)
def test_bad_votes_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    write(tmp_path / "scored", ROWS)
    with pytest.raises(UserError) as caught:
        run(tmp_path, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()

"""`pair how=lists`: all scored pictures of a prompt as one record; and what manifests say of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.data.sources.jsonl import Plugin
from diffalign.objectives.rankdpo import Plugin as RankDPO
from diffalign.stages.pair import pair
from tests.pickapic_files import jpeg
from tests.scored_pictures import manifest, picture, run, write


def scored(name: str, prompt: str, **values: float | None) -> dict[str, Any]:
    """A row with the scores of several scorers; of "far" lower is better."""
    scores = {
        scorer: {"value": value, "scale": "s", "version": "1", "higher_is_better": scorer != "far"}
        for scorer, value in values.items()
    }
    return picture(name, prompt, None, scores=scores)


# cat: three pictures, the third with no value of far; dog: two that clip finds equal; fish: two alike.
LISTS = [
    scored("p0", "cat", clip=0.2, far=9.0),
    scored("p1", "cat", clip=0.5, far=1.0),
    scored("p2", "dog", clip=0.3, far=2.0),
    scored("p3", "cat", clip=0.2, far=None),
    scored("p4", "cat", clip=0.1, far=4.0),
    scored("p5", "dog", clip=0.3, far=3.0),
    scored("p6", "fish", clip=0.7, far=5.0),
    scored("p7", "fish", clip=0.7, far=5.0),
    scored("p8", "bird", clip=0.7, far=5.0),
    scored("p9", "cow", clip=0.7),
]


def run_lists(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """The records of how=lists."""
    given = [f"images={tmp_path / 'scored'}", f"out={tmp_path / 'pairs'}", "how=lists", *words]
    path = pair(**load_recipe(pair, None, given).arguments)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_list_holds_all_pictures_of_a_prompt_with_all_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """p3 lacks far and p9 has no far at all; that leaves bird and cow alone, and fish has nothing to tell."""
    write(tmp_path / "scored", LISTS)
    cat, dog = run_lists(tmp_path)
    assert (cat["id"], cat["prompt"], cat["source"]) == ("p0|p1|p4", "cat", "pair:clip+far")
    assert cat["meta"] == {"Category": "Animals", "prompt_id": "id-of-cat"}
    assert cat["candidates"][1] == {
        "id": "p1",
        "image": "../scored/pictures/p1.jpg",
        "model": "base",
        "seed": 1,
        "scores": {
            "clip": {"value": 0.5, "scale": "s", "version": "1", "higher_is_better": True},
            "far": {"value": 1.0, "scale": "s", "version": "1", "higher_is_better": False},
        },
    }
    assert dog["id"] == "p2|p5"
    said = "2 lists by clip, far out of 5 prompts (1 nan_score, 1 no_score, 1 tie, 2 single_picture)"
    assert said in capsys.readouterr().err
    found = manifest(tmp_path)
    assert found["counts"] == {
        "pictures": 10,
        "prompts": 5,
        "lists_asked": 3,
        "lists": 2,
        "dropped": {"nan_score": 1, "no_score": 1, "tie": 1, "single_picture": 2},
    }
    assert found["dropped"]["tie"] == ["p6|p7"] and "scorer" not in found
    assert found["scorers"] == ["clip", "far"]
    facts = {name: (row["n"], row["min"], row["max"], row["mean"]) for name, row in found["scores"].items()}
    assert facts["clip"] == (5, 0.1, 0.5, pytest.approx(1.4 / 5))
    assert facts["far"] == (5, 1.0, 9.0, pytest.approx(19 / 5))


def test_a_list_is_ranked_where_one_scorer_decides(tmp_path: Path) -> None:
    """Of clip 0.2 0.5 0.2 0.1 the two equal ones share places 2 and 3; far may be missing then."""
    write(tmp_path / "scored", LISTS)
    (cat,) = run_lists(tmp_path, "by=clip")
    assert [(row["id"], row["rank"]) for row in cat["candidates"]] == [
        ("p0", 2.5),
        ("p1", 1.0),
        ("p3", 2.5),
        ("p4", 4.0),
    ]
    assert cat["candidates"][2]["scores"]["far"]["value"] is None and cat["source"] == "pair:clip"
    found = manifest(tmp_path)
    assert found["dropped"] == {"tie": ["p2|p5", "p6|p7"], "single_picture": ["p8", "p9"]}
    assert (found["scorer"], found["scores"]["clip"]["n"], found["scores"]["far"]["n"]) == ("clip", 4, 3)
    lower = tmp_path / "lower"
    write(lower / "scored", LISTS)
    ranks = [[row["rank"] for row in record["candidates"]] for record in run_lists(lower, "by=far")]
    assert ranks == [[3.0, 1.0, 2.0], [1.0, 2.0]]


def test_a_list_of_equal_pictures_is_kept_with_ties_soft(tmp_path: Path) -> None:
    write(tmp_path / "scored", LISTS)
    kept = run_lists(tmp_path, "ties=soft", "by=clip")
    assert [record["id"] for record in kept] == ["p0|p1|p3|p4", "p2|p5", "p6|p7"]
    assert [row["rank"] for row in kept[1]["candidates"]] == [1.5, 1.5]


def test_lists_are_what_a_list_objective_reads(tmp_path: Path) -> None:
    """The source knows the range of each scorer, higher being better, and gives a group of all pictures."""
    write(tmp_path / "scored", LISTS)
    (tmp_path / "scored" / "pictures").mkdir()
    for index in range(10):
        (tmp_path / "scored" / "pictures" / f"p{index}.jpg").write_bytes(jpeg(20 * index))
    run_lists(tmp_path)
    source = Plugin(str(tmp_path / "pairs"))
    facts = {name: (fact.low, fact.high) for name, fact in source.score_facts().items()}
    assert facts == {"clip": (0.1, 0.5), "far": (-9.0, -1.0)}
    cat, dog = source.usable(unit="list", reject=RankDPO().reject)
    assert [image.getpixel((8, 8)) for image in cat.images] == [(0, 0, 0), (20, 20, 20), (80, 80, 80)]
    assert (len(dog.images), dog.target) == (2, None)


def test_scores_of_others_that_cannot_be_compared_are_no_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """by=clip decides; scene is on two scales, which lists of all scorers refuse."""
    rows = [scored("p0", "cat", clip=0.1, scene=1.0), scored("p1", "cat", clip=0.2, scene=0.5)]
    rows[1]["scores"]["scene"]["scale"] = "x100"
    write(tmp_path / "scored", rows)
    with pytest.raises(UserError, match=r"scores of 'scene' are not comparable \(s 1, x100 1\)"):
        run_lists(tmp_path)
    assert run(tmp_path, "by=clip") == [("p0|p1", 0.0)]
    assert list(manifest(tmp_path)["scores"]) == ["clip"]
    assert "left out of the manifest: scores of 'scene' are not comparable" in capsys.readouterr().err


def test_every_score_says_that_lower_is_better_where_some_do(tmp_path: Path) -> None:
    """Later stages read records one by one; a score that is silent there would count the wrong way round."""
    rows = [scored("p0", "cat", far=1.0), scored("p1", "cat", far=2.0)]
    del rows[1]["scores"]["far"]["higher_is_better"]
    write(tmp_path / "scored", rows)
    assert run(tmp_path) == [("p0|p1", 1.0)]
    record = json.loads((tmp_path / "pairs" / "preferences.jsonl").read_text())
    assert [row["scores"]["far"]["higher_is_better"] for row in record["candidates"]] == [False, False]

"""`pair`: scored pictures to preferences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.errors import UserError
from diffalign.data.sources.jsonl import Plugin
from diffalign.stages.pair import pair
from tests.pickapic_files import jpeg
from tests.scored_pictures import manifest, picture, run, write

# cat: 0.2 0.5 0.4 0.5; dog: one picture; fish: equal; bird: one valid of two.
ROWS = [
    picture("p0", "cat", 0.2),
    picture("p1", "dog", 0.9),
    picture("p2", "cat", 0.5),
    picture("p3", "fish", 0.3),
    picture("p4", "cat", 0.4),
    picture("p5", "fish", 0.3),
    picture("p6", "bird", None),
    picture("p7", "bird", 0.1),
    picture("p8", "cat", 0.5),
    picture("p9", "cat", 0.1, scores={}, errors={"clip": "unreadable"}),
]


def test_best_against_worst_of_each_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "scored", ROWS)
    assert run(tmp_path) == [("p0|p2", 0.0)]  # the first of the two best; in the order of the file
    said = "1 pairs by clip out of 4 prompts (1 nan_score, 1 no_score, 2 single_picture, 1 tie)"
    assert said in capsys.readouterr().err
    found = manifest(tmp_path)
    assert found["counts"] == {
        "pictures": 10,
        "prompts": 4,
        "pairs_asked": 2,
        "pairs": 1,
        "dropped": {"nan_score": 1, "no_score": 1, "single_picture": 2, "tie": 1},
    }
    assert found["dropped"] == {
        "nan_score": ["p6"],
        "no_score": ["p9"],
        "single_picture": ["p1", "p7"],
        "tie": ["p3|p5"],
    }
    assert (found["scorer"], found["higher_is_better"]) == ("clip", True)
    assert found["scores"] == {  # of the two pictures that are in the pair, not of all
        "clip": {
            "scale": "cosine",
            "version": "1",
            "higher_is_better": True,
            "n": 2,
            "min": 0.2,
            "max": 0.5,
            "mean": 0.35,
        }
    }
    assert found["inputs"]["images"]["path"] == str(path)
    assert found["recipe"]["how"] == "best_worst"


def test_all_pairs_with_ties_dropped_or_soft(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    assert run(tmp_path, "how=all_pairs") == [
        ("p0|p2", 0.0),
        ("p0|p4", 0.0),
        ("p0|p8", 0.0),
        ("p2|p4", 1.0),
        ("p4|p8", 0.0),
    ]
    assert manifest(tmp_path)["dropped"]["tie"] == ["p2|p8", "p3|p5"]
    soft = tmp_path / "soft"
    write(soft / "scored", ROWS)
    assert run(soft, "how=all_pairs", "ties=soft")[3:] == [
        ("p2|p4", 1.0),
        ("p2|p8", 0.5),
        ("p4|p8", 0.0),
        ("p3|p5", 0.5),
    ]
    assert "tie" not in manifest(soft)["dropped"]


@pytest.mark.parametrize(("margin", "kept"), [(0.25, ["p0|p1"]), (0.26, [])])
def test_margin_is_the_smallest_difference_that_counts(
    tmp_path: Path, margin: float, kept: list[str]
) -> None:
    write(tmp_path / "scored", [picture("p0", "cat", 0.5), picture("p1", "cat", 0.75)])
    if kept:
        assert run(tmp_path, f"margin={margin}") == [("p0|p1", 0.0)]
        return
    with pytest.raises(UserError, match=r"no pair out of 1 prompts \(1 tie\): lower margin or use ties=soft"):
        run(tmp_path, f"margin={margin}")
    assert not (tmp_path / "pairs").exists()
    assert run(tmp_path, f"margin={margin}", "ties=soft") == [("p0|p1", 0.5)]


def test_lower_is_better_where_the_rows_say_so(tmp_path: Path) -> None:
    def distance(value: float) -> dict[str, Any]:
        return {"far": {"value": value, "scale": "px", "version": "1", "higher_is_better": False}}

    write(
        tmp_path / "scored",
        [picture(f"p{i}", "cat", 0, scores=distance(v)) for i, v in enumerate((0.2, 0.7, 0.1))],
    )
    assert run(tmp_path) == [("p1|p2", 0.0)]
    assert manifest(tmp_path)["higher_is_better"] is False
    row = json.loads((tmp_path / "pairs" / "preferences.jsonl").read_text())
    assert row["candidates"][1]["scores"] == distance(0.1)


def test_the_records_are_what_the_jsonl_source_reads(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    (tmp_path / "scored" / "pictures").mkdir()
    for index in range(10):
        (tmp_path / "scored" / "pictures" / f"p{index}.jpg").write_bytes(jpeg(20 * index))
    run(tmp_path)
    row = json.loads((tmp_path / "pairs" / "preferences.jsonl").read_text())
    assert row == {
        "id": "p0|p2",
        "prompt": "cat",
        "candidates": [
            {
                "id": "p0",
                "image": "../scored/pictures/p0.jpg",
                "model": "base",
                "seed": 0,
                "scores": {"clip": {"value": 0.2, "scale": "cosine", "version": "1", "parts": {"x": 2}}},
                "label": 0.0,
            },
            {
                "id": "p2",
                "image": "../scored/pictures/p2.jpg",
                "model": "base",
                "seed": 2,
                "scores": {"clip": {"value": 0.5, "scale": "cosine", "version": "1", "parts": {"x": 2}}},
                "label": 1.0,
            },
        ],
        "source": "pair:clip",
        "meta": {"Category": "Animals", "prompt_id": "id-of-cat"},
    }
    (usable,) = Plugin(str(tmp_path / "pairs")).usable()
    assert usable.target == 0.0
    assert [image.getpixel((8, 8)) for image in usable.images] == [(0, 0, 0), (40, 40, 40)]


def test_limit_counts_prompts(tmp_path: Path) -> None:
    write(tmp_path / "scored", [picture(f"p{i}", "abc"[i % 3], i) for i in range(9)])
    assert run(tmp_path, "limit=2") == [("p0|p6", 0.0), ("p1|p7", 0.0)]


def test_the_scorer_must_be_named_among_several(tmp_path: Path) -> None:
    both = {"clip": {"value": 0.1, "scale": "c"}, "scene": {"value": 1.0, "scale": "s"}}
    other = {"clip": {"value": 0.3, "scale": "c"}, "scene": {"value": 0.0, "scale": "s"}}
    write(tmp_path / "scored", [picture("p0", "cat", 0, scores=both), picture("p1", "cat", 0, scores=other)])
    with pytest.raises(UserError, match="holds several scorers: choose with by= one of clip, scene"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"unknown scorer of .* 'scenes': did you mean 'scene'"):
        run(tmp_path, "by=scenes")
    assert run(tmp_path, "by=scene") == [("p0|p1", 1.0)]


def test_scores_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    rows = [picture("p0", "cat", 0.1), picture("p1", "cat", 0.2)]
    rows[1]["scores"]["clip"] = {"value": 0.2, "scale": "x100", "version": "1"}
    write(tmp_path / "scored", rows)
    with pytest.raises(UserError, match=r"scores of 'clip' are not comparable \(cosine 1, x100 1\)"):
        run(tmp_path)


def test_the_same_again_is_fine_and_another_recipe_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    assert run(tmp_path) == run(tmp_path)
    before = (tmp_path / "pairs" / "preferences.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"another recipe \(how was best_worst, now all_pairs\): choose another"
    ):
        run(tmp_path, "how=all_pairs")
    write(tmp_path / "scored", ROWS[::-1])
    with pytest.raises(UserError, match=r"another recipe \(images changed\)"):
        run(tmp_path)
    assert (tmp_path / "pairs" / "preferences.jsonl").read_bytes() == before


def test_half_of_the_scores_make_no_pairs(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    (tmp_path / "scored" / "recipe.json").write_text('{"stage": "score"}')
    with pytest.raises(UserError, match="scored is not complete: repeat the 'score' that writes it"):
        run(tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_another_stages_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "manifest.json").write_text('{"stage": "train"}')
    with pytest.raises(UserError, match="holds the output of 'train'"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([], (), "holds no scored picture"),
        ([{"id": "a", "prompt": "p"}], (), r"scores\.jsonl:1 has no 'image' \(it has id, prompt\)"),
        (
            [picture("p0", "cat", 1), picture("p0", "cat", 2)],
            (),
            r"scores\.jsonl:2: a second picture with the id 'p0'",
        ),
        ([{**picture("p0", "cat", 1), "prompt": None}], (), r"scores\.jsonl:1: prompt is None"),
        ([picture("p0", "cat", 1, scores={"clip": {"value": "high"}})], (), "score clip: value is 'high'"),
        ([picture("p0", "cat", 1)], ("margin=-1",), "margin=-1.0: give a difference"),
        ([picture("p0", "cat", 1)], ("limit=0",), "limit=0"),
        ([picture("p0", "cat", 1)], ("how=bestworst",), "best_worst"),
        ([picture("p0", "cat", 1)], ("how=lists", "margin=0.5"), "margin=0.5 has no meaning with how=lists"),
        (
            [picture("p0", "cat", 1)],
            ("how=lists",),
            r"no list out of 1 prompts \(1 single_picture\): give several",
        ),
        ([picture("p0", "cat", 1, scores={})], ("how=lists",), "holds no scores: score the pictures first"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, rows: list[dict[str, Any]], words: tuple[str, ...], message: str
) -> None:
    write(tmp_path / "scored", rows)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*/scored; give the scores\.jsonl of diffalign score"):
        run(tmp_path)
    (tmp_path / "scored").mkdir()
    with pytest.raises(UserError, match=r"no file .*/scored/scores\.jsonl; give the scores\.jsonl"):
        run(tmp_path)


def test_python_callers_get_the_same_refusals(tmp_path: Path) -> None:
    write(tmp_path / "scored", ROWS)
    with pytest.raises(UserError, match="margin=nan"):
        pair(images=str(tmp_path / "scored"), out=str(tmp_path / "pairs"), margin=math.nan)

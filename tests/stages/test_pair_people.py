"""`pair data=... by=rank | votes`: pairs out of the lists that people ranked or voted on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import read_json, read_jsonl
from diffalign.data.records import read_records
from diffalign.data.sources.jsonl import Plugin
from diffalign.stages.pair import pair
from tests.data.sources import test_imagereward as imagereward
from tests.pickapic_files import jpeg, row, write
from tests.scored_pictures import picture
from tests.scored_pictures import write as write_scores

ANNOTATIONS = [{"rank": [3, 1, 2], "user_hash": "u"}]


def run(tmp_path: Path, data: str, path: str, *words: str, out: str = "out") -> list[Any]:
    """The written records. No device is looked for, since nothing is scored."""
    given = [f"data={data}", f"data.path={tmp_path / path}", f"out={tmp_path / out}", "device=none", *words]
    return read_jsonl(pair(**load_recipe(pair, None, given).arguments))


def labels(records: list[Any]) -> dict[str, list[float]]:
    return {row["id"]: [one["label"] for one in row["candidates"]] for row in records}


def manifest(tmp_path: Path) -> Any:
    return read_json(tmp_path / "out" / "manifest.json")


def write_lists(path: Path, *lists: dict[str, Any]) -> None:
    """Writes records a, b, ... of our own file, with up to four pictures; `of` has the fields of each."""
    for index in range(4):
        (path.parent / f"{index}.png").write_bytes(jpeg(20 * index))
    rows = [
        {
            "id": "abcdefgh"[number],
            "prompt": f"prompt {number}",
            "source": "mine",
            **{key: value for key, value in given.items() if key != "of"},
            "candidates": [{"image": f"{index}.png", **fields} for index, fields in enumerate(given["of"])],
        }
        for number, given in enumerate(lists)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranks(*places: float | None) -> dict[str, Any]:
    return {"of": [{} if place is None else {"rank": place} for place in places]}


def votes(*counts: int | None) -> dict[str, Any]:
    return {"of": [{} if count is None else {"votes": count} for count in counts]}


def test_all_pairs_of_imagereward_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Places 2 1 2 decide two pairs of three, 1 2 3 all three, 1 1 none; a single picture none."""
    folder = tmp_path / "d"
    imagereward.contract_case(folder)
    two, one = ["images/a.webp", "images/b.webp"], ["images/c.webp"]
    rows = [
        imagereward.listed(),
        imagereward.listed(id="x", prompt="a dog", ranking=[1, 2, 3]),
        imagereward.listed(prompt="a cow", generations=two, ranking=[1, 1]),
        imagereward.listed(prompt="a hen", generations=one, ranking=[1]),
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    records = run(tmp_path, "imagereward", "d/test.json", "how=all_pairs")
    assert labels(records) == {
        "test.json:0:0|test.json:0:1": [0.0, 1.0],
        "test.json:0:1|test.json:0:2": [1.0, 0.0],
        "test.json:1:0|test.json:1:1": [1.0, 0.0],
        "test.json:1:0|test.json:1:2": [1.0, 0.0],
        "test.json:1:1|test.json:1:2": [1.0, 0.0],
    }
    assert records[0] == {
        "id": "test.json:0:0|test.json:0:1",
        "prompt": "a cat",
        "candidates": [
            {"image": "../d/images/a.webp", "label": 0.0, "rank": 2.0},
            {"image": "../d/images/b.webp", "label": 1.0, "rank": 1.0},
        ],
        "source": "imagereward",
        "meta": {"prompt_id": "005658-0040"},
    }
    assert not any(record.labelled_by_scorers for record in read_records(tmp_path / "out/preferences.jsonl"))
    found = manifest(tmp_path)
    assert found["dropped"] == {
        "single_picture": ["test.json:3"],
        "tie": ["test.json:0:0|test.json:0:2", "test.json:2"],
    }
    assert (found["counts"]["records"], found["counts"]["pairs_asked"], found["counts"]["pairs"]) == (4, 7, 5)
    assert found["by"] == "rank" and not {"scorers", "scorer", "agreement"} & {*found}
    assert "pair: 5 pairs by rank out of 3 records (1 single_picture, 2 tie)" in capsys.readouterr().err
    groups = list(Plugin(str(tmp_path / "out")).usable())  # what dpo trains on
    assert [group.target for group in groups] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert [image.getpixel((8, 8)) for image in groups[0].images] == [(0, 0, 0), (1, 1, 1)]


def test_equal_ranks_are_ties_that_soft_keeps(tmp_path: Path) -> None:
    imagereward.contract_case(tmp_path / "d")  # 2 1 2, 1 2 3, 2 1 2
    records = run(tmp_path, "imagereward", "d/test.json", "how=all_pairs", "ties=soft")
    assert len(records) == 9 and "tie" not in manifest(tmp_path)["dropped"]
    usable = Plugin(str(tmp_path / "out")).usable(ties="soft")
    assert [group.target for group in usable] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0]


def test_the_margin_counts_ranks_and_a_lot_keeps_some(tmp_path: Path) -> None:
    imagereward.contract_case(tmp_path / "d")
    best_worst = run(tmp_path, "imagereward", "d/test.json", "margin=2")
    assert labels(best_worst) == {"test.json:1:0|test.json:1:2": [1.0, 0.0]}
    few = run(tmp_path, "imagereward", "d/test.json", "how=all_pairs", "max_pairs=1", out="few")
    assert [record["prompt"] for record in few] == ["a cat", "a dog", "a cow"]
    with pytest.raises(UserError, match=r"no pair out of 3 records \(3 tie\): lower margin or use ties=soft"):
        run(tmp_path, "imagereward", "d/test.json", "margin=2.5", out="again")
    assert run(tmp_path, "imagereward", "d/test.json", "margin=2", out="again") == best_worst


def test_best_against_worst_of_hpd_lists(tmp_path: Path) -> None:
    """HPD's ranks are means over annotators: 2.5 1 1.5 makes the second the best, the first the worst."""
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(9))
    hpd = {"prompt": "a dog", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2.5, 1, 1.5]}
    rows = [{**hpd, "raw_annotations": ANNOTATIONS}, {**hpd, "prompt": "a cat", "rank": [1, 2, 3]}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    dog, cat = run(tmp_path, "hpd", "test.json")
    assert labels([dog, cat]) == {
        "test.json:0:0|test.json:0:1": [0.0, 1.0],
        "test.json:1:0|test.json:1:2": [1.0, 0.0],
    }
    assert [one["rank"] for one in dog["candidates"]] == [2.5, 1.0]
    assert (dog["source"], dog["meta"]) == ("hpd", {"raw_annotations": ANNOTATIONS})
    assert [group.target for group in Plugin(str(tmp_path / "out")).usable()] == [0.0, 1.0]


def folder_of_ranks(tmp_path: Path) -> None:
    for name, stems in (("a cat", ("rank_1", "rank_2_a", "rank_2_b")), ("a dog", ("rank_1", "rank_3"))):
        (tmp_path / "lists" / name).mkdir(parents=True)
        for index, stem in enumerate(stems):
            (tmp_path / "lists" / name / f"{stem}.png").write_bytes(jpeg(20 * index))


def test_a_folder_of_ranks(tmp_path: Path) -> None:
    folder_of_ranks(tmp_path)
    records = run(tmp_path, "folder", "lists", "how=all_pairs")
    assert labels(records) == {
        "a cat:0|a cat:1": [1.0, 0.0],
        "a cat:0|a cat:2": [1.0, 0.0],
        "a dog": [1.0, 0.0],  # the whole list, and so its name
    }
    assert manifest(tmp_path)["dropped"] == {"tie": ["a cat:1|a cat:2"]}
    assert len(list(Plugin(str(tmp_path / "out")).usable())) == 3


def test_lists_stay_as_they_are(tmp_path: Path) -> None:
    """But for pictures without a rank, and lists of equal ones."""
    write_lists(tmp_path / "l.jsonl", ranks(5, None, 2, 2), ranks(1, 1))
    (record,) = run(tmp_path, "jsonl", "l.jsonl", "how=lists")
    assert (record["id"], record["source"]) == ("a:0|a:2|a:3", "mine")
    assert [(one["image"], one["rank"]) for one in record["candidates"]] == [
        ("../0.png", 5),
        ("../2.png", 2),
        ("../3.png", 2),
    ]
    assert manifest(tmp_path)["dropped"] == {"no_rank": ["a:1"], "tie": ["b"]}
    assert manifest(tmp_path)["counts"]["lists"] == 1


def test_pictures_of_parquet_are_written_and_ratings_kept(tmp_path: Path) -> None:
    """Three ratings are there to go by too, but ranks are what people compared."""
    rows = [imagereward.row("g", 2, overall_rating=7), imagereward.row("g", 1, overall_rating=3)]
    imagereward.write(tmp_path / "p" / "train.parquet", rows)
    (record,) = run(tmp_path, "imagereward", "p")
    first, second = record["candidates"]
    assert [first["label"], second["label"], first["rank"], second["rank"]] == [0.0, 1.0, 2, 1]
    assert first["scores"]["overall_rating"]["value"] == 7.0
    assert (record["id"], record["meta"]["classification"]) == ("train.parquet:0", "People")
    assert [(tmp_path / "out" / one["image"]).read_bytes() for one in (first, second)] == [jpeg(40), jpeg(20)]
    assert manifest(tmp_path)["scores"]["overall_rating"]["max"] == 7.0
    assert len(list(Plugin(str(tmp_path / "out")).usable())) == 1


def test_votes_decide_where_they_are_asked_for(tmp_path: Path) -> None:
    """Margin 2 makes 5 against 4 a tie; a label that was there is kept beside."""
    pairs = {"of": [{"votes": 3, "label": 0.6}, {"votes": 2, "label": 0.4}], "meta": {"k": 1}}
    write_lists(tmp_path / "v.jsonl", votes(5, 1, 4), pairs, votes(3, None), votes(None, None))
    with pytest.raises(UserError, match=r"v\.jsonl holds votes only: choose by=votes, or give scorers="):
        run(tmp_path, "jsonl", "v.jsonl")
    assert not (tmp_path / "out").exists()
    records = run(tmp_path, "jsonl", "v.jsonl", "by=votes", "how=all_pairs", "margin={votes: 2}", "ties=soft")
    assert labels(records) == {
        "a:0|a:1": [1.0, 0.0],
        "a:0|a:2": [0.5, 0.5],
        "a:1|a:2": [0.0, 1.0],
        "b": [0.5, 0.5],
    }
    first, second = records[3]["candidates"]
    assert (first["votes"], first["human_label"], second["human_label"]) == (3, 0.6, 0.4)
    assert records[3]["meta"] == {"k": 1} and manifest(tmp_path)["by"] == "votes"
    dropped = manifest(tmp_path)["dropped"]
    assert dropped == {"no_votes": ["c:1", "d"], "single_picture": ["c:0"]}


def test_records_without_ranks_are_dropped_and_named(tmp_path: Path) -> None:
    """NaN is no rank either."""
    unranked = {"of": [{"label": 1.0}, {"label": 0.0}]}
    write_lists(tmp_path / "l.jsonl", unranked, ranks(1), ranks(float("nan"), 4), ranks(2, 1))
    assert labels(run(tmp_path, "jsonl", "l.jsonl")) == {"d": [0.0, 1.0]}
    found = manifest(tmp_path)
    assert found["dropped"] == {"single_picture": ["b", "c:1"], "no_rank": ["a", "c:0"]}
    assert found["counts"]["records"] == 4
    with pytest.raises(UserError, match=r"\(1 no_rank, 1 single_picture\): give records with several"):
        write_lists(tmp_path / "l.jsonl", ranks(None, 4))
        run(tmp_path, "jsonl", "l.jsonl", out="none")


def test_scorers_may_score_while_people_decide(tmp_path: Path) -> None:
    folder_of_ranks(tmp_path)
    words = ("scorers=[jpeg]", "by=rank", "device=cpu")
    cat, dog = run(tmp_path, "folder", "lists", *words)
    assert labels([cat, dog]) == {"a cat:0|a cat:1": [1.0, 0.0], "a dog": [1.0, 0.0]}
    assert cat["source"] == "folder" and cat["candidates"][0]["scores"]["jpeg"]["value"] > 0
    assert "agreement" not in manifest(tmp_path) and manifest(tmp_path)["scores"]["jpeg"]["n"] == 4
    # The same pictures, by the scorer that they have now.
    by_scorer = run(tmp_path, "jsonl", "out/scored.jsonl", "by=jpeg", "ties=soft", out="again")
    assert by_scorer[0]["source"] == "pair:jpeg" and by_scorer[0]["candidates"][0]["human_rank"] == 1.0


def test_ranks_that_scorers_gave_stay_theirs(tmp_path: Path) -> None:
    write_lists(tmp_path / "l.jsonl", {**ranks(2, 1, 3), "source": "pair:clip"})
    run(tmp_path, "jsonl", "l.jsonl")
    (record,) = read_records(tmp_path / "out" / "preferences.jsonl")
    assert record.labelled_by_scorers and record.pair_target() == 1.0


def test_the_default_is_by_rank_and_votes_are_another_recipe(tmp_path: Path) -> None:
    write_lists(tmp_path / "l.jsonl", {"of": [{"rank": 1, "votes": 2}, {"rank": 2, "votes": 4}]})
    first = run(tmp_path, "jsonl", "l.jsonl")
    (tmp_path / "out" / "manifest.json").unlink()  # as if killed before the end
    assert run(tmp_path, "jsonl", "l.jsonl", "by=[rank]") == first
    with pytest.raises(UserError, match=r"another recipe \(by was rank, now votes\)"):
        run(tmp_path, "jsonl", "l.jsonl", "by=votes")
    assert labels(run(tmp_path, "jsonl", "l.jsonl", "by=votes", out="v")) == {"a": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["by=[rank,clip]"], "by=[rank, clip]: what people gave decides alone, choose one, by=rank"),
        (["by=ranks"], "unknown by for"),
        (["by=ranks"], "'ranks': did you mean 'rank'"),
        (["by=votes"], "'votes'"),
        (["margin={clip: 1}"], "unknown scorer in margin 'clip'"),
        (["how=lists", "margin=1"], "margin=1.0 has no meaning with how=lists"),
        (["by=[]"], "by=[] names no scorer"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    write_lists(tmp_path / "l.jsonl", ranks(2, 1))
    with pytest.raises(UserError) as caught:
        run(tmp_path, "jsonl", "l.jsonl", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_several_scorers_and_no_ranks_leave_no_folder_in_the_way(tmp_path: Path) -> None:
    scores = {name: {"value": 1.0, "scale": "s", "version": "1"} for name in ("a", "b")}
    write_lists(tmp_path / "l.jsonl", {"of": [{"scores": scores, "votes": 3}, {"scores": scores}]})
    with pytest.raises(UserError, match="holds several scorers: choose with by= one of a, b"):
        run(tmp_path, "jsonl", "l.jsonl")
    assert not (tmp_path / "out").exists()


def test_pairs_that_nobody_ranked(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row("a cat", jpeg(1), jpeg(2))])
    nothing = r"holds no scores, ranks or votes: leave by out"
    with pytest.raises(UserError, match=rf"^by=rank: .*{nothing}, and give scorers="):
        run(tmp_path, "pickapic", "train.parquet", "by=rank")
    with pytest.raises(UserError, match=rf"^by=votes: .*{nothing}, for scorers=\[jpeg\] to decide"):
        run(tmp_path, "pickapic", "train.parquet", "by=votes", "scorers=[jpeg]")


def test_scored_pictures_have_no_ranks(tmp_path: Path) -> None:
    write_scores(tmp_path / "scored", [picture("p0", "cat", 0.1)])
    given = [f"images={tmp_path / 'scored'}", f"out={tmp_path / 'out'}", "by=rank"]
    with pytest.raises(UserError, match=r"unknown scorer of .* 'rank'"):
        pair(**load_recipe(pair, None, given).arguments)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ((None, 0.1), r"\(1 nan_score, 1 single_picture\): pictures are broken or could not be scored"),
        ((0.1,), r"\(1 single_picture\): give several pictures a prompt"),
        ((0.1, 0.1), r"\(1 tie\): lower margin"),
    ],
)
def test_what_helps_follows_from_what_was_wrong(
    tmp_path: Path, values: tuple[float | None, ...], remedy: str
) -> None:
    rows = [picture(f"p{index}", "cat", value) for index, value in enumerate(values)]
    write_scores(tmp_path / "scored", rows)
    given = [f"images={tmp_path / 'scored'}", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=remedy):
        pair(**load_recipe(pair, None, given).arguments)


def test_broken_pictures_of_data_are_said_to_be_broken(tmp_path: Path) -> None:
    write_lists(tmp_path / "l.jsonl", ranks(1, 2))
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"\(2 nan_score, 1 single_picture\): pictures are broken"):
        run(tmp_path, "jsonl", "l.jsonl", "scorers=[jpeg]", "device=cpu")

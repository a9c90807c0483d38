"""`pair data=...`: preference data that scorers label anew."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import folder_lock, read_json, read_jsonl, write_jsonl
from diffalign.data.sources.jsonl import Plugin
from diffalign.stages.pair import pair
from tests.pickapic_files import messy_rows, row, write


def noisy(amount: int, size: int = 32) -> bytes:
    """Returns a PNG whose JPEG is the larger, the more noise it has."""
    noise = np.random.default_rng(amount).integers(0, amount + 1, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise + 100).save(stream, "PNG")
    return stream.getvalue()


FLAT, SOME, MUCH = noisy(0), noisy(40), noisy(150)

TEXTS = ("half a \\ud83d character", "a cat")

ROWS = [
    row("a cat", FLAT, MUCH),  # 0 people prefer the flat one
    row("a dog", MUCH, FLAT),  # 1 people prefer the noise, as the scorer does
    row("a fish", MUCH, FLAT, (0.5, 0.5)),  # 2 a tie of people
    row("a bird", FLAT, SOME, (0.5, 0.5), has_label=False),  # 3 unlabelled
    row("a cow", b"not an image", FLAT),  # 4
    row("a hen", FLAT, None),  # 5
    row("a cat", MUCH[:-300], FLAT),  # 6 cut short: it has a header
    row("twins", SOME, SOME),  # 7 a tie of the scorer
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "train.parquet", ROWS)


def run(tmp_path: Path, *words: str, data: str = "pickapic", path: str = "train.parquet") -> list[Any]:
    """The written preferences."""
    given = [f"data={data}", f"data.path={tmp_path / path}", f"out={tmp_path / 'out'}", "device=cpu", *words]
    return read_jsonl(pair(**load_recipe(pair, None, given).arguments))


def labels(records: list[Any]) -> dict[str, list[float]]:
    return {row["id"].rpartition(":")[2]: [one["label"] for one in row["candidates"]] for row in records}


def test_scorers_label_and_peoples_labels_are_kept(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = run(tmp_path, "scorers=[jpeg]")
    assert labels(records) == {"0": [0.0, 1.0], "1": [1.0, 0.0], "2": [1.0, 0.0], "3": [0.0, 1.0]}
    first, second = records[0]["candidates"]
    assert (first["human_label"], second["human_label"], first["uid"]) == (1.0, 0.0, "u0")
    assert "human_label" not in records[3]["candidates"][0]
    assert first["scores"]["jpeg"]["value"] < second["scores"]["jpeg"]["value"]
    assert records[0]["id"] == "train.parquet:0" and records[0]["user"] == "42"
    assert (records[0]["source"], records[0]["meta"]["source"]) == ("pair:jpeg", "pickapic")
    found = read_json(tmp_path / "out" / "manifest.json")
    assert found["dropped"] == {
        "corrupt_image": ["train.parquet:4"],
        "missing_image": ["train.parquet:5"],
        "nan_score": ["train.parquet:6:0"],
        "single_picture": ["train.parquet:6:1"],
        "tie": ["train.parquet:7"],
    }
    assert (found["counts"]["records"], found["counts"]["pairs"]) == (8, 4)
    # Of the pairs that people decide: 0 differs, 1 agrees, 7 is a tie of the scorer.
    agreed = found["agreement"]
    assert (agreed["estimate"], agreed["n"], agreed["ties_before"]) == (0.5, 3, 1)
    assert agreed["low"] == 0.0 and agreed["high"] == 1.0
    said = capsys.readouterr().err
    assert "agrees with the labels before on 50.0 % [0.0, 100.0] of the 3 pairs that these decide" in said
    (broken,) = [row for row in read_jsonl(tmp_path / "out" / "scored.jsonl") if row["id"].endswith(":6")]
    assert "cannot be decoded" in broken["candidates"][0]["errors"]["jpeg"]


def test_every_mess_of_the_original_is_counted(tmp_path: Path) -> None:
    """NaN and contradicting labels are no obstacle: nobody needs them now."""
    rows = [*messy_rows(), row("half a character", FLAT, MUCH)]
    write(tmp_path / "train.parquet", rows)
    records = run(tmp_path, "scorers=[jpeg]", "ties=soft")
    found = read_json(tmp_path / "out" / "manifest.json")
    assert found["counts"]["records"] == 21
    numbers = {
        reason: [int(name.split(":")[1]) for name in names] for reason, names in found["dropped"].items()
    }
    assert numbers == {
        "corrupt_image": [5, 16],
        "missing_image": [6, 19],
        "nan_score": [4],
        "single_picture": [4],
    }
    by_number = {int(record["id"].split(":")[1]): record for record in records}
    assert sorted({*range(21)} - {*by_number}) == [4, 5, 6, 16, 19]
    assert [one.get("human_label") for one in by_number[13]["candidates"]] == [None, 1.0]
    assert [one["human_label"] for one in by_number[14]["candidates"]] == [1.0, 1.0]


def test_text_that_no_file_can_hold_is_dropped_before_the_scoring(tmp_path: Path) -> None:
    (tmp_path / "flat.png").write_bytes(FLAT)
    (tmp_path / "much.png").write_bytes(MUCH)
    candidates = '[{"image": "flat.png"}, {"image": "much.png"}]'
    lines = [
        f'{{"id": "{k}", "prompt": "{text}", "candidates": {candidates}}}' for k, text in enumerate(TEXTS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert [row["id"] for row in run(tmp_path, "scorers=[jpeg]", data="jsonl", path="pairs.jsonl")] == ["1"]
    assert read_json(tmp_path / "out" / "manifest.json")["dropped"] == {"bad_text": ["pairs.jsonl:1"]}


def test_the_pictures_are_files_and_train_reads_them(tmp_path: Path, data: Path) -> None:
    records = run(tmp_path, "scorers=[jpeg]")
    paths = {one["image"] for row in records for one in row["candidates"]}
    assert len(paths) == 3 and all(path.startswith("images/") and path.endswith(".png") for path in paths)
    assert {(tmp_path / "out" / path).read_bytes() for path in paths} == {FLAT, SOME, MUCH}
    usable = list(Plugin(str(tmp_path / "out")).usable())
    assert [group.target for group in usable] == [0.0, 1.0, 1.0, 0.0]
    assert Plugin(str(tmp_path / "out")).score_facts()["jpeg"].scale == "incompressibility"


def test_margin_ties_votes_and_limit_apply_alike(tmp_path: Path, data: Path) -> None:
    """The two scorers contradict each other everywhere; twins are a tie of both."""
    both = "scorers={large: {name: jpeg}, small: {name: jpeg, scale: compressibility}}"
    with pytest.raises(UserError, match="scorers holds several scorers: choose with by= one of large, small"):
        run(tmp_path, both)
    assert not (tmp_path / "out").exists()
    records = run(tmp_path, both, "by=[large,small]", "ties=soft", "limit=3")
    assert labels(records) == {"0": [0.5, 0.5], "1": [0.5, 0.5], "2": [0.5, 0.5]}
    assert [one["votes"] for one in records[0]["candidates"]] == [1, 1]
    assert read_json(tmp_path / "out" / "manifest.json")["counts"]["records"] == 3


def test_scored_records_are_labelled_again_without_scoring(tmp_path: Path, data: Path) -> None:
    run(tmp_path, "scorers=[jpeg]")
    scored = (tmp_path / "out").rename(tmp_path / "first")
    rows = [row for row in read_jsonl(scored / "scored.jsonl") if not row["id"].endswith(":6")]
    flat, some, much = (rows[k]["candidates"][1]["scores"]["jpeg"]["value"] for k in (1, 3, 0))
    assert flat < some < much
    again = run(tmp_path, f"margin={(much - flat) * 0.999}", data="jsonl", path="first/scored.jsonl")
    assert labels(again) == {"0": [0.0, 1.0], "1": [1.0, 0.0], "2": [1.0, 0.0]}
    assert again[0]["candidates"][0]["human_label"] == 1.0
    assert again[0]["candidates"][0]["image"].startswith("../first/images/")
    (tmp_path / "out").rename(tmp_path / "second")
    # What scorers have labelled is no person's label.
    third = run(tmp_path, "scorers={jpeg: {scale: compressibility}}", data="jsonl", path="second")
    assert labels(third)["0"] == [1.0, 0.0]
    first = third[0]["candidates"][0]
    assert (first["human_label"], first["old_label"], third[0]["meta"]["source"]) == (1.0, 0.0, "pickapic")


def test_ranked_lists_are_ranked_anew(tmp_path: Path) -> None:
    for name, content in (("flat", FLAT), ("some", SOME), ("much", MUCH)):
        (tmp_path / f"{name}.png").write_bytes(content)
    ranked = [{"image": f"{name}.png", "rank": k + 1} for k, name in enumerate(("flat", "some", "much"))]
    write_jsonl(tmp_path / "lists.jsonl", [{"id": "l", "prompt": "a cat", "candidates": ranked}])
    words = ("scorers=[jpeg]", "by=jpeg")
    (record,) = run(tmp_path, *words, "how=lists", data="jsonl", path="lists.jsonl")
    assert [(one["human_rank"], one["rank"]) for one in record["candidates"]] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]
    assert not (tmp_path / "out" / "images").exists()
    agreed = read_json(tmp_path / "out" / "manifest.json")["agreement"]
    assert (agreed["estimate"], agreed["n"]) == (0.0, 3)  # the very order of people, turned round
    (tmp_path / "out").rename(tmp_path / "lists")
    pairs = run(tmp_path, *words, "how=all_pairs", data="jsonl", path="lists.jsonl")
    assert [row["id"] for row in pairs] == ["l:0|l:1", "l:0|l:2", "l:1|l:2"]


def test_a_killed_run_goes_on(tmp_path: Path, data: Path) -> None:
    whole = run(tmp_path, "scorers=[jpeg]")
    out = tmp_path / "out"
    (out / "manifest.json").unlink()
    (out / "preferences.jsonl").unlink()
    rows = read_jsonl(out / "scored.jsonl")
    rows[0]["candidates"][0]["scores"]["jpeg"]["value"] = 999.0  # to see that it is not scored again
    write_jsonl(out / "scored.jsonl", rows[:2])
    with open(out / "scored.jsonl", "a") as stream:
        stream.write('{"id": "train.parquet:2", "prom')
    left = out / whole[0]["candidates"][0]["image"]
    left.with_name(f".tmp-0-{left.name}").write_bytes(b"half a picture")
    records = run(tmp_path, "scorers=[jpeg]")
    assert labels(records) == {**labels(whole), "0": [1.0, 0.0]}
    assert records[1:] == whole[1:]
    assert not list(out.rglob(".tmp-*"))


def test_two_at_once_and_another_recipe_are_refused(tmp_path: Path, data: Path) -> None:
    with folder_lock(tmp_path / "out"), pytest.raises(UserError, match="another run is writing to"):
        run(tmp_path, "scorers=[jpeg]")
    run(tmp_path, "scorers=[jpeg]")
    with pytest.raises(UserError, match=r"another recipe \(margin was 0\.0, now 0\.5\)"):
        run(tmp_path, "scorers=[jpeg]", "margin=0.5")
    with pytest.raises(UserError, match=r"another recipe \(scorers\.jpeg\.quality was 95, now 90\)"):
        run(tmp_path, "scorers={jpeg: {quality: 90}}")


def test_known_scores_come_from_the_cache(tmp_path: Path, data: Path) -> None:
    first = run(tmp_path, "scorers=[jpeg]", f"cache={tmp_path / 'cache'}")
    (tmp_path / "out").rename(tmp_path / "first")
    assert run(tmp_path, "scorers=[jpeg]", f"cache={tmp_path / 'cache'}") == first
    assert (tmp_path / "cache" / "scores.sqlite").stat().st_size > 0


def test_a_judge_of_groups_compares_the_pictures_of_one_record(tmp_path: Path) -> None:
    """Two records of one prompt: the noise of the first would win against all of the second."""
    write(tmp_path / "train.parquet", [row("a cat", MUCH, SOME), row("a cat", FLAT, SOME)])
    ensemble = "scorers={vote: {name: ensemble, how: votes, scorers: {jpeg: {}}}}"
    found = run(tmp_path, ensemble)
    assert labels(found) == {"0": [1.0, 0.0], "1": [0.0, 1.0]}
    values = [[one["scores"]["vote"]["value"] for one in row["candidates"]] for row in found]
    assert values == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no scores"),
        (["scorers=[jpeg]", "by=clip"], "unknown scorer of scorers 'clip'"),
        (["scorers=[geneval]"], "scorer geneval needs a context for every picture"),
        (["scorers=[jpeg]", "batch_size=0"], "batch_size=0: give a number of pictures"),
        (["scorers=[jpeg]", "images=x"], "pair needs images= (scored pictures) or data="),
    ],
)
def test_what_cannot_be_labelled_is_refused(
    tmp_path: Path, data: Path, words: list[str], message: str
) -> None:
    rows = [{**row, "ranking_id": None, "num_example_per_prompt": None} for row in ROWS]
    write(data, rows)  # no meta, which could be a context
    with pytest.raises(UserError) as caught:
        run(tmp_path, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "preferences.jsonl").exists()


def test_scorers_that_were_forgotten_leave_no_folder_in_the_way(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        UserError, match=r"train\.parquet holds no scores, ranks or votes: give scorers=\[\.\.\.\] to make"
    ):
        run(tmp_path)
    assert not (tmp_path / "out").exists() and run(tmp_path, "scorers=[jpeg]")


def test_nothing_is_written_where_every_file_is_data(tmp_path: Path) -> None:
    """Folders of ranked lists: `out` would be the next list."""
    for name in ("a cat", "a dog"):
        (tmp_path / "lists" / name).mkdir(parents=True)
        for rank, content in enumerate((MUCH, FLAT), start=1):
            (tmp_path / "lists" / name / f"rank_{rank}.png").write_bytes(content)
    with pytest.raises(UserError, match=r"out=.* lies in the folder of the data \(.*lists\): choose another"):
        run(tmp_path, "scorers=[jpeg]", f"out={tmp_path / 'lists' / 'out'}", data="folder", path="lists")
    assert len(run(tmp_path, "scorers=[jpeg]", data="folder", path="lists")) == 2
    beside = run(tmp_path, "scorers=[jpeg]", f"out={tmp_path / 'out' / 'again'}", data="jsonl", path="out")
    assert len(beside) == 2  # of a jsonl one file is read, whatever lies beside it


def test_the_folder_of_the_data_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out" / "preferences.jsonl", [{"id": "a", "prompt": "p", "candidates": []}])
    before = (tmp_path / "out" / "preferences.jsonl").read_bytes()
    with pytest.raises(UserError, match="is the folder of the data: choose another folder"):
        run(tmp_path, "scorers=[jpeg]", data="jsonl", path="out")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_data_without_two_pictures_a_record(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row("a cat", FLAT, None)])
    with pytest.raises(UserError, match=r"has no record with two pictures \(1 missing_image\)"):
        run(tmp_path, "scorers=[jpeg]")
    assert not (tmp_path / "out").exists()

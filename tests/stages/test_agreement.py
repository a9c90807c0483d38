"""`evaluate mode=scorers`: scorers against the people who labelled the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import read_json, read_jsonl, write_jsonl
from diffalign.stages.evaluate import evaluate
from tests.pickapic_files import row, write
from tests.stages.test_relabel import FLAT, MUCH, ROWS, SOME


def run(tmp_path: Path, *words: str, data: str = "pickapic", path: str = "train.parquet") -> dict[str, Any]:
    """The report."""
    given = [
        "mode=scorers",
        f"data={data}",
        f"data.path={tmp_path / path}",
        f"out={tmp_path / 'out'}",
        *words,
    ]
    report: dict[str, Any] = read_json(evaluate(**load_recipe(evaluate, None, given).arguments))
    return report


def test_the_report_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People: flat, noise, tie, -, flat (first picture broken, no score), twins: first. The scorer: noise."""
    write(tmp_path / "train.parquet", ROWS)
    report = run(tmp_path, "scorers=[jpeg]", "device=cpu")
    assert (report["mode"], report["pairs"], report["prompts"]) == ("scorers", 7, 6)
    found = report["scorers"]["jpeg"]
    # Of the labelled pairs 4, 5 and 6 have a broken picture; 0 is wrong, 1 right, 7 a tie of the scorer.
    assert (found["pairs"], found["dropped"]) == (4, 3)
    assert (found["ties_of_people"], found["ties_of_scorer"]) == (1, 1)
    assert (found["accuracy"]["estimate"], found["accuracy"]["n"]) == (0.5, 3)
    assert found["imagereward_accuracy"]["estimate"] == pytest.approx(1 / 3)
    assert found["pickscore_label_accuracy"]["estimate"] == pytest.approx(1.5 / 4)
    assert found["inversion_score"]["estimate"] == 0.75 and found["tau_b"] == 0.0
    models = found["models"]["dreamlike | sdxl"]
    assert (models["pairs"], models["people"], models["scorer"]) == (4, pytest.approx(0.5 / 4), 0.375)
    rows = read_jsonl(tmp_path / "out" / "agreement.jsonl")
    assert [row["target"] for row in rows] == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert rows[0]["leads"]["jpeg"] < 0 < rows[1]["leads"]["jpeg"] and rows[3]["leads"]["jpeg"] is None
    text = (tmp_path / "out" / "agreement.txt").read_text()
    assert (
        text in capsys.readouterr().out and "scorers against people: 7 pairs of 7 records, 6 prompts" in text
    )
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["dropped"] == {"unlabelled": ["train.parquet:3"]} and manifest["counts"]["used"] == 7


def test_several_scorers_with_one_another_and_by_category(tmp_path: Path) -> None:
    pictures = {"flat": FLAT, "some": SOME, "much": MUCH}
    for name, content in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(content)

    def ranked(name: str, order: list[str], category: str) -> dict[str, Any]:
        listed = [{"image": f"{one}.png", "rank": order.index(one) + 1} for one in pictures]
        return {"id": name, "prompt": name, "candidates": listed, "meta": {"Category": category, "n": 1}}

    rows = [ranked("a", ["much", "some", "flat"], "Animals"), ranked("b", ["some", "much", "flat"], "Arts")]
    write_jsonl(tmp_path / "lists.jsonl", rows)
    both = "scorers={large: {name: jpeg}, small: {name: jpeg, scale: compressibility}}"
    report = run(tmp_path, both, data="jsonl", path="lists.jsonl")
    large, small = report["scorers"]["large"], report["scorers"]["small"]
    assert report["pairs"] == 6 and large["inversion_score"]["estimate"] == pytest.approx((1 + 2 / 3) / 2)
    assert small["accuracy"]["estimate"] == pytest.approx(1 / 6) and large["tau_b"] == pytest.approx(4 / 6)
    by = {label: of["estimate"] for label, of in large["by"]["Category"].items()}
    assert by == {"Animals": 1.0, "Arts": pytest.approx(2 / 3)} and list(large["by"]) == ["Category"]
    together = report["between_scorers"]["large | small"]
    assert together["alike"]["estimate"] == 0.0 and together["tau_b"] == -1.0
    assert "accuracy by Category" in (tmp_path / "out" / "agreement.txt").read_text()


def test_scores_that_are_in_the_data_serve(tmp_path: Path) -> None:
    """Of a score where less is better the lead is turned; no picture is looked at."""

    def one(value: float, label: float) -> dict[str, Any]:
        scores = {"far": {"value": value, "scale": "px", "higher_is_better": False}}
        return {"image": "nowhere.png", "label": label, "scores": scores}

    pair = {"id": "a", "prompt": "p", "candidates": [one(1.0, 1.0), one(3.0, 0.0)]}
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    report = run(tmp_path, data="jsonl", path="pairs.jsonl")
    assert report["scorers"]["far"]["accuracy"]["estimate"] == 1.0
    assert read_jsonl(tmp_path / "out" / "agreement.jsonl")[0]["leads"] == {"far": 2.0}


def test_a_limit_counts_judged_records(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [ROWS[3], *ROWS[:3]])
    assert run(tmp_path, "scorers=[jpeg]", "limit=2")["pairs"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no scores: give scorers="),
        (["limit=0"], "limit=0: give a number of at least 1"),
        (["scorers=[jpeg]", "base=x"], "evaluate mode=scorers does not read base"),
        (["scorers=[jpeg]", "draws=3"], "evaluate mode=scorers does not read draws"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    write(tmp_path / "train.parquet", ROWS)
    with pytest.raises(UserError, match=message):
        run(tmp_path, *words)
    assert not (tmp_path / "out").exists()


def test_labels_that_scorers_gave_are_said_to_be_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat.png").write_bytes(FLAT)
    (tmp_path / "much.png").write_bytes(MUCH)
    both = [{"image": "flat.png", "label": 0.0}, {"image": "much.png", "label": 1.0}]
    rows = [
        {"id": name, "prompt": name, "candidates": both, "source": name} for name in ("mine", "pair:clip")
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run(tmp_path, "scorers=[jpeg]", data="jsonl", path="pairs.jsonl")
    assert "the labels of 1 of 2 records are scorers', not people's" in capsys.readouterr().err


def test_a_scorer_without_any_score_is_no_success(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row("a cat", b"not an image", MUCH)])
    with pytest.raises(
        UserError, match=r"scorer jpeg has no score for any of 1 pairs \(.*is no picture.*\): give"
    ):
        run(tmp_path, "scorers=[jpeg]")
    assert (tmp_path / "out" / "agreement.json").exists()


def test_data_that_nobody_judged(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row("a cat", FLAT, MUCH, (0.5, 0.5), has_label=False)])
    with pytest.raises(UserError, match=r"none of 1 rows is usable \(1 unlabelled\)"):
        run(tmp_path, "scorers=[jpeg]")
    with pytest.raises(UserError, match="evaluate mode=scorers needs data"):
        evaluate(mode="scorers", scorers=["jpeg"], out=str(tmp_path / "out"))

"""`check` as the command line calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.statistics import share_interval
from diffalign.stages.check import as_table, check
from tests.drawn_pictures import encoded
from tests.pickapic_files import messy_rows, row, write


def run(*words: str) -> dict[str, object]:
    return check(**load_recipe(check, None, list(words)).arguments)


@pytest.fixture
def messy(tmp_path: Path) -> str:
    return str(write(tmp_path / "train-00000-of-00001.parquet", messy_rows()))


def test_table_names_the_rows(messy: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("data=pickapic", f"data.path={messy}")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    name = "train-00000-of-00001.parquet"
    assert lines[0] == f"{messy} (pickapic)"
    for line in (
        "rows 20",
        "prompts 17",
        "images 38 (6 distinct)",
        "decided 14 (first preferred in 9: 64.3% [38.8%, 83.7%])",
        "ties 2",
        f"unlabelled 2 {name}:3, 17",
        "usable pairs 9 (ties=drop)",
        "not a pair 0",
        f"bad label 2 {name}:13, 14",
        f"missing image 2 {name}:6, 19",
        f"corrupt image 3 {name}:4, 5, 16",
        f"tiny image 1 {name}:15",
        f"duplicates 3 {name}:7=0, 8=0, 9=0",
        f"conflicting duplicates 1 {name}:9=0",
        f"same picture twice 1 {name}:18",
        f"empty captions 1 {name}:10",
        f"long captions 1 {name}:11",
        "non-ASCII captions 1",
        "sizes 16x16: 33",
        "24x16: 1",
        "pairs of two sizes 1",
        "look-alikes 0 pictures in 0 groups (within 4 of 64 bits)",
        f"longest (least tokens) {name}:11 (76), 12 (3), 16 (3), 0 (2), 1 (2)",
        "words not for work 0",
        "two people agree in no pair with the votes of two people",
        "circular votes 0",
    ):
        assert line in lines
    assert lines[-1].startswith("Training would refuse this data: 43.8%")


def test_json_is_all_that_stdout_holds(messy: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(
        "data=pickapic", f"data.path={messy}", "json=true", "data.ties=soft", "data.max_bad_share=0.5"
    )
    assert json.loads(capsys.readouterr().out) == report
    assert (report["rows"], report["usable"], report["ties_policy"]) == (20, 10, "soft")


def test_what_only_other_data_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Votes in a circle, two people on one pair, look-alikes, and a winner that is always first."""
    circle = [row("p", encoded(a), encoded(b), user_id=1) for a, b in ((1, 2), (2, 3), (3, 1))]
    again = row("p", encoded(2), encoded(1), user_id=2)
    many = [row(f"nude {n}", encoded(10 + 2 * n), encoded(11 + 2 * n)) for n in range(100)]
    alike = row("q", encoded(500, 64), encoded(500, 64, quality=60))
    path = write(tmp_path / "t.parquet", [*circle, again, *many, alike])
    run("data=pickapic", f"data.path={path}")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "circular votes 1 t.parquet:0, 1, 2",
        "two people agree in 0.0% [0.0%, 0.0%] over 1 pairs, 2 votes, Krippendorff's alpha 0.00",
        "look-alikes 2 pictures in 1 groups (within 4 of 64 bits)",
        "t.parquet:104[0], 104[1]",
        "pairs of look-alikes 1 t.parquet:104",
    ):
        assert line in lines
    assert any(line.startswith("words not for work 100 t.parquet:4, 5") for line in lines)
    assert lines[-1].startswith(
        "The first picture is preferred in 100.0% [96.5%, 100.0%] of the decided pairs"
    )


@pytest.mark.parametrize(("count", "warned"), [(500, False), (560, False), (600, True), (400, True)])
def test_position_is_warned_of_only_when_it_is_far_from_even(
    messy: str, capsys: pytest.CaptureFixture[str], count: int, warned: bool
) -> None:
    report = run("data=pickapic", f"data.path={messy}", "data.max_bad_share=1")
    report["first_preferred_share"] = share_interval(count, 1000).as_dict()
    assert ("the position tells the label" in as_table(report)) == warned


def test_limit_counts_rows(messy: str) -> None:
    report = run("data=pickapic", f"data.path={messy}", "limit=3")
    assert (report["rows"], report["decided"], report["ties"]) == (3, 2, 1)


def test_report_and_manifest_in_out(messy: str, tmp_path: Path) -> None:
    out = tmp_path / "checked"
    report = run("data=pickapic", f"data.path={messy}", f"out={out}")
    assert json.loads((out / "check.json").read_text()) == report
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "check"
    assert manifest["counts"] == {"rows": 20, "usable": 9}
    assert manifest["dropped"]["corrupt_image"] == [
        f"train-00000-of-00001.parquet:{index}" for index in (4, 5, 16)
    ]
    assert manifest["recipe"]["data"]["path"] == messy
    (identity,) = manifest["inputs"].values()
    assert len(identity["sha256"]) == 64
    run("data=pickapic", f"data.path={messy}", f"out={out}")  # the same again is fine


def test_another_stages_folder_is_left_alone(messy: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": "train"}')
    with pytest.raises(UserError, match="holds the output of 'train': choose another folder"):
        run("data=pickapic", f"data.path={messy}", f"out={tmp_path}")
    assert not (tmp_path / "check.json").exists()
    with pytest.raises(UserError, match="is a file: give a folder"):
        run("data=pickapic", f"data.path={messy}", f"out={messy}")


def test_bad_input_is_one_line_and_writes_nothing(messy: str, tmp_path: Path) -> None:
    out = tmp_path / "checked"
    with pytest.raises(UserError, match=r"gone\.parquet: no such file"):
        run("data=pickapic", f"data.path={tmp_path}/gone.parquet", f"out={out}")
    with pytest.raises(UserError, match="limit=0"):
        run("data=pickapic", f"data.path={messy}", "limit=0", f"out={out}")
    with pytest.raises(UserError, match="did you mean"):
        run("data=pikapic", f"data.path={messy}")
    assert not out.exists()


def test_long_lists_are_cut_in_the_table_only(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row(str(index), second=b"x") for index in range(20)])
    report = run("data=pickapic", f"data.path={path}")
    assert len(report["problems"]["corrupt_image"]) == 20  # type: ignore[index]
    table = as_table(report)
    assert "t.parquet:0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, and 4 more" in table


def test_jsonl_records_are_checked_too(tmp_path: Path) -> None:
    line = {"prompt": "p", "candidates": [{"image": "a.png", "label": 1.0}, {"image": "b.png", "label": 0.0}]}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(line) + "\n")
    report = run("data=jsonl", f"data.path={tmp_path}")
    assert report["problems"] == {"missing_image": ["preferences.jsonl:1"]}


NOTO = Path(__file__).parents[2] / ".." / "shared" / "data" / "noto_pairs"


@pytest.mark.skipif(not NOTO.is_dir(), reason="the noto pairs are not here")
def test_noto_pairs_as_counted_with_pandas() -> None:
    report = run("data=pickapic", f"data.path={NOTO}", "data.split=train")
    counted = {key: report[key] for key in ("rows", "prompts", "decided", "ties", "unlabelled", "usable")}
    assert counted == {
        "rows": 1414, "prompts": 1207, "decided": 1251, "ties": 152, "unlabelled": 11, "usable": 1236
    }  # fmt: skip
    problems: dict[str, list[str]] = report["problems"]  # type: ignore[assignment]
    rows = {reason: [int(name.split(":")[1]) for name in names] for reason, names in problems.items()}
    assert rows["missing_image"] == [540, 926]
    assert rows["corrupt_image"] == [9, 41, 93, 214, 528, 830, 913, 991, 1110, 1113, 1160, 1171, 1217, 1234]
    assert len(report["duplicates"]) == 14  # type: ignore[arg-type]
    assert report["pairs_of_two_sizes"] == 290

"""`check` with a filter, dedup, split or format: what is left out, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from diffalign import cli
from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.data.sources.jsonl import Plugin as Jsonl
from diffalign.data.sources.pickapic import Plugin as PickaPic
from diffalign.stages.check import check
from tests.drawn_pictures import encoded
from tests.pickapic_files import messy_rows, row, write


def run(*words: str) -> dict[str, Any]:
    return check(**load_recipe(check, None, list(words)).arguments)


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    """40 pairs of 20 prompts."""
    rows = [row(f"prompt {n // 2}", encoded(2 * n), encoded(2 * n + 1)) for n in range(40)]
    path = write(tmp_path / "in" / "train-00000-of-00001.parquet", rows)
    return ["data=pickapic", f"data.path={path}"]


@pytest.fixture
def messy(tmp_path: Path) -> list[str]:
    path = write(tmp_path / "messy" / "train-00000-of-00001.parquet", messy_rows())
    return ["data=pickapic", f"data.path={path}"]


def test_report_alone_says_what_would_be_left_out(
    messy: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = run(*messy, "dedup=exact", "filter.drop_ties=true", "filter.same_size=true")
    name = "train-00000-of-00001.parquet"
    assert report["selection"] == {
        "counts": {"rows": 20, "kept": 7, "held_out": 0, "dropped": 13},
        "dropped": {
            "two_sizes": [f"{name}:1"],
            "tie": [f"{name}:2"],
            "corrupt_image": [f"{name}:4", f"{name}:5", f"{name}:16"],
            "missing_image": [f"{name}:6", f"{name}:19"],
            "duplicate": [f"{name}:7", f"{name}:8", f"{name}:9"],
            "bad_label": [f"{name}:13", f"{name}:14"],
            "tiny_image": [f"{name}:15"],
        },
    }
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("nothing was written: give out=FOLDER")
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "kept 7 rows" in lines and "left out 13 rows" in lines and f"duplicate 3 {name}:7, 8, 9" in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_that_pass_are_written_with_a_manifest(
    messy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    report = run(*messy, "dedup=exact", f"out={out}")
    kept = [record.prompt for record in PickaPic(str(out), split="train").records()]
    dropped = {int(name.split(":")[1]) for names in report["selection"]["dropped"].values() for name in names}
    assert kept == [line["caption"] for n, line in enumerate(messy_rows()) if n not in dropped]
    for folder in (out, out / "train"):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["stage"] == "check" and manifest["dropped"] == report["selection"]["dropped"]
        assert manifest["counts"]["kept"] == len(kept)
    assert manifest["not_held"] == {} and manifest["counts"]["written"] == len(kept)
    assert json.loads((out / "check.json").read_text()) == report
    assert f"check: {len(kept)} rows in {out}/train\n" in capsys.readouterr().err
    first = (out / "train" / "train-00000-of-00001.parquet").read_bytes()
    run(*messy, "dedup=exact", f"out={out}")  # the same again gives the same
    assert (out / "train" / "train-00000-of-00001.parquet").read_bytes() == first


def test_split_writes_two_sets_that_share_no_prompt(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(*source, "split=0.3", f"out={out}", "seed=3")
    sets = {
        name: [record.prompt for record in PickaPic(str(out), split=name).records()]
        for name in ("train", "validation")
    }
    assert not set(sets["train"]) & set(sets["validation"])
    assert sorted(sets["train"] + sets["validation"]) == sorted(f"prompt {n // 2}" for n in range(40))
    counts = report["selection"]["counts"]
    assert (counts["kept"], counts["held_out"]) == (len(sets["train"]), len(sets["validation"]))
    assert 0 < counts["held_out"] < 24
    assert all(sets["validation"].count(prompt) == 2 for prompt in sets["validation"])


def test_jsonl_out_of_parquet_and_back(source: list[str], tmp_path: Path) -> None:
    run(*source, "format=jsonl", "limit=5", f"out={tmp_path / 'lines'}")
    records = list(Jsonl(str(tmp_path / "lines" / "train")).records())
    assert len(records) == 5 and records[3].candidates[1].image.read() == encoded(7)
    run(
        "data=jsonl",
        f"data.path={tmp_path / 'lines' / 'train'}",
        "format=pickapic",
        f"out={tmp_path / 'back'}",
    )
    again = pq.read_table(tmp_path / "back" / "train" / "train-00000-of-00001.parquet").to_pylist()
    expected = pq.read_table(source[1].partition("=")[2]).to_pylist()[:5]
    for key in ("caption", "jpg_0", "jpg_1", "label_0", "user_id", "image_1_uid", "ranking_id", "model_0"):
        assert [line[key] for line in again] == [line[key] for line in expected]


def pairs_on_disk(folder: Path, **fields: Any) -> list[str]:
    """Four pairs as jsonl with pictures beside it."""
    folder.mkdir()
    lines = []
    for n in range(4):
        candidates = []
        for side in (0, 1):
            (folder / f"{n}{side}.png").write_bytes(encoded(2 * n + side, kind="PNG"))
            score = {"clip": {"value": n / 10 * side, "scale": "cosine", "version": "v"}}
            candidates.append({"image": f"{n}{side}.png", "label": float(side), "scores": score, **fields})
        lines.append(json.dumps({"id": f"r{n}", "prompt": f"p{n}", "candidates": candidates}))
    (folder / "preferences.jsonl").write_text("\n".join(lines))
    return ["data=jsonl", f"data.path={folder}"]


def test_jsonl_keeps_ids_scores_and_their_range(tmp_path: Path) -> None:
    words = pairs_on_disk(tmp_path / "in")
    run(*words, "filter.min_score_gap.clip=0.15", f"out={tmp_path / 'out'}")
    written = Jsonl(str(tmp_path / "out" / "train"))
    records = list(written.records())
    assert [record.id for record in records] == ["r2", "r3"]
    assert records[0].candidates[0].image.path.resolve() == (tmp_path / "in" / "20.png").resolve()
    facts = written.score_facts()["clip"]
    assert (facts.scale, facts.version, facts.low, facts.high) == ("cosine", "v", 0.0, 0.3)
    assert not (tmp_path / "out" / "train" / "images").exists()


def test_chosen_rejected_leaves_ties_out_and_says_what_it_cannot_hold(
    messy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(*messy, "format=chosen_rejected", f"out={tmp_path / 'out'}")
    name = "train-00000-of-00001.parquet"
    assert report["selection"]["dropped"]["tie"] == [f"{name}:2"]
    assert report["selection"]["dropped"]["unlabelled"] == [f"{name}:3", f"{name}:17"]
    table = pq.read_table(tmp_path / "out" / "train" / name)
    assert table.column_names == ["prompt", "chosen", "rejected"]
    assert len(table) == report["selection"]["counts"]["kept"] == 9
    assert "; chosen_rejected has no place for model (9 rows), " in capsys.readouterr().err


def test_prompts_of_an_evaluation_are_counted_and_left_out(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "eval.txt").write_text("Prompt  3\nprompt 7\nelsewhere\n")
    report = run(*source, f"against={tmp_path / 'eval.txt'}", "filter.drop_overlap=true")
    rows = [f"train-00000-of-00001.parquet:{n}" for n in (6, 7, 14, 15)]
    assert report["overlap"] == {"prompts": 2, "rows": rows}
    assert report["selection"]["dropped"] == {"overlap": rows}
    assert "is not held out" not in capsys.readouterr().out
    run(*source, f"against={tmp_path / 'eval.txt'}", f"out={tmp_path / 'out'}")
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert inputs["against"]["path"] == str(tmp_path / "eval.txt") and len(inputs) == 2
    said = capsys.readouterr()
    assert "2 prompts of against=" in said.out and "nothing was written" not in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["filter.drop_overlap=true"], "filter.drop_overlap=true needs against=FILE"),
        (["against=a_word"], "against=a_word: no such file"),
        (["format=jsonl"], "format=jsonl says how rows are written: give out=FOLDER too"),
        (["split=1"], "split=1.0: give the share of prompts to hold out"),
        (["near_distance=9"], "near_distance=9: give a number of bits from 0 to 8"),
        (["dedup=exakt"], "did you mean 'exact'"),
        (["filter.min_sid=3"], "did you mean 'min_side'"),
        (["filter.min_side=99", "out=OUT"], "none of 40 rows passes .40 small_side.: nothing is written"),
        (["split=0.0001", "out=OUT"], "split=0.0001 leaves 40 rows in train and 0 in validation"),
        (["filter.drop_ties=true", "out=IN"], "holds data that is read"),
        (["run=somewhere"], "run=somewhere and data= do not go together"),
    ],
)
def test_refusals_write_nothing(source: list[str], tmp_path: Path, words: list[str], message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    places = {"out=OUT": f"out={tmp_path / 'out'}", "out=IN": f"out={tmp_path / 'in'}"}
    with pytest.raises(UserError, match=message):
        run(*source, *(places.get(word, word) for word in words))
    assert sorted(tmp_path.rglob("*")) == before


def test_without_data_or_run() -> None:
    with pytest.raises(UserError, match=r"check needs data=NAME data.path=PATH, or run=FOLDER"):
        run()


def test_pictures_that_lie_in_out_are_not_overwritten(tmp_path: Path) -> None:
    pairs_on_disk(tmp_path / "out")
    (tmp_path / "out" / "preferences.jsonl").rename(tmp_path / "elsewhere.jsonl")
    lines = (tmp_path / "elsewhere.jsonl").read_text().replace('"image": "', '"image": "out/')
    (tmp_path / "elsewhere.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"holds data that is read .*00\.png"):
        run(
            "data=jsonl",
            f"data.path={tmp_path / 'elsewhere.jsonl'}",
            "dedup=exact",
            f"out={tmp_path / 'out'}",
        )
    assert not (tmp_path / "out" / "train").exists() and not (tmp_path / "out" / "manifest.json").exists()


def test_a_set_may_take_the_folder_of_a_report(source: list[str], tmp_path: Path) -> None:
    run(*source, f"out={tmp_path / 'out'}")
    run(*source, "dedup=exact", f"out={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"another recipe \(dedup was exact, now near\)"):
        run(*source, "dedup=near", f"out={tmp_path / 'out'}")


def test_no_shard_among_the_shards(source: list[str], tmp_path: Path) -> None:
    folder = Path(source[1].partition("=")[2]).parent
    words = [source[0], f"data.path={folder}", *source[2:], f"out={folder / 'clean'}"]
    with pytest.raises(UserError, match="lies in the folder of the data"):
        run(*words, "format=pickapic")
    run(*words, "format=jsonl")


def test_no_report_among_the_data(tmp_path: Path) -> None:
    for rank in (1, 2):
        (tmp_path / "lists" / "a cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lists" / "a cat" / f"rank_{rank}.jpg").write_bytes(encoded(rank))
    with pytest.raises(UserError, match="lies in the folder of the data"):
        run("data=folder", f"data.path={tmp_path / 'lists'}", f"out={tmp_path / 'lists' / 'report'}")


def test_another_recipe_does_not_replace_a_set(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*source, "split=0.3", f"out={out}")
    with pytest.raises(UserError, match=r"holds a run of another recipe \(dedup was none, now exact\)"):
        run(*source, "dedup=exact", f"out={out}")
    with pytest.raises(UserError, match="holds a record set of an earlier check"):
        run(*source, f"out={out}")
    assert (out / "manifest.json").exists() and (out / "validation").exists()


def test_a_folder_of_somebody_else_is_not_replaced(source: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds a folder 'train' that no check wrote"):
        run(*source, "dedup=exact", f"out={tmp_path / 'mine'}")
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["train", "thesis.txt"]
    run(*source, f"out={tmp_path / 'mine'}")  # the report alone touches nothing
    assert (tmp_path / "mine" / "train" / "thesis.txt").read_text() == "years"


def test_data_that_changes_between_the_passes(
    tmp_path: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.stages import check as module

    choose = module.choose

    def and_change(*given: Any, **keys: Any) -> Any:
        write(Path(source[1].partition("=")[2]), [row("other", encoded(1), encoded(2))] * 39)
        return choose(*given, **keys)

    monkeypatch.setattr(module, "choose", and_change)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has changed while it was read: start again"):
        run(*source, "dedup=exact", f"out={out}")
    assert not out.exists()


def test_the_command_line_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = pairs_on_disk(tmp_path / "in", model="m")
    assert cli.main(["check", *words, "filter.models=[m]", f"out={tmp_path / 'out'}"]) == 0
    assert cli.main(["check", *words, "filter.models=[n]", f"out={tmp_path / 'two'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none of 4 rows passes (4 model)")

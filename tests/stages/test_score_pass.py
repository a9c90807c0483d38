"""One pass of `score`: prompts from files, known scores, groups, shares of processes, tables, comparisons."""

from __future__ import annotations

import csv
import math
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.common.files import folder_lock, read_json, read_jsonl, write_jsonl
from diffalign.common.manifest import read_manifest
from diffalign.scorers import load_scorer
from diffalign.stages import _scoring
from diffalign.stages._image_rows import read_image_rows, with_prompts
from diffalign.stages.score import score
from tests.tiny_clip import write_open_clip

SEEDS = 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_open_clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Nine noisy pictures: three prompts, each with three seeds, as `generate` writes them."""
    folder = tmp_path / "drawn"
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(9):
        noise = np.random.default_rng(index).integers(0, 255, (20 + index, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{index}.png")
        prompt = f"a {('red', 'blue', 'white')[index // SEEDS]} circle"
        row = {"id": f"r{index}", "image": f"images/{index}.png", "prompt": prompt}
        rows.append(row | {"prompt_id": f"p{index // SEEDS}", "seed": index % SEEDS})
    write_jsonl(folder / "images.jsonl", rows)
    return folder


def run(pictures: Path, out: Path, clip: str, **options) -> list[dict]:
    given = {"images": str(pictures), "scorers": {"clip": {"path": clip}}, "out": str(out), "device": "cpu"}
    return read_jsonl(score(**{**given, **options}))


def values_of(rows: list[dict], name: str = "clip") -> list[float]:
    return [row["scores"][name]["value"] for row in rows]


def folder_of(tmp_path: Path, names: list[str]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def prompts_of(folder: Path, source: str) -> dict[str, str]:
    rows, _ = read_image_rows(folder)
    return {row["image"]: row["prompt"] for row in with_prompts(rows, source)}


def test_prompts_of_a_file_go_in_the_order_of_the_numbers(tmp_path):
    folder = folder_of(tmp_path, ["10.png", "2.png", "1.png"])
    (tmp_path / "prompts.txt").write_text("one\ntwo\nten\n")
    expected = {"1.png": "one", "2.png": "two", "10.png": "ten"}
    assert prompts_of(folder, str(tmp_path / "prompts.txt")) == expected
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 prompts for 3 pictures and no column"):
        prompts_of(folder, str(tmp_path / "short.txt"))
    assert prompts_of(folder, "a red cube") == dict.fromkeys(expected, "a red cube")
    for source in (str(folder), "[a, b]"):
        with pytest.raises(UserError, match=r"is no file of prompts|is a folder: give one file of it"):
            prompts_of(folder, source)


def test_prompts_of_a_file_go_by_name_where_it_says_one(tmp_path):
    folder = folder_of(tmp_path, ["a.png", "b.png"])
    (tmp_path / "prompts.csv").write_text("file_name,prompt\nb.png,of b\na,of a\nunused.png,x\n")
    assert prompts_of(folder, str(tmp_path / "prompts.csv")) == {"a.png": "of a", "b.png": "of b"}
    (tmp_path / "twice.csv").write_text("id,prompt\na,one\na,two\nb,x\n")
    with pytest.raises(UserError, match="'a' has two prompts"):
        prompts_of(folder, str(tmp_path / "twice.csv"))
    (tmp_path / "less.csv").write_text("id,prompt\na,one\n")
    with pytest.raises(UserError, match=r"has none for picture 'b\.png'"):
        prompts_of(folder, str(tmp_path / "less.csv"))
    (folder / "a.txt").write_text("its own")
    with pytest.raises(UserError, match=r"'a\.png' has a prompt already"):
        prompts_of(folder, str(tmp_path / "prompts.csv"))


def test_an_id_is_matched_before_a_file_name(tmp_path):
    folder = folder_of(tmp_path, ["1.png", "2.png"])
    write_jsonl(folder / "images.jsonl", [{"id": "1", "image": "2.png"}, {"id": "2", "image": "1.png"}])
    (tmp_path / "prompts.csv").write_text("id,prompt\n1,of id one\n2,of id two\n")
    assert prompts_of(folder, str(tmp_path / "prompts.csv")) == {"2.png": "of id one", "1.png": "of id two"}


def test_a_name_of_several_pictures_is_refused_and_accents_are_compared(tmp_path):
    rows = [{"id": f"{name}/1", "image": f"{name}/1.png"} for name in "ab"]
    (tmp_path / "one.csv").write_text("image,prompt\n1.png,x\n")
    with pytest.raises(UserError, match=r"'1\.png' could be 'a/1\.png' or 'b/1\.png'"):
        with_prompts(rows, str(tmp_path / "one.csv"))
    (tmp_path / "paths.csv").write_text("image,prompt\na/1.png,x\nb/1.png,y\n")
    assert [row["prompt"] for row in with_prompts(rows, str(tmp_path / "paths.csv"))] == ["x", "y"]
    (tmp_path / "accent.csv").write_text("image,prompt\ncaf\u00e9.png,x\n", encoding="utf-8")
    decomposed = [{"id": "1", "image": "cafe\u0301.png"}]
    assert with_prompts(decomposed, str(tmp_path / "accent.csv"))[0]["prompt"] == "x"


def test_a_limit_leaves_the_prompts_where_they_belong(pictures, tmp_path, clip):
    folder = folder_of(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    rows = run(folder, tmp_path / "out", clip, prompts=str(tmp_path / "prompts.txt"), limit=2)
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert "prompts" in read_manifest(tmp_path / "out")["inputs"]


def test_what_a_file_says_beside_a_prompt_is_the_context(tmp_path, clip):
    """GenEval's own file of prompts is all that its scorer needs beside boxes."""
    folder = folder_of(tmp_path, ["0.png", "1.png"])
    rows = [
        {
            "tag": "single_object",
            "include": [{"class": name, "count": 1}],
            "prompt": f"a photo of a {name}",
            "detections": {"cat": [[0, 0, 5, 5, 0.9]]},
        }
        for name in ("cat", "dog")
    ]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    given = {"scorers": {"geneval": {}}, "prompts": str(tmp_path / "metadata.jsonl")}
    rows = run(folder, tmp_path / "out", clip, **given)
    assert values_of(rows, "geneval") == [1, 0] and rows[0]["meta"]["tag"] == "single_object"
    with pytest.raises(UserError, match=r"geneval needs a context for every picture, '0\.png' has none"):
        run(folder, tmp_path / "none", clip, scorers={"geneval": {}})


def test_batches_and_threads_change_no_score(pictures, tmp_path, clip):
    whole = run(pictures, tmp_path / "a", clip, batch_size=9, workers=1)
    parts = run(pictures, tmp_path / "b", clip, batch_size=2, workers=4)
    assert values_of(parts) == pytest.approx(values_of(whole), rel=1e-5)
    assert [row["id"] for row in parts] == [f"r{index}" for index in range(9)]
    scorer = load_scorer("clip", path=clip)
    images = [Image.open(pictures / "images" / f"{index}.png") for index in range(9)]
    expected = scorer(images, [row["prompt"] for row in whole]).tolist()
    assert values_of(whole) == pytest.approx(expected, rel=1e-5)


def test_known_scores_are_given_again(pictures, tmp_path, clip, capsys, monkeypatch):
    options = {"scorers": {"clip": {"path": clip}, "jpeg": {}}, "cache": str(tmp_path / "cache")}
    first = run(pictures, tmp_path / "a", clip, **options)
    assert "cache: 0 of 18 scores were known" in capsys.readouterr().err
    decoded = []
    decode = _scoring.ImageRef.decode
    monkeypatch.setattr(
        _scoring.ImageRef, "decode", lambda self, c: (decoded.append(self.name), decode(self, c))[1]
    )
    again = run(pictures, tmp_path / "b", clip, **options)
    assert "cache: 18 of 18 scores were known" in capsys.readouterr().err
    assert decoded == [] and [row["scores"] for row in again] == [row["scores"] for row in first]
    # Another prompt, another picture or another option is another score; jpeg does not read the prompt.
    rows = read_jsonl(pictures / "images.jsonl")
    write_jsonl(pictures / "images.jsonl", [{**rows[0], "prompt": "green"}, *rows[1:]])
    Image.new("RGB", (9, 9)).save(pictures / "images" / "1.png")
    run(pictures, tmp_path / "c", clip, **options)
    assert "cache: 15 of 18 scores were known" in capsys.readouterr().err
    options["scorers"]["clip"]["scale"] = "logits"
    run(pictures, tmp_path / "d", clip, **options)
    assert "cache: 9 of 18 scores were known" in capsys.readouterr().err


def test_what_has_no_score_is_not_kept(pictures, tmp_path, clip, capsys):
    options = {"scorers": ["scene"], "cache": str(tmp_path / "cache")}
    rows = read_jsonl(pictures / "images.jsonl")
    write_jsonl(pictures / "images.jsonl", [{**row, "prompt": "no scene"} for row in rows])
    for out in ("a", "b"):
        with pytest.raises(UserError, match="could judge none of 9"):
            run(pictures, tmp_path / out, clip, **options)
        assert "cache: 0 of 9 scores were known" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache=.*file cannot be used"):
        run(pictures, tmp_path / "c", clip, cache=str(tmp_path / "file"))


def test_a_cache_that_fails_costs_only_itself(pictures, tmp_path, clip, capsys):
    options = {"scorers": {"jpeg": {}}, "cache": str(tmp_path / "cache")}
    expected = run(pictures, tmp_path / "a", clip, **options)
    with closing(sqlite3.connect(tmp_path / "cache" / "scores.sqlite")) as database, database:
        database.execute("UPDATE scores SET entry = 'torn'")
    capsys.readouterr()
    assert values_of(run(pictures, tmp_path / "b", clip, **options), "jpeg") == values_of(expected, "jpeg")
    assert capsys.readouterr().err.count("scores are not looked up or kept where it does") == 1
    with closing(sqlite3.connect(tmp_path / "cache" / "scores.sqlite")) as database, database:
        database.execute("DROP TABLE scores")
        database.execute("CREATE TABLE scores (name TEXT)")
    with pytest.raises(UserError, match=r"cannot be used .*no such column"):
        run(pictures, tmp_path / "c", clip, **options)


def test_pictures_of_a_prompt_stay_together_for_those_that_vote(pictures, tmp_path, clip):
    rows = read_jsonl(pictures / "images.jsonl")
    mixed = [rows[k] for k in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    write_jsonl(pictures / "images.jsonl", mixed)
    voting = {"vote": {"name": "ensemble", "how": "rank", "scorers": {"clip": {"path": clip}}}}
    found = run(pictures, tmp_path / "out", clip, scorers=voting, batch_size=2)
    assert [row["id"] for row in found] == [row["id"] for row in mixed]
    for prompt in {row["prompt"] for row in rows}:
        assert sorted(values_of([row for row in found if row["prompt"] == prompt], "vote")) == [0, 0.5, 1]


def test_a_torn_group_is_judged_anew_as_a_whole(pictures, tmp_path, clip):
    voting = {"vote": {"name": "ensemble", "how": "rank", "scorers": {"clip": {"path": clip}}}}
    expected = run(pictures, tmp_path / "out", clip, scorers=voting)
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    (tmp_path / "out" / "parts").mkdir()
    part = tmp_path / "out" / "parts" / "00000-of-00001.jsonl"
    part.write_text("\n".join(lines[:4]) + "\n" + lines[4][:10])  # one picture of the second prompt
    for name in ("manifest.json", "scores.jsonl", "summary.json"):
        (tmp_path / "out" / name).unlink()
    assert run(pictures, tmp_path / "out", clip, scorers=voting) == expected


def test_what_cannot_be_compared_with_is_said_before_the_work(pictures, tmp_path, clip):
    run(pictures, tmp_path / "base", clip, scorers={"jpeg": {}})
    with pytest.raises(UserError, match="has scores of jpeg, not of clip"):
        run(pictures, tmp_path / "out", clip, compare=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"compare=.*nowhere does not exist"):
        run(pictures, tmp_path / "out", clip, compare=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"compare=.* has no scores\.jsonl: score it first"):
        run(pictures, tmp_path / "out", clip, compare=str(pictures))
    assert not (tmp_path / "out").exists()


def test_batches_of_groups():
    rows = [{"prompt": prompt} for prompt in "aabbbbbac"]
    batches = _scoring.batches_of(rows, 4, whole_groups=True)
    assert ["".join(row["prompt"] for row in batch) for batch in batches] == ["aaa", "bbbbb", "c"]
    plain = _scoring.batches_of(rows, 4, whole_groups=False)
    assert ["".join(row["prompt"] for row in batch) for batch in plain] == ["aabb", "bbba", "c"]
    named = [{"prompt": "a", "context": {"group": name}} for name in "xyx"]
    assert [len(batch) for batch in _scoring.batches_of(named, 1, whole_groups=True)] == [2, 1]


def test_two_processes_share_the_work(pictures, tmp_path, clip, monkeypatch, capsys):
    expected = run(pictures, tmp_path / "alone", clip)
    out = tmp_path / "shared"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("diffalign.common.progress._silent", False)
    with pytest.raises(UserError, match="does not exist"):  # this one is done, the other has not begun
        run(pictures, out, clip)
    part = read_jsonl(out / "parts" / "00001-of-00002.jsonl")
    assert [row["id"] for row in part] == ["r1", "r3", "r5", "r7"] and read_manifest(out) is None
    monkeypatch.setenv("RANK", "0")
    assert run(pictures, out, clip) == expected
    assert not (out / "parts").exists() and read_manifest(out)["counts"]["pictures"] == 9
    assert run(pictures, out, clip) == expected  # nothing to do
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK=2 WORLD_SIZE=2"):
        run(pictures, out, clip)


def test_a_run_of_two_goes_on_as_one(pictures, tmp_path, clip, monkeypatch):
    expected = run(pictures, tmp_path / "alone", clip)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="does not exist"):
        run(pictures, tmp_path / "shared", clip)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run(pictures, tmp_path / "shared", clip) == expected


def test_processes_of_one_run_share_the_folder_and_others_do_not(tmp_path):
    with folder_lock(tmp_path, member=0), folder_lock(tmp_path, member=1):
        for member in (None, 0, 1):
            with (
                pytest.raises(UserError, match="another run is writing"),
                folder_lock(tmp_path, member=member),
            ):
                pass
    with (
        folder_lock(tmp_path),
        pytest.raises(UserError, match="another run is writing"),
        folder_lock(tmp_path, member=0),
    ):
        pass


def test_a_reference_picture_is_found_from_the_rows_own_folder(pictures, tmp_path, clip, monkeypatch):
    """Paths in a context start where the rows lie, and stay right in the rows that are written."""
    from tests.scorers.test_dino import contract_case

    (tmp_path / "dino").mkdir()
    options, *_ = contract_case(tmp_path / "dino")
    rows = read_jsonl(pictures / "images.jsonl")
    context = [{"reference": row["image"]} for row in rows[:1]] + [
        {"reference": [rows[1]["image"], rows[0]["image"]]} for _ in rows[1:]
    ]
    write_jsonl(
        pictures / "images.jsonl", [{**row, "context": c} for row, c in zip(rows, context, strict=True)]
    )
    monkeypatch.chdir(tmp_path)
    first = run(pictures, tmp_path / "deep" / "out", clip, scorers={"dino": options})
    assert values_of(first, "dino")[0] == pytest.approx(1.0, abs=1e-5)
    again = run(tmp_path / "deep" / "out", tmp_path / "again", clip, scorers={"dino": options})
    assert values_of(again, "dino") == pytest.approx(values_of(first, "dino"))


def test_ranks_within_a_prompt(pictures, tmp_path, clip, capsys):
    scorers = {"clip": {"path": clip}, "jpeg": {}}
    rows = run(pictures, tmp_path / "out", clip, scorers=scorers, group=True)
    ranking = read_jsonl(tmp_path / "out" / "ranking.jsonl")
    assert [len(each["pictures"]) for each in ranking] == [3, 3, 3] and ranking[0]["prompt_id"] == "p0"
    assert [picture["ranks"]["clip"] for picture in ranking[0]["pictures"]] == [1, 2, 3]
    best = max(rows[:3], key=lambda row: row["scores"]["clip"]["value"])
    assert ranking[0]["pictures"][0]["id"] == best["id"]
    assert "ranking: " in capsys.readouterr().out


def test_equal_scores_share_their_places_and_nan_has_none(tmp_path, pictures, clip):
    for index in (1, 2):  # equal pictures of one prompt
        Image.new("RGB", (8, 8), "red").save(pictures / "images" / f"{index}.png")
    (pictures / "images" / "4.png").write_bytes(b"")
    run(pictures, tmp_path / "out", clip, scorers={"jpeg": {}}, group=True)
    ranking = read_jsonl(tmp_path / "out" / "ranking.jsonl")
    assert [p["ranks"]["jpeg"] for p in ranking[0]["pictures"]] == [1, 2.5, 2.5]
    assert [p["ranks"]["jpeg"] for p in ranking[1]["pictures"]] == [1, 2, None]
    assert ranking[1]["pictures"][2]["id"] == "r4"


def test_a_paired_comparison(pictures, tmp_path, clip, capsys):
    run(pictures, tmp_path / "base", clip, scorers={"jpeg": {}})
    for index in range(6):  # flat pictures lose
        Image.new("RGB", (8, 8)).save(pictures / "images" / f"{index}.png")
    run(pictures, tmp_path / "flat", clip, scorers={"jpeg": {}}, compare=str(tmp_path / "base"))
    shown = capsys.readouterr().out
    found = read_json(tmp_path / "flat" / "comparison.json")
    reward = found["rewards"]["jpeg"]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (0, 3, 6) and found["pairs"] == 9
    assert reward["win_rate"]["estimate"] == pytest.approx(1.5 / 9)
    assert f"against {tmp_path / 'base'}, 9 pairs:" in shown and "0/3/6" in shown


def test_pictures_without_seeds_are_compared_by_their_names(tmp_path, clip):
    base = folder_of(tmp_path, ["1.png", "2.png", "3.png"])
    given = {"scorers": {"jpeg": {}}, "prompts": "one prompt for all"}
    run(base, tmp_path / "base", clip, **given)
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(base / "2.png")
    run(base, tmp_path / "out", clip, compare=str(tmp_path / "base"), **given)
    reward = read_json(tmp_path / "out" / "comparison.json")["rewards"]["jpeg"]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (1, 2, 0)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_flat_table(pictures, tmp_path, clip, kind):
    (pictures / "images" / "4.png").write_bytes(b"")
    voting = {"name": "ensemble", "scorers": {"clip": {"path": clip}, "jpeg": {}}}
    rows = run(pictures, tmp_path / "out", clip, scorers={"both": voting}, table=kind)
    path = tmp_path / "out" / f"scores.{kind}"
    if kind == "csv":
        with path.open() as file:
            table = list(csv.DictReader(file))
        numbers = [float(row["both"] or "nan") for row in table]
    else:
        table = pyarrow.parquet.read_table(path).to_pylist()
        numbers = [math.nan if row["both"] is None else row["both"] for row in table]
    assert list(table[0])[:8] == [
        "id",
        "image",
        "prompt",
        "prompt_id",
        "seed",
        "both",
        "both.clip",
        "both.jpeg",
    ]
    expected = [math.nan if value is None else value for value in values_of(rows, "both")]
    assert numbers == pytest.approx(expected, nan_ok=True) and math.isnan(numbers[4])
    assert "empty file" in table[4]["both.error"] and table[4]["seed"] == "1"


def test_labels_that_a_table_cannot_tell_apart_are_refused(pictures, tmp_path, clip):
    for scorers, message in (
        ({"seed": {"name": "jpeg"}}, "for scorer 'seed'"),
        ({"a": {"name": "jpeg"}, "a.b": {"name": "jpeg"}}, "for scorer 'a.b' beside 'a'"),
    ):
        with pytest.raises(UserError, match=message):
            run(pictures, tmp_path / "out", clip, scorers=scorers, table="csv")
    run(pictures, tmp_path / "out", clip, scorers={"a.b": {"name": "jpeg"}}, table="csv")
    assert "a.b" in (tmp_path / "out" / "scores.csv").read_text().splitlines()[0]


def test_prompts_of_one_id_are_ranked_apart(pictures, tmp_path, clip):
    rows = read_jsonl(pictures / "images.jsonl")
    write_jsonl(pictures / "images.jsonl", [{**row, "prompt_id": "p0"} for row in rows])
    run(pictures, tmp_path / "out", clip, scorers={"jpeg": {}}, group=True)
    ranking = read_jsonl(tmp_path / "out" / "ranking.jsonl")
    assert [len(each["pictures"]) for each in ranking] == [3, 3, 3]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"context": "foo"}, "'context' is 'foo', expected a mapping"),
        ({"context": {"group": ["x"]}}, "the context's 'group' is"),
        ({"scores": [1]}, "'scores' is"),
        ({"image": 5}, "'image' is 5, expected a path"),
        ({"prompt": 5}, "'prompt' is 5, expected a text"),
    ],
)
def test_fields_of_another_kind_are_named(pictures, tmp_path, clip, field, message):
    rows = read_jsonl(pictures / "images.jsonl")
    write_jsonl(pictures / "images.jsonl", [rows[0], {**rows[1], **field}])
    with pytest.raises(UserError, match=r"images\.jsonl, row 1: " + message):
        run(pictures, tmp_path / "out", clip, scorers={"jpeg": {}})


def test_odd_names_and_places(pictures, tmp_path, clip):
    folder = folder_of(tmp_path, ["10\u00b25.png", "._10.png", "2.png"])
    rows = run(folder, tmp_path / "out", clip, scorers={"jpeg": {}})
    assert [row["id"] for row in rows] == ["2.png", "10\u00b25.png"]
    with pytest.raises(UserError, match=r"2\.png is a picture: give its folder"):
        run(folder / "2.png", tmp_path / "no", clip)
    with pytest.raises(UserError, match="cannot be made"):
        run(folder, Path("/proc/no-such-folder"), clip, scorers={"jpeg": {}})
    with pytest.raises(UserError, match="list names one twice: jpeg, jpeg"):
        run(folder, tmp_path / "no", clip, scorers=["jpeg", "jpeg"])


def test_earlier_errors_of_other_scorers_stay(pictures, tmp_path, clip):
    rows = read_jsonl(pictures / "images.jsonl")
    write_jsonl(pictures / "images.jsonl", [{**row, "prompt": "no scene"} for row in rows])
    with pytest.raises(UserError, match="could judge none of 9"):
        run(pictures, tmp_path / "a", clip, scorers={"scene": {}})
    again = run(tmp_path / "a", tmp_path / "b", clip, scorers={"jpeg": {}})
    assert "not a scene caption" in again[0]["errors"]["scene"] and "jpeg" in again[0]["scores"]


def test_a_picture_a_mile_long_is_nan(tmp_path, clip):
    folder = folder_of(tmp_path, ["good.png"])
    Image.new("L", (1, 60_000)).save(folder / "long.png")
    rows = run(folder, tmp_path / "out", clip, prompts="a red circle")
    assert "is 1x60000 pixels: too narrow to be scored" in rows[1]["errors"]["clip"]
    assert rows[0]["scores"]["clip"]["value"] is not None


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_hostile_files_are_nan_named_and_counted(tmp_path, clip, capsys):
    folder = folder_of(tmp_path, ["good.png", "torn.png"])
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "torn.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:6000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png_of(40_000, 40_000))
    rows = run(folder, tmp_path / "out", clip, prompts="a red circle")
    found = {row["id"]: row["errors"].get("clip") for row in rows}
    assert found.pop("good.png") is None
    assert "no picture in a known format" in found["text.png"] and "empty file" in found["empty.png"]
    assert "decompression bomb" in found["bomb.png"] and "cannot be decoded" in found["torn.png"]
    assert read_manifest(tmp_path / "out")["counts"] == {"pictures": 5, "clip NaN": 4}
    assert "clip: ... and 1 more" in capsys.readouterr().out

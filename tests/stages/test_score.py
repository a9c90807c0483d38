"""Scoring folders of drawn scenes: rows, broken pictures, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import read_json, read_jsonl, write_jsonl
from diffalign.common.manifest import read_manifest
from diffalign.data.records import Candidate
from diffalign.scenes import Scene, SceneObject, caption, draw
from diffalign.scorers import load_scorer
from diffalign.stages.score import score
from tests.tiny_clip import write_open_clip

RED = Scene((SceneObject("circle", "red"),), "white")
BLUE = Scene((SceneObject("circle", "blue"),), "white")


def write_pictures(folder: Path, scenes: list[Scene], *, wanted: Scene = RED) -> Path:
    """Writes drawings of `scenes` as `generate` would, all asked for as `wanted`; returns the folder."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for index, scene in enumerate(scenes):
        draw(scene, np.random.default_rng(index)).save(folder / "images" / f"p{index}.png")
        row = {"id": f"p{index}-s0", "image": f"images/p{index}.png", "prompt": caption(wanted)}
        rows.append(row | {"prompt_id": f"p{index}", "seed": 0, "model": "tiny", "meta": {"n": index}})
    write_jsonl(folder / "images.jsonl", rows)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A right picture, a blue one instead of a red one, a right one."""
    return write_pictures(tmp_path / "drawn", [RED, BLUE, RED])


def run(pictures: Path, out: Path, **options) -> list[dict]:
    given = {"images": str(pictures), "scorers": ["scene"], "out": str(out), "device": "cpu", **options}
    return read_jsonl(score(**given))


def test_rows_keep_what_they_had_and_get_scores(pictures, tmp_path, capsys):
    rows = run(
        pictures, tmp_path / "out", scorers={"scene": {}, "exact": {"name": "scene", "scale": "accurate"}}
    )
    assert [row["scores"]["scene"]["value"] for row in rows] == [1, 0.75, 1]
    assert [row["scores"]["exact"]["value"] for row in rows] == [1, 0, 1]
    entry = rows[1]["scores"]["scene"]
    assert entry["scale"] == "share" and entry["version"] == "1" and entry["higher_is_better"] is True
    parts = {"accurate": 0, "object": 1, "colour": 0, "count": 1, "position": None, "other": 1}
    assert entry["parts"] == parts
    assert rows[1]["meta"] == {"n": 1} and rows[1]["model"] == "tiny" and rows[1]["errors"] == {}
    # The path starts from the new file, and a record reads the row back.
    assert (tmp_path / "out" / rows[1]["image"]).resolve() == (pictures / "images" / "p1.png").resolve()
    known = {key: rows[1][key] for key in ("image", "model", "seed", "scores")}
    assert Candidate.from_dict(known, tmp_path / "out").scores["exact"].value == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"{tmp_path / 'out' / 'scores.jsonl'}:"
    assert table[1].split()[:8] == ["scorer", "scale", "pictures", "mean", "median", "5", "%", "95"]
    assert table[2].split()[:8] == ["scene", "share", "3", "0.9167", "1.0000", "0.7750", "1.0000", "0"]
    assert table[3].split()[:8] == ["exact", "accurate", "3", "0.6667", "1.0000", "0.1000", "1.0000", "0"]
    found = read_json(tmp_path / "out" / "summary.json")["scorers"]["exact"]
    assert (found["count"], found["nan"], found["min"], found["max"]) == (3, 0, 0.0, 1.0)
    assert found["std"] == pytest.approx((2 / 9) ** 0.5) and found["quantiles"]["0.25"] == 0.5
    assert found["histogram"]["counts"] == [1, *[0] * 18, 2] and len(found["histogram"]["edges"]) == 21


def test_a_broken_picture_scores_nan_and_stops_nothing(pictures, tmp_path, capsys):
    (pictures / "images" / "p1.png").write_bytes((pictures / "images" / "p1.png").read_bytes()[:150])
    (pictures / "images" / "p2.png").unlink()
    rows = run(pictures, tmp_path / "out", batch_size=2)
    assert [row["scores"]["scene"]["value"] for row in rows] == [1, None, None]
    assert "NaN" not in (tmp_path / "out" / "scores.jsonl").read_text()
    assert rows[0]["errors"] == {} and "cannot be" in rows[1]["errors"]["scene"]
    assert "images/p2.png" in rows[2]["errors"]["scene"]
    found = read_manifest(tmp_path / "out")
    assert found["counts"] == {"pictures": 3, "scene NaN": 2}
    assert found["dropped"] == {"scene NaN": ["p1-s0", "p2-s0"]}
    assert "scene: p1-s0: picture images/p1.png" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_graded_says_why(tmp_path):
    folder = write_pictures(tmp_path / "drawn", [RED])
    rows = read_jsonl(folder / "images.jsonl")
    write_jsonl(folder / "images.jsonl", [{**rows[0], "prompt": "a photo of a cat"}])
    with pytest.raises(UserError, match=r"scorer scene could judge none of 1 pictures \(not a scene caption"):
        run(folder, tmp_path / "out")
    row = read_jsonl(tmp_path / "out" / "scores.jsonl")[0]  # complete all the same
    assert row["scores"]["scene"]["value"] is None and "not a scene caption" in row["errors"]["scene"]


def test_clip_scores_are_those_of_the_scorer(pictures, tmp_path):
    options = {"path": str(write_open_clip(tmp_path / "clip")), "scale": "logits"}
    rows = run(pictures, tmp_path / "out", scorers={"clip": options}, batch_size=2)
    images = []
    for index in range(3):
        with Image.open(pictures / "images" / f"p{index}.png") as image:
            images.append(image.convert("RGB"))
    scorer = load_scorer("clip", **options)
    expected = scorer(images, [caption(RED)] * 3).tolist()
    assert [row["scores"]["clip"]["value"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert rows[0]["scores"]["clip"]["version"] == scorer.version and "@" in scorer.version
    extra = read_manifest(tmp_path / "out")["scorers"]
    assert extra == {"clip": {"scale": "logits", "version": scorer.version}}


def test_a_killed_run_goes_on(pictures, tmp_path):
    out = tmp_path / "out"
    expected = run(pictures, out)
    lines = (out / "scores.jsonl").read_text().splitlines()
    marked = json.dumps({**json.loads(lines[2]), "mark": "kept"})
    (out / "parts").mkdir()
    (out / "parts" / "00000-of-00001.jsonl").write_text(marked + "\n" + lines[1][:30])
    for name in ("manifest.json", "scores.jsonl", "summary.json"):
        (out / name).unlink()
    rows = run(pictures, out)
    assert rows[2].pop("mark") == "kept" and rows == expected  # in the order of the pictures, not of the work
    assert read_manifest(out)["counts"]["pictures"] == 3 and not (out / "parts").exists()


def test_the_output_of_a_stopped_stage_is_not_scored(pictures, tmp_path):
    (pictures / "recipe.json").write_text('{"stage": "generate"}')
    for source in (pictures, pictures / "images.jsonl"):
        with pytest.raises(UserError, match="drawn is not complete: repeat the 'generate'"):
            run(source, tmp_path / "out")
    (pictures / "manifest.json").write_text('{"stage": "generate"}')
    assert len(run(pictures, tmp_path / "out")) == 3


def test_a_folder_of_pictures_with_texts(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, scene in (("b", BLUE), ("a", RED)):
        draw(scene, np.random.default_rng(0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption(RED) + "\n")
    rows = run(folder, tmp_path / "out")
    assert [(row["id"], row["scores"]["scene"]["value"]) for row in rows] == [("a.png", 1), ("b.png", 0.75)]
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 text \(byte 3\): convert it to UTF-8"):
        run(folder, tmp_path / "other")
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"needs a prompt for every picture, 'a.png' has none"):
        run(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "images=nowhere does not exist"),
        ({"scorers": ["scenes"]}, "did you mean 'scene'"),
        ({"scorers": {}}, "no scorer is named"),
        ({"scorers": {"scene": {"scale": "x"}}}, "unknown scale"),
        ({"scorers": {"clip": {"path": "no/such/clip.pt"}}}, "no/such/clip.pt"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"device": "warp"}, "device=warp"),
    ],
)
def test_bad_input_leaves_no_folder(pictures, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        run(pictures, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_named(tmp_path):
    def error(*rows: dict) -> str:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        with pytest.raises(UserError) as caught:
            run(tmp_path / "rows.jsonl", tmp_path / "out")
        return str(caught.value)

    assert "holds no picture" in error()
    assert "row 1 has no 'image' (it has id)" in error({"image": "a.png"}, {"id": "b"})
    assert "second picture with the id 'a'" in error({"image": "a.png"}, {"image": "x/a.png"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither an images.jsonl nor pictures"):
        run(tmp_path / "empty", tmp_path / "out")


def test_another_run_in_the_folder_is_refused(pictures, tmp_path):
    run(pictures, tmp_path / "out")
    with pytest.raises(UserError, match=r"another recipe \(scorers\.scene\.scale was share, now accurate\)"):
        run(pictures, tmp_path / "out", scorers={"scene": {"scale": "accurate"}})
    with pytest.raises(UserError, match=r"another recipe \(pictures and prompts changed\)"):
        run(pictures, tmp_path / "out", limit=2)
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings" / "manifest.json").write_text('{"stage": "generate"}')
    with pytest.raises(UserError, match="holds the output of 'generate'"):
        run(pictures, tmp_path / "drawings")
    for source in (pictures, pictures / "images.jsonl"):
        with pytest.raises(UserError, match="drawn is the folder of the pictures"):
            run(source, pictures)


def test_another_picture_under_the_same_name_is_not_given_the_old_score(pictures, tmp_path):
    """As when a folder is drawn again with a retrained adapter: all rows are as they were."""
    run(pictures, tmp_path / "out")
    Image.new("RGB", (64, 64)).save(pictures / "images" / "p0.png")
    with pytest.raises(UserError, match=r"scores of other pictures \('p0-s0' has changed"):
        run(pictures, tmp_path / "out")
    assert run(pictures, tmp_path / "new")[0]["scores"]["scene"]["value"] < 1


def test_a_limit_scores_the_first(pictures, tmp_path):
    assert [row["id"] for row in run(pictures, tmp_path / "out", limit=2)] == ["p0-s0", "p1-s0"]


def test_the_signature_is_a_recipe():
    arguments = load_recipe(score, None, ["images=x", "scorers=[scene]", "out=y", "limit=3"]).arguments
    assert arguments["limit"] == 3 and arguments["scorers"]["scene"].scale == "share"

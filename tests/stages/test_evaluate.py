"""Base against aligned through the stage: report, table, picture, refusals."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import read_json, read_jsonl, write_jsonl
from diffalign.common.manifest import read_manifest
from diffalign.data.specs import PreprocessSpec
from diffalign.scenes import Scene, SceneObject, caption, draw
from diffalign.stages.evaluate import READ_BY, READ_BY_ALL, evaluate
from diffalign.stages.score import score
from tests.tiny_clip import write_open_clip
from tests.two_processes import two_processes

WANTED = [
    Scene((SceneObject(shape, colour),), "white")
    for shape, colour in (("circle", "red"), ("square", "green"), ("ring", "blue"), ("cross", "purple"))
]


def write_pictures(folder: Path, wrong: list[int], seeds: tuple[int, ...] = (0, 1)) -> Path:
    """Writes a drawing a prompt and seed; those of the prompts `wrong` have the colour pink."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for index, scene in enumerate(WANTED):
        item = scene.objects[0]
        shown = Scene((SceneObject(item.shape, "pink"),), "white") if index in wrong else scene
        for seed in seeds:
            name = f"images/p{index}-s{seed}.png"
            draw(shown, np.random.default_rng([index, seed])).save(folder / name)
            row = {"id": f"p{index}-s{seed}", "image": name, "prompt": caption(scene)}
            rows.append(row | {"prompt_id": f"p{index}", "seed": seed})
    write_jsonl(folder / "images.jsonl", rows)
    return folder


@pytest.fixture
def sides(tmp_path) -> dict[str, str]:
    """Base gets the colours of prompts 0, 1 and 2 wrong, aligned that of prompt 3: three wins, one loss."""
    return {
        "base": str(write_pictures(tmp_path / "base", [0, 1, 2])),
        "aligned": str(write_pictures(tmp_path / "aligned", [3])),
    }


def scored(sides: dict[str, str], tmp_path: Path) -> dict[str, str]:
    for name, folder in sides.items():
        score(images=folder, scorers=["scene"], out=str(tmp_path / f"{name}-scores"), device="cpu")
    return {name: str(tmp_path / f"{name}-scores") for name in sides}


def test_the_report_by_hand(sides, tmp_path, capsys):
    out = tmp_path / "report"
    path = evaluate(**scored(sides, tmp_path), out=str(out), device="cpu")
    report = read_json(path)
    # 6 of 8 pairs win; per prompt 3 wins and 1 loss: p = 2 (1 + 4) / 16. Each colour is one of four clauses.
    assert (report["reward"], report["win_rate"], report["n"], report["pairs"]) == ("scene", 0.75, 8, 8)
    assert report["interval"][0] < 0.75 < report["interval"][1] == 1.0
    reward = report["rewards"]["scene"]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (6, 0, 2)
    assert reward["sign_p"] == pytest.approx(0.625)
    assert reward["difference"]["estimate"] == pytest.approx((3 * 0.25 - 0.25) / 4)
    assert reward["parts"]["colour"]["difference"]["estimate"] == pytest.approx(0.5)
    assert reward["parts"]["object"]["difference"]["estimate"] == 0
    assert "position" not in reward["parts"]
    assert report["prompts"] == 4 and report["seeds"] == [0, 1]
    # Only the colour differs between the sides, so edges hardly move while pixels do.
    assert report["drift"]["pixel_mean_abs"]["estimate"] > 0
    assert abs(report["drift"]["edge_density"]["difference"]["estimate"]) < 0.05
    assert "vendi" not in report["drift"] and "embedder=clip" in report["notes"][0]
    printed = capsys.readouterr().out
    assert "75.0 % [" in printed and "6/0/2" in printed and "0.625" in printed
    assert f"page: {out / 'report.html'}" in printed
    written = [(out / name).read_text() for name in ("report.md", "report.html")]
    assert all("75.0 % [" in text and "6/0/2" in text and "0.625" in text for text in written)
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        *("report.html", "report.md", "report.json", "grid.png", "manifest.json", "recipe.json")
    }
    found = read_manifest(out)
    assert (
        found["stage"] == "evaluate" and found["counts"]["pairs"] == 8 and found["inputs"]["base"]["sha256"]
    )


def test_the_picture_shows_wins_and_losses(sides, tmp_path):
    evaluate(**scored(sides, tmp_path), out=str(tmp_path / "report"), grid_rows=1, device="cpu")
    with Image.open(tmp_path / "report" / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pink = (np.abs(pixels - (250, 125, 185)).sum(axis=2) < 60).sum(axis=0)
    third = pixels.shape[1] // 3
    # In every win base is pink, in every loss aligned is: both outer columns hold pink pictures.
    assert pink[:third].sum() > 500 and pink[-third:].sum() > 500


def test_scoring_on_the_fly_gives_the_same_report(sides, tmp_path):
    stored = read_json(evaluate(**scored(sides, tmp_path), out=str(tmp_path / "a"), device="cpu"))
    fresh = read_json(evaluate(**sides, scorers=["scene"], out=str(tmp_path / "b"), device="cpu"))
    assert fresh["rewards"] == stored["rewards"] and fresh["drift"] == stored["drift"]
    again = read_json(
        evaluate(**scored(sides, tmp_path), scorers=["scene"], out=str(tmp_path / "c"), device="cpu")
    )
    assert again["rewards"] == stored["rewards"]


def test_an_embedder_measures_distance_and_diversity(sides, tmp_path):
    clip = {"name": "clip", "path": str(write_open_clip(tmp_path / "clip"))}
    named = read_json(
        evaluate(
            **scored(sides, tmp_path), embedder=clip, out=str(tmp_path / "a"), device="cpu", batch_size=3
        )
    )
    drift = named["drift"]
    assert 0 < drift["embedding_distance"]["estimate"] < 2
    assert 1 <= drift["vendi"]["base"] <= 8 and drift["vendi"]["ratio"] == pytest.approx(
        drift["vendi"]["aligned"] / drift["vendi"]["base"]
    )
    assert 1 <= drift["vendi_per_prompt"]["base"] <= 2
    # A scorer with features serves as the embedder.
    scorers = {"scene": {}, "clip": {"path": clip["path"]}}
    both = read_json(evaluate(**sides, scorers=scorers, out=str(tmp_path / "b"), device="cpu"))
    assert both["drift"]["vendi"]["base"] == pytest.approx(drift["vendi"]["base"], rel=1e-4)
    assert list(both["rewards"]) == ["scene", "clip"] and both["notes"] == []


def test_equal_sides_tie_everywhere(sides, tmp_path):
    folder = scored(sides, tmp_path)["base"]
    report = read_json(evaluate(base=folder, aligned=folder, out=str(tmp_path / "report"), device="cpu"))
    assert report["win_rate"] == 0.5 and report["interval"] == [0.5, 0.5]
    assert report["rewards"]["scene"]["sign_p"] == 1 and report["rewards"]["scene"]["ties"] == 8
    assert report["drift"]["pixel_rms"]["high"] == 0


def test_broken_pictures_are_dropped_and_named(sides, tmp_path):
    (Path(sides["aligned"]) / "images" / "p1-s1.png").write_bytes(b"broken")
    report = read_json(evaluate(**sides, scorers=["scene"], out=str(tmp_path / "report"), device="cpu"))
    assert report["n"] == 7 and report["pairs"] == 8
    assert report["rewards"]["scene"]["dropped"] == 1 and report["unreadable"] == ["p1-s1"]
    assert read_manifest(tmp_path / "report")["dropped"] == {"unreadable": ["p1-s1"]}


def test_a_limit_counts_prompts(sides, tmp_path):
    report = read_json(evaluate(**scored(sides, tmp_path), limit=2, out=str(tmp_path / "r"), device="cpu"))
    assert report["prompts"] == 2 and report["pairs"] == 4 and report["win_rate"] == 1


def test_a_limit_spares_the_scorers(sides, tmp_path, capsys):
    """Two prompts of two seeds are scored, not all four; a prompt that is missing is missed all the same."""
    report = read_json(evaluate(**sides, scorers=["scene"], limit=2, out=str(tmp_path / "r"), device="cpu"))
    assert report["pairs"] == 4 and "4/4 pictures" in capsys.readouterr().err
    path = Path(sides["aligned"]) / "images.jsonl"
    write_jsonl(path, read_jsonl(path)[4:])
    with pytest.raises(UserError, match=r"prompt p0 .* is in base, not in aligned"):
        evaluate(**sides, scorers=["scene"], limit=2, out=str(tmp_path / "out"), device="cpu")


def test_other_prompts_are_refused(sides, tmp_path):
    path = Path(sides["aligned"]) / "images.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, rows[:-2])
    with pytest.raises(UserError, match=r"prompt p3 .* is in base, not in aligned"):
        evaluate(**sides, scorers=["scene"], out=str(tmp_path / "out"), device="cpu")
    write_jsonl(path, rows[:-1])
    with pytest.raises(UserError, match=r"seed 1 of prompt p3 is in base, not in aligned"):
        evaluate(**sides, scorers=["scene"], out=str(tmp_path / "out"), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "image"}, "did you mean 'images'"),
        ({"aligned": None}, "needs aligned=FOLDER"),
        ({"base": "nowhere"}, "nowhere"),
        ({"scorers": None}, "has no scores.jsonl: score it first"),
        ({"aligned": "nowhere"}, "aligned=nowhere does not exist: give the output of score"),
        ({"embedder": "scene"}, "embedder=scene gives no picture features"),
        ({"limit": 0}, "limit=0"),
        ({"tie_epsilon": -1.0}, "tie_epsilon=-1.0"),
        ({"grid_rows": 0}, "grid_rows=0"),
        ({"pictures": -1}, "pictures=-1"),
        ({"run": "nowhere"}, "run=nowhere holds no metrics"),
        ({"run": {"dpo": "nowhere"}}, "run: no model is called 'dpo', known: aligned"),
        ({"aligned": []}, "aligned is empty"),
        ({"aligned": ["a/dpo", "b/dpo"]}, "two of aligned= are folders named 'dpo': name them"),
        ({"aligned": {"a/b": "x"}}, "'a/b' cannot be part of a file name"),
        ({"aligned": {"\u56fe" * 90: "x"}}, "cannot be part of a file name"),
        ({"aligned": {"": "x"}}, "'' cannot be part of a file name"),
        ({"aligned": {"base": "x"}}, "a model may not be called 'base'"),
        ({"aligned": {"a": "x", "b": "y"}, "run": "nowhere"}, "whose of a, b"),
        ({"aligned": {"dpo": "nowhere"}}, "dpo=nowhere does not exist"),
        ({"device": "warp"}, "device=warp"),
    ],
)
def test_bad_input_leaves_no_folder(sides, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(**{**sides, "scorers": ["scene"], "out": str(tmp_path / "out"), "device": "cpu", **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("images", {"adapter": "lora"}),
        ("images", {"draws": 4}),
        ("images", {"preprocess": PreprocessSpec(batch_size=2)}),
        ("implicit", {"seed": 1}),
        ("implicit", {"device": "cpu"}),
        ("implicit", {"base": "pictures"}),
        ("implicit", {"run": "run"}),
        ("implicit", {"pictures": 3}),
    ],
)
def test_a_key_that_the_mode_does_not_read_is_refused(mode, option, tmp_path):
    (name,) = option
    with pytest.raises(UserError, match=f"evaluate mode={mode} does not read {name}: leave it out"):
        evaluate(mode=mode, **option, out=str(tmp_path / "out"))


def test_every_key_is_read_by_a_mode():
    read = [*READ_BY_ALL, *READ_BY["images"], *READ_BY["implicit"]]
    assert sorted(read) == sorted(inspect.signature(evaluate).parameters)


def test_the_output_of_another_stage_is_not_replaced(sides, tmp_path):
    folders = scored(sides, tmp_path)
    with pytest.raises(UserError, match="holds the output of 'score'"):
        evaluate(**folders, out=folders["base"], device="cpu")
    evaluate(**folders, out=str(tmp_path / "out"), device="cpu")
    evaluate(
        **folders, out=str(tmp_path / "out"), tie_epsilon=0.1, device="cpu"
    )  # its own report it replaces
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["tie_epsilon"] == 0.1


def test_the_signature_is_a_recipe():
    words = ["base=a", "aligned=b", "out=c", "embedder=clip", "embedder.path=x", "scorers={scene: {}}"]
    arguments = load_recipe(evaluate, None, words).arguments
    assert arguments["embedder"].path == "x" and arguments["mode"] == "images"
    assert arguments["aligned"] == "b"


@pytest.mark.parametrize(
    ("text", "models"), [("[a, b]", ["a", "b"]), ("{dpo: a, mapo: b}", {"dpo": "a", "mapo": "b"})]
)
def test_several_models_can_be_written_as_words(text, models):
    arguments = load_recipe(evaluate, None, ["base=x", f"aligned={text}", "out=c"]).arguments
    assert arguments["aligned"] == models


@pytest.fixture
def three(sides, tmp_path) -> dict[str, str]:
    """Base wrong on three prompts, `some` on one, `none` nowhere: scores of all three."""
    folders = {"base": sides["base"], "some": sides["aligned"]}
    return scored({**folders, "none": str(write_pictures(tmp_path / "none", []))}, tmp_path)


def test_several_models_against_base_and_one_another(three, tmp_path, capsys):
    models = {"some": three["some"], "none": three["none"]}
    out = tmp_path / "report"
    report = read_json(evaluate(base=three["base"], aligned=models, out=str(out), device="cpu"))
    some, best = report["models"]["some"], report["models"]["none"]
    assert some["win_rate"] == 0.75 and best["win_rate"] == (6 + 0.5 * 2) / 8
    alone = read_json(
        evaluate(base=three["base"], aligned=three["some"], out=str(tmp_path / "one"), device="cpu")
    )
    assert some["rewards"] == alone["rewards"] and some["drift"] == alone["drift"]
    standing = report["standings"]["scene"]
    assert standing["models"] == ["base", "some", "none"]
    assert standing["wins"]["none"]["some"]["estimate"] == (2 + 0.5 * 6) / 8
    ratings = standing["ratings"]
    assert ratings["base"]["estimate"] == 0 < ratings["some"]["estimate"] < ratings["none"]["estimate"]
    assert {path.name for path in (out / "grids").iterdir()} == {"some.png", "none.png"}
    printed = capsys.readouterr().out
    assert "Ratings by scene" in printed and "of none against base" in printed
    again = {"none": three["none"], "some": three["some"]}
    turned = read_json(evaluate(base=three["base"], aligned=again, out=str(tmp_path / "b"), device="cpu"))
    for name, rating in turned["standings"]["scene"]["ratings"].items():
        assert rating["estimate"] == pytest.approx(ratings[name]["estimate"], abs=1e-6)
    counts = read_manifest(out)["counts"]
    assert counts == {"some: pairs": 8, "some: scene NaN": 0, "none: pairs": 8, "none: scene NaN": 0}


def test_a_list_is_named_by_its_folders(three, tmp_path):
    listed = [three["some"], three["none"]]
    report = read_json(evaluate(base=three["base"], aligned=listed, out=str(tmp_path / "r"), device="cpu"))
    assert list(report["models"]) == ["some-scores", "none-scores"]


def test_an_other_model_that_lacks_a_prompt_is_named(three, tmp_path):
    path = Path(three["none"]) / "scores.jsonl"
    write_jsonl(path, read_jsonl(path)[:-2])
    models = {"some": three["some"], "none": three["none"]}
    with pytest.raises(UserError, match=r"prompt p3 .* is in base, not in none"):
        evaluate(base=three["base"], aligned=models, out=str(tmp_path / "r"), device="cpu")


def test_what_the_prompts_file_says_becomes_categories(sides, tmp_path):
    for folder in sides.values():
        rows = read_jsonl(Path(folder) / "images.jsonl")
        kinds = {"p0": "round", "p1": "sharp", "p2": "round", "p3": "sharp"}
        meta = [{"Category": kinds[row["prompt_id"]], "Note": row["prompt_id"]} for row in rows]
        write_jsonl(
            Path(folder) / "images.jsonl", [{**row, "meta": m} for row, m in zip(rows, meta, strict=True)]
        )
    out = tmp_path / "report"
    report = read_json(evaluate(**scored(sides, tmp_path), out=str(out), device="cpu"))
    assert list(report["categories"]) == ["Category"]  # a note of each prompt is no category
    found = report["categories"]["Category"]
    assert found["round"]["win_rate"]["scene"]["estimate"] == 1.0 and found["round"]["pairs"] == 4
    assert found["sharp"]["win_rate"]["scene"]["estimate"] == 0.5 and found["sharp"]["prompts"] == 2
    assert "## aligned by Category" in (out / "report.md").read_text()


def test_the_health_of_a_run_and_the_number_of_pictures(sides, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": k, "kind": "train", "loss": 0.7, "margin": 0.1 * k} for k in range(1, 9)]
    write_jsonl(run / "metrics.jsonl", rows)
    out = tmp_path / "report"
    evaluate(**scored(sides, tmp_path), out=str(out), run=str(run), pictures=2, device="cpu")
    page = (out / "report.html").read_text()
    assert 'aria-label="Margin. margin: from 0.1 to 0.8."' in page and str(run) in page
    assert page.count("<article") == 2


def test_of_two_processes_the_first_writes(sides, tmp_path):
    folders = scored(sides, tmp_path)
    words = [f"{name}={folder}" for name, folder in folders.items()]
    arguments = ["evaluate", *words, f"out={tmp_path / 'report'}", "device=cpu"]
    first, second = two_processes(arguments, tmp_path / "kept")
    assert first.code == 0 and second.code == 0, first.said + second.said
    assert "does not share its work" not in first.said
    assert second.said.strip() == "evaluate does not share its work: the first process does it"
    assert read_json(tmp_path / "report" / "report.json")["win_rate"] == 0.75
    assert read_manifest(tmp_path / "report") is not None


def test_of_two_processes_one_says_what_is_wrong(sides, tmp_path):
    arguments = ["evaluate", "base=nowhere", f"aligned={sides['aligned']}", f"out={tmp_path / 'report'}"]
    first, second = two_processes(arguments, tmp_path / "kept")
    assert first.code == 2 and len(first.errors) == 1 and "nowhere does not exist" in first.errors[0]
    assert second.code == 0 and second.errors == []

"""Base against aligned: four pairs by hand, refusals, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.common.files import to_plain
from diffalign.evaluation.grid import SIDE, choose, draw_grid
from diffalign.evaluation.pairs import match, prompt_key, read_shots
from diffalign.evaluation.report import compare
from diffalign.evaluation.summary import verdict


def rows(values, *, parts=None, scorer="scene", seeds=(0,), version="1", **more) -> list[dict]:
    """Rows of a scores.jsonl: prompts p0, p1, ... each with these seeds; None is a failed score."""
    made = []
    for index, value in enumerate(values):
        prompt, seed = divmod(index, len(seeds))
        entry = {"value": value, "scale": "share", "version": version, **more}
        if parts is not None:
            entry["parts"] = {name: column[index] for name, column in parts.items()}
        row = {"id": f"p{prompt}-s{seeds[seed]}", "image": f"{index}.png", "prompt": f"prompt {prompt}"}
        row |= {"prompt_id": f"p{prompt}", "seed": seeds[seed], "scores": {scorer: entry}}
        row["errors"] = {} if value is not None else {scorer: "the picture is broken"}
        made.append(row)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def pairs_of(base: list[dict], aligned: list[dict], folder: Path):
    return match(read_shots(base, folder, "base"), read_shots(aligned, folder, "aligned"))


def test_four_pairs_by_hand(folder):
    # Gains 0.5, 0.25, 0, -0.25: two wins, a tie, a loss: (2 + 1/2) / 4.
    pairs = pairs_of(rows([0.5, 0.5, 0.5, 0.5]), rows([1.0, 0.75, 0.5, 0.25]), folder)
    reward = compare(pairs).rewards["scene"]
    assert reward.win_rate.estimate == 0.625 and reward.win_rate.n == 4
    assert (reward.wins, reward.ties, reward.losses) == (2, 1, 1)
    assert reward.difference.estimate == 0.125
    assert (reward.base, reward.aligned, reward.aligned_median) == (0.5, 0.625, 0.625)
    # Two wins of three decided prompts: 2 (C(3,0) + C(3,1)) / 8 = 1.
    assert reward.sign_p == 1.0
    assert reward.win_rate.low <= 0.625 <= reward.win_rate.high


def test_sign_test_by_hand(folder):
    # Five wins of five: 2 / 32.
    pairs = pairs_of(rows([0.0] * 5), rows([0.1] * 5), folder)
    assert compare(pairs).rewards["scene"].sign_p == pytest.approx(1 / 16)


def test_seeds_of_a_prompt_are_one_trial(folder):
    # Two prompts, two seeds each: prompt 0 gains 1 and loses 1 (a tie on average), prompt 1 gains twice.
    base, aligned = [0, 1, 0, 0], [1, 0, 1, 1]
    pairs = pairs_of(rows(base, seeds=(0, 1)), rows(aligned, seeds=(0, 1)), folder)
    reward = compare(pairs).rewards["scene"]
    assert reward.win_rate.estimate == 0.75
    assert reward.sign_p == 1.0  # one decided prompt: 2 * 1/2
    # Only two blocks to draw from: their means are 1/2 and 1.
    assert (reward.win_rate.low, reward.win_rate.high) == (0.5, 1.0)


def test_rounding_does_not_decide_a_prompt(folder):
    third = 0.3333333432674408  # 1/3 in float32
    pairs = pairs_of(
        rows([third, 1.0, 0.0], seeds=(0, 1, 2)), rows([2 * third, 2 * third, 0.0], seeds=(0, 1, 2)), folder
    )
    reward = compare(pairs).rewards["scene"]
    assert (reward.wins, reward.ties, reward.losses) == (1, 1, 1)
    assert reward.sign_p == 1.0


def test_lower_wins_where_the_scorer_says_so(folder):
    pairs = pairs_of(
        rows([0.5, 0.5], higher_is_better=False), rows([0.1, 0.6], higher_is_better=False), folder
    )
    reward = compare(pairs).rewards["scene"]
    assert not reward.higher_is_better
    assert (reward.wins, reward.losses, reward.win_rate.estimate) == (1, 1, 0.5)
    pairs = pairs_of(rows([0.5, 0.5]), rows([0.1, 0.2]), folder)
    assert compare(pairs, lower_is_better=frozenset({"scene"})).rewards["scene"].win_rate.estimate == 1
    assert compare(pairs).rewards["scene"].win_rate.estimate == 0


def test_a_tie_epsilon_makes_ties(folder):
    pairs = pairs_of(rows([0.5, 0.5]), rows([0.55, 0.7]), folder)
    reward = compare(pairs, tie_epsilon=0.1).rewards["scene"]
    assert (reward.wins, reward.ties) == (1, 1) and reward.win_rate.estimate == 0.75


def test_failed_scores_are_dropped_and_counted(folder):
    pairs = pairs_of(rows([0.0, None, 0.0]), rows([1.0, 1.0, None]), folder)
    report = compare(pairs)
    assert report.rewards["scene"].dropped == 2 and report.rewards["scene"].win_rate.n == 1
    assert "2 pairs without both scores" in report.as_text()
    with pytest.raises(
        UserError, match=r"no pair has both scene scores \(first error: the picture is broken\)"
    ):
        compare(pairs_of(rows([None]), rows([1.0]), folder))


def test_parts_count_where_both_have_them(folder):
    base = rows([0.5] * 3, parts={"colour": [0.0, 1.0, 0.0], "position": [None, None, 0.0]})
    aligned = rows([0.5] * 3, parts={"colour": [1.0, 1.0, 1.0], "position": [1.0, None, 1.0]})
    parts = compare(pairs_of(base, aligned, folder)).rewards["scene"].parts
    assert parts["colour"]["difference"].estimate == pytest.approx(2 / 3)
    assert parts["colour"]["base"] == pytest.approx(1 / 3) and parts["colour"]["aligned"] == 1
    assert parts["position"]["difference"].n == 1 and parts["position"]["difference"].estimate == 1


def test_drift_stands_beside_and_broken_pictures_are_named(folder):
    (folder / "1.png").write_bytes(b"no picture")
    aligned = [{**row, "image": "0.png"} for row in rows([1.0, 1.0, 1.0])]
    report = compare(pairs_of(rows([0.0, 0.0, 0.0]), aligned, folder))
    assert report.unreadable == ["p1-s0"]
    assert report.drift["pixel_mean_abs"].n == 2 and report.drift["pixel_mean_abs"].low == 0
    text = report.as_text()
    assert "pixel distance" in text and "embedder=clip" in text and "p1-s0" in text
    assert json.loads(json.dumps(to_plain(report)))["rewards"]["scene"]["win_rate"]["n"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:2], "prompt p2 .* is in base, not in aligned"),
        (lambda made: [*made, *rows([0] * 4)[3:]], "prompt p3 .* is in aligned, not in base"),
        (lambda made: [*made[:2], {**made[2], "seed": 7}], "seed 0 of prompt p2 is in base, not in aligned"),
        (lambda made: [*made, {**made[2], "seed": 7}], "seed 7 of prompt p2 .* is in aligned, not in base"),
        (lambda made: [*made[:2], {**made[2], "prompt": "other"}], "'prompt 2' in base, 'other' in aligned"),
        (lambda made: [*made, made[0]], "second picture of prompt p0 with seed 0"),
        (lambda made: [{"image": "0.png"}], "row 0 has no prompt"),
        (lambda made: [{**made[0], "seed": "a"}, *made[1:]], "seed is 'a'"),
        (lambda made: [], "prompt p0 .* not in aligned"),
    ],
)
def test_other_prompts_or_seeds_are_refused(folder, change, message):
    with pytest.raises(UserError, match=message):
        pairs_of(rows([0, 0, 0]), change(rows([1, 1, 1])), folder)


def test_scores_that_cannot_be_compared_are_refused(folder):
    with pytest.raises(UserError, match="not comparable"):
        compare(pairs_of(rows([0.0]), rows([1.0], version="2"), folder))
    with pytest.raises(UserError, match=r"no scorer in common \(they have scene and clip\)"):
        compare(pairs_of(rows([0.0]), rows([1.0], scorer="clip"), folder))


def test_rows_belong_together_by_id_or_else_by_prompt():
    assert [prompt_key(row) for row in rows([0.0] * 4, seeds=(0, 1))] == ["p0", "p0", "p1", "p1"]
    assert prompt_key({"prompt": "a cat"}) == prompt_key({"prompt": "a cat", "prompt_id": None}) == "a cat"
    assert prompt_key({"prompt": "a cat", "prompt_id": 0}) == "0"


def test_the_order_of_files_does_not_matter(folder):
    base, aligned = rows([0.1, 0.2, 0.3]), rows([0.3, 0.2, 0.1])
    forward = compare(pairs_of(base, aligned, folder)).rewards
    assert compare(pairs_of(base, aligned[::-1], folder)).rewards == forward


def test_the_grid_shows_wins_losses_and_others_once(folder):
    base = [0.5] * 8
    aligned = [0.9, 0.4, 0.5, 1.0, 0.2, 0.5, 0.6, 0.5]
    pairs = pairs_of(rows(base), rows(aligned), folder)
    sections = choose(pairs, "scene", rows=2)
    assert [pair.base.prompt_id for pair in sections[0].pairs] == ["p3", "p0"]
    assert [pair.base.prompt_id for pair in sections[2].pairs] == ["p4", "p1"]
    assert {pair.base.prompt_id for pair in sections[1].pairs} <= {"p2", "p5", "p6", "p7"}
    assert len(sections[1].pairs) == 2
    lower = choose(pairs, "scene", rows=1, higher_is_better=False)
    assert lower[0].pairs[0].base.prompt_id == "p4"
    everything = choose(pairs, "scene", rows=8)
    shown = [pair.base.prompt_id for section in everything for pair in section.pairs]
    assert sorted(shown) == [f"p{index}" for index in range(8)]


def test_the_grid_draws_the_pictures(folder):
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (300, 100), (0, 0, 255)).save(folder / "blue.png")
    base = [{**row, "image": "red.png"} for row in rows([0.1])]
    aligned = [{**row, "image": "blue.png"} for row in rows([0.9])]
    sheet = draw_grid(choose(pairs_of(base, aligned, folder), "scene", rows=3), "scene", title="A title")
    pixels = np.asarray(sheet)
    # The red picture fills its square; the blue one, three times as wide as high, fills a third of its own.
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == SIDE * SIDE
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == pytest.approx(SIDE * SIDE / 3, rel=0.02)
    dark = (pixels.sum(axis=2) < 150).sum()
    assert dark > 100  # title and caption
    (folder / "red.png").write_bytes(b"broken")
    assert (
        draw_grid(choose(pairs_of(base, aligned, folder), "scene", rows=3), "scene").size[0] == sheet.size[0]
    )
    assert math.isclose(draw_grid([], "scene").size[0], 2 * SIDE, abs_tol=100)


def test_the_prompts_behind_a_verdict_are_those_with_scores(folder):
    """Twelve prompts, four of them scored: too few, whatever their interval says."""
    values = [0.9] * 4 + [None] * 8
    report = compare(pairs_of(rows([0.5] * 12), rows(values), folder))
    assert (report.prompts, report.rewards["scene"].prompts, report.rewards["scene"].dropped) == (12, 4, 8)
    (said,) = verdict("aligned", report)
    assert said.startswith("aligned and base cannot be told apart by scene on fewer than 10 prompts")
    assert said.endswith("4 pairs of 4 prompts.")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"value": -1e308}, r"base, row 0, score scene: a size above 1e\+100"),
        ({"value": 0.5, "parts": {"colour": 1e200}}, "a size above"),
        ({"value": 0.5, "parts": {"colour": "red"}}, "'parts' are no numbers by name: score again"),
        ({"value": 0.5, "parts": [1.0]}, "'parts' are no numbers by name"),
    ],
)
def test_senseless_scores_are_refused(folder, entry, message):
    row = rows([0.5])[0]
    row["scores"]["scene"] = entry
    with pytest.raises(UserError, match=message):
        read_shots([row], folder, "base")


def test_an_infinite_score_is_left_out_and_counted(folder):
    report = compare(pairs_of(rows([0.5] * 3), rows([math.inf, 0.6, 0.7]), folder))
    assert report.rewards["scene"].dropped == 1 and report.rewards["scene"].wins == 2

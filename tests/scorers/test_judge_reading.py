"""The judge: what is read of an answer, and what is not."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from diffalign.scorers import _judge_prompts as prompts
from diffalign.scorers._judge_prompts import RUBRICS, Answer
from diffalign.scorers.judge import Plugin

CONFIGS = Path(__file__).parents[2] / "configs" / "scorers"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Final Score: 4", 4),
        ("cat (object): 1\nFinal Score: 3.25.", 3.25),
        ("**Final Score:** 2", 2),
        ("**final score**: 2/5", 2),
        ("Final Score: 4\n- 3 things are missing", 4),
        ("Final Score: 2? I think it over. Final Score: 5", 5),
        ("Final Score: 10", math.nan),
        ("Final Score: 0.9", math.nan),
        ("Final Score: -4", math.nan),
        ("Final Score: 4/10", math.nan),
        ("Final Score: 4.5/10", math.nan),
        ("Final Score: 45/100", math.nan),
        ("Final Score: 40%", math.nan),
        ("Final Score: 3-4", math.nan),
        ("Final Score: 3 to 4", math.nan),
        ("Final Score: 3,5", math.nan),
        ("Final Score: 4e5", math.nan),
        ("Final Score: 3.5.1", math.nan),
        ("Final Score: four", math.nan),
        ("Score: 4", math.nan),
        ("", math.nan),
        # what may stand around a score
        ("Final Score: [4]", 4),
        ("Final Score: `4`", 4),
        ("Final Score (1-5): 4", 4),
        ("**Final Score = 4/5**.", 4),
        ("Final Score: 4 out of 5", 4),
        ("Final Score: 4, since all is there", 4),
        ("Final Score: 4 because nothing lacks. 7 things are there.", 4),
        ("(Final Score: 4)", 4),
        ("<score>Final Score: 4</score>", 4),
        ("Final Score: 4. This final score is a guess.", 4),
        # what may not
        ("Final Score: **4**/10", math.nan),
        ("Final Score: 4 out of 10", math.nan),
        ("Final Score: **4** out of 10", math.nan),
        ("Final Score: 4 stars of 10", math.nan),
        ("Final Score: 4\u204410", math.nan),
        ("Final Score: 4 \\/ 10", math.nan),
        ("Final Score: 4:10", math.nan),
        ("Final Score: 4/5.5", math.nan),
        ("Final Score: 3\u20144", math.nan),
        ("Final Score: 3\u22124", math.nan),
        ("Final Score: 3\u20114", math.nan),
        ("Final Score: 3~4", math.nan),
        ("Final Score: 3 or 4", math.nan),
        ("Final Score: 3 and a half", math.nan),
        ("Final Score: 4 percent", math.nan),
        ("Final Score: 4e-1", math.nan),
        ("Final Score: 3\u00bd", math.nan),
        ("Final Score: 3 1/2", math.nan),
        ("Final Score: 2 000", math.nan),
        ("Final Score: 1 (worst) - 5", math.nan),
        # the last score counts, and no draft in its place
        ("Final Score: 2 seems harsh.\nFinal Score: 4/10", math.nan),
        ("Final Score: 2? no. Final Score: 80%", math.nan),
        ("Final Score: 3\nOn reflection, Final Score: N/A", math.nan),
        ("Final Score: 2 as a draft. But then, Final Score:", math.nan),
        ("Final Score: 2 as a draft. But then, Final Score", math.nan),
    ],
)
def test_point_scores(answer, value):
    assert RUBRICS["unifiedreward_point"].read(Answer(answer))[""] == pytest.approx(value, nan_ok=True)


def test_a_number_at_the_end_of_a_cut_answer_is_no_score():
    """Of "2.69" a limit may leave "2." or "2.6"."""
    read = RUBRICS["unifiedreward_point"].read
    for text in ("Final Score: 2", "Final Score: 2.", "Final Score: 2.6\n"):
        assert math.isnan(read(Answer(text, cut=True))[""])
        assert not math.isnan(read(Answer(text))[""])
    assert math.isnan(read(Answer("Final Score: 4 or so. Final Score: 2.", cut=True))[""])
    assert read(Answer("Final Score: 2.69, since it", cut=True))[""] == 2.69
    shares = "".join(f"{axis} Score:\n Image 1: 0.4\n Image 2: 0.6\n" for axis in ("Alignment", "Coherence"))
    row = RUBRICS["unifiedreward_pair"].read(
        Answer(shares + "Style Score:\n Image 1: 0.5\n Image 2: 0.5", True)
    )
    assert row["coherence"] == pytest.approx(0.4) and math.isnan(row["style"]) and math.isnan(row[""])


@pytest.mark.parametrize("rest", [" 4 o", " 4/", " 4/5", " 4 ou"])
def test_a_cut_answer_may_have_run_on(rest):
    assert math.isnan(RUBRICS["unifiedreward_point"].read(Answer("Final Score:" + rest, cut=True))[""])


def test_a_long_answer_is_read_at_once():
    blanks = " *_" * 100_000
    start = time.monotonic()
    for rubric in RUBRICS.values():
        for text in ("Final Score", "Alignment Score", "Alignment Score: Image 1: 0.5", "Final Score: 4"):
            rubric.read(Answer(text + blanks + "?"))
            rubric.read(Answer(text + blanks + "?", cut=True))
            rubric.read(Answer(f"{text} " * 10_000))
    assert time.monotonic() - start < 5


def test_axes():
    text = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    read = RUBRICS["unifiedreward_acs"].read
    row = read(Answer(text + "Style Score (1-5): 2.802500009536743"))
    assert row == {
        "": pytest.approx((2.6947 + 2.3715 + 2.8025) / 3),
        "alignment": pytest.approx(2.6947),
        "coherence": pytest.approx(2.3715),
        "style": pytest.approx(2.8025),
    }
    assert read(Answer("**Alignment Score**: 1\n**Coherence Score:** 2\nStyle Score: 3"))[""] == 2
    assert read(Answer("Alignment Score: 1, Coherence Score: 2, Style Score: 3"))[""] == 2
    assert math.isnan(read(Answer("Alignment Score: **4**/10\nCoherence Score: 2\nStyle Score: 3"))[""])
    draft = "Alignment Score: 1\nCoherence Score: 2\nStyle Score: 3\nAlignment Score: N/A"
    assert math.isnan(read(Answer(draft))["alignment"])
    lacking = read(Answer(text + "Style Score (1-5): 7"))
    assert lacking["alignment"] == pytest.approx(2.6947)
    assert math.isnan(lacking["style"]) and math.isnan(lacking[""])


def shares_text(*shares: tuple[object, object]) -> str:
    axes = ("Alignment", "Coherence", "Style")
    rows = zip(axes, shares, strict=True)
    return "\n\n".join(f"{axis} Score:\n Image 1: {one}\n Image 2: {two}" for axis, (one, two) in rows)


def test_shares_of_a_pair():
    read = RUBRICS["unifiedreward_pair"].read
    row = read(Answer(shares_text((0.4357, 0.5643), (1, 0), (0.50, 0.51))))
    assert row["alignment"] == pytest.approx(0.4357) and row["coherence"] == 1
    assert row["style"] == pytest.approx(50 / 101)
    assert row[""] == pytest.approx((0.4357 + 1 + 50 / 101) / 3)
    again = read(Answer(shares_text((0.4357, "**0.5643**"), (1, "0/1"), (0.50, "0.51."))))
    assert row == pytest.approx(again)
    axes = ("Alignment", "Coherence", "Style")
    one_line = ", ".join(f"{axis} Score: Image 1: 0.4, Image 2: 0.6" for axis in axes)
    assert read(Answer(one_line))[""] == pytest.approx(0.4)
    running_on = ((0.7, "0.3/10"), (0.7, "0.3 or 0.4"), ("0.7/10", 0.3))
    for wrong in ((0.5, 0.6), (-0.2, 1.2), (4, 5), (0, 0), *running_on):
        row = read(Answer(shares_text((0.4, 0.6), wrong, (0.4, 0.6))))
        assert math.isnan(row[""]) and math.isnan(row["coherence"]) and row["style"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("So, Image 1 is better.", 1),
        ("**Image 2** is better", 0),
        ("Image 1 is better in colour. Overall, Image 2 is better.", 0),
        ("Both images are equally good.", 0.5),
        ("Image 1 is better than Image 2.", 1),
        ("Image 12 is better", math.nan),
        ("Neither is any good", math.nan),
        ("Image 1 is sharper.\n\n**Conclusion:** Image 1 is better.", 1),
        ('"Image 2 is better."', 0),
        ("Image 1 is better.\n\nNo: Image 2 is better.\n\nOverall, Image 2 is better.\n", 0),
        ("Image 2 is better in terms of style, but overall Image 1 wins.", math.nan),
        ("I cannot say that Image 1 is better", math.nan),
        ("Image 1 is better, or Image 2 is better?", math.nan),
        ("Image 1 is better. Image 2 is better.", math.nan),
        ("Image 1 is better.\nBoth images are equally good.", math.nan),
        (prompts.PAIR_V1, math.nan),
        ("", math.nan),
    ],
)
def test_verdicts(answer, value):
    assert RUBRICS["unifiedreward_pair_v1"].read(Answer(answer))[""] == pytest.approx(value, nan_ok=True)


def test_a_verdict_at_the_end_of_a_cut_answer_may_go_on():
    read = RUBRICS["unifiedreward_pair_v1"].read
    assert math.isnan(read(Answer("Image 1 is better", cut=True))[""])
    assert read(Answer("Image 1 is better. Since", cut=True))[""] == 1


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 9", 9),
        ("score: 10.", 10),
        ("Score: 9/10", 9),
        ("Score: 4/5", math.nan),
        ("Score: 11", math.nan),
        ("Score: 7-8", math.nan),
        ("**Score:** 7", 7),
        ("Score: 7 out of 10", 7),
        ("Score: 7 out of 100", math.nan),
        ("Score: 9%", math.nan),
        ("Score: 7\u20138", math.nan),
        ("Score: 3. No: Score: 8/100", math.nan),
    ],
)
def test_the_example_of_ones_own_question_reads_what_it_asks_for(answer, value):
    recipe = yaml.safe_load((CONFIGS / "judge.yaml").read_text(encoding="utf-8"))
    rubric = Plugin(**recipe["scorers"]["judge"])._asks
    assert rubric.read(Answer(answer))[""] == pytest.approx(value, nan_ok=True)
    assert "a cat" in rubric.question("a cat").text

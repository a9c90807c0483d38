"""The judge: what is asked and sent, what is read of an answer, and what becomes of faults."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffalign.common.errors import UserError
from diffalign.scorers import _judge_prompts as prompts
from diffalign.scorers._judge_prompts import RUBRICS, Answer
from diffalign.scorers.judge import Plugin
from tests.judge_server import (
    POINT,
    PROMPTS,
    JudgeServer,
    Reaction,
    brightness,
    by_brightness,
    expect,
    judge,
    pictures,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "scorers"
PAIR = {"rubric": "unifiedreward_pair"}
_contract: list[JudgeServer] = []


def contract_case(folder: Path):
    _contract.append(JudgeServer(by_brightness))
    return {"server": _contract[-1].url, "api_key_env": None, **POINT}, pictures(), PROMPTS, None


# What is asked


@pytest.mark.parametrize(
    ("rubric", "digest"),
    [
        ("unifiedreward_point", "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"),
        ("unifiedreward_acs", "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851"),
        ("unifiedreward_acs_v1", "88d1d1c5f0fba9dc6f112022ffbabf86f6ad64df58047a7c7293814f91c39ea9"),
        ("unifiedreward_pair", "828e9ab2f81c3b6d42fb68dd5b8ea1b7647063c4b5d79a98d003ff25de5c5ca8"),
        ("unifiedreward_pair_v1", "0fd2f5c43a06516503fde3e64ffc98fff6f3a8815b5eac8dc5f0d81cee686614"),
    ],
)
def test_prompts_are_the_authors_word_for_word(rubric, digest):
    """The digests were taken from the authors' scripts themselves, with {prompt} for the caption."""
    assert hashlib.sha256(RUBRICS[rubric].text.encode()).hexdigest() == digest


def test_a_request_carries_the_picture_the_prompt_and_greedy_settings():
    with JudgeServer(by_brightness) as server:
        scorer = judge(server, workers=1, max_tokens=77)
        images = pictures()
        scorer(images, PROMPTS)
        seen = server.questions
    assert len(seen) == 6
    for image, prompt, request in zip(images, PROMPTS, seen, strict=True):
        (sent,) = request.pictures
        assert sent.format == "PNG" and np.array_equal(np.asarray(sent), np.asarray(image))
        assert request.text == prompts.POINT.removesuffix("[{prompt}]") + f"[{prompt}]"
        assert [part["type"] for part in request.body["messages"][0]["content"]] == ["image_url", "text"]
        settings = {key: value for key, value in request.body.items() if key != "messages"}
        assert settings == {"model": "tiny", "temperature": 0, "seed": 0, "max_tokens": 77, "stream": False}
        assert "Authorization" not in request.headers


def test_jpeg_is_sent_where_asked_for():
    with JudgeServer(by_brightness) as server:
        png, jpeg = judge(server), judge(server, image_format="jpeg")
        jpeg(pictures(2), PROMPTS[:2])
        assert {image.format for seen in server.questions for image in seen.pictures} == {"JPEG"}
        assert png.version != jpeg.version


def test_a_tensor_is_sent_as_the_saved_picture():
    with JudgeServer(by_brightness) as server:
        tensor = torch.tensor([0.0, 0.2, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 5, 4)
        judge(server)(tensor, ["x"])
        (sent,) = server.questions[0].pictures
    assert sent.size == (4, 5) and sent.getpixel((0, 0)) == (0, 51, 255)


def test_order_is_kept_whichever_answer_comes_first():
    def slow_first(seen):
        time.sleep(0.12 - 0.1 * brightness(seen.pictures[0]))
        return by_brightness(seen)

    images = pictures()
    with JudgeServer(slow_first) as server:
        values = judge(server, workers=6)(images, PROMPTS)
        assert 1 < server.most_under_way <= 6
    expect(values, [1 + 4 * brightness(image) for image in images])


def test_workers_bound_the_questions_under_way():
    with JudgeServer(lambda seen: Reaction("Final Score: 3", delay=0.02)) as server:
        judge(server, workers=2)(pictures(), PROMPTS)
        assert server.most_under_way == 2


# What is read


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
    lacking = read(Answer(text + "Style Score (1-5): 7"))
    assert lacking["alignment"] == pytest.approx(2.6947)
    assert math.isnan(lacking["style"]) and math.isnan(lacking[""])


def shares_text(*shares: tuple[float, float]) -> str:
    axes = ("Alignment", "Coherence", "Style")
    rows = zip(axes, shares, strict=True)
    return "\n\n".join(f"{axis} Score:\n Image 1: {one}\n Image 2: {two}" for axis, (one, two) in rows)


def test_shares_of_a_pair():
    read = RUBRICS["unifiedreward_pair"].read
    row = read(Answer(shares_text((0.4357, 0.5643), (1, 0), (0.50, 0.51))))
    assert row["alignment"] == pytest.approx(0.4357) and row["coherence"] == 1
    assert row["style"] == pytest.approx(50 / 101)
    assert row[""] == pytest.approx((0.4357 + 1 + 50 / 101) / 3)
    for wrong in ((0.5, 0.6), (-0.2, 1.2), (4, 5), (0, 0)):
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
        ("", math.nan),
    ],
)
def test_verdicts(answer, value):
    assert RUBRICS["unifiedreward_pair_v1"].read(Answer(answer))[""] == pytest.approx(value, nan_ok=True)


def test_a_question_of_ones_own():
    own = {
        "rubric": None,
        "prompt": 'Is this "{prompt}"? {"n": 1}',
        "pattern": r"n=(-?\d+)",
        "low": -5,
        "high": 50,
    }
    with JudgeServer(["n=-3 n=7", "n=51", "n=x"]) as server:
        scorer = judge(server, workers=1, **own)
        scores = scorer.score(pictures(3), ["a {prompt}", "b", "c"])
        assert server.questions[0].text == 'Is this "a {prompt}"? {"n": 1}'
        other = judge(server, **{**own, "high": 60})
    expect(scores.values, [7, math.nan, math.nan])
    assert scorer.scale == "own -5 to 50" and not scorer.relative
    assert scorer.version != other.version


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 9", 9),
        ("score: 10.", 10),
        ("Score: 9/10", 9),
        ("Score: 4/5", math.nan),
        ("Score: 11", math.nan),
        ("Score: 7.5", math.nan),
        ("Score: 7-8", math.nan),
    ],
)
def test_the_example_of_ones_own_question_reads_what_it_asks_for(answer, value):
    recipe = yaml.safe_load((CONFIGS / "judge.yaml").read_text(encoding="utf-8"))
    rubric = Plugin(**recipe["scorers"]["judge"])._asks
    assert rubric.read(Answer(answer))[""] == pytest.approx(value, nan_ok=True)
    assert "a cat" in rubric.question("a cat").text


def test_what_cannot_be_read_is_nan_and_quoted_shortly():
    long = "I would rather\n not say " + "x" * 100
    with JudgeServer(["Final Score: 4", long, Reaction("Final Score: 3.", finish="length"), ""]) as server:
        scores = judge(server, workers=1).score(pictures(4), PROMPTS[:4])
    expect(scores.values, [4, math.nan, math.nan, math.nan])
    expect(scores.parts["unparsed"], [0, 1, 1, 1])
    expect(scores.parts["unanswered"], [0, 0, 0, 0])
    assert scores.errors[0] is None
    assert scores.errors[1].endswith("'I would rather not say " + "x" * 37 + "...'")
    assert "cut at max_tokens=2048: 'Final Score: 3.'" in scores.errors[2]
    assert all("\n" not in error for error in scores.errors[1:])


def test_axes_are_parts():
    text = "Alignment Score (1-5): {}\nCoherence Score (1-5): 2\nStyle Score (1-5): 3"
    with JudgeServer([text.format(4), text.format("?")]) as server:
        scores = judge(server, workers=1, rubric="unifiedreward_acs").score(pictures(2), PROMPTS[:2])
    expect(scores.values, [3, math.nan])
    expect(scores.parts["alignment"], [4, math.nan])
    expect(scores.parts["style"], [3, 3])


# Pairs


def test_every_two_of_a_prompt_are_asked_about_in_both_orders():
    images = pictures(4)
    light = [brightness(image) for image in images]
    order, texts = [2, 0, 3, 1], ["a", "a", "b", "a"]
    with JudgeServer(by_brightness) as server:
        scorer = judge(server, **PAIR)
        scores = scorer.score([images[i] for i in order], texts)
        assert len(server.questions) == 6
        alone = scorer.score([images[3]], ["b"])
    assert scorer.relative and scorer.scale == "unifiedreward_pair"

    def value(of: int) -> float:
        return sum(light[of] / (light[of] + light[other]) for other in (0, 1, 2) if other != of) / 2

    expect(scores.values, [value(2), value(0), math.nan, value(1)])
    assert scores.values[[0, 1, 3]].mean().item() == pytest.approx(0.5, abs=1e-6)
    expect(scores.parts["style"], scores.values.tolist())
    assert scores.errors[0] is None and "the only one" in scores.errors[2]
    assert alone.errors == [scores.errors[2]]


def test_a_liking_for_the_first_place_falls_out():
    images = pictures(3)
    with JudgeServer(["Image 1 is better."]) as server:
        fair = judge(server, rubric="unifiedreward_pair_v1")
        expect(fair.score(images, ["a"] * 3).values, [0.5, 0.5, 0.5])
        cheap = judge(server, rubric="unifiedreward_pair_v1", both_orders=False)
        asked = len(server.questions)
        values = cheap.score(images, ["a"] * 3).values
        assert len(server.questions) == asked + 3
        assert sorted(values.tolist()) == [0, 0.5, 1]
        expect(cheap.score(images[::-1], ["a"] * 3).values, values.tolist()[::-1])
        assert fair.version != cheap.version


def test_a_pair_that_cannot_be_read_counts_for_neither():
    images = pictures(3)
    light = [brightness(image) for image in images]

    def reply(seen):
        first, second = (brightness(image) for image in seen.pictures)
        if first == light[0] and second == light[1]:
            return "Image 1 is better than I can say"  # not asked for in this rubric
        return by_brightness(seen)

    with JudgeServer(reply) as server:
        scorer = judge(server, **PAIR)
        scores = scorer.score(images, ["a"] * 3)
        two = scorer.score(images[:2], ["a"] * 2)
    against_third = [each / (each + light[2]) for each in light[:2]]
    expect(scores.values, [*against_third, 1 - sum(against_third) / 2])
    expect(scores.parts["unparsed"], [1, 1, 0])
    assert scores.errors == [None] * 3
    expect(two.values, [math.nan, math.nan])
    assert all("Image 1 is better than I can say" in error for error in two.errors)


def test_groups_can_be_compared_directly():
    with JudgeServer(by_brightness) as server:
        groups = judge(server, **PAIR).compare([pictures(2), pictures(3)[1:]], ["a", "b"])
    assert [len(group.values) for group in groups] == [2, 2]
    assert all(group.values[1] > group.values[0] for group in groups)


def test_versions_tell_rubrics_and_settings_apart():
    with JudgeServer(by_brightness) as server:
        options = [{}, {"max_tokens": 5}, {"temperature": 0.5}, {"rubric": "unifiedreward_acs"}, PAIR]
        versions = [judge(server, **each).version for each in options]
        assert len(set(versions)) == len(options)
        assert judge(server, workers=3, timeout=9.0, retries=3).version == versions[0]


# Options

HERE = {"server": "http://localhost:1/v1"}
OWN = {"prompt": "{prompt}", "pattern": r"(\d)", "low": 0, "high": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (POINT, "either server="),
        ({**POINT, **HERE, "path": "x"}, "either server="),
        ({**HERE}, "give rubric= .unifiedreward_point"),
        ({**HERE, "rubric": "unifiedreward_points"}, "did you mean 'unifiedreward_point'"),
        ({**HERE, **POINT, "pattern": "(x)"}, "has its own pattern"),
        ({**HERE, **OWN, "high": None}, "all of prompt="),
        ({**HERE, **OWN, "prompt": "rate it"}, r"no \{prompt\} in it"),
        ({**HERE, **OWN, "pattern": "("}, "no regular expression"),
        ({**HERE, **OWN, "pattern": r"\d"}, "has 0 groups"),
        ({**HERE, **OWN, "high": 0}, "low=0 is not below high=0"),
        ({**HERE, **OWN, "low": math.nan}, "low=nan is not below"),
        ({**HERE, **POINT, "dtype": "fp8"}, "unknown dtype"),
        ({**HERE, **POINT, "image_format": "gif"}, "unknown image_format"),
        ({**HERE, **POINT, "retries": -1}, "retries is -1"),
        ({**HERE, **POINT, "workers": 0}, "workers is 0"),
        ({**HERE, **POINT, "max_tokens": 0}, "max_tokens is 0"),
        ({**HERE, **POINT, "temperature": math.inf}, "temperature is inf"),
        ({**HERE, **POINT, "timeout": 0.0}, "timeout is 0"),
        ({**HERE, **POINT, "revision": "main"}, "revision= is for path="),
        ({**HERE, **POINT, "trust_remote_code": True}, "trust_remote_code= is for path="),
        ({**POINT, "path": "x", "model": "m"}, "model= is for server="),
        ({**POINT, "path": "x", "temperature": 1.0}, "temperature= is for server="),
        ({**POINT, "server": "localhost:8000"}, "is no address"),
        ({**POINT, "server": "file:///etc/passwd"}, "is no address"),
        ({**POINT, "server": "http://local host/v1"}, "is no address"),
        ({**POINT, "server": "http://h:port/v1"}, "is no address"),
        ({**POINT, "server": "http://[::1/v1"}, "is no address"),
        ({**POINT, "server": "http://h/v1#a"}, "is no address"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Plugin(**options)


def test_it_says_when_it_is_not_loaded():
    with pytest.raises(UserError, match=r"call \.load\(\) first"):
        Plugin(**HERE, **POINT)(pictures(1), ["a"])

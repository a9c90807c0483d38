"""The judge: what is asked and sent, what becomes of answers, and its options."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import _judge_prompts as prompts
from diffalign.scorers._judge_prompts import RUBRICS
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


# What becomes of it


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


@pytest.mark.parametrize("both_orders", [True, False])
def test_equal_pictures_share_evenly_without_a_question(both_orders):
    one, two = pictures(2)
    with JudgeServer(["Image 1 is better."]) as server:
        scorer = judge(server, rubric="unifiedreward_pair_v1", both_orders=both_orders)
        scores = scorer.score([one, one.copy()], ["a"] * 2)
        assert not server.questions
        expect(scores.values, [0.5, 0.5])
        expect(scores.parts["unanswered"], [0, 0])
        values = scorer([one, two, one.copy()], ["a"] * 3)
        assert len(server.questions) == (4 if both_orders else 2)
    assert values[0] == values[2] and values.mean().item() == pytest.approx(0.5)


def test_the_questions_of_all_groups_are_asked_together():
    images, texts = pictures(6), ["a", "b", "c", "a", "b", "c"]
    light = [brightness(image) for image in images]
    with JudgeServer(lambda seen: Reaction(by_brightness(seen), delay=0.1)) as server:
        scorer = judge(server, workers=6, **PAIR)
        values = scorer(images, texts)
        assert server.most_under_way > 2  # a group has two questions
        scorer.batch_size = 1  # a group at a time
        expect(scorer(images, texts), values.tolist())
        assert judge(server, workers=2).batch_size == 32 and judge(server, workers=20).batch_size == 80
    expect(values, [light[i] / (light[i] + light[(i + 3) % 6]) for i in range(6)])


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


def test_the_version_tells_how_answers_are_read(monkeypatch):
    with JudgeServer(by_brightness) as server:
        version = judge(server).version
        assert judge(server, temperature=0).version == version
        monkeypatch.setattr(prompts, "RULE", "rule-0")
        assert judge(server).version != version


def test_null_leaves_a_setting_out():
    with JudgeServer(by_brightness) as server:
        judge(server, seed=None, max_tokens=None)(pictures(1), ["a"])
        assert set(server.questions[0].body) == {"model", "messages", "temperature", "stream"}


def test_versions_tell_rubrics_and_settings_apart():
    with JudgeServer(by_brightness) as server:
        options = [
            {},
            {"max_tokens": 5},
            {"temperature": 0.5},
            {"seed": 1},
            {"rubric": "unifiedreward_acs"},
            PAIR,
        ]
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
        ({**POINT, "path": "x", "dtype": "fp8"}, "unknown dtype"),
        ({**HERE, **POINT, "dtype": "fp32"}, "dtype= is for path="),
        ({**POINT, "path": "x", "image_format": "jpeg"}, "image_format= is for server="),
        ({**POINT, "path": "x", "workers": 2}, "workers= is for server="),
        ({**POINT, "path": "x", "api_key_env": None}, "api_key_env= is for server="),
        ({**POINT, "path": "x", "max_tokens": None}, "max_tokens= of a judge at path= is a number"),
        ({**HERE, **POINT, "both_orders": False}, "both_orders= is for rubrics that compare"),
        ({**HERE, **OWN, "pattern": "Score{number}!"}, "must end it"),
        ({**HERE, **OWN, "pattern": "{number}"}, "behind a label"),
        ({**HERE, **OWN, "pattern": "(Score{number}"}, "no regular expression"),
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

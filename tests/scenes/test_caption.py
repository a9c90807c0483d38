"""Captions: exact inverse, wordings, prompts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from diffalign.common.errors import UserError
from diffalign.scenes import (
    Scene,
    SceneObject,
    caption,
    is_held_out,
    parse,
    sample_prompts,
    sample_scene,
    vocabulary,
)


def test_hand_written_captions() -> None:
    circle, square = SceneObject("circle", "orange"), SceneObject("square", "blue")
    assert caption(Scene((circle,), "gray")) == "an orange circle on a gray background"
    assert caption(Scene((circle, square), "white", "left of")) == (
        "an orange circle left of a blue square on a white background"
    )
    crosses = Scene((SceneObject("cross", "red", "small", 3),), "black")
    assert caption(crosses) == "three small red crosses on a black background"
    assert parse("  Three small  red crosses, black background ") == crosses
    assert parse("an orange circle to the left of a blue square, white background").relation == "left of"
    assert parse("one orange circle, gray background") == Scene((circle,), "gray")


def test_parse_is_the_inverse_of_every_wording() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1500):
        scene = sample_scene(rng, split="any")
        assert parse(caption(scene)) == scene
        assert parse(caption(scene, rng)) == scene


def test_random_wordings_differ_and_stay_in_the_vocabulary() -> None:
    rng = np.random.default_rng(1)
    scene = parse("a red circle left of a blue square on a white background")
    wordings = {caption(scene, rng) for _ in range(60)}
    assert len(wordings) == 4
    words = {
        word for _ in range(500) for word in re.findall(r"\w+", caption(sample_scene(rng, split="any"), rng))
    }
    assert words == set(vocabulary())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red blob on a white background",
        "two red circle on a white background",
        "a red circles on a white background",
        "five red circles on a white background",
        "a red circle to the above a blue square on a white background",
        "a red circle left of a red square on a white background",
        "a red circle on a white background and more",
    ],
)
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_prompts_are_distinct_deterministic_and_of_their_split() -> None:
    prompts = sample_prompts(1000, seed=5, split="heldout")
    assert len(set(prompts)) == 1000
    assert prompts == sample_prompts(1000, seed=5, split="heldout")
    assert prompts != sample_prompts(1000, seed=6, split="heldout")
    assert all(is_held_out(parse(prompt)) for prompt in prompts)
    assert not any(is_held_out(parse(prompt)) for prompt in sample_prompts(1000, seed=5, split="train"))
    pairs = [parse(prompt).relation is not None for prompt in prompts]
    # Shuffled: the kinds that run out while sampling are not all in the first half.
    assert abs(np.mean(pairs[:500]) - np.mean(pairs[500:])) < 0.12


def test_more_prompts_than_the_grammar_yields_are_refused() -> None:
    with pytest.raises(UserError, match="-1 different"):
        sample_prompts(-1, seed=0, split="train")

"""The scene grader as a scorer: shares and parts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.scenes import Scene, SceneObject, caption, draw
from diffalign.scorers import load_scorer

SCENES = [
    Scene((SceneObject("circle", "red"),), "white"),
    Scene((SceneObject("square", "blue", count=3),), "black"),
    Scene((SceneObject("circle", "red"), SceneObject("square", "blue")), "gray", "left of"),
    Scene((SceneObject("ring", "green", "large"),), "white"),
    Scene((SceneObject("cross", "purple", count=2),), "gray"),
    Scene((SceneObject("circle", "red"),), "white"),
]


def pictures() -> list[Image.Image]:
    """Six drawings, the last one of something else than SCENES says."""
    drawn = [draw(scene, np.random.default_rng(index)) for index, scene in enumerate(SCENES[:5])]
    return [*drawn, draw(Scene((SceneObject("circle", "blue"),), "white"), np.random.default_rng(9))]


def contract_case(folder: Path):
    return {}, pictures(), [caption(scene) for scene in SCENES], None


def test_right_pictures_score_one_and_a_wrong_colour_costs_its_clause():
    prompts = [caption(scene) for scene in SCENES]
    scores = load_scorer("scene").score(pictures(), prompts)
    # The last: circle right, colour wrong, one object right, background right: 3 of 4.
    assert scores.values.tolist() == [1, 1, 1, 1, 1, 0.75]
    assert scores.parts["colour"].tolist() == [1, 1, 1, 1, 1, 0]
    assert scores.parts["object"].tolist() == [1] * 6
    assert scores.parts["accurate"].tolist() == [1, 1, 1, 1, 1, 0]
    assert scores.parts["count"].tolist() == [1] * 6
    position = scores.parts["position"]
    assert position[2] == 1 and position.isnan().tolist() == [True, True, False, True, True, True]
    assert load_scorer("scene", scale="accurate")(pictures(), prompts).tolist() == [1, 1, 1, 1, 1, 0]


def test_a_prompt_of_another_world_is_nan_and_says_so():
    scores = load_scorer("scene").score(pictures()[:2], ["a photo of a cat", caption(SCENES[1])])
    assert scores.values.isnan().tolist() == [True, False]
    assert "not a scene caption" in scores.errors[0] and scores.errors[1] is None
    assert all(part[0].isnan() for part in scores.parts.values())


def test_context_may_say_the_scene():
    images = pictures()[:2]
    context = [{"scene": SCENES[0]}, {"scene": caption(SCENES[1])}]
    assert load_scorer("scene")(images, ["x", "y"], context=context).tolist() == [1, 1]


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="did you mean 'accurate'"):
        load_scorer("scene", scale="accuracy")
    assert torch.equal(load_scorer("scene", scale="share")([], []), torch.zeros(0))

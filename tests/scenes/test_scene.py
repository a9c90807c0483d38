"""Scenes: held-out combinations, splits, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.common.errors import UserError
from diffalign.scenes import COLOURS, HELD_OUT, SHAPES, Scene, SceneObject, is_held_out, sample_scene
from diffalign.scenes.scene import Split


def scenes(split: Split, n: int = 2000, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split=split) for _ in range(n)]


def combinations(scene: Scene) -> set[tuple[str, str]]:
    return {(item.colour, item.shape) for item in scene.objects}


def test_about_15_percent_of_the_combinations_are_held_out_and_every_word_stays_in_training() -> None:
    assert 0.12 <= len(HELD_OUT) / (len(COLOURS) * len(SHAPES)) <= 0.18
    seen = set().union(*(combinations(scene) for scene in scenes("train")))
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


def test_train_never_has_a_held_out_combination_and_heldout_always_has_one() -> None:
    assert not any(combinations(scene) & HELD_OUT for scene in scenes("train"))
    assert all(combinations(scene) & HELD_OUT for scene in scenes("heldout"))
    assert {is_held_out(scene) for scene in scenes("any")} == {True, False}


def test_all_kinds_of_scenes_occur_in_every_split() -> None:
    for split in ("train", "heldout", "any"):
        found = scenes(split, 500)
        assert {scene.total for scene in found} == {1, 2, 3, 4}
        assert {scene.relation for scene in found} == {None, "left of", "right of", "above", "below"}
        assert {scene.objects[0].size for scene in found} == {None, "small", "large"}
        assert {scene.background for scene in found} == {"white", "gray", "black"}


def test_equal_seeds_give_equal_scenes() -> None:
    assert scenes("any", 50, seed=3) == scenes("any", 50, seed=3)
    assert scenes("any", 50, seed=3) != scenes("any", 50, seed=4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SceneObject("blob", "red"), "blob"),
        (lambda: SceneObject("circle", "mauve"), "mauve"),
        (lambda: SceneObject("circle", "red", "huge"), "huge"),
        (lambda: SceneObject("circle", "red", count=5), "5"),
        (lambda: Scene((SceneObject("circle", "red"),), "pink"), "pink"),
        (lambda: Scene((SceneObject("circle", "red"),), "white", "above"), "above"),
        (lambda: Scene((), "white"), "0 objects"),
        (lambda: Scene((SceneObject("circle", "red"), SceneObject("ring", "red")), "white", "above"), "red"),
        (lambda: sample_scene(np.random.default_rng(0), split="dev"), "dev"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_scene_is_refused_in_one_line_that_names_it(make, named: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)

"""Pictures that are drawn, captioned and graded exactly by code: a small world in which every judgement is known."""

from diffalign.scenes.caption import caption, describe, parse, sample_prompts, vocabulary
from diffalign.scenes.draw import FAULTS, draw, draw_faulty
from diffalign.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_held_out,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FAULTS",
    "HELD_OUT",
    "MAX_COUNT",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "SceneObject",
    "caption",
    "describe",
    "draw",
    "draw_faulty",
    "is_held_out",
    "parse",
    "sample_prompts",
    "sample_scene",
    "vocabulary",
]

"""Pictures that are drawn, captioned and graded exactly by code: a world in which the truth is known."""

from diffalign.scenes.caption import caption, describe, parse, sample_prompts, vocabulary
from diffalign.scenes.draw import FAULTS, draw, draw_faulty
from diffalign.scenes.grade import KINDS, ClauseResult, Grade, grade, judge
from diffalign.scenes.look import SeenObject, View, look
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
    "KINDS",
    "MAX_COUNT",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "ClauseResult",
    "Grade",
    "Scene",
    "SceneObject",
    "SeenObject",
    "View",
    "caption",
    "describe",
    "draw",
    "draw_faulty",
    "grade",
    "is_held_out",
    "judge",
    "look",
    "parse",
    "sample_prompts",
    "sample_scene",
    "vocabulary",
]

"""What a judge is asked and how its answer is read.

The texts of the built-in rubrics are UnifiedReward's own, word for word, since its weights were trained on
them: https://github.com/CodeGoat24/UnifiedReward at commit ff6f520, MIT licence, Copyright (c) 2025 Yibin
Wang; the file of each stands beside it. How answers are read is ours:
    - the last score in an answer counts, since a verdict follows its reasons;
    - no score: a number that runs on ("4/10", "3-4", "80%"), one outside the legal range, and one at the very
      end of an answer that was cut;
    - the two scores of a pair must sum to 1, within 0.02; they are divided by their sum.
Convention: an answer that cannot be read has no value. Public code gives it 0, which is below the legal range
(flow_grpo, rewards.py), or calls it a win of the first picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffalign.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# UnifiedReward (MIT), inference_qwen/image_generation/qwen_point_score_image_generation.py
POINT = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated "
    "image using the format: 'element (type): value' (where value=0 means not generated, and value=1 "
    "means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)

# UnifiedReward (MIT), inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py
ACS = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n"
    "\n"
    "Output your evaluation using the format below:\n"
    "\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)

# UnifiedReward (MIT), inference_qwen/image_generation/qwen_point_score_ACS_image_generation.py
ACS_V1 = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "\n"
    "1. Evaluate each word in the caption based on how well it is visually represented in the image. "
    "Assign a numerical score to each word using the format:\n"
    '   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], '
    '["[No_mistakes]", scoreM]]\n'
    "   - A higher score indicates that the word is less well represented in the image.\n"
    "   - The special token [No_mistakes] represents whether all elements in the caption were "
    "correctly depicted. A high score suggests no mistakes; a low score suggests missing or "
    "incorrect elements.\n"
    "\n"
    "2. Provide overall assessments for the image along the following axes (each rated from 1 to "
    "5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n"
    "\n"
    "Output your evaluation using the format below:\n"
    "\n"
    "---\n"
    "\n"
    'Word-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]\n'
    "\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)

# UnifiedReward (MIT), inference_qwen/UnifiedReward-2.0-inference/pair_score_image_generation.py
PAIR = (
    "You are presented with two generated images (Image 1 and Image 2) along with a shared text "
    "caption. Your task is to comparatively evaluate the two images across three specific "
    "dimensions:\n"
    "\n"
    "- Alignment Score: How well each image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent and visually coherent each image is (absence of "
    "visual glitches, distorted objects, etc.).\n"
    "- Style Score: How aesthetically appealing each image is, regardless of caption accuracy.\n"
    "\n"
    "For each dimension, you must assign a relative score to Image 1 and Image 2, such that:\n"
    "- Each score is a float between 0 and 1 (inclusive).\n"
    "- The scores for Image 1 and Image 2 must sum to exactly 1.0 for each dimension.\n"
    "- The higher the score, the better that image is in the corresponding dimension *relative to "
    "the other*.\n"
    "\n"
    "This format emphasizes comparative quality rather than absolute evaluation.\n"
    "\n"
    "Please provide your evaluation in the format below:\n"
    "\n"
    "Alignment Score:\n"
    " Image 1: X\n"
    " Image 2: Y\n"
    "\n"
    "Coherence Score:\n"
    " Image 1: X\n"
    " Image 2: Y\n"
    "\n"
    "Style Score:\n"
    " Image 1: X\n"
    " Image 2: Y\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)

# UnifiedReward (MIT), inference_qwen/image_generation/qwen_pair_rank_image_generation.py
PAIR_V1 = (
    "You are given a text caption and two generated images based on that caption. Your task is to "
    "evaluate and compare these images based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well each image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described in "
    "the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Compare both images using the above criteria and select the one that better aligns with the "
    "caption while exhibiting superior visual quality.\n"
    'Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both '
    'images are equally good."\n'
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)

AXES = ("alignment", "coherence", "style")
SUM_SLACK = 0.02
"""How far the two scores of a pair may be from the sum of 1: rounding to two digits."""

# A whole number: possessive, so that what must not follow cannot be dodged by reading fewer digits.
_NUMBER = r"([-+]?\d++(?:\.\d++)?+)(?![.,e]\d|[ \t]*%|[ \t]*(?:-|\u2013|to\b)[ \t]*\d)"
_OF_FIVE = rf"{_NUMBER}(?![ \t]*/[ \t]*(?!5(?:\.0)?\b)\d)"
_BETWEEN = r"[\s*_:]*"

FINAL_SCORE = rf"(?i)Final Score{_BETWEEN}{_OF_FIVE}"
_VERDICT = re.compile(r"(?i)\b(?:Image ([12])[*_]* is better|(Both images are equally good))\b")


@dataclass(frozen=True)
class Question:
    """What a judge is asked: a text and the pictures (RGB) that it speaks of, shown before it, in order."""

    text: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the answer; empty where none came.
        cut: it was ended by the limit on its length.
        error: None, or one line saying why no answer came.
        failure: with an error: "down", the judge was not reached; "refused", it does not take this question;
            "lost", anything else.
    """

    text: str = ""
    cut: bool = False
    error: str | None = None
    failure: Literal["down", "refused", "lost"] | None = None


Reader = Callable[[Answer], dict[str, float]]


@dataclass(frozen=True)
class Rubric:
    """One way to ask.

    Attributes:
        name: it names the scale.
        text: the question; `{prompt}` stands for the picture's prompt.
        read: gives what an answer says, by part: NaN where a part cannot be read; "" is the value. Of a pair:
            the shares of the first picture.
        settings: what reading depends on, for the version.
        parts: names of the parts.
        pair: two pictures are shown, and values are shares.
    """

    name: str
    text: str
    read: Reader
    settings: tuple[object, ...] = ()
    parts: tuple[str, ...] = ()
    pair: bool = False

    def question(self, prompt: str, *images: Image.Image) -> Question:
        """Returns what to ask about these pictures."""
        return Question(self.text.replace("{prompt}", prompt), images)


def number_reader(pattern: str, low: float, high: float) -> Reader:
    """Returns the reader of one number in [low, high]: the one group of the last match of `pattern`."""
    compiled = re.compile(pattern)

    def read(answer: Answer) -> dict[str, float]:
        return {"": _last_number(compiled, answer, low, high)}

    return read


def _last_number(pattern: re.Pattern[str], answer: Answer, low: float, high: float) -> float:
    """Returns the group of the last match as a number, NaN where there is none that is legal."""
    found = list(pattern.finditer(answer.text))
    if not found or _is_torn(answer, found[-1].end(1)):
        return math.nan
    try:
        value = float(found[-1][1])
    except (TypeError, ValueError):  # the group took no part in the match, or is no number
        return math.nan
    return value if low <= value <= high else math.nan


def _is_torn(answer: Answer, end: int) -> bool:
    """Returns whether the number that ends here may lack digits, since the answer was cut behind it."""
    return answer.cut and not answer.text[end:].strip(". \n")


_AXIS = {
    axis: re.compile(rf"(?i){axis} Score{_BETWEEN}(?:\(\s*1\s*-\s*5\s*\))?{_BETWEEN}{_OF_FIVE}")
    for axis in AXES
}
_AXIS_OF_PAIR = {
    axis: re.compile(
        rf"(?i){axis} Score{_BETWEEN}Image 1{_BETWEEN}{_NUMBER}[\s*_,;]*Image 2{_BETWEEN}{_NUMBER}"
    )
    for axis in AXES
}


def _sources(patterns: dict[str, re.Pattern[str]]) -> tuple[str, ...]:
    """Returns the patterns as texts."""
    return tuple(pattern.pattern for pattern in patterns.values())


def _read_axes(answer: Answer) -> dict[str, float]:
    """Returns the score 1 to 5 of each axis, and as value their mean, NaN where one of them lacks."""
    scores = {axis: _last_number(_AXIS[axis], answer, 1, 5) for axis in AXES}
    return {"": sum(scores.values()) / len(AXES), **scores}


def _read_shares(answer: Answer) -> dict[str, float]:
    """Returns the first picture's share 0 to 1 on each axis, and as value their mean."""
    shares = {axis: _share(_AXIS_OF_PAIR[axis], answer) for axis in AXES}
    return {"": sum(shares.values()) / len(AXES), **shares}


def _share(pattern: re.Pattern[str], answer: Answer) -> float:
    """Returns the first of two scores that sum to 1, NaN where the answer has no such two."""
    found = list(pattern.finditer(answer.text))
    if not found or _is_torn(answer, found[-1].end()):
        return math.nan
    first, second = float(found[-1][1]), float(found[-1][2])
    legal = min(first, second) >= 0 and abs(first + second - 1) <= SUM_SLACK
    return first / (first + second) if legal else math.nan


def _read_verdict(answer: Answer) -> dict[str, float]:
    """Returns 1 where the first picture is called better, 0 where the second is, 0.5 for a tie."""
    found = list(_VERDICT.finditer(answer.text))
    if not found:
        return {"": math.nan}
    return {"": 0.5 if found[-1][2] else float(found[-1][1] == "1")}


RUBRICS = {
    rubric.name: rubric
    for rubric in (
        Rubric("unifiedreward_point", POINT, number_reader(FINAL_SCORE, 1, 5), (FINAL_SCORE, 1, 5)),
        Rubric("unifiedreward_acs", ACS, _read_axes, _sources(_AXIS), AXES),
        Rubric("unifiedreward_acs_v1", ACS_V1, _read_axes, _sources(_AXIS), AXES),
        Rubric("unifiedreward_pair", PAIR, _read_shares, _sources(_AXIS_OF_PAIR), AXES, pair=True),
        Rubric("unifiedreward_pair_v1", PAIR_V1, _read_verdict, (_VERDICT.pattern,), pair=True),
    )
}


def own_rubric(text: str, pattern: str, low: float, high: float) -> Rubric:
    """Returns the rubric of a question of one's own about one picture, whose answer is a number.

    Raises:
        UserError: a text without the prompt's place, a pattern without its one group, or an empty range.
    """
    if "{prompt}" not in text:
        raise UserError("scorer judge: prompt= has no {prompt} in it, where the picture's prompt goes")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"scorer judge: pattern={pattern} is no regular expression: {error}") from error
    if groups != 1:
        raise UserError(
            f"scorer judge: pattern={pattern} has {groups} groups: mark the number as its one group, "
            r"such as Score: (\d+)"
        )
    if not -math.inf < low < high < math.inf:
        raise UserError(f"scorer judge: low={low:g} is not below high={high:g}")
    settings = (pattern, float(low), float(high))
    return Rubric(f"own {low:g} to {high:g}", text, number_reader(pattern, low, high), settings)

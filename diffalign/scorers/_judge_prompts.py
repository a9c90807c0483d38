"""What a judge is asked and how its answer is read.

The texts of the built-in rubrics are UnifiedReward's own, word for word, since its weights were trained on
them: https://github.com/CodeGoat24/UnifiedReward at commit ff6f520, MIT licence, Copyright (c) 2025 Yibin
Wang; the file of each stands beside it. How answers are read is ours (RULE):
    - what stands after the last "Final Score:" counts, since a verdict follows its reasons: where that is no
      score ("N/A", nothing), there is none, whatever a draft before it said;
    - a score ends its line, or its sentence, or words without numbers follow; "/5" (the highest legal number)
      may stand between. "4/10", "3-4", "80%", "3 or 4", "3 1/2" are no scores, nor is a number outside the
      legal range, nor one of which a cut answer shows no more than the next word;
    - the two scores of a pair must sum to 1, within 0.02; they are divided by their sum;
    - a verdict ("Image 1 is better.") is a sentence of its own, and the last paragraph with one has no other.
Convention: an answer that cannot be read has no value. Public code gives it 0, which is below the legal range
(flow_grpo, rewards.py), or calls it a win of the first picture.
"""

from __future__ import annotations

import math
import re
from collections import deque
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

RULE = "rule-2"
"""Name of the way answers are read, part of the version: another one gives other values."""

# Everything is possessive: nothing is read twice, and what must not follow cannot be dodged by reading less.
_DIGITS = r"([-+]?\d++(?:\.\d++)?+)"
_MARKS = r"[ \t*_`\"\])]*+"
_WORD = r"(?!(?:of|out|or|to|and|point|percent|over|through|until)\b)(?!(?:(?!Score)[^\n.;,\d])*+\d)[^\W\d_]"
# Between a label and its number: a colon, or the number itself follows; or the answer ends.
_LEAD = (
    r"[\s*_`]*+(?:\(\s*\d+\s*[-\u2013]\s*\d+\s*\))?+[\s*_`]*+"
    r"(?:[:=\uff1a][\s*_:`\"\[(]*+|\[?+(?=[-+]?\d)|\Z)"
)


def _number(highest: float) -> str:
    """Returns the pattern of a number that does not run on, but for the highest as in "4/5"."""
    scale = rf"(?:(?:/|(?:out )?of\b)[ \t]*+{re.escape(f'{highest:g}')}(?:\.0)?+(?!\.?\d){_MARKS})?+"
    end = r"[\r\n]|\Z|</"
    sentence = rf"[.;!]{_MARKS}(?:(?={end})|(?<=[ \t])\D)"
    words = rf",?+{_MARKS}(?:(?={end})|(?<=[ \t]){_WORD})"
    return rf"{_DIGITS}{_MARKS}{scale}(?:{sentence}|{words})"


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
        failure: with an error: "refused", the judge does not take this question, or gives no text to it;
            "lost", the way to it failed.
    """

    text: str = ""
    cut: bool = False
    error: str | None = None
    failure: Literal["refused", "lost"] | None = None


def printable(text: str) -> str:
    """Returns a text whose control signs, marks of direction and half characters are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def quoted(text: str, length: int = 60) -> str:
    """Returns the beginning of a text as one line, fit to be shown."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else line[:length] + "..."


Reader = Callable[[Answer], dict[str, float]]


@dataclass(frozen=True)
class Rubric:
    """One way to ask.

    Attributes:
        name: it names the scale.
        text: the question; `{prompt}` stands for the picture's prompt.
        read: gives what an answer says, by part: NaN where a part cannot be read; "" is the value. Of a pair:
            the shares of the first picture.
        settings: what reading depends on besides RULE, for the version.
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


def _number_reader(pattern: str, low: float, high: float) -> Reader:
    """Returns the reader of one number in [low, high]: the one group of the last match of `pattern`."""
    compiled = re.compile(pattern)

    def read(answer: Answer) -> dict[str, float]:
        return {"": _legal(answer, _last(compiled, answer.text), low, high)}

    return read


def _label_reader(label: str, low: float, high: float) -> Reader:
    """Returns the reader of the number in [low, high] that stands after the last match of `label`."""
    pattern = _after(label, _number(high))

    def read(answer: Answer) -> dict[str, float]:
        return {"": _legal(answer, pattern(answer.text), low, high)}

    return read


def _after(label: str, value: str, lead: str = _LEAD) -> Callable[[str], re.Match[str] | None]:
    """Returns what finds `value` right after the last `label`, and nothing where something else is there."""
    labels = re.compile(label + lead)
    values = re.compile(value, labels.flags)

    def find(text: str) -> re.Match[str] | None:
        place = _last(labels, text)
        return place and values.match(text, place.end())

    return find


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Returns the last match in a text."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _legal(answer: Answer, found: re.Match[str] | None, low: float, high: float) -> float:
    """Returns the group of a match as a number, NaN where it is none that is legal."""
    if found is None or _is_torn(answer, found.end(1)):
        return math.nan
    try:
        value = float(found[1])
    except (TypeError, ValueError):  # the group took no part in the match, or is no number
        return math.nan
    return value if low <= value <= high else math.nan


def _is_torn(answer: Answer, end: int) -> bool:
    """Returns whether the number that ends here may lack digits, or what it runs on to, in a cut answer."""
    return answer.cut and re.fullmatch(r"[\W_]*+\w*+", answer.text[end:]) is not None


FINAL_SCORE = r"(?i)\bFinal Score"
_OF_AXIS = {axis: _label_reader(rf"(?i)\b{axis} Score", 1, 5) for axis in AXES}
_SHARES_OF_AXIS = {
    axis: _after(
        rf"(?i)\b{axis} Score",
        rf"Image 1{_LEAD}{_DIGITS}[\s*_,;]*+Image 2{_LEAD}{_number(1)}",
        r"[\s*_]*+(?:[:=\uff1a][\s*_:]*+|(?=Image 1)|\Z)",
    )
    for axis in AXES
}
_VERDICT = re.compile(
    r"(?i)[*_#>\"\s-]*+(?:(?:so|overall|therefore|thus|hence|finally|to conclude|in (?:conclusion|summary)"
    r"|(?:my |the )?(?:final )?(?:conclusion|verdict|answer|decision|judge?ment))[*_]*+[,:]?[*_\"\s]+)?"
    r"(?:Image ([12])[*_]*+ is better(?: than Image [12])?|(Both images are equally good))"
    r"[*_]*+[.!]?[*_\"\s]*"
)


def _read_axes(answer: Answer) -> dict[str, float]:
    """Returns the score 1 to 5 of each axis, and as value their mean, NaN where one of them lacks."""
    scores = {axis: _OF_AXIS[axis](answer)[""] for axis in AXES}
    return {"": sum(scores.values()) / len(AXES), **scores}


def _read_shares(answer: Answer) -> dict[str, float]:
    """Returns the first picture's share 0 to 1 on each axis, and as value their mean."""
    shares = {axis: _share(_SHARES_OF_AXIS[axis](answer.text), answer) for axis in AXES}
    return {"": sum(shares.values()) / len(AXES), **shares}


def _share(found: re.Match[str] | None, answer: Answer) -> float:
    """Returns the first of two scores that sum to 1, NaN where the answer has no such two."""
    if found is None or _is_torn(answer, found.end(2)):
        return math.nan
    first, second = float(found[1]), float(found[2])
    legal = min(first, second) >= 0 and abs(first + second - 1) <= SUM_SLACK
    return first / (first + second) if legal else math.nan


def _read_verdict(answer: Answer) -> dict[str, float]:
    """Returns 1 where the first picture is called better, 0 where the second is, 0.5 for a tie."""
    text = answer.text
    if answer.cut:  # the sentence at its end may go on
        text = text[: max(text.rfind(sign) for sign in ".!\n") + 1]
    said: set[float] = set()
    for paragraph in re.split(r"\n[ \t\r]*+\n", text):
        sentences = re.split(r"(?<=[.!?])[*_\"]*\s+|\n", paragraph)
        verdicts = [found for each in sentences if (found := _VERDICT.fullmatch(each))]
        said = {0.5 if found[2] else float(found[1] == "1") for found in verdicts} or said
    return {"": said.pop() if len(said) == 1 else math.nan}


RUBRICS = {
    rubric.name: rubric
    for rubric in (
        Rubric("unifiedreward_point", POINT, _label_reader(FINAL_SCORE, 1, 5)),
        Rubric("unifiedreward_acs", ACS, _read_axes, parts=AXES),
        Rubric("unifiedreward_acs_v1", ACS_V1, _read_axes, parts=AXES),
        Rubric("unifiedreward_pair", PAIR, _read_shares, parts=AXES, pair=True),
        Rubric("unifiedreward_pair_v1", PAIR_V1, _read_verdict, pair=True),
    )
}


def own_rubric(text: str, pattern: str, low: float, high: float) -> Rubric:
    """Returns the rubric of a question of one's own about one picture, whose answer is a number.

    Raises:
        UserError: a text without the prompt's place, a pattern without its one group or its {number}, or an
            empty range.
    """
    if "{prompt}" not in text:
        raise UserError("scorer judge: prompt= has no {prompt} in it, where the picture's prompt goes")
    label, place, rest = pattern.partition("{number}")
    try:
        groups = re.compile(label).groups
    except re.error as error:
        raise UserError(f"scorer judge: pattern={pattern} is no regular expression: {error}") from error
    if place and (rest or not label):
        raise UserError(f"scorer judge: pattern={pattern}: {{number}} must end it, behind a label")
    if not place and groups != 1:
        raise UserError(
            f"scorer judge: pattern={pattern} has {groups} groups: end it with {{number}}, such as "
            r"Score{number}, or mark the number as its one group, such as Score: (\d+)"
        )
    if not -math.inf < low < high < math.inf:
        raise UserError(f"scorer judge: low={low:g} is not below high={high:g}")
    settings = (pattern, float(low), float(high))
    reader = _label_reader if place else _number_reader
    return Rubric(f"own {low:g} to {high:g}", text, reader(label, low, high), settings)

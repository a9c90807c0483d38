"""One picture that shows what the numbers mean: the biggest wins, the biggest losses and a random middle."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffalign.data.pictures import BadImage
from diffalign.evaluation.pairs import Pair, Shot

SIDE = 224
"""Side of the square that a picture is fitted into."""

_GAP, _MARGIN = 10, 18
_CAPTION_LINES = 3
_PAPER, _INK, _FAINT, _EMPTY = (255, 255, 255), (25, 25, 25), (110, 110, 110), (225, 225, 225)
_BETTER, _WORSE = (15, 120, 50), (185, 35, 30)


@dataclass(frozen=True)
class Section:
    """One column of the grid: a title and the pairs below it."""

    title: str
    pairs: list[Pair]


def choose(
    pairs: Sequence[Pair], scorer: str, *, rows: int, seed: int = 0, higher_is_better: bool = True
) -> list[Section]:
    """Returns the sections: biggest wins, random middle, biggest losses; each prompt shown at most once.

    Args:
        pairs: matched pairs; those without both scores are left out.
        scorer: decides what a win is.
        rows: pairs in a section; fewer where there are not so many wins or losses.
        seed: of the random choice.
        higher_is_better: of the scorer.
    """
    sign = 1.0 if higher_is_better else -1.0
    gains = [sign * (pair.aligned.value(scorer) - pair.base.value(scorer)) for pair in pairs]
    picked = pick(gains, [pair.base.prompt for pair in pairs], rows=rows, seed=seed)
    return [Section(title, [pairs[index] for index in places]) for title, places in picked.items()]


def pick(gains: Sequence[float], prompts: Sequence[str], *, rows: int, seed: int = 0) -> dict[str, list[int]]:
    """Returns title -> places of the biggest wins, of others at random and of the biggest losses.

    Each prompt is taken at most once; gains that are NaN never.

    Args:
        gains: `[n]`, above 0 where aligned won.
        prompts: `[n]`.
        rows: places in a section.
        seed: of the random choice.
    """
    order = sorted((k for k, gain in enumerate(gains) if np.isfinite(gain)), key=lambda k: -gains[k])
    shown: set[str] = set()

    def take(candidates: Sequence[int]) -> list[int]:
        taken: list[int] = []
        for index in candidates:
            if len(taken) < rows and prompts[index] not in shown:
                taken.append(index)
                shown.add(prompts[index])
        return taken

    wins = take([index for index in order if gains[index] > 0])
    losses = take([index for index in reversed(order) if gains[index] < 0])
    shuffled = np.random.default_rng([seed, 11]).permutation(len(order))
    middle = take([order[index] for index in shuffled])
    return {"Biggest wins": wins, "Random": middle, "Biggest losses": losses}


def draw_grid(
    sections: Sequence[Section], scorer: str, *, title: str = "", higher_is_better: bool = True
) -> Image.Image:
    """Returns the grid: one column a section, one row a pair: base | aligned, prompt above, scores below."""
    fonts = {size: ImageFont.load_default(size) for size in (13, 14, 17, 20)}
    kept = [section for section in sections if section.pairs]
    block_width = 2 * SIDE + _GAP
    captions = {
        id(pair): _caption(pair, fonts[14], block_width) for section in kept for pair in section.pairs
    }
    caption_height = 18 * max((text.count("\n") + 1 for text in captions.values()), default=1) + 4
    block_height = caption_height + SIDE + 34
    top = _MARGIN + (34 if title else 0) + 34
    count = max((len(section.pairs) for section in kept), default=0)
    width = 2 * _MARGIN + max(len(kept), 1) * block_width + max(len(kept) - 1, 0) * 3 * _MARGIN
    sheet = Image.new("RGB", (width, top + count * (block_height + _GAP) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text(
            (_MARGIN, _MARGIN), _fitted(title, fonts[20], width - 2 * _MARGIN), fill=_INK, font=fonts[20]
        )
    for column, section in enumerate(kept):
        left = _MARGIN + column * (block_width + 3 * _MARGIN)
        pen.text((left, top - 30), section.title, fill=_INK, font=fonts[17])
        for row, pair in enumerate(section.pairs):
            place = top + row * (block_height + _GAP)
            pen.multiline_text((left, place), captions[id(pair)], fill=_INK, font=fonts[14], spacing=4)
            for index, shot in enumerate((pair.base, pair.aligned)):
                x, y = left + index * (SIDE + _GAP), place + caption_height
                sheet.paste(_tile(shot), (x, y))
                text, colour = _verdict(pair, index, scorer, higher_is_better)
                pen.text((x, y + SIDE + 4), text, fill=colour, font=fonts[14])
    return sheet


def _verdict(pair: Pair, index: int, scorer: str, higher_is_better: bool) -> tuple[str, tuple[int, int, int]]:
    """Returns the line under a picture and its colour."""
    base, aligned = pair.base.value(scorer), pair.aligned.value(scorer)
    if index == 0:
        return f"base  {base:.3f}", _FAINT
    gain = aligned - base if higher_is_better else base - aligned
    colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _FAINT
    return f"aligned  {aligned:.3f}  ({aligned - base:+.3f})", colour


def _tile(shot: Shot) -> Image.Image:
    """Returns the picture inside a square; small ones are enlarged without smoothing: pixels stay true."""
    tile = Image.new("RGB", (SIDE, SIDE), _EMPTY)
    try:
        picture = shot.image.open()
    except BadImage:
        ImageDraw.Draw(tile).text((10, SIDE // 2 - 8), "cannot be read", fill=_FAINT)
        return tile
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile.paste(picture.resize(size, method), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return tile


def _caption(pair: Pair, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns prompt and seed in at most three lines; a cut prompt ends with dots."""
    seed = "" if pair.base.seed is None else f"(seed {pair.base.seed})"
    characters = max(10, int(width / max(font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27, 1)))
    room = _CAPTION_LINES * (characters - 8) - len(seed)  # lines break at words, not at the last character
    prompt = textwrap.shorten(" ".join(pair.base.prompt.split()), room, placeholder=" ...")
    wrapped = textwrap.wrap(f"{prompt} {seed}", characters, max_lines=_CAPTION_LINES, placeholder=" ...")
    return "\n".join(_fitted(part, font, width) for part in wrapped)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns the text, cut where it would leave the width."""
    while text and font.getlength(text) > width:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text

"""What scorers keep: no picture is ever taken for another, whatever is freed, nested or done at once."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from diffalign.scorers._memo import TEXTS, PictureMemo, TextMemo


def shade(value: int) -> Image.Image:
    return Image.new("L", (2, 2), value)


def look(images: list[Image.Image]) -> torch.Tensor:
    """The shade of each picture, as features [B, 1]."""
    return torch.tensor([[float(image.getpixel((0, 0)))] for image in images])


def test_a_pass_computes_each_picture_once_in_each_kind():
    memo, calls = PictureMemo(), []
    images = [shade(1), shade(2), shade(3)]

    def counted(chosen: list[Image.Image]) -> torch.Tensor:
        calls.append(len(chosen))
        return look(chosen)

    with memo.one_pass():
        assert memo(images[:2], "a", counted).flatten().tolist() == [1, 2]
        assert memo(images[::-1], "a", counted).flatten().tolist() == [3, 2, 1]
        assert memo(images, "b", counted).flatten().tolist() == [1, 2, 3]
        assert calls == [2, 1, 3]
        memo.forget(images[:1])
        memo(images, "a", counted)
        assert calls == [2, 1, 3, 1]
    memo(images, "a", counted)
    assert calls == [2, 1, 3, 1, 3] and not memo._known


def test_passing_pictures_are_never_taken_for_others():
    """An identity is used again as soon as its picture is gone."""
    memo = PictureMemo()
    with memo.one_pass():
        for value in range(200):
            assert memo([shade(value)], "a", look).item() == value
            gc.collect(0)


def test_a_pass_inside_a_pass_ends_nothing():
    memo, image = PictureMemo(), shade(1)
    with memo.one_pass():
        with memo.one_pass():
            memo([image], "a", look)
        image.putpixel((0, 0), 9)
        assert memo([image], "a", look).item() == 1  # still known
    assert memo([image], "a", look).item() == 9


def test_several_threads_share_a_memo():
    memo = PictureMemo()

    def work(start: int) -> bool:
        right = True
        for value in range(start, 250, 3):
            with memo.one_pass():
                right &= memo([shade(value), shade(255 - value)], "a", look).flatten().tolist() == [
                    value,
                    255 - value,
                ]
        return right

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert not memo._known


def test_an_error_leaves_no_pass_open():
    memo = PictureMemo()
    with pytest.raises(ZeroDivisionError), memo.one_pass():
        memo([shade(1)], "a", look)
        raise ZeroDivisionError
    assert memo._depth == 0 and not memo._known


def test_the_texts_used_last_are_kept():
    calls: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        calls.extend(texts)
        return torch.tensor([[float(len(text))] for text in texts]).reshape(len(texts), 1)

    memo = TextMemo(encode)
    assert memo(["a", "bb", "a"]).flatten().tolist() == [1, 2, 1] and calls == ["a", "bb"]
    memo([f"text {index}" for index in range(TEXTS - 1)])
    calls.clear()
    memo(["bb"])
    assert calls == []
    memo(["a"])  # pushed out
    assert calls == ["a"]
    assert memo([]).shape == (0, 1)

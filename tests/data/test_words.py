"""Prompts as they are compared, and the word list."""

from __future__ import annotations

import pytest

from diffalign.data.words import NSFW_WORDS, normalised, nsfw_words


def test_case_and_white_space_do_not_matter() -> None:
    assert normalised("  A Red\tcube \n") == normalised("a red  cube") == "a red cube"
    assert normalised("STRASSE") == normalised("straße")
    assert normalised("a red cube.") != normalised("a red cube")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a NUDE statue, nsfw", ["nude", "nsfw"]),
        ("Essex, Sussex and a sextant", []),
        ("nude-coloured shoes", ["nude"]),
        ("denuded hills", []),
        ("", []),
    ],
)
def test_whole_words(prompt: str, words: list[str]) -> None:
    assert nsfw_words(prompt) == words


def test_the_list_is_what_it_says() -> None:
    assert list(NSFW_WORDS) == sorted(set(NSFW_WORDS))
    assert all(word.isalpha() and word == word.casefold() for word in NSFW_WORDS)

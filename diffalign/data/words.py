"""Words in prompts: how prompts are compared, and a list of words that mark a prompt as not safe for work."""

from __future__ import annotations

import re

__all__ = ["NSFW_WORDS", "normalised", "nsfw_words"]

NSFW_WORDS = (
    "bdsm",
    "bondage",
    "boobs",
    "breasts",
    "cleavage",
    "erotic",
    "erotica",
    "fetish",
    "genitals",
    "gore",
    "hentai",
    "horny",
    "intercourse",
    "kinky",
    "lewd",
    "lingerie",
    "masturbating",
    "naked",
    "nipple",
    "nipples",
    "nsfw",
    "nude",
    "nudes",
    "nudity",
    "orgasm",
    "orgy",
    "panties",
    "penis",
    "porn",
    "porno",
    "pornographic",
    "pornography",
    "pornstar",
    "pussy",
    "seductive",
    "sex",
    "sexual",
    "sexy",
    "slut",
    "stripper",
    "striptease",
    "thong",
    "tits",
    "topless",
    "underwear",
    "undressed",
    "undressing",
    "vagina",
    "xxx",
)
"""A short list of English words, no classifier: it knows no other language, no spelling mistake and no
context, and nothing of the pictures."""

_NSFW = re.compile(rf"\b(?:{'|'.join(NSFW_WORDS)})\b")


def normalised(prompt: str) -> str:
    """Returns the prompt as it is compared with others: case folded, runs of white space as one blank."""
    return " ".join(prompt.casefold().split())


def nsfw_words(prompt: str) -> list[str]:
    """Returns the words of NSFW_WORDS that stand in the prompt as whole words, in its order."""
    return _NSFW.findall(prompt.casefold())

"""PickScore: the published layout (transformers) against an independent one, and its scales."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from tests.scorers.test_clip import PROMPTS, even_pictures, pictures
from tests.tiny_clip import write_open_clip, write_transformers


def write_weights(folder: Path) -> Path:
    """A tiny model in the layout of the published weights: transformers, with CLIP's own vocabulary."""
    return write_transformers(
        write_open_clip(folder / "open_clip", own_tokenizer=False), folder / "transformers"
    )


def contract_case(folder: Path):
    return {"path": str(write_weights(folder))}, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pickscore")


@pytest.fixture(scope="module")
def weights(folder) -> str:
    return str(write_weights(folder))


def test_the_score_is_that_of_open_clip_on_the_same_weights(folder, weights):
    ours = load_scorer("pickscore", path=weights)
    theirs = load_scorer("clip", path=str(folder / "open_clip"), scale="logits")
    images = even_pictures()
    torch.testing.assert_close(ours(images, PROMPTS), theirs(images, PROMPTS), rtol=0, atol=1e-4)


def test_scales_by_hand(weights):
    logits, cosine, unit = (
        load_scorer("pickscore", path=weights, scale=scale)(pictures(), PROMPTS)
        for scale in ("logits", "cosine", "unit")
    )
    torch.testing.assert_close(logits, math.exp(2.0) * cosine, rtol=0, atol=1e-5)
    torch.testing.assert_close(unit, logits / 26, rtol=0, atol=1e-6)
    assert load_scorer("pickscore", path=weights).scale == "logits"


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'logits'"):
        load_scorer("pickscore", scale="logit")
    with pytest.raises(UserError, match="did you mean 'tensor'"):
        load_scorer("pickscore", mode="tensors")
    with pytest.raises(UserError, match="dtype"):
        load_scorer("pickscore", dtype="int8")
    with pytest.raises(UserError, match="the hub does not give them"):  # the tests run without network
        load_scorer("pickscore")

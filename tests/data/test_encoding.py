"""Encoding pairs once: who shares what, which picture is at fault, and how much memory is allowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data.buckets import PreprocessSpec
from diffalign.data.encoded import EncodedSet, ratings
from diffalign.data.encoding import encode as encode_groups
from diffalign.data.encoding import fitter
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Score
from diffalign.data.select import Group
from diffalign.models.sdxl import Plugin
from tests.tiny_training import make_pair, picture


@pytest.fixture(scope="module")
def encoder(tiny_sdxl: str) -> Any:
    return Plugin(path=tiny_sdxl).load()


def encode(groups: Any, encoder: Any, *, seed: int = 0, **options: Any) -> EncodedSet:
    return encode_groups(groups, encoder, PreprocessSpec(**options), seed=seed)


def preferred(pair: Group) -> Group:
    """The preferred picture of a pair as a single one."""
    side = 0 if pair.target == 1.0 else 1
    return replace(pair, candidates=(pair.candidates[side],), images=(pair.images[side],), target=1.0)


def test_latents_and_prompts_are_those_of_the_model(encoder: Any) -> None:
    pairs = [make_pair("a", prompt="a ring"), make_pair("b", prompt="a cube", target=0.0)]
    encoded = encode(pairs, encoder)
    assert len(encoded) == 2 and [example.id for example in encoded.examples] == ["a", "b"]
    assert [example.target for example in encoded.examples] == [1.0, 0.0]
    for pair, example in zip(pairs, encoded.examples, strict=True):
        for side in (0, 1):
            pixels = torch.from_numpy(np.array(pair.images[side])).permute(2, 0, 1) / 255
            mean, std = encoder.encode_images(pixels[None])
            assert torch.allclose(encoded.means[example.images[side]], mean[0], atol=1e-5)
            assert torch.allclose(encoded.stds[example.images[side]], std[0], atol=1e-5)
        cond = encoded.conditioning(example, dropped=False)
        alone = encoder.encode_prompts([example.prompt])
        assert set(cond) == {*alone, "time_ids"} and cond.batch_size == 2
        for key in alone:
            assert torch.allclose(cond[key], alone[key].expand_as(cond[key]), atol=1e-5)
        assert not encoded.conditioning(example, dropped=True)["prompt_embeds"].any()


def test_draws_from_the_posterior_belong_to_their_key(encoder: Any) -> None:
    encoded = encode([make_pair("a")], encoder)
    mean, std = encoded.means[0], encoded.stds[0]
    assert torch.equal(encoded.latents(0), mean)
    draw = encoded.latents(0, "key", 1)
    assert torch.equal(draw, encoded.latents(0, "key", 1)) and not torch.equal(
        draw, encoded.latents(0, "key", 2)
    )
    scores = torch.stack([(encoded.latents(0, number) - mean) / std for number in range(50)])
    count = scores.numel()  # 51,200: 4 standard errors of mean and variance
    assert (
        abs(scores.mean().item()) < 4 / count**0.5 and abs(scores.var().item() - 1) < 4 * (2 / count) ** 0.5
    )


def test_equal_pictures_are_encoded_once(encoder: Any) -> None:
    """The winner of one pair and the loser of another; two pictures of three are new in the second pair."""
    shared = picture(77)
    pairs = [
        make_pair("a", images=(shared, picture(1))),
        make_pair("b", images=(picture(2), shared)),
        make_pair("c", images=(shared, shared)),
    ]
    encoded = encode(pairs, encoder)
    assert [example.images for example in encoded.examples] == [(0, 1), (2, 0), (0, 0)]
    assert len(encoded.means) == len(encoded.stds) == 3
    assert encoded.prompts.batch_size == 1


def test_a_group_shares_bucket_crop_flip_and_size_conditioning(encoder: Any) -> None:
    """A pair of one picture twice has one tensor twice, whatever was drawn; groups differ from another."""
    wide = picture(5, (64, 32))
    pairs = [make_pair(f"row-{number}", images=(wide, wide)) for number in range(12)]
    encoded = encode(pairs, encoder, crop="random", flip=True)
    assert all(example.images[0] == example.images[1] for example in encoded.examples)
    assert len(encoded.means) > 6
    mixed = encode(
        [make_pair("m", images=(picture(1, (64, 32)), picture(2, (32, 64))))], encoder, max_crop=1.0
    )
    example = mixed.examples[0]
    assert example.size == (32, 32)
    assert [c["time_ids"].tolist() for c in example.conditions] == [[[32, 32, 0, 0, 32, 32]]] * 2


def test_per_image_size_conditioning_is_for_single_images(encoder: Any) -> None:
    """64 x 32 pixels into the bucket (24, 40): scaled by 3/4 to 48 x 24, 4 columns cut at the left."""
    pairs = [make_pair("a", size=(64, 32))]
    with pytest.raises(
        UserError, match=r"size_conditioning=per_image gives labels away in groups: use target"
    ):
        encode(pairs, encoder, size_conditioning="per_image")
    encoded = encode(map(preferred, pairs), encoder, size_conditioning="per_image")
    assert encoded.examples[0].conditions[0]["time_ids"].tolist() == [[32, 64, 0, 4, 24, 40]]


def test_single_examples_have_one_picture(encoder: Any) -> None:
    pairs = [make_pair("a"), make_pair("b", target=0.0)]
    encoded, both = encode(map(preferred, pairs), encoder), encode(pairs, encoder)
    assert [example.target for example in encoded.examples] == [1.0, 1.0]
    for single, (row, side) in zip(encoded.examples, ((0, 0), (1, 1)), strict=True):
        wanted = both.means[both.examples[row].images[side]]
        assert torch.allclose(encoded.means[single.images[0]], wanted, atol=1e-5)


def test_ratings_are_turned_so_that_higher_is_better() -> None:
    scores = {"clip": Score(0.3, "cosine"), "fid": Score(7.0, "d", extra={"higher_is_better": False})}
    candidate = Candidate(ImageRef(name="x"), scores=scores, label=1.0, rank=2, votes=5)
    assert ratings(candidate) == {"clip": 0.3, "fid": -7.0, "label": 1.0, "votes": 5.0, "rank": -2.0}
    assert ratings(Candidate(ImageRef(name="y"))) == {}


def test_latents_that_are_not_finite_name_their_row(tiny_sdxl: str) -> None:
    """A VAE whose first layer overflows on white but not on grey: only the white picture's row is named."""
    model: Any = Plugin(path=tiny_sdxl).load()
    first = model.parts["vae"].encoder.conv_in
    with torch.no_grad():
        first.weight.mul_(1e20)
        first.bias.zero_()
    grey, white = Image.new("RGB", (32, 32), (127, 127, 127)), Image.new("RGB", (32, 32), "white")
    assert len(encode([make_pair("fine", images=(grey, grey))], model)) == 1
    pairs = [make_pair("fine", images=(grey, grey)), make_pair("shard-7:33", images=(grey, white))]
    with pytest.raises(UserError, match=r"not finite for shard-7:33: use model\.vae_dtype=fp32, or a VAE"):
        encode(pairs, model)


def test_more_data_than_the_memory_limit_is_refused(encoder: Any) -> None:
    """A picture keeps 2 x 4 x 16 x 16 float32 numbers, 8192 bytes: three fit into 25 kB, four do not."""
    pairs = [make_pair("a"), make_pair("b")]
    with pytest.raises(
        UserError, match=r"4 encoded pictures exceed preprocess\.memory_limit_gb=2\.5e-05: write"
    ):
        encode(pairs, encoder, memory_limit_gb=25e-6)
    assert len(encode(pairs[:1], encoder, memory_limit_gb=60e-6)) == 1  # and the embeddings of one prompt


def test_the_batch_size_of_encoding_does_not_matter(encoder: Any) -> None:
    pairs = [make_pair(f"row-{number}", size=((64, 32), (32, 32))[number % 2]) for number in range(5)]
    one, many = encode(pairs, encoder, batch_size=1), encode(pairs, encoder, batch_size=3)
    assert [example.images for example in one.examples] == [example.images for example in many.examples]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.means, many.means, strict=True))
    assert {tuple(mean.shape) for mean in one.means} == {(4, 12, 20), (4, 16, 16)}


def test_two_variants_are_each_picture_and_its_mirror(encoder: Any) -> None:
    """Whatever the draw of the first: a fixed pair of variants would leave half of the groups without one."""
    make = fitter(encoder, PreprocessSpec(flip=True), seed=0, variants=2)
    groups = [make_pair(f"row-{number}", images=(picture(1), picture(2))) for number in range(8)]
    first = [make(group).variants[0][0].pixels for group in groups]
    assert len({pixels.numpy().tobytes() for pixels in first}) == 2
    for group in groups:
        one, other = make(group).variants
        assert all(torch.equal(a.pixels, b.pixels.flip(2)) for a, b in zip(one, other, strict=True))

"""Pictures that look alike: the hash against its definition, the groups against comparing all pairs."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data.near import PictureTable, check_distance, near_groups, perceptual_hash
from tests.drawn_pictures import blocks


def bits_apart(one: Image.Image, other: Image.Image) -> int:
    first, second = perceptual_hash(one), perceptual_hash(other)
    assert first is not None and second is not None
    return (first ^ second).bit_count()


def test_hash_is_the_sign_of_the_low_frequencies() -> None:
    """The DCT-II written out as a sum, on a picture of 32x32 pixels, which is not scaled."""
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    grey = np.asarray(picture.convert("L"), dtype=float)
    low = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            for y in range(32):
                row = math.cos(math.pi * (2 * y + 1) * u / 64)
                low[u, v] += row * sum(
                    grey[y, x] * math.cos(math.pi * (2 * x + 1) * v / 64) for x in range(32)
                )
            low[u, v] *= math.sqrt((1 if u == 0 else 2) / 32) * math.sqrt((1 if v == 0 else 2) / 32)
    bits = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert perceptual_hash(picture) == int(bits, 2)


def test_scaled_and_compressed_pictures_stay_near_others_do_not() -> None:
    picture = blocks(1, 256)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=40)
    assert bits_apart(picture, Image.open(stream)) <= 4
    assert bits_apart(picture, picture.resize((100, 100))) <= 4
    assert bits_apart(picture, picture.convert("L").convert("RGB")) == 0  # it sees no colour
    assert bits_apart(picture, blocks(2, 256)) > 16


def test_flat_pictures_have_no_hash() -> None:
    assert perceptual_hash(Image.new("RGB", (64, 64), (10, 200, 30))) is None
    # A single grey level across half of the picture is no rounding error.
    step = Image.new("RGB", (64, 64), (10, 10, 10))
    step.paste((11, 11, 11), (0, 0, 32, 64))
    assert perceptual_hash(step) is not None


def first_leader(hashes: np.ndarray, distance: int) -> list[int]:
    leaders: list[int] = []
    groups = []
    for index, value in enumerate(hashes.tolist()):
        near = [lead for lead in leaders if (value ^ int(hashes[lead])).bit_count() <= distance]
        groups.append(near[0] if near else index)
        leaders += [] if near else [index]
    return groups


@pytest.mark.parametrize("distance", range(9))
def test_groups_are_those_of_comparing_all_pairs(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 150, dtype=np.uint64)
    hashes = np.concatenate([hashes, hashes[:20], rng.choice(hashes, 300)])
    for _ in range(distance + 1):  # up to one bit more than is near
        flips = np.uint64(1) << rng.integers(0, 64, 300).astype(np.uint64)
        hashes[170:] ^= np.where(rng.random(300) < 0.8, flips, np.uint64(0))
    rng.shuffle(hashes)
    groups = near_groups(hashes, distance)
    assert groups.tolist() == first_leader(hashes, distance)
    assert len(set(groups.tolist())) < len(hashes)


def test_a_chain_of_small_steps_is_not_one_group() -> None:
    chain = np.array([2**n - 1 for n in range(10)], dtype=np.uint64)  # 0, 1, 11, 111, ...: one bit a step
    assert near_groups(chain, 4).tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5]


def test_a_crowd_is_grouped_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    crowd = np.zeros(300, dtype=np.uint64)
    for _ in range(3):
        crowd ^= np.uint64(1) << rng.integers(0, 64, 300).astype(np.uint64)
    expected = first_leader(crowd, 4)
    assert near_groups(crowd, 4).tolist() == expected
    monkeypatch.setattr("diffalign.data.near.EDGES_HELD", 10)
    assert near_groups(crowd, 4).tolist() == expected


def test_no_hash_no_group() -> None:
    assert near_groups(np.array([], dtype=np.uint64), 4).tolist() == []


def test_table_of_pictures() -> None:
    table = PictureTable()
    a, b, c, d = (bytes([n]) * 16 for n in range(1, 5))
    for digest, perceptual in [
        (a, 0),
        (None, None),
        (b, None),
        (a, 0),
        (c, 0b111),
        (b, None),
        (d, 2**63 + 255),
    ]:
        table.add(digest, perceptual)
    numbers = table.numbers()
    assert numbers.tolist() == [0, -1, 2, 0, 4, 2, 6]
    # The hash 0 of a is a hash; b has none and is alone.
    assert table.groups(4).tolist() == [0, -1, 2, 0, 0, 2, 6]
    assert table.groups(2, numbers).tolist() == numbers.tolist()
    empty = PictureTable()
    assert empty.numbers().tolist() == empty.groups(4).tolist() == []


@pytest.mark.parametrize("distance", [-1, 9])
def test_distances_that_mean_nothing(distance: int) -> None:
    with pytest.raises(UserError, match=f"near_distance={distance}: give a number of bits from 0 to 8"):
        check_distance(distance)

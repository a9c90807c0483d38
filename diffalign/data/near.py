"""Pictures that look alike: a perceptual hash, and groups of hashes without comparing all pairs."""

from __future__ import annotations

from array import array
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.common.errors import UserError

__all__ = ["MAX_DISTANCE", "PictureTable", "check_distance", "near_groups", "perceptual_hash"]

MAX_DISTANCE = 8
"""Beyond this many of 64 bits different pictures begin to look alike."""

SIDE = 32
FREQUENCIES = 8
FLAT = 1e-2
"""Coefficients closer than this (in grey levels of 0 to 255) are equal: rounding errors are far smaller."""

# The rows of the orthonormal DCT-II that are needed, [frequency, pixel]: a whole transform takes longer.
_COSINES = np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1))
_COSINES *= np.sqrt(np.where(np.arange(FREQUENCIES) == 0, 1, 2) / SIDE)[:, None]

EDGES_HELD = 1_000_000

Hashes = NDArray[np.uint64]


def check_distance(distance: int) -> None:
    """Raises UserError when `distance` is no number of differing bits that means alike."""
    if not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"near_distance={distance}: give a number of bits from 0 to {MAX_DISTANCE}, of 64")


def perceptual_hash(image: Image.Image) -> int | None:
    """Returns 64 bits that change little when a picture is scaled or compressed; None for a flat picture.

    The picture is scaled to 32x32 grey pixels; a bit says whether one of the 8x8 lowest coefficients of its
    two-dimensional DCT-II lies above their median (Zauner, Implementation and Benchmarking of Perceptual
    Image Hash Functions, 2010). It sees neither colour nor small detail.

    Convention: the constant coefficient is among the 64, as in the Python package ImageHash; pHash leaves
    out the first row and column. The numbers of the two differ, and so do the scaling filters of others.
    """
    # Scaled first, in colour: reducing by whole factors is far cheaper than converting every pixel.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    low = (_COSINES @ np.asarray(small, dtype=np.float64) @ _COSINES.T).ravel()
    if np.abs(low[1:]).max() < FLAT:
        return None
    bits = low - np.sort(low)[[31, 32]].mean() > FLAT
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_groups(hashes: Hashes, distance: int) -> NDArray[np.intp]:
    """Returns for each of `[n]` hashes the index of the hash that leads its group; alone, its own.

    In order, a hash joins the first leader within `distance` bits and leads a group itself where there is
    none: members are within `distance` of their leader and 2 x `distance` of one another, so that groups do
    not grow along a chain of small steps.

    A few sorts replace the comparison of all pairs (Manku et al., Detecting Near-Duplicates for Web Crawling,
    2007): of distance + 2 blocks of bits two are equal in hashes that differ in at most `distance` bits.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    distinct, first = values[order], first[order]
    leaders = np.arange(len(distinct))
    for members in _members(_components(distinct, distance)):
        rest = members
        while rest.size:
            near = np.bitwise_count(distinct[rest] ^ distinct[rest[0]]) <= distance
            leaders[rest[near]] = rest[0]
            rest = rest[~near]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return np.asarray(first[leaders[place[inverse]]], dtype=np.intp)


def _components(hashes: Hashes, distance: int) -> NDArray[np.intp]:
    """Returns `[n]` labels of distinct hashes, equal where steps of at most `distance` bits lead across."""
    edges = np.linspace(0, 64, distance + 3).round().astype(int)
    blocks = [(1 << high) - (1 << low) for low, high in pairwise(edges.tolist())]
    labels = np.arange(len(hashes))
    for one, other in combinations(blocks, 2):
        keys = hashes & np.uint64(one | other)
        order = np.argsort(keys)
        keys = keys[order]
        found: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        held, step = 0, 1
        left = np.arange(len(hashes))
        while True:  # each hash with the one `step` places on, while they share the two blocks
            left = left[left + step < len(hashes)]
            left = left[keys[left] == keys[left + step]]
            if not left.size:
                break
            a, b = order[left], order[left + step]
            near = (np.bitwise_count(hashes[a] ^ hashes[b]) <= distance) & (labels[a] != labels[b])
            found.append((a[near], b[near]))
            held, step = held + int(near.sum()), step + 1
            if held > EDGES_HELD:  # one crowd of n look-alikes has n^2 / 2 edges, but soon a single label
                labels, found, held = _merged(labels, found), [], 0
        labels = _merged(labels, found)
    return labels


def _merged(
    labels: NDArray[np.intp], found: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> NDArray[np.intp]:
    """Returns the labels with those of the two ends of each edge made one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not any(a.size for a, _ in found):
        return labels
    a, b = (labels[np.concatenate(ends)] for ends in zip(*found, strict=True))
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(len(labels), len(labels)))
    return np.asarray(connected_components(graph, directed=False)[1][labels], dtype=np.intp)


def _members(labels: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Returns the ascending indices of each label that stands more than once."""
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return [part for part in np.split(order, cuts) if part.size > 1]


class PictureTable:
    """What is kept of every picture that was met: 25 bytes each, in places 0, 1, 2, ..."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._hashes = array("Q")
        self._state = bytearray()  # 0: no bytes, 1: bytes, 2: bytes and a hash

    def __len__(self) -> int:
        return len(self._state)

    def add(self, digest: bytes | None, perceptual: int | None) -> None:
        """Takes the next place: a digest of 16 bytes (None: no picture) and a hash (None: none)."""
        self._digests += digest or bytes(16)
        self._hashes.append(perceptual or 0)
        self._state.append(0 if digest is None else 1 if perceptual is None else 2)

    def numbers(self) -> NDArray[np.intp]:
        """Returns `[places]` the first place with the same bytes; -1 where there is no picture."""
        state = np.frombuffer(self._state, dtype=np.uint8)
        present = np.flatnonzero(state > 0)
        numbers = np.full(len(state), -1, dtype=np.intp)
        if present.size:
            words = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)[present]
            order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ones stay in order of place
            ordered = words[order]
            starts = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
            first = order[np.flatnonzero(starts)]
            numbers[present[order]] = present[first[np.cumsum(starts) - 1]]
        return numbers

    def groups(self, distance: int, numbers: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
        """Returns `[places]` the place of the picture that leads each one's group of look-alikes.

        Byte-equal pictures are in one group; a picture without a hash is alone; -1 where there is none.
        `numbers` saves computing them again.
        """
        numbers = self.numbers() if numbers is None else numbers
        state = np.frombuffer(self._state, dtype=np.uint8)
        places = np.flatnonzero((numbers == np.arange(len(numbers))) & (state == 2))
        groups = np.arange(len(numbers))
        hashes: Any = np.frombuffer(self._hashes, dtype=np.uint64)
        if places.size:
            groups[places] = places[near_groups(hashes[places], distance)]
        return np.where(numbers < 0, -1, groups[np.maximum(numbers, 0)])

"""Random numbers that depend on a key alone, never on what was drawn before.

The key is a sequence of ints and strings, for example (seed, example id, epoch, draw). World size, number of
workers and resuming therefore cannot change a draw. Everything is drawn on the CPU in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seed_of(*parts: int | str) -> int:
    """Returns a 63-bit seed (0 <= seed < 2**63) made of the key by blake2b.

    Parts are tagged with their type and length: (1, 23), (12, 3) and ("12", 3) are three different keys.

    Raises:
        TypeError: a part is neither an int nor a string, or there is none.
    """
    if not parts:
        raise TypeError("a draw needs at least one key part")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"key parts are ints or strings, not {type(part).__name__}: {part!r}")
        text = f"{part:d}".encode() if isinstance(part, int) else part.encode("utf-8")
        tag = b"i" if isinstance(part, int) else b"s"
        digest.update(tag + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Returns a fresh CPU generator for the key.

    torch's CPU generator starts from the low 32 bits of a seed, so two unrelated keys can share a stream
    (one chance in 4e9 for a given pair); draws need independence, not uniqueness.
    """
    return torch.Generator(device="cpu").manual_seed(seed_of(*parts))


def normal(shape: Sequence[int], *parts: int | str) -> torch.Tensor:
    """Returns standard normal float32 numbers of `shape` on the CPU."""
    return torch.randn(tuple(shape), generator=generator(*parts), dtype=torch.float32)


def uniform(*parts: int | str) -> float:
    """Returns one number in [0, 1) with 53 random bits."""
    return (seed_of(*parts) >> 10) / 2**53


def permutation(n: int, *parts: int | str) -> torch.Tensor:
    """Returns a random order of 0..n-1 as an int64 tensor `[n]`."""
    return torch.randperm(n, generator=generator(*parts))

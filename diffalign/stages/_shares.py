"""Work shared by several processes or machines that see one folder; they need not talk to one another.

`torchrun` says how many there are and which one this is (RANK, WORLD_SIZE); for job arrays a person may. Each
takes every n-th part of the work and writes a file of its own; the last one to finish puts them together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffalign.common.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """This process's share of the work: number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    @property
    def name(self) -> str:
        """A name for its files, different from those of all others."""
        return f"{self.index:05d}-of-{self.count:05d}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Returns this process's items."""
        return list(items[self.index :: self.count])


def my_share() -> Share:
    """Returns the share that the environment asks of this process; all of the work where it says nothing.

    Raises:
        UserError: RANK or WORLD_SIZE are no numbers that fit together.
    """
    index, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"RANK={index} WORLD_SIZE={count}: give whole numbers, RANK from 0 to WORLD_SIZE - 1")
    return Share(int(index), int(count))

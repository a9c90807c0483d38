"""Work shared by several processes or machines that see one folder; they need not talk to one another.

`torchrun` says how many there are and which one this is (RANK, WORLD_SIZE); for job arrays a person may. Each
takes every n-th part of the work and writes a file of its own; the last one to finish puts them together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffalign.common.errors import UserError

Item = TypeVar("Item")

LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What a launcher tells each process of the others."""


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


@contextlib.contextmanager
def first_of_all() -> Iterator[bool]:
    """For work that is not shared: yields whether this is the process that does it, as if it were alone.

    Inside the block the first process knows of no other, so that nothing in it waits for one.
    """
    share = my_share()
    hidden = {} if share.alone else {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    for name in hidden:
        del os.environ[name]
    try:
        yield share.index == 0
    finally:
        os.environ.update(hidden)

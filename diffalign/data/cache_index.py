"""Joining the packs of a cache to one index, in the order of the source, whoever wrote them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from diffalign.common import files
from diffalign.common.conditioning import Conditioning
from diffalign.data.cache_packs import ROWS, TENSORS, kind_of, packs_of, write_tensors
from diffalign.data.records import Record
from diffalign.data.tally import Tally

RECORDS = "records.jsonl"
PROMPTS = "prompts.json"
TABLES = "tables.safetensors"


def _numbers() -> array[int]:
    return array("q")


@dataclass
class _Index:
    """The tables, as they grow; `_ends` are running totals, so that row k is `values[ends[k-1]:ends[k]]`.

    Args:
        height, width, prompt, target, candidates: one a row; target is NaN where there is none.
        image_ends, images, sizes: pictures of a row, and what the network is told of their sizes.
        record_ends: bytes of `records.jsonl`.
        picture_places: pack, bucket and row of each picture; prompt_places: pack and row of each prompt.
        size_tables: what the network is told of sizes, of all packs one after another.
    """

    height: array[int] = field(default_factory=_numbers)
    width: array[int] = field(default_factory=_numbers)
    prompt: array[int] = field(default_factory=_numbers)
    candidates: array[int] = field(default_factory=_numbers)
    target: array[float] = field(default_factory=lambda: array("d"))
    image_ends: array[int] = field(default_factory=_numbers)
    images: array[int] = field(default_factory=_numbers)
    sizes: array[int] = field(default_factory=_numbers)
    record_ends: array[int] = field(default_factory=_numbers)
    picture_places: array[int] = field(default_factory=_numbers)
    prompt_places: array[int] = field(default_factory=_numbers)
    size_tables: dict[str, list[Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tables by name."""
        found = {
            name: torch.from_numpy(np.array(column))
            for name, column in vars(self).items()
            if isinstance(column, array)
        }
        found["picture_places"] = found["picture_places"].reshape(-1, 3)
        found["prompt_places"] = found["prompt_places"].reshape(-1, 2)
        tables = {f"size.{name}": torch.cat(parts) for name, parts in self.size_tables.items()}
        return {**found, **tables}


class _Joiner:
    """Numbers pictures, prompts and sizes over all packs, row after row in the order of the source."""

    def __init__(self, packs: list[Path]) -> None:
        self.index = _Index()
        self.kinds: dict[str, int] = {}
        self.pictures: dict[bytes, int] = {}
        self.prompts: dict[str, int] = {}
        self.num_encoded = 0
        self._size_starts = [self._take_sizes(path) for path in packs]

    def _take_sizes(self, path: Path) -> int:
        """Adds what a pack's rows are told of sizes; returns where that begins in the whole table."""
        start = 0
        with safe_open(path.with_suffix(TENSORS), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if name.startswith("size."):
                    parts = self.index.size_tables.setdefault(name.removeprefix("size."), [])
                    start = sum(map(len, parts))
                    parts.append(tensors.get_tensor(name))
        return start

    def add(self, pack: int, row: dict[str, Any]) -> Record:
        """Adds a row that is not dropped; returns its record.

        A picture that two processes have encoded is taken from the first.
        """
        index, record = self.index, Record.from_dict(row["record"], Path())
        kind = self.kinds.setdefault(kind_of(row["size"]), len(self.kinds))
        for key, place in zip(map(bytes.fromhex, row["keys"]), row["key_rows"], strict=True):
            if place >= 0:
                self.num_encoded += 1
                if self.pictures.setdefault(key, len(self.pictures)) * 3 == len(index.picture_places):
                    index.picture_places.extend((pack, kind, place))
            index.images.append(self.pictures[key])
        if row["prompt_row"] >= 0 and record.prompt not in self.prompts:
            self.prompts[record.prompt] = len(self.prompts)
            index.prompt_places.extend((pack, row["prompt_row"]))
        target = record.pair_target() if len(record.candidates) == 2 else None
        index.height.append(row["size"][0])
        index.width.append(row["size"][1])
        index.prompt.append(self.prompts[record.prompt])
        index.candidates.append(len(record.candidates))
        index.target.append(float("nan") if target is None else target)
        index.sizes.extend(self._size_starts[pack] + number for number in row["told"])
        index.image_ends.append(len(index.images))
        return record


def join(
    folder: Path, dropped: Conditioning, *, max_bad_share: float, what: str
) -> tuple[Tally, dict[str, Any]]:
    """Writes the index over all complete packs of `folder`.

    Args:
        folder: of the cache.
        dropped: conditioning of "no prompt", one row.
        max_bad_share: refuse beyond this share of bad rows.
        what: what messages call the data.

    Returns:
        The tally of the data, and what a reader must know: `packs`, `kinds`, and `files` with their sizes in
        bytes; with numbers for people.

    Raises:
        UserError: no usable row, or too many bad ones; the packs stay.
    """
    packs = packs_of(folder)
    joiner, tally = _Joiner(packs), Tally(what=what)
    with files.atomic_path(folder / RECORDS) as temporary, temporary.open("wb") as records:
        for pack, row in _in_order(packs):
            tally.asked += 1
            if "dropped" in row:
                tally.drop(row["dropped"], row["id"])
                continue
            tally.used += 1
            joiner.add(pack, row)
            records.write((json.dumps(row["record"], ensure_ascii=False) + "\n").encode("utf-8"))
            joiner.index.record_ends.append(records.tell())
        tally.refuse_if_too_many(max_bad_share)
        tally.refuse_if_empty()
    files.write_json(folder / PROMPTS, list(joiner.prompts))
    no_prompt = {f"dropped.{name}": tensor.contiguous() for name, tensor in dropped.items()}
    write_tensors(folder / TABLES, {**joiner.index.tensors(), **no_prompt})
    names = [path.name.removesuffix(ROWS) for path in packs]
    read = [RECORDS, PROMPTS, TABLES, *(f"{name}{TENSORS}" for name in names)]
    return tally, {
        "packs": names,
        "files": {name: (folder / name).stat().st_size for name in read},
        "kinds": list(joiner.kinds),
        "pictures": len(joiner.pictures),
        "pictures_encoded": joiner.num_encoded,
        "prompts": len(joiner.prompts),
    }


def _in_order(packs: list[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(pack, row)` of all packs, by position; one pack of each share is in memory at a time."""

    def rows(numbered: Iterator[tuple[int, Path]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, path in numbered:
            for row in files.read_jsonl(path):
                yield number, row

    shares = groupby(enumerate(packs), key=lambda item: item[1].name[: len("00000-of-00000")])
    streams = [rows(iter(list(share))) for _, share in shares]
    yield from merge(*streams, key=lambda item: item[1]["position"])

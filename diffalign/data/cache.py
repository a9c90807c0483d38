"""A cache on disk as training reads it: any example at any time, a few reads each, memory flat.

Beside its packs (`cache_packs.py`) a cache holds `records.jsonl`, one line an example in the order of the
source, `prompts.json`, and `tables.safetensors`, which says where each record, picture and prompt lies. The
tables are kept in memory, about 100 bytes an example. Records, latents and embeddings are read by position:
of files that are mapped, every page that was ever touched would count as the process's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.common import draws, files, manifest
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError, brief
from diffalign.data.cache_index import PROMPTS, RECORDS, TABLES
from diffalign.data.cache_packs import SHOWN, SPANS, TENSORS, TEXT
from diffalign.data.encoded import Example, numbered, ratings, with_sizes
from diffalign.data.records import Record
from diffalign.data.select import Group, UsableGroups
from diffalign.data.tally import Tally

MOST_OPEN = 128
"""Packs that are open at a time."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class RowFile:
    """A safetensors file of which single rows of tensors are read.

    Args:
        path: the file.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            size = os.fstat(self._descriptor).st_size
            length = min(int.from_bytes(os.pread(self._descriptor, 8, 0), "little"), size)
            self._start = 8 + length
            self._known = {
                name: (DTYPES[entry["dtype"]], tuple(entry["shape"][1:]), entry["data_offsets"][0])
                for name, entry in json.loads(os.pread(self._descriptor, length, 8)).items()
                if name != "__metadata__"
            }
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:  # anything may be in it
            raise damaged(path, brief(error)) from error

    def close(self) -> None:
        """Gives the file back."""
        os.close(self._descriptor)

    def names(self, prefix: str) -> list[str]:
        """The tensors whose names begin so."""
        return [name for name in self._known if name.startswith(prefix)]

    def row(self, name: str, number: int) -> Tensor:
        """Row `number` of a tensor, as `rows`."""
        return self.rows(name, number, 1)[0]

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a tensor, read now; float16 becomes float32. UserError where the file ends."""
        dtype, shape, offset = self._known[name]
        tensor = torch.empty((count, *shape), dtype=dtype)
        place = self._start + offset + first * math.prod(shape) * dtype.itemsize
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        if os.preadv(self._descriptor, [content], place) != tensor.nbytes:
            raise damaged(self._path, "cut off")
        return tensor.float() if dtype is torch.float16 else tensor


class OpenFiles:
    """The packs of a cache, opened when first read; the one that was not used for longest is closed.

    Args:
        folder: of the cache.
        names: of the packs.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._open: dict[int, RowFile] = {}

    def __getitem__(self, number: int) -> RowFile:
        found = self._open.pop(number, None) or RowFile(self._folder / f"{self._names[number]}{TENSORS}")
        self._open[number] = found  # the last of the mapping is the one that was used last
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return found


@dataclass(frozen=True)
class Cache:
    """A complete cache.

    Args:
        folder: where it is.
        facts: of its manifest: packs, kinds, posterior, variants, encoders and more.
        tables: see `cache_index`.
        sizes: what the network is told of sizes, by name.
        dropped: conditioning of "no prompt", one row.
        packs: its tensors.
        records: descriptor of its records.
    """

    folder: Path
    facts: dict[str, Any]
    tables: dict[str, NDArray[Any]]
    sizes: dict[str, Tensor]
    dropped: Conditioning
    packs: OpenFiles
    records: int

    def __len__(self) -> int:
        return len(self.tables["prompt"])

    def __reduce__(self) -> tuple[Callable[[Path], Cache], tuple[Path]]:
        """Opened again in another process: descriptors mean nothing there."""
        return open_cache, (self.folder,)

    def record(self, row: int) -> Record:
        """The record of a row, without its pictures."""
        ends = self.tables["record_ends"]
        start = int(ends[row - 1]) if row else 0
        content = json.loads(os.pread(self.records, int(ends[row]) - start, start))
        return Record.from_dict(content, self.folder, f"{self.folder}:{row}")

    def inputs(self) -> dict[str, Path | str]:
        """What a manifest records as input, as of a data source: what the cache was made of."""
        return {"cache": f"cache {self.facts['identity']}"}

    def told(self, row: int) -> dict[str, Tensor]:
        """What the network is told of sizes, one row by name."""
        return {name: table[row : row + 1] for name, table in self.sizes.items()}

    def text(self, prompt: int) -> Conditioning:
        """What a prompt was encoded to, one row; zeros stand where its mask hides it."""
        pack, row = (int(number) for number in self.tables["prompt_places"][prompt])
        file = self.packs[pack]
        found = {name.removeprefix(TEXT): file.row(name, row) for name in file.names(TEXT)}
        for name in (name.removeprefix(SHOWN) for name in file.names(SHOWN)):
            first, kept, whole = file.row(f"{SPANS}{name}", row).tolist()
            shown = file.rows(f"{SHOWN}{name}", first, kept)
            found[name] = torch.cat([shown, shown.new_zeros(whole - kept, *shown.shape[1:])])
        return Conditioning({name: tensor[None] for name, tensor in found.items()})

    def choose(
        self,
        *,
        unit: str = "pair",
        undesirable: bool = False,
        reject: Callable[[Record], str | None] | None = None,
        unlabelled: bool = False,
        ties: Literal["drop", "soft"] = "soft",
        limit: int | None = None,
    ) -> tuple[CachedSet, Tally]:
        """The groups that an objective can use, and the tally of the others; arguments of `UsableGroups`.

        Ties are there when the cache was made with data.ties=soft; they are of use for pairs alone.
        """
        if unit == "pair" and reject is None and not unlabelled:
            return self._choose_pairs(ties, limit)
        groups = UsableGroups(
            (replace(self.record(row), extra={_ROW: row}) for row in range(len(self))),
            unit=unit,
            undesirable=undesirable,
            reject=reject,
            unlabelled=unlabelled,
            ties=ties if unit == "pair" else "drop",
            max_bad_share=1.0,
            limit=limit,
            opens=False,
            what=str(self.folder),
        )
        chosen = list(groups.made(_chosen_of))
        rows, sides, targets, names = zip(*chosen, strict=True)
        return CachedSet(
            self,
            np.array(rows, dtype=np.int64),
            np.array(sides, dtype=np.int64),
            np.array(targets, dtype=np.float64),
            names,
        ), groups.tally

    def _choose_pairs(self, ties: Literal["drop", "soft"], limit: int | None) -> tuple[CachedSet, Tally]:
        """What `choose` does with labelled pairs, of a million in less than a second."""
        targets = self.tables["target"]
        is_pair = self.tables["candidates"] == 2
        is_tie = (targets == 0.5) & (ties == "drop")
        good = np.flatnonzero(is_pair & np.isfinite(targets) & ~is_tie)[:limit]
        end = len(self) if limit is None or len(good) < limit else int(good[-1]) + 1
        tally = Tally(what=str(self.folder), asked=end, used=len(good))
        for row in np.setdiff1d(np.arange(end), good).tolist():
            undecided = "tie" if is_tie[row] else "unlabelled"
            tally.drop(undecided if is_pair[row] else "not_a_pair", self.record(row).id)
        tally.refuse_if_too_many(1.0)
        tally.refuse_if_empty()
        return CachedSet(self, good, np.full(len(good), -1), targets[good].astype(np.float64)), tally


_ROW = "row"


def _chosen_of(group: Group) -> tuple[int, int, float, str]:
    """Row, candidate (-1: all), target (NaN: none) and id of a group."""
    candidates = group.record.candidates
    whole = len(group.candidates) == len(candidates)
    side = -1 if whole else next(i for i, c in enumerate(candidates) if c is group.candidates[0])
    return group.record.extra[_ROW], side, math.nan if group.target is None else group.target, group.id


@dataclass(frozen=True)
class CachedSet:
    """Groups of a cache; an `Encoded`.

    Args:
        cache: where they are.
        rows: `[n]`, each one's record.
        sides: `[n]`, its candidate; -1: all.
        targets: `[n]`, as in `select.Group`; NaN: none.
        names: ids; None: those of the records.
    """

    cache: Cache
    rows: NDArray[np.int64]
    sides: NDArray[np.int64]
    targets: NDArray[np.float64]
    names: Sequence[str] | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """In the order of the source, read when they are looked at."""
        return _Examples(self)

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, epoch: int) -> Example:
        """The example; its variants take turns, epoch after epoch, each beginning with one of its own."""
        cache, row, side = self.cache, int(self.rows[index]), int(self.sides[index])
        record, tables, target = cache.record(row), cache.tables, float(self.targets[index])
        count, variants = int(tables["candidates"][row]), cache.facts["variants"]
        shown = (epoch + draws.seed_of(record.id, "variant")) % variants if variants > 1 else 0
        first = int(tables["image_ends"][row]) - (variants - shown) * count
        places = range(first, first + count) if side < 0 else (first + side,)
        candidates = record.candidates if side < 0 else [record.candidates[side]]
        return Example(
            id=record.id if self.names is None else self.names[index],
            prompt=record.prompt,
            images=tuple(int(tables["images"][place]) for place in places),
            size=(int(tables["height"][row]), int(tables["width"][row])),
            target=None if math.isnan(target) else target,
            conditions=tuple(cache.told(int(tables["sizes"][place])) for place in places),
            ratings=tuple(map(ratings, candidates)),
            meta={**record.meta, "models": [candidate.model for candidate in candidates]},
            prompt_row=int(tables["prompt"][row]),
        )

    def latents(self, image: int, *key: int | str) -> Tensor:
        """A draw from the posterior of a picture for `key`, or its mean when no key is given; `[c, h, w]`."""
        pack, kind, row = (int(number) for number in self.cache.tables["picture_places"][image])
        file, bucket = self.cache.packs[pack], self.cache.facts["kinds"][kind]
        mean = file.row(f"mean.{bucket}", row)
        if not key:
            return mean
        return mean + file.row(f"std.{bucket}", row) * draws.normal(tuple(mean.shape), *key)

    def conditioning(self, example: Example, *, dropped: bool) -> Conditioning:
        """One row per image of the example; all share the prompt, or all have it dropped."""
        if dropped:
            return with_sizes(self.cache.dropped, example)
        return with_sizes(self.cache.text(example.prompt_row), example)

    def kinds(self) -> NDArray[np.int64]:
        """`[n]`, equal where bucket and number of images are."""
        tables, rows = self.cache.tables, self.rows
        images = np.where(self.sides < 0, tables["candidates"][rows], 1).astype(np.int64)
        return numbered(tables["height"][rows], tables["width"][rows], images)

    def texts(self) -> tuple[Sequence[str], NDArray[np.int64]]:
        """The prompts of the cache, and which of them each example has."""
        return files.read_json(self.cache.folder / PROMPTS), self.cache.tables["prompt"][self.rows]

    def subset(self, indices: Iterable[int]) -> CachedSet:
        """The chosen examples over the same files."""
        chosen = np.fromiter(indices, dtype=np.int64)
        names = None if self.names is None else [self.names[index] for index in chosen]
        return CachedSet(self.cache, self.rows[chosen], self.sides[chosen], self.targets[chosen], names)


@dataclass(frozen=True)
class _Examples(Sequence[Example]):
    """The examples of a set, as they are in epoch 0."""

    of: CachedSet

    def __len__(self) -> int:
        return len(self.of)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.of.example(index, 0)


def open_cache(folder: str | Path) -> Cache:
    """The cache in a folder.

    Raises:
        UserError: there is none, it is not complete, or a file is missing or damaged.
    """
    folder = Path(folder)
    said = manifest.read_manifest(folder)
    if said is None or said.get("stage") != "cache":
        what = "is not complete: repeat the command that writes it" if folder.is_dir() else "does not exist"
        if said is not None:
            what = f"holds the output of '{said.get('stage')}'"
        raise UserError(f"cache={folder} {what}; make one with diffalign cache")
    facts: dict[str, Any] = said["cache"]
    try:
        for name, size in facts["files"].items():
            if (folder / name).stat().st_size != size:
                raise damaged(folder / name, "of another size than it was")
        tensors = load_file(folder / TABLES)
        records = os.open(folder / RECORDS, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        raise damaged(folder, brief(error)) from error

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    return Cache(
        folder,
        facts,
        {name: tensor.numpy() for name, tensor in tensors.items() if "." not in name},
        named("size."),
        Conditioning(named("dropped.")),
        OpenFiles(folder, facts["packs"]),
        records,
    )


def damaged(place: Path, why: str) -> UserError:
    """The error for a cache that is not as it was written; the caller raises it."""
    return UserError(f"{place} is damaged ({why}): remove the folder of the cache, and write it again")

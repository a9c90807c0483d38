"""Writing a cache: packs of encoded records, one after another, each whole or not there.

A pack is two files. `NAME.safetensors` holds what is new in it: latents of pictures by bucket
(`mean.1024x1024`, `std.1024x1024`), embeddings of prompts (`text.*`), and what the network is told of sizes
(`size.*`). Where a mask hides the end of an embedding (`Encoder.text_masks`) only what comes before is kept,
of one prompt after another (`shown.*`), and for each prompt where that begins, how many rows are kept and how
many there were (`spans.*`).

`NAME.jsonl` has one row a record of the source, in order; it is written last, and where it is the pack is
complete:

    {"position": 12, "id": "a.parquet:12", "dropped": "corrupt_image"}
    {"position": 13, "size": [1024, 1024], "keys": ["5f...", "09..."], "key_rows": [7, -1], "told": [0, 0],
     "prompt_row": -1, "record": {"id": "a.parquet:13", "prompt": "a cat", "candidates": [...]}}

keys: identities of the pictures, variant after variant, in the record's order; key_rows and prompt_row: where
they stand in the tensors, -1 when an earlier pack of this share has them.

What is in a pack depends on the records alone, and each begins with no picture waiting: a run that is killed
and repeated writes the very same bytes. `cache_index.py` joins the packs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.data.buckets import Size
from diffalign.data.encoding import PROMPT_BATCH, Encoder, Fitted, PictureEncoder, prompt_batches
from diffalign.data.records import Record
from diffalign.data.select import Unusable

ROWS, TENSORS = ".jsonl", ".safetensors"
TEXT, SHOWN, SPANS = "text.", "shown.", "spans."

MAX_ROWS = 65536
"""Records in a pack of pictures that take hardly any room."""

Told = tuple[Size, Size, Size]


@dataclass(frozen=True)
class PackSpec:
    """What is kept, and in how large packs.

    Args:
        posterior: "sample" keeps the standard deviation of latents beside their mean, "mean" does not.
        dtype: "fp16" halves what is float32, "fp32" keeps it.
        pack_bytes: a pack is closed when its latents and embeddings reach so much.
    """

    posterior: str
    dtype: str
    pack_bytes: int


@dataclass
class _Pack:
    """A pack that is being filled.

    Args:
        rows: one a record.
        prompts: those that are new in it and wait to be encoded.
        num_prompts: how many are new in it.
        texts: embeddings of the others, in order.
        told: what the network is told of sizes -> row.
        latents: bucket -> mean and standard deviation of each picture that is new in it, in order.
        num_bytes: of all pictures and prompts, once they are encoded.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    num_prompts: int = 0
    texts: list[dict[str, Tensor]] = field(default_factory=list)
    told: dict[Told, int] = field(default_factory=dict)
    latents: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    num_bytes: int = 0


class PackWriter:
    """Fills and writes the packs of one process.

    Args:
        folder: where they go.
        share: name of this process's share; no other process writes packs of that name.
        encoder: the model.
        spec: what is kept.
        batch_size: pictures encoded at once.

    Attributes:
        last_position: number of the last record that was taken, by this run or an earlier one; -1: none.
    """

    def __init__(self, folder: Path, share: str, encoder: Encoder, spec: PackSpec, batch_size: int) -> None:
        self._folder, self._share, self._encoder, self._spec = folder, share, encoder, spec
        self._known: set[bytes] = set()
        self._prompts: set[str] = set()
        self._pack = _Pack()
        self._pictures = PictureEncoder(encoder, batch_size, self._keep)
        self._number = 0
        self.last_position = -1
        for path in packs_of(folder, share):
            if path.stem != self._name or not path.with_suffix(TENSORS).is_file():
                raise UserError(
                    f"{folder} is damaged (files of {self._name} are missing): remove the folder of the "
                    "cache, and write it again"
                )
            self._take_over(files.read_jsonl(path))

    @property
    def _name(self) -> str:
        """Of the pack that is being filled."""
        return f"{self._share}-{self._number:06d}"

    def _take_over(self, rows: list[dict[str, Any]]) -> None:
        """Learns what an earlier run has written."""
        self._number += 1
        self.last_position = rows[-1]["position"]
        for row in rows:
            if "dropped" not in row:
                self._prompts.add(row["record"]["prompt"])
                self._known.update(map(bytes.fromhex, row["keys"]))

    def add(self, position: int, record: Record, outcome: Fitted | Unusable) -> None:
        """Takes the next record, and writes the pack when that fills it.

        Raises:
            UserError: latents or embeddings that cannot be kept.
        """
        pack = self._pack
        if isinstance(outcome, Unusable):
            pack.rows.append({"position": position, "id": record.id, "dropped": outcome.reason})
        else:
            pack.rows.append({"position": position, **self._row(outcome)})
        self.last_position = position
        if pack.num_bytes >= self._spec.pack_bytes or len(pack.rows) >= MAX_ROWS:
            self.close_pack()

    def _row(self, fitted: Fitted) -> dict[str, Any]:
        """The row of a group; its new pictures begin to be encoded."""
        group, pack = fitted.group, self._pack
        keys, key_rows, told = [], [], []
        kept = pack.latents.setdefault(kind_of(fitted.size), [])
        for cut in (cut for cuts in fitted.variants for cut in cuts):
            is_new = cut.key not in self._known
            keys.append(cut.key.hex())
            key_rows.append(len(kept) if is_new else -1)
            if is_new:
                self._known.add(cut.key)
                kept.append(())
                self._pictures.add((kept, len(kept) - 1), cut.pixels, group.id)
            told.append(pack.told.setdefault(cut.told, len(pack.told)))
        prompt, prompt_row = group.record.prompt, -1
        if prompt not in self._prompts:
            self._prompts.add(prompt)
            prompt_row, pack.num_prompts = pack.num_prompts, pack.num_prompts + 1
            pack.prompts.append(prompt)
            if len(pack.prompts) >= PROMPT_BATCH:
                self._encode_prompts()
        return {
            "size": fitted.size,
            "keys": keys,
            "key_rows": key_rows,
            "told": told,
            "prompt_row": prompt_row,
            "record": group.record.to_dict(None),
        }

    def _keep(self, place: tuple[list[tuple[Tensor, ...]], int], mean: Tensor, std: Tensor) -> None:
        kept, row = place
        moments = (mean, std) if self._spec.posterior == "sample" else (mean,)
        kept[row] = tuple(self._stored(tensor, "latents") for tensor in moments)
        self._pack.num_bytes += sum(tensor.nbytes for tensor in kept[row])

    def _encode_prompts(self) -> None:
        """Encodes the prompts that are waiting."""
        pack = self._pack
        for part in prompt_batches(pack.prompts, self._encoder):
            parts = {f"{TEXT}{name}": tensor for name, tensor in part.items()}
            for name, mask in self._encoder.text_masks.items():
                first = sum(len(earlier[f"{SHOWN}{name}"]) for earlier in pack.texts)
                shown, spans = without_hidden(parts.pop(f"{TEXT}{name}"), part[mask], first)
                parts |= {f"{SHOWN}{name}": shown, f"{SPANS}{name}": spans}
            texts = {name: self._stored(tensor, "text embeddings") for name, tensor in parts.items()}
            pack.texts.append(texts)
            pack.num_bytes += sum(tensor.nbytes for tensor in texts.values())
        pack.prompts.clear()

    def _stored(self, tensor: Tensor, what: str) -> Tensor:
        """The tensor as it is kept. UserError for numbers that fp16 does not hold."""
        if self._spec.dtype == "fp32" or tensor.dtype != torch.float32:
            return tensor.contiguous()
        half = tensor.half().contiguous()
        if not bool(torch.isfinite(half).all()):
            raise UserError(f"the {what} are too large for fp16: use dtype=fp32")
        return half

    def close_pack(self) -> None:
        """Encodes what is waiting and writes the pack, if it has a row."""
        pack = self._pack
        if not pack.rows:
            return
        self._pictures.flush()
        self._encode_prompts()
        tensors = {}
        for kind, latents in pack.latents.items():
            if not latents:
                continue
            for name, moments in zip(("mean", "std"), zip(*latents, strict=True), strict=False):
                tensors[f"{name}.{kind}"] = torch.stack(moments)
        tensors |= _joined(pack.texts) | _joined(map(self._size, pack.told))
        write_tensors(self._folder / f"{self._name}{TENSORS}", tensors)
        files.write_jsonl(self._folder / f"{self._name}{ROWS}", pack.rows)
        self._number += 1
        self._pack = _Pack()

    def _size(self, told: Told) -> dict[str, Tensor]:
        sizes = self._encoder.size_conditioning(*told)
        return {f"size.{name}": tensor.cpu() for name, tensor in sizes.items()}


def without_hidden(whole: Tensor, mask: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The rows of each prompt up to the last that its mask shows, one prompt after another; and their places.

    Where a mask shows none, all: a softmax over nothing but hidden rows weighs these.

    Args:
        whole: `[B, n, ...]`.
        mask: `[B, n]`, 0 hides.
        first: row where they will begin.

    Returns:
        `[sum of kept, ...]`, and `[B, 3]` int64: `first, kept, whole` of each prompt.
    """
    length = whole.shape[1]
    last = (mask.ne(0) * torch.arange(1, length + 1)).amax(dim=1)
    kept = last.where(last > 0, length)
    rows = [tensor[:count] for tensor, count in zip(whole, kept.tolist(), strict=True)]
    spans = torch.stack([first + kept.cumsum(0) - kept, kept, torch.full_like(kept, length)], dim=1)
    return torch.cat(rows), spans


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The parts' rows one after another, by name; nothing where there are none."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            columns.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in columns.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all. UserError where the disk refuses."""
    with files.atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary)
        except SafetensorError as error:
            raise UserError(
                f"{path} cannot be written ({brief(error)}): make room, then repeat the command"
            ) from error


def kind_of(size: Size) -> str:
    """The name of a bucket in a cache."""
    return f"{size[0]}x{size[1]}"


def packs_of(folder: Path, share: str | None = None) -> list[Path]:
    """The complete packs of a share (None: of all), in order, as the paths of their rows."""
    return sorted(folder.glob(f"{share or '?????-of-?????'}-??????{ROWS}"))

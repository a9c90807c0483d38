"""WebDataset tars, plain or gzip: a sample is the neighbouring files whose names agree up to the first dot.

    000017.json  000017.0.jpg       000017.1.jpg
    000017.json  000017.jpg_0       000017.jpg_1
    000017.json  000017.winner.jpg  000017.loser.jpg

Any suffix of a picture will do (`0.png`, `png_0`, `winner.webp`). The json holds `prompt` (or `caption`;
without either, the text of a `.txt`) and for the first two namings `label`: P(picture 0 preferred) in
[0, 1], or `label_0` and `label_1`; with neither, or null, the pair is unlabelled. `model_0`, `model_1` and
`user` are taken where they are there, other keys stay in `meta`, the sample's name as `__key__`. Files of
other names are left alone.

Samples are read one at a time, straight from the tar: nothing is unpacked, so no name in it can reach a file
outside, and links are never followed. Without a prompt a sample is a `missing_caption`, with a json that
cannot be read a `bad_text`, without a picture a `missing_image`, with anything twice `not_a_pair`.

Convention: which of winner and loser comes first hangs on the sample's id alone.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.common.errors import UserError, brief
from diffalign.common.files import printable
from diffalign.data.pictures import PICTURE_SUFFIXES, ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._base import Source, in_keyed_order, shards
from diffalign.data.sources._json import encodes, is_number

SUFFIXES = (".tar", ".tar.gz", ".tgz")
END_OF_TAR = bytes(1024)
GZIP_MAGIC = b"\x1f\x8b"
DRAIN_BYTES = 1 << 20

_NAME = re.compile(r"^(?P<key>(?:.*/)?[^./][^./]*)\.(?P<kind>[^/]+)$")
_FORMATS = "|".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
_PICTURE = re.compile(rf"^(?:(?P<before>0|1|winner|loser)\.(?:{_FORMATS})|(?:{_FORMATS})_(?P<after>0|1))$")


@dataclass
class _Sample:
    """What one sample holds: pictures by 0, 1, winner or loser; json and txt as they are."""

    key: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    count: int = 0

    @property
    def named(self) -> bool:
        """Whether the pictures are winner and loser."""
        return not self.pictures.keys().isdisjoint(("winner", "loser"))

    @property
    def ambiguous(self) -> bool:
        """Whether something is there twice, or pictures of both namings."""
        twice = self.count > len(self.pictures) + len(self.texts)
        return twice or (self.named and not {"0", "1"}.isdisjoint(self.pictures))


@dataclass
class Plugin(Source):
    """Pairs in tar files.

    Attributes:
        path: a tar, or a folder of them (`.tar`, `.tar.gz`, `.tgz`).
    """

    def files(self) -> list[Path]:
        """Returns the tars, sorted by name."""
        return list(self._shards().values())

    def rows(self) -> Iterator[Record]:
        """Yields every sample as a record; ids are `file.tar:number`, its name is in `meta`.

        Raises:
            UserError: no such file, no tar in the folder, or a tar that cannot be read to its end.
        """
        for name, path in self._shards().items():
            for index, sample in enumerate(_samples(path)):
                yield _record(f"{name}:{index}", sample)

    def _shards(self) -> dict[str, Path]:
        return shards(self.path, SUFFIXES, "tar")


def _samples(path: Path) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for key, kind, content in _members(path):
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        sample.count += 1
        match = _PICTURE.match(kind)
        if match is not None:
            sample.pictures[match["before"] or match["after"]] = content
        else:
            sample.texts[kind] = content
    if sample is not None:
        yield sample


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields (key, rest of the name, bytes) of each json, txt and picture, in the tar's order."""
    last = "its beginning"
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            if not packed:
                _check_end(path)
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all headers
                    last = printable(member.name)
                    match = _NAME.match(member.name)
                    kind = match["kind"].lower() if match else ""
                    if match and member.isreg() and (kind in ("json", "txt") or _PICTURE.match(kind)):
                        found = tar.extractfile(member)
                        assert found is not None  # a regular file
                        yield match["key"], kind, found.read()
            while packed and stream.read(DRAIN_BYTES):  # on to the checksum at the end
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a tar from {last} on ({brief(error)}); is its download complete?"
        ) from error


def _check_end(path: Path) -> None:
    """Raises ReadError for a tar without its end: cut between two files it would pass for a shorter one."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(END_OF_TAR)))
        if file.read() != END_OF_TAR:
            raise tarfile.ReadError("the end of the archive is missing")


def _record(where: str, sample: _Sample) -> Record:
    facts, prompt, problem = _facts(sample)
    models = [facts.pop(key, None) for key in ("model_0", "model_1")]
    user = facts.pop("user", None)
    labels = _labels(facts)
    candidates: list[Candidate] = []
    if sample.ambiguous:
        problem = problem or "not_a_pair"
    elif sample.named:
        winner, loser = (_candidate(where, sample, side) for side in ("winner", "loser"))
        candidates = in_keyed_order(where, winner, loser)
    elif labels is None:
        problem = problem or "bad_label"
    else:
        candidates = [_candidate(where, sample, side) for side in ("0", "1")]
        for candidate, label, model in zip(candidates, labels, models, strict=True):
            candidate.label, candidate.model = label, None if model is None else str(model)
    return Record(
        id=where,
        prompt=prompt,
        candidates=candidates,
        source="webdataset",
        user=None if user is None else str(user),
        meta={**facts, "__key__": printable(sample.key)},
        problem=problem,
    )


def _facts(sample: _Sample) -> tuple[dict[str, Any], str, str | None]:
    """Returns the json's other keys, the prompt, and why the sample cannot be used (None: it can)."""
    try:
        facts = json.loads(sample.texts.get("json", b"{}"))
        text = sample.texts.get("txt", b"").decode("utf-8-sig").strip()
        if not isinstance(facts, dict):
            return {}, "", "bad_text"
        said = [facts.pop(key, None) for key in ("prompt", "caption")]
        prompt = next((words for words in said if words is not None), text)
        if not isinstance(prompt, str):
            return facts, "", "bad_text"
    except (ValueError, RecursionError):
        return {}, "", "bad_text"
    if not encodes([prompt, facts]):
        return {}, "", "bad_text"
    return facts, prompt, None if prompt.strip() else "missing_caption"


def _labels(facts: dict[str, Any]) -> tuple[float | None, float | None] | None:
    """Takes the labels out of `facts` and returns them; (None, None) without any, None for no numbers."""
    label, *both = (facts.pop(key, None) for key in ("label", "label_0", "label_1"))
    if label is not None:
        return (float(label), 1.0 - float(label)) if is_number(label) else None
    if all(one is None or is_number(one) for one in both):
        first, second = (None if one is None else float(one) for one in both)
        return first, second
    return None


def _candidate(where: str, sample: _Sample, side: str) -> Candidate:
    return Candidate(image=ImageRef(data=sample.pictures.get(side), name=f"{where}:{side}"))

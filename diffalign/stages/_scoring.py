"""One pass over pictures for several scorers: decoded ahead, each network run once, known scores taken over.

Pictures are read, decoded and prepared by threads while the scorers work on the batch before.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pictures import BadImage, ImageRef, digest
from diffalign.stages._image_rows import Row, context_of

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.scorers import Scorer
    from diffalign.stages._score_cache import ScoreCache

MAX_ASPECT = 100
"""Longest longer side of a picture, in shorter ones."""

MOST_WORKERS = 16

AHEAD = 2
"""Batches that are decoded while one is scored."""

Entry = dict[str, Any]
"""What is written of one scorer and picture: value, scale, version, higher_is_better, parts."""


@dataclass
class Opened:
    """A row's picture on its way through the pass.

    Attributes:
        row: the row.
        folder: that the row's paths start from.
        digest: what identifies the picture's bytes, None without any.
        known: label -> entry, of scores that need not be made again.
        picture: decoded; None where nothing is left to score, or it is broken.
        problem: why it is broken.
    """

    row: Row
    folder: Path
    digest: str | None = None
    known: dict[str, Entry] = field(default_factory=dict)
    picture: Image.Image | None = None
    problem: str | None = None


def score_batches(
    rows: Sequence[Row],
    folder: Path,
    scorers: Mapping[str, Scorer],
    *,
    batch_size: int,
    workers: int | None = None,
    cache: ScoreCache | None = None,
) -> Iterator[list[Row]]:
    """Yields the rows, batch by batch, with `scores`, `errors` and the picture's `digest` added.

    Picture paths stay as they are. A picture that cannot be decoded scores NaN (null on disk) under every
    scorer and says why in `errors`. Where a scorer judges groups, the rows of a prompt come together, in one
    batch however many they are.

    Args:
        rows: of pictures (`image` is a path, or an ImageRef), with what the scorers need.
        folder: that the rows' paths start from.
        scorers: label -> loaded scorer.
        batch_size: pictures decoded and scored at a time.
        workers: threads that decode and prepare; None: one for each core, at most MOST_WORKERS.
        cache: of earlier scores.
    """
    relative = any(scorer.relative for scorer in scorers.values())
    waiting = deque(batches_of(rows, batch_size, whole_groups=relative))
    coming: deque[list[Future[Opened]]] = deque()
    with ExitStack() as stack:
        for memo in (memo for scorer in scorers.values() for memo in scorer.memos()):
            stack.enter_context(memo.one_pass())
        threads = workers or min(os.cpu_count() or 1, MOST_WORKERS)
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="decode"))
        try:
            while waiting or coming:
                while waiting and len(coming) <= AHEAD:
                    batch = waiting.popleft()
                    coming.append([pool.submit(_open, row, folder, scorers, cache) for row in batch])
                yield _score_batch([future.result() for future in coming.popleft()], scorers, cache)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def batches_of(rows: Sequence[Row], size: int, *, whole_groups: bool) -> list[list[Row]]:
    """Returns the rows in batches of `size`; with `whole_groups` no group is split, however large it is."""
    if not whole_groups:
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches: list[list[Row]] = []
    for group in groups_of(rows).values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def groups_of(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """Returns the rows by what scorers that judge groups go by: the context's `group`, else the prompt."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        named = (row.get("context") or {}).get("group")
        groups.setdefault((row.get("prompt") or "") if named is None else named, []).append(row)
    return groups


def _open(row: Row, folder: Path, scorers: Mapping[str, Scorer], cache: ScoreCache | None) -> Opened:
    """Reads, decodes and prepares one picture, in a thread; nothing more than is left to be scored."""
    opened = Opened(row, folder)
    image = row["image"]
    if not isinstance(image, ImageRef):
        image = ImageRef(path=folder / image, name=image)
    try:
        content = image.read()
        opened.digest = digest(content).hex()
        if cache is not None:
            opened.known = cache.find(opened.digest, row, scorers)
        if len(opened.known) < len(scorers):
            opened.picture = _of_bearable_shape(image.decode(content), image.name)
            for label, scorer in scorers.items():
                if label not in opened.known:
                    scorer.prepare_ahead([opened.picture])
    except BadImage as error:
        opened.picture, opened.problem = None, str(error)
    except MemoryError:
        opened.picture, opened.problem = None, f"picture {image.name}: needs more memory than there is"
    return opened


def _of_bearable_shape(picture: Image.Image, name: str) -> Image.Image:
    """Returns the picture, if its shorter side can be brought to a network's without a mile of the other."""
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        width, height = picture.size
        raise BadImage(name, "odd_shape", f"is {width}x{height} pixels: too narrow to be scored")
    return picture


def _score_batch(batch: list[Opened], scorers: Mapping[str, Scorer], cache: ScoreCache | None) -> list[Row]:
    """Returns the rows of a batch with their scores; pictures are forgotten afterwards."""
    entries: dict[str, list[Entry]] = {}
    errors: list[dict[str, str]] = [{} for _ in batch]
    for label, scorer in scorers.items():
        places = [
            k for k, opened in enumerate(batch) if opened.picture is not None and label not in opened.known
        ]
        fresh = dict(zip(places, _scored(scorer, [batch[k] for k in places]), strict=True))
        column: list[Entry] = []
        for place, opened in enumerate(batch):
            entry, error = fresh.get(place, (opened.known.get(label), opened.problem))
            if error is not None:
                errors[place][label] = error
            column.append(entry or entry_of(scorer, None))
        entries[label] = column
        if cache is not None and places:
            cache.keep(scorer, [(batch[k].digest, batch[k].row, fresh[k][0]) for k in places])
    pictures = [opened.picture for opened in batch if opened.picture is not None]
    for memo in (memo for scorer in scorers.values() for memo in scorer.memos()):
        memo.forget(pictures)
    return [
        {
            **opened.row,
            "digest": opened.digest,
            "scores": {**(opened.row.get("scores") or {}), **{label: entries[label][k] for label in scorers}},
            "errors": {**_others(opened.row.get("errors"), scorers), **errors[k]},
        }
        for k, opened in enumerate(batch)
    ]


def _others(errors: Mapping[str, str] | None, scorers: Mapping[str, Scorer]) -> dict[str, str]:
    """Returns what earlier scorers said of the picture, other than those that judged it now."""
    return {label: error for label, error in (errors or {}).items() if label not in scorers}


def _scored(scorer: Scorer, batch: list[Opened]) -> list[tuple[Entry, str | None]]:
    """Returns entry and error of each picture."""
    if not batch:
        return []
    prompts = [opened.row.get("prompt") or "" for opened in batch]
    needed = "context" in scorer.needs
    contexts = [context_of(opened.row, opened.folder, needed=needed) for opened in batch]
    result = scorer.score(
        [opened.picture for opened in batch if opened.picture is not None],  # all have one
        prompts if scorer.takes("prompts") else None,
        context=contexts if scorer.takes("context") else None,
    )
    values, parts = result.values.tolist(), {name: part.tolist() for name, part in result.parts.items()}
    found = []
    for place, value in enumerate(values):
        entry = entry_of(scorer, value, {name: part[place] for name, part in parts.items()})
        error = result.errors[place] or ("the scorer gave NaN" if entry["value"] is None else None)
        found.append((entry, error))
    return found


def entry_of(scorer: Scorer, value: float | None, parts: Mapping[str, float] | None = None) -> Entry:
    """Returns what is written of a value; NaN and infinities become None: JSON has no word for them."""
    return {
        "value": _or_none(value),
        "scale": scorer.scale,
        "version": scorer.version,
        "higher_is_better": scorer.higher_is_better,
        "parts": {name: _or_none(part) for name, part in (parts or {}).items()},
    }


def _or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

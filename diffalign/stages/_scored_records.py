"""Preference records through the scoring pass: the pictures of every record get the scores of the scorers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.records import Candidate, Record, Score
from diffalign.stages._image_rows import Row, check_needs
from diffalign.stages._scoring import score_batches

if TYPE_CHECKING:
    from diffalign.scorers import Scorer
    from diffalign.stages._score_cache import ScoreCache

BATCHES_AT_ONCE = 16
"""Batches of pictures whose records are held at a time."""


def score_records(
    records: Iterable[Record],
    scorers: Mapping[str, Scorer],
    *,
    batch_size: int,
    cache: ScoreCache | None = None,
) -> Iterator[list[Record]]:
    """Yields the records in order, some at a time, with scores added to their candidates.

    Scores of the same name are replaced. A picture that cannot be judged has NaN, and the reason in `errors`
    of its candidate. A scorer that judges groups compares the pictures of one record. What a scorer needs to
    know beside the prompt is the record's `meta`.

    Args:
        records: with pictures in files or in memory.
        scorers: label -> loaded scorer; without any the records come as they are.
        batch_size: pictures decoded and scored at a time.
        cache: of earlier scores.

    Raises:
        UserError: a record lacks what a scorer needs.
    """
    held: list[Record] = []
    pictures = 0
    for record in records:
        held.append(record)
        pictures += len(record.candidates)
        if pictures >= BATCHES_AT_ONCE * batch_size:
            yield _scored(held, scorers, batch_size, cache)
            held, pictures = [], 0
    if held:
        yield _scored(held, scorers, batch_size, cache)


def _scored(
    records: list[Record], scorers: Mapping[str, Scorer], batch_size: int, cache: ScoreCache | None
) -> list[Record]:
    """Returns the records with scores."""
    if not scorers:
        return records
    rows = [
        _row(record, candidate, f"{index}:{place}", scorers)
        for index, record in enumerate(records)
        for place, candidate in enumerate(record.candidates)
    ]
    check_needs([{**row, "id": row["name"]} for row in rows], scorers)
    batches = score_batches(rows, Path(), scorers, batch_size=batch_size, cache=cache)
    found = {row["id"]: row for batch in batches for row in batch}
    return [
        replace(
            record,
            candidates=[
                _with_scores(candidate, found[f"{index}:{place}"])
                for place, candidate in enumerate(record.candidates)
            ],
        )
        for index, record in enumerate(records)
    ]


def _row(record: Record, candidate: Candidate, key: str, scorers: Mapping[str, Scorer]) -> Row:
    """Returns a candidate as the scoring pass takes it."""
    row: Row = {
        "id": key,
        "name": record.id,
        "image": candidate.image,
        "prompt": record.prompt if candidate.prompt is None else candidate.prompt,
        "meta": record.meta,
    }
    if any(scorer.relative for scorer in scorers.values()):
        needed = any("context" in scorer.needs for scorer in scorers.values())
        row["context"] = {**(record.meta if needed else {}), "group": key.partition(":")[0]}
    return row


def _with_scores(candidate: Candidate, row: Mapping[str, Any]) -> Candidate:
    scores = {name: Score.from_dict(entry, f"score {name}") for name, entry in row["scores"].items()}
    errors = {"errors": row["errors"]} if row["errors"] else {}
    kept = {name: value for name, value in candidate.extra.items() if name != "errors"}
    return replace(candidate, scores={**candidate.scores, **scores}, extra={**kept, **errors})

"""Groups of judged pictures to preference records: pairs or ranked lists, labelled by scorers or people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from diffalign.stages._grouping import Drops, Group, Picture
from diffalign.stages._votes import Judges

if TYPE_CHECKING:
    from diffalign.data.records import Candidate, Record

JUDGED = ("label", "rank", "votes")
"""Fields of a candidate that hold a judgement."""


def preferences(
    groups: Sequence[Group], judges: Judges | None, source: str | None, how: Mapping[str, Any], drops: Drops
) -> Iterator[Record]:
    """Yields the preference records, group after group.

    Args:
        groups: what is compared.
        judges: who decides; None for lists that are not ranked here.
        source: of the records that scorers label; None: people's ranks or votes decide, and stay in the
            records, whose source stays too.
        how: the keys how, ties, max_pairs and seed of `pair`.
        drops: counts what is left out.
    """
    for group in groups:
        pictures = group.pictures
        if len(pictures) < 2:
            drops.add("single_picture", pictures[0].id if pictures else group.name)
        elif how["how"] == "lists":
            if how["ties"] == "drop" and all(picture.values == pictures[0].values for picture in pictures):
                drops.add("tie", _name(group, pictures))
            else:
                ranked = [{} for _ in pictures] if judges is None else judges.ranked(pictures)
                yield _record(group, pictures, ranked, source)
        else:
            assert judges is not None
            made = list(_pairs(group, judges, source, how, drops))
            yield from _first(made, group, how["max_pairs"], how["seed"], drops)


def _pairs(
    group: Group, judges: Judges, source: str | None, how: Mapping[str, Any], drops: Drops
) -> Iterator[Record]:
    """Yields the pairs of a group."""
    every = how["how"] == "all_pairs"
    for pair in combinations(group.pictures, 2) if every else [_extremes(group.pictures, judges)]:
        given = judges.judged(*pair, how["ties"])
        if given is None:
            drops.add("tie", _name(group, pair))
        else:
            yield _record(group, pair, given, source)


def _first(made: list[Record], group: Group, most: int | None, seed: int, drops: Drops) -> Iterator[Record]:
    """Yields at most `most` of a group's pairs, drawn by seed, prompt and id, in their order."""
    if most is None or len(made) <= most:
        yield from made
        return
    from diffalign.common.draws import seed_of

    by_lot = sorted(made, key=lambda record: seed_of(seed, "max_pairs", group.prompt, record.id))
    kept = {record.id for record in by_lot[:most]}
    for record in made:
        if record.id in kept:
            yield record
        else:
            drops.add("over_max_pairs", record.id)


def _extremes(pictures: Sequence[Picture], judges: Judges) -> tuple[Picture, Picture]:
    """Returns the best and the worst picture, in file order; of equal ones the first, never one twice."""
    points = judges.standings(pictures)
    best = max(range(len(pictures)), key=points.__getitem__)
    rest = [index for index in range(len(pictures)) if index != best]
    worst = min(rest, key=points.__getitem__)
    first, second = sorted((best, worst))
    return pictures[first], pictures[second]


def _record(
    group: Group, pictures: Sequence[Picture], judged: Sequence[Mapping[str, Any]], source: str | None
) -> Record:
    """Returns the record of some pictures of a group; `judged` holds what each one is given."""
    from diffalign.data.records import Record

    pairs = zip(pictures, judged, strict=True)
    if source is None:
        assert group.record is not None
        candidates = [_labelled(picture.candidate, group.record, given) for picture, given in pairs]
        return replace(group.record, id=_name(group, pictures), candidates=candidates)
    if group.record is not None:
        before = group.record
        return replace(
            before,
            id=_name(group, pictures),
            candidates=[_given(_set_aside(picture.candidate, before), given) for picture, given in pairs],
            source=source,
            meta={**({"source": before.source} if before.source else {}), **before.meta},
        )
    meta = dict(pictures[0].meta)
    if pictures[0].prompt_id is not None:
        meta["prompt_id"] = pictures[0].prompt_id
    return Record(
        id=_name(group, pictures),
        prompt=group.prompt,
        candidates=[_given(picture.candidate, given) for picture, given in pairs],
        source=source,
        meta=meta,
    )


def _name(group: Group, pictures: Sequence[Picture]) -> str:
    """Returns the id of some pictures of a group: their record's own where they are all of it."""
    if group.record is not None and len(pictures) == len(group.record.candidates):
        return group.record.id
    return "|".join(picture.id for picture in pictures)


def _given(candidate: Candidate, judged: Mapping[str, Any]) -> Candidate:
    """Returns the candidate with this judgement and no other."""
    return replace(candidate, label=judged.get("label"), rank=judged.get("rank"), votes=judged.get("votes"))


def _labelled(candidate: Candidate, record: Record, given: Mapping[str, Any]) -> Candidate:
    """Returns the candidate as it is, but for the label that it is given, if any."""
    return replace(_set_aside(candidate, record, tuple(given)), **given)


def _set_aside(candidate: Candidate, record: Record, fields: Sequence[str] = JUDGED) -> Candidate:
    """Returns the candidate whose judgement is kept as human_label (human_rank, human_votes).

    Where scorers gave it, it is called old_label: people's own, kept before, stays what it is.
    """
    whose = "old" if record.labelled_by_scorers else "human"
    before = {name: getattr(candidate, name) for name in fields}
    kept = {f"{whose}_{name}": value for name, value in before.items() if value is not None}
    return replace(candidate, extra={**candidate.extra, **kept})

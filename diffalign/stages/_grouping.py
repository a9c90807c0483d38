"""Judged pictures on their way to preferences: read, checked, grouped, counted. For `pair`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common.errors import UserError
from diffalign.stages._run import refuse_unfinished

if TYPE_CHECKING:
    from diffalign.data.records import Candidate, Record

SCORES = "scores.jsonl"

PEOPLE = {"rank": False, "votes": True}
"""Fields of a candidate that pictures can be compared by instead of scores: whether higher is better."""


@dataclass(frozen=True)
class Row:
    """One row of a scores.jsonl: what it says, and the picture with its scores."""

    said: dict[str, Any]
    candidate: Candidate

    @property
    def id(self) -> str:
        """The picture's id."""
        return str(self.said["id"])


@dataclass
class Drops:
    """What was left out, by reason.

    Pictures: no_score, nan_score; no_rank and no_votes, which are a record's where none of its pictures has
    any. Prompts or records: single_picture; bad_text, missing_image and corrupt_image of data that is
    labelled anew. Pairs and lists: tie, over_max_pairs.
    """

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts one."""
        self.names.setdefault(reason, []).append(name)

    def counts(self) -> dict[str, int]:
        """Returns reason -> how many."""
        return {reason: len(names) for reason, names in self.names.items()}

    def made(self, what: str, count: int) -> dict[str, Any]:
        """Returns the manifest's counts of the `what` ("pairs") of which `count` were written."""
        return {
            f"{what}_asked": count + sum(len(self.names.get(why, [])) for why in ("tie", "over_max_pairs")),
            what: count,
            "dropped": self.counts(),
        }

    def words(self) -> str:
        """Returns the counts in words."""
        return ", ".join(f"{n} {reason}" for reason, n in self.counts().items()) or "none dropped"


@dataclass
class Picture:
    """A judged picture: its row's id, the candidate, what decides (higher is better) and its meta."""

    id: str
    candidate: Candidate
    values: dict[str, float]
    prompt_id: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """Pictures that are compared with one another: those of a prompt, or of a record.

    Attributes:
        prompt: what they are of.
        pictures: those that have all of what decides, in the order of the file.
        record: that they come from; None where they were grouped by prompt.
    """

    prompt: str
    pictures: list[Picture]
    record: Record | None = None

    @property
    def name(self) -> str:
        """What a group without pictures is called."""
        return self.prompt if self.record is None else self.record.id


def scores_file(images: str) -> Path:
    """Returns the file of scored pictures. UserError when there is none, or only half of one."""
    path = Path(images)
    found = path / SCORES if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"images={path}: no file {found}; give the {SCORES} of diffalign score or its folder")
    refuse_unfinished(found.parent)
    return found


def read_rows(path: Path) -> list[Row]:
    """Returns the scored pictures. UserError naming the line for anything else."""
    from diffalign.data.records import Candidate, read_lines

    known = ("image", "model", "seed", "scores")
    rows: dict[str, Row] = {}
    for where, row in read_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        for key in ("id", "image", "prompt", "scores"):
            if key not in row:
                raise UserError(
                    f"{where} has no '{key}' (it has {', '.join(row)}): give a {SCORES} of diffalign score"
                )
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: prompt is {row['prompt']!r}, expected text")
        name = str(row["id"])
        if name in rows:
            raise UserError(f"{where}: a second picture with the id {row['id']!r}; ids must differ")
        candidate = Candidate.from_dict({key: row[key] for key in known if key in row}, path.parent, where)
        candidate.extra = {"id": name}
        rows[name] = Row(row, candidate)
    if not rows:
        raise UserError(f"{path} holds no scored picture")
    return list(rows.values())


def scorers_of(rows: Iterable[Row]) -> list[str]:
    """Returns the names of all scorers, those included that failed on every picture."""
    return sorted({name for row in rows for name in (*row.candidate.scores, *(row.said.get("errors") or {}))})


def direction(candidates: Iterable[Candidate], name: str) -> bool:
    """Returns whether higher is better: as the scores say, else the scorer plug-in of this name, else True.

    Raises UserError when the scores disagree, or are on several scales or of several versions.
    """
    from diffalign.common import plugins

    scores = [candidate.scores[name] for candidate in candidates if name in candidate.scores]
    kinds = Counter((score.scale, score.version) for score in scores)
    if len(kinds) > 1:
        listed = ", ".join(
            f"{scale or 'no scale'} {version or 'no version'}" for scale, version in sorted(kinds)
        )
        raise UserError(
            f"scores of '{name}' are not comparable ({listed}): score all pictures with one scorer"
        )
    said = {score.extra["higher_is_better"] for score in scores if "higher_is_better" in score.extra}
    if len(said) > 1 or not all(isinstance(word, bool) for word in said):
        raise UserError(f"scores of '{name}' disagree on higher_is_better ({sorted(map(str, said))})")
    if said:
        return bool(said.pop())
    if name.replace("-", "_") in plugins.names("scorers"):
        scorer: Any = plugins.get("scorers", name)
        return bool(scorer.higher_is_better)
    return True


def groups_by_prompt(
    rows: Iterable[Row], directions: dict[str, bool], limit: int | None, drops: Drops
) -> list[Group]:
    """Returns the pictures of each prompt, prompts in the order of the file (groups may be empty).

    Args:
        rows: all scored pictures.
        directions: the deciding scorers, each with whether higher is better; a picture without a finite score
            by one of them is dropped.
        limit: take the first so many prompts only.
        drops: counts what is left out.
    """
    groups: dict[str, Group] = {}
    for row in rows:
        prompt = row.said["prompt"]
        if prompt not in groups and limit is not None and len(groups) >= limit:
            continue
        group = groups.setdefault(prompt, Group(prompt, []))
        prompt_id = row.said.get("prompt_id")
        named = None if prompt_id is None else str(prompt_id)
        picture = _picture(row.id, row.candidate, directions, drops)
        if picture is not None:
            picture.prompt_id, picture.meta = named, dict(row.said.get("meta") or {})
            group.pictures.append(picture)
    return list(groups.values())


def groups_of_records(records: Iterable[Record], directions: dict[str, bool], drops: Drops) -> list[Group]:
    """Returns the pictures of each record; arguments as in `groups_by_prompt`."""
    groups = []
    for record in records:
        pictures = [
            _picture(f"{record.id}:{place}", candidate, directions, drops)
            for place, candidate in enumerate(record.candidates)
        ]
        groups.append(Group(record.prompt, [one for one in pictures if one is not None], record))
    return groups


def groups_by_people(records: Iterable[Record], name: str, drops: Drops) -> list[Group]:
    """Returns the pictures of each record that has any with `name`, one of PEOPLE; they are left as they are.

    `drops` counts records and pictures without it (and ranks that are no number).
    """
    groups = []
    sign = 1.0 if PEOPLE[name] else -1.0
    for record in records:
        values = [_said(candidate, name) for candidate in record.candidates]
        if all(value is None for value in values):
            drops.add(f"no_{name}", record.id)
            continue
        pictures = []
        for place, (candidate, value) in enumerate(zip(record.candidates, values, strict=True)):
            if value is None:
                drops.add(f"no_{name}", f"{record.id}:{place}")
            else:
                pictures.append(Picture(f"{record.id}:{place}", candidate, {name: sign * value}))
        groups.append(Group(record.prompt, pictures, record))
    return groups


def known_of(records: Iterable[Record], wanted: Collection[str]) -> list[str]:
    """Returns what pictures can be compared by, sorted: the scorers' names, and "rank" and "votes".

    It reads no further than until all `wanted` ones have been seen.
    """
    known: set[str] = set()
    for record in records:
        for candidate in record.candidates:
            known.update(name for name in candidate.scores if name not in PEOPLE)
            known.update(name for name in PEOPLE if _said(candidate, name) is not None)
        if known.issuperset(wanted):
            break
    return sorted(known)


def _said(candidate: Candidate, name: str) -> float | None:
    """Returns the field as a finite number, or None."""
    value: float | None = getattr(candidate, name)
    return None if value is None or not math.isfinite(value) else float(value)


def _picture(name: str, candidate: Candidate, directions: dict[str, bool], drops: Drops) -> Picture | None:
    """Returns the picture with its deciding scores; None, and counted, where one of them is missing."""
    scores = candidate.scores
    if any(scorer not in scores for scorer in directions):
        drops.add("no_score", name)
        return None
    if not all(math.isfinite(scores[scorer].value) for scorer in directions):
        drops.add("nan_score", name)
        return None
    values = {
        scorer: float(scores[scorer].value if higher else -scores[scorer].value)
        for scorer, higher in directions.items()
    }
    return Picture(name, _outspoken(candidate, directions), values)


def _outspoken(candidate: Candidate, directions: dict[str, bool]) -> Candidate:
    """Returns the candidate whose scores say that lower is better where only their scorer's code did."""
    scores = {
        name: score
        if directions.get(name, True)
        else replace(score, extra={**score.extra, "higher_is_better": False})
        for name, score in candidate.scores.items()
    }
    return replace(candidate, scores=scores)


def score_facts(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Returns what a manifest says of each scorer over the pictures of the records, each picture once.

    That is scale, version, higher_is_better, and n, min, max and mean of the finite values, on the scorer's
    own scale. A scorer that does not decide and whose scores cannot be compared is said and left out.
    """
    from diffalign.common.progress import say
    from diffalign.data import writers

    candidates = {
        (record.prompt, candidate.extra.get("id"), candidate.image.path): candidate
        for record in records
        for candidate in record.candidates
    }
    facts: dict[str, dict[str, Any]] = {}
    for name in sorted({name for candidate in candidates.values() for name in candidate.scores}):
        scores = [one.scores[name] for one in candidates.values() if name in one.scores]
        try:
            higher_is_better = direction(candidates.values(), name)
        except UserError as error:
            say(f"pair: left out of the manifest: {error}")
            continue
        values = [score.value for score in scores]
        found = writers.score_facts(scores[0].scale, scores[0].version, higher_is_better, values)
        facts |= {} if found is None else {name: found}
    return facts

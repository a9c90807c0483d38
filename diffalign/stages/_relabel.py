"""`pair data=...`: existing preference data scored anew, so that scorers label it instead of people.

OUT/scored.jsonl holds the records as they were, their pictures in files and with scores. It grows batch by
batch, and a run that was killed goes on with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.common.progress import Progress
from diffalign.data.pictures import BadImage, ImageRef, digest, usual_suffix
from diffalign.data.records import BadLabel, Candidate, Record, read_lines
from diffalign.evaluation.agreement import accuracy, judged_pairs, mean_interval
from diffalign.stages._grouping import Drops, Group
from diffalign.stages._scored_records import score_records
from diffalign.stages._votes import Judges

if TYPE_CHECKING:
    from diffalign.data.sources._base import Source
    from diffalign.scorers import Scorer
    from diffalign.stages._score_cache import ScoreCache

SCORED = "scored.jsonl"
PICTURES = "images"


def write_scored(
    data: Source,
    scorers: Mapping[str, Scorer],
    folder: Path,
    drops: Drops,
    *,
    limit: int | None,
    batch_size: int,
    cache: ScoreCache | None,
) -> Path:
    """Returns the path of the scored records in `folder`, after scoring those that are not there yet.

    Args:
        data: the records; labelled or not.
        scorers: label -> loaded scorer; none: the scores that are there are taken.
        folder: claimed by this run.
        drops: counts records that cannot be scored.
        limit: the first so many records only.
        batch_size: pictures scored at a time.
        cache: of earlier scores.

    Raises:
        UserError: no record can be scored, or one lacks what a scorer needs.
    """
    target = folder / SCORED
    files.trim_torn_tail(target)
    for place in (folder / PICTURES).glob("*"):
        files.remove_leftovers(place)
    done = {str(row["id"]) for _, row in read_lines(target)} if target.exists() else set[str]()
    total = data.size() if limit is None else limit
    with Progress("score" if scorers else "read", total, "records", initial=len(done)) as progress:
        left = _to_score(data, folder, drops, limit, done)
        for batch in score_records(left, scorers, batch_size=batch_size, cache=cache):
            files.append_jsonl(target, [record.to_dict(folder) for record in batch])
            progress.update(len(batch))
    if not target.exists():
        raise UserError(f"data.path={data.path} has no record with two pictures ({drops.words()})")
    return target


def _to_score(
    data: Source, folder: Path, drops: Drops, limit: int | None, done: set[str]
) -> Iterator[Record]:
    """Yields the records that are not done, their pictures in files."""
    for number, record in enumerate(data.records()):
        if number == limit:
            return
        if record.problem is not None:
            drops.add(record.problem, record.id)
        elif len(record.candidates) < 2:
            drops.add("single_picture", record.id)
        else:
            try:
                kept = replace(record, candidates=[_kept(one, folder) for one in record.candidates])
                json.dumps(files.to_plain(kept.to_dict(folder)), ensure_ascii=False).encode()
            except BadImage as error:
                drops.add(error.reason, record.id)
                continue
            except UnicodeEncodeError:  # half a character, which no file can hold: said before the scoring
                drops.add("bad_text", record.id)
                continue
            if record.id not in done:
                yield kept


def _kept(candidate: Candidate, folder: Path) -> Candidate:
    """Returns the candidate with its picture in a file, and no label that is NaN, which JSON lacks."""
    label = candidate.label
    return replace(
        candidate,
        image=keep_picture(candidate.image, folder / PICTURES),
        label=label if label is None or math.isfinite(label) else None,
    )


def keep_picture(image: ImageRef, folder: Path) -> ImageRef:
    """Returns a picture that is in a file: its own, or one below `folder` named by its bytes.

    Raises:
        BadImage: a picture in memory that has no bytes or is of no known format (it is not decoded here).
    """
    if image.data is None and image.path is not None:
        return image
    content = image.read()
    name = digest(content).hex()
    path = folder / name[:2] / f"{name}{usual_suffix(content, image.name)}"
    if not path.is_file():
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return ImageRef(path=path, name=image.name)


def agreement_with_people(groups: Sequence[Group], judges: Judges) -> dict[str, Any] | None:
    """Returns how often the scorers agree with the labels before; None where those decide no pair.

    Counted are all pairs of pictures of a record that its labels or ranks decide and the scorers could judge:
    1 where the same picture is preferred, 0 where the other is, 0.5 where the scorers find both equal. Ties
    before are counted apart. The interval is by bootstrap over prompts.
    """
    targets: list[float] = []
    leads: list[float] = []
    prompts: list[str] = []
    for group in groups:
        pictures = {picture.id: picture for picture in group.pictures}
        for first, second, target in _judged_before(group):
            one, other = pictures.get(f"{group.name}:{first}"), pictures.get(f"{group.name}:{second}")
            if one is not None and other is not None:
                targets.append(target)
                leads.append(judges.share(one, other) - 0.5)
                prompts.append(group.prompt)
    found = mean_interval(accuracy(targets, leads), prompts)
    return None if found is None else {**found.as_dict(), "ties_before": targets.count(0.5)}


def _judged_before(group: Group) -> list[tuple[int, int, float]]:
    """Returns the pairs that a record's own labels or ranks judge; none where they are no preference."""
    try:
        return [] if group.record is None else judged_pairs(group.record)
    except BadLabel:
        return []

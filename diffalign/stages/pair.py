"""Turn scored pictures into preferences: of the pictures of one prompt, the better against the worse.

Reads scores.jsonl (written by `diffalign score`) and writes OUT/preferences.jsonl, which `data=jsonl` reads.
Pictures are grouped by prompt. A pair keeps the order of the file, so that the winner's place tells nothing;
so does a list, which holds all pictures of a prompt with the scores of all scorers. Pairs within the margin
are ties: dropped, or kept as 0.5/0.5 with ties=soft. Pictures without a valid score are dropped; all drops
are counted and named in the manifest, beside the scale and range of each scorer's numbers.

Examples:
    diffalign pair images=scored out=pairs
    diffalign pair images=scored/scores.jsonl out=pairs by=clip how=all_pairs margin=0.01
    diffalign pair images=scored out=pairs by=scene ties=soft
    diffalign pair images=scored out=lists how=lists
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.common.config import resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.stages._grouping import (
    Drops,
    Picture,
    deciding_scorer,
    direction,
    groups_by_prompt,
    read_rows,
    score_facts,
    scorers_of,
    scores_file,
)
from diffalign.stages._run import claim_folder

if TYPE_CHECKING:
    from diffalign.data.records import Record

PREFERENCES = "preferences.jsonl"


def pair(
    *,
    images: str,
    out: str,
    by: str | None = None,
    how: Literal["best_worst", "all_pairs", "lists"] = "best_worst",
    margin: float = 0.0,
    ties: Literal["drop", "soft"] = "drop",
    limit: int | None = None,
) -> Path:
    """Returns the path of the written preferences.jsonl.

    Args:
        images: the scored pictures: a scores.jsonl or the folder that holds it.
        out: folder for preferences.jsonl and the manifest.
        by: which scorer decides. Pairs need it where the file holds several. Lists get their `rank` from it;
            without it they have none, and their pictures need the scores of all scorers.
        how: `best_worst` makes one pair a prompt, `all_pairs` every pair of its pictures, `lists` one record
            a prompt with all its pictures.
        margin: the smallest difference of scores, on the scorer's scale, that is a preference; a smaller one,
            and always an exact tie, is none. Not for lists.
        ties: `drop` pairs within the margin or keep them as `soft` targets of 0.5; likewise lists whose
            pictures all have equal scores.
        limit: use the first so many prompts only.

    Raises:
        UserError: no such file or scorer, a row that is no scored picture, scores of several scales or
            versions, or nothing to write; nothing is written then.
    """
    from diffalign.common import files
    from diffalign.common.progress import say

    recipe = resolved_recipe(pair, locals())
    _refuse_bad_arguments(how, margin, ties, limit)
    path = scores_file(images)
    rows = read_rows(path)
    all_decide = how == "lists" and by is None and bool(scorers_of(rows))
    names = scorers_of(rows) if all_decide else [deciding_scorer(rows, by, path)]
    directions = {name: direction((row.candidate for row in rows), name) for name in names}
    drops = Drops()
    groups = groups_by_prompt(rows, directions, limit, drops)
    records = list(_preferences(groups, how, margin, ties, None if all_decide else names[0], drops))
    what = "lists" if how == "lists" else "pairs"
    found = f"{len(groups)} prompts ({drops.words()})"
    if not records:
        remedy = (
            "lower margin or use ties=soft" if "tie" in drops.names else "score several pictures a prompt"
        )
        raise UserError(f"{path}: no {what[:-1]} out of {found}: {remedy}")
    decides = {key: value for key, value in recipe.items() if key not in ("images", "out")}
    same = {**decides, "by": "+".join(names), "images": files.file_identity(path)}
    extra: dict[str, Any] = {"scorers": names, "scores": score_facts(records)}
    if not all_decide:
        extra |= {"scorer": names[0], "higher_is_better": directions[names[0]]}
    counts = {"pictures": len(rows), "prompts": len(groups), **drops.made(what, len(records))}
    with claim_folder(out, stage="pair", recipe=recipe, same=same):
        target = _write(Path(out), records, path, recipe, counts, drops, extra)
    say(f"pair: {len(records)} {what} by {', '.join(names)} out of {found}: {target}")
    return target


def _write(
    folder: Path,
    records: list[Record],
    path: Path,
    recipe: dict[str, Any],
    counts: dict[str, Any],
    drops: Drops,
    extra: dict[str, Any],
) -> Path:
    """Writes preferences and manifest; returns the path of the former."""
    from diffalign.common import manifest
    from diffalign.data.records import write_records

    target = folder / PREFERENCES
    manifest.withdraw_manifest(folder)
    write_records(target, records)
    manifest.write_manifest(
        folder,
        stage="pair",
        recipe=recipe,
        inputs={"images": path},
        counts=counts,
        dropped=drops.names,
        extra=extra,
    )
    return target


def _preferences(
    groups: dict[str, list[Picture]], how: str, margin: float, ties: str, name: str | None, drops: Drops
) -> Iterator[Record]:
    """Yields the preference records, prompt after prompt; `name` decides (None: all scorers, of lists)."""
    for prompt, pictures in groups.items():
        if len(pictures) < 2:
            drops.add("single_picture", pictures[0].id if pictures else prompt)
        elif how == "lists":
            if ties == "drop" and all(picture.values == pictures[0].values for picture in pictures):
                drops.add("tie", "|".join(picture.id for picture in pictures))
            else:
                yield _list_record(prompt, pictures, name)
        else:
            assert name is not None
            yield from _pair_records(prompt, pictures, how, margin, ties, name, drops)


def _pair_records(
    prompt: str, pictures: list[Picture], how: str, margin: float, ties: str, name: str, drops: Drops
) -> Iterator[Record]:
    """Yields the pairs of a prompt."""
    for first, second in combinations(pictures, 2) if how == "all_pairs" else [_extremes(pictures, name)]:
        lead = first.values[name] - second.values[name]
        tied = lead == 0.0 or abs(lead) < margin
        if tied and ties == "drop":
            drops.add("tie", f"{first.id}|{second.id}")
            continue
        target = 0.5 if tied else float(lead > 0)
        labels = {"label": target}, {"label": 1.0 - target}
        yield _record(prompt, [first, second], labels, name)


def _extremes(pictures: list[Picture], name: str) -> tuple[Picture, Picture]:
    """Returns the best and the worst picture, in file order; of equal ones the first, never one twice."""
    best = max(range(len(pictures)), key=lambda index: pictures[index].values[name])
    rest = [index for index in range(len(pictures)) if index != best]
    worst = min(rest, key=lambda index: pictures[index].values[name])
    first, second = sorted((best, worst))
    return pictures[first], pictures[second]


def _list_record(prompt: str, pictures: list[Picture], name: str | None) -> Record:
    """Returns all pictures of a prompt as one record, ranked where one scorer decides.

    The best has rank 1; equal ones share the mean of their places (1, 2.5, 2.5, 4).
    """
    if name is None:
        return _record(prompt, pictures, [{} for _ in pictures], "+".join(pictures[0].values))
    values = [picture.values[name] for picture in pictures]
    ranks = [1.0 + sum(other > value for other in values) + (values.count(value) - 1) / 2 for value in values]
    return _record(prompt, pictures, [{"rank": rank} for rank in ranks], name)


def _record(prompt: str, pictures: list[Picture], judged: Sequence[dict[str, float]], source: str) -> Record:
    """Returns the record of some pictures of a prompt; `judged` holds each one's label or rank."""
    from diffalign.data.records import Record

    meta = dict(pictures[0].meta)
    if pictures[0].prompt_id is not None:
        meta["prompt_id"] = pictures[0].prompt_id
    return Record(
        id="|".join(picture.id for picture in pictures),
        prompt=prompt,
        candidates=[
            replace(picture.candidate, label=given.get("label"), rank=given.get("rank"))
            for picture, given in zip(pictures, judged, strict=True)
        ],
        source=f"pair:{source}",
        meta=meta,
    )


def _refuse_bad_arguments(how: str, margin: float, ties: str, limit: int | None) -> None:
    from diffalign.data.select import check_ties

    if how not in ("best_worst", "all_pairs", "lists"):
        raise unknown("how", how, ("best_worst", "all_pairs", "lists"))
    if not 0.0 <= margin < math.inf:
        raise UserError(f"margin={margin}: give a difference of scores of at least 0")
    if margin > 0.0 and how == "lists":
        raise UserError(f"margin={margin} has no meaning with how=lists: leave it out")
    check_ties(ties)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of prompts of at least 1, or leave it out")

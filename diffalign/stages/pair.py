"""Turn scored pictures into preferences: of the pictures of one prompt, the better against the worse.

Reads scores.jsonl (written by `diffalign score`) and writes OUT/preferences.jsonl, which `data=jsonl` reads.
Pictures are grouped by prompt. A pair keeps the order of the file, so that the winner's place tells nothing.
Pairs within the margin are ties: dropped, or kept as 0.5/0.5 with ties=soft. Pictures without a valid score
are dropped; all drops are counted and named in the manifest.

Examples:
    diffalign pair images=scored out=pairs
    diffalign pair images=scored/scores.jsonl out=pairs by=clip how=all_pairs margin=0.01
    diffalign pair images=scored out=pairs by=scene ties=soft
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.common.config import resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.stages._run import claim_folder, refuse_unfinished

if TYPE_CHECKING:
    from diffalign.data.records import Candidate, Record

SCORES = "scores.jsonl"
PREFERENCES = "preferences.jsonl"


def pair(
    *,
    images: str,
    out: str,
    by: str | None = None,
    how: Literal["best_worst", "all_pairs"] = "best_worst",
    margin: float = 0.0,
    ties: Literal["drop", "soft"] = "drop",
    limit: int | None = None,
) -> Path:
    """Returns the path of the written preferences.jsonl.

    Args:
        images: the scored pictures: a scores.jsonl or the folder that holds it.
        out: folder for preferences.jsonl and the manifest.
        by: which scorer decides; needed where the file holds several.
        how: `best_worst` makes one pair a prompt, `all_pairs` every pair of its pictures.
        margin: the smallest difference of scores, on the scorer's scale, that is a preference; a smaller one,
            and always an exact tie, is none.
        ties: `drop` pairs within the margin or keep them as `soft` targets of 0.5.
        limit: use the first so many prompts only.

    Raises:
        UserError: no such file or scorer, a row that is no scored picture, scores of several scales or
            versions, or no pair at all; nothing is written then.
    """
    from diffalign.common import files, manifest
    from diffalign.common.progress import say
    from diffalign.data.records import write_records

    recipe = resolved_recipe(pair, locals())
    _refuse_bad_arguments(how, margin, ties, limit)
    path = _scores_file(Path(images))
    rows = list(_read_rows(path))
    name = _scorer(rows, by, path)
    higher_is_better = _direction(rows, name)
    drops = Drops()
    groups = _groups(rows, name, limit, drops)
    records = list(_preferences(groups, name, how, margin, ties, higher_is_better, drops))
    found = f"{len(groups)} prompts ({drops.words()})"
    if not records:
        raise UserError(f"{path}: no pair out of {found}; lower margin or use ties=soft")
    decides = {key: value for key, value in recipe.items() if key not in ("images", "out")}
    same = {**decides, "by": name, "images": files.file_identity(path)}
    with claim_folder(out, stage="pair", recipe=recipe, same=same):
        target = Path(out) / PREFERENCES
        manifest.withdraw_manifest(out)
        write_records(target, records)
        manifest.write_manifest(
            out,
            stage="pair",
            recipe=recipe,
            inputs={"images": path},
            counts={"pictures": len(rows), "prompts": len(groups), **drops.pair_counts(len(records))},
            dropped=drops.names,
            extra={"scorer": name, "higher_is_better": higher_is_better},
        )
    say(f"pair: {len(records)} pairs by {name} out of {found}: {target}")
    return target


@dataclass
class Drops:
    """What was left out: pictures (no_score, nan_score), prompts (single_picture) and pairs (tie)."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts one."""
        self.names.setdefault(reason, []).append(name)

    def counts(self) -> dict[str, int]:
        """Returns reason -> how many."""
        return {reason: len(names) for reason, names in self.names.items()}

    def pair_counts(self, made: int) -> dict[str, Any]:
        """Returns the manifest's counts of pairs, `made` of which were written."""
        return {"pairs_asked": made + len(self.names.get("tie", [])), "pairs": made, "dropped": self.counts()}

    def words(self) -> str:
        """Returns the counts in words."""
        return ", ".join(f"{n} {reason}" for reason, n in self.counts().items()) or "none dropped"


@dataclass
class Picture:
    """A scored picture: its row's id, the candidate, the deciding score and the prompt's own meta."""

    id: str
    candidate: Candidate
    value: float
    prompt_id: str | None
    meta: dict[str, Any]


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any], Candidate]]:
    """Yields (where, row, candidate) for each scored picture. UserError naming the line for anything else."""
    from diffalign.data.records import Candidate, read_lines

    known = ("image", "model", "seed", "scores")
    seen: set[str] = set()
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
        if str(row["id"]) in seen:
            raise UserError(f"{where}: a second picture with the id {row['id']!r}; ids must differ")
        seen.add(str(row["id"]))
        candidate = Candidate.from_dict({key: row[key] for key in known if key in row}, path.parent, where)
        candidate.extra = {"id": str(row["id"])}
        yield where, row, candidate
    if not seen:
        raise UserError(f"{path} holds no scored picture")


def _scorer(rows: list[tuple[str, dict[str, Any], Candidate]], by: str | None, path: Path) -> str:
    """Returns the scorer that decides. UserError when it is not in the file, or one of several not named."""
    names = sorted(
        {name for _, row, candidate in rows for name in (*candidate.scores, *(row.get("errors") or {}))}
    )
    if by is not None:
        if by not in names:
            raise unknown(f"scorer of {path}", by, names)
        return by
    if len(names) != 1:
        several = f"several scorers: choose with by= one of {', '.join(names)}" if names else "no scores"
        raise UserError(f"{path} holds {several}")
    return names[0]


def _direction(rows: list[tuple[str, dict[str, Any], Candidate]], name: str) -> bool:
    """Returns whether higher is better: as the rows say, else the scorer plug-in of this name, else True.

    Raises UserError when the rows disagree, or hold scores on several scales or of several versions.
    """
    from diffalign.common import plugins

    scores = [candidate.scores[name] for _, _, candidate in rows if name in candidate.scores]
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


def _groups(
    rows: Iterable[tuple[str, dict[str, Any], Candidate]], name: str, limit: int | None, drops: Drops
) -> dict[str, list[Picture]]:
    """Returns prompt -> its pictures with a valid score, in the order of the file (groups may be empty)."""
    groups: dict[str, list[Picture]] = {}
    for _, row, candidate in rows:
        prompt = row["prompt"]
        if prompt not in groups and limit is not None and len(groups) >= limit:
            continue
        group = groups.setdefault(prompt, [])
        identity = candidate.extra["id"]
        score = candidate.scores.get(name)
        if score is None:
            drops.add("no_score", identity)
        elif not math.isfinite(score.value):
            drops.add("nan_score", identity)
        else:
            prompt_id = row.get("prompt_id")
            named = None if prompt_id is None else str(prompt_id)
            group.append(Picture(identity, candidate, float(score.value), named, dict(row.get("meta") or {})))
    return groups


def _preferences(
    groups: dict[str, list[Picture]],
    name: str,
    how: str,
    margin: float,
    ties: str,
    higher_is_better: bool,
    drops: Drops,
) -> Iterator[Record]:
    """Yields the preference records, prompt after prompt."""
    for prompt, pictures in groups.items():
        if len(pictures) < 2:
            drops.add("single_picture", pictures[0].id if pictures else prompt)
            continue
        chosen = combinations(pictures, 2) if how == "all_pairs" else [_extremes(pictures)]
        for first, second in chosen:
            lead = first.value - second.value if higher_is_better else second.value - first.value
            tied = lead == 0.0 or abs(lead) < margin
            if tied and ties == "drop":
                drops.add("tie", f"{first.id}|{second.id}")
                continue
            target = 0.5 if tied else float(lead > 0)
            yield _record(prompt, first, second, target, name)


def _extremes(pictures: list[Picture]) -> tuple[Picture, Picture]:
    """Returns the highest and the lowest picture, in file order; of equal ones the first, never one twice."""
    highest = max(range(len(pictures)), key=lambda index: pictures[index].value)
    rest = [index for index in range(len(pictures)) if index != highest]
    lowest = min(rest, key=lambda index: pictures[index].value)
    first, second = sorted((highest, lowest))
    return pictures[first], pictures[second]


def _record(prompt: str, first: Picture, second: Picture, target: float, name: str) -> Record:
    from dataclasses import replace

    from diffalign.data.records import Record

    meta = dict(first.meta)
    if first.prompt_id is not None:
        meta["prompt_id"] = first.prompt_id
    return Record(
        id=f"{first.id}|{second.id}",
        prompt=prompt,
        candidates=[replace(first.candidate, label=target), replace(second.candidate, label=1.0 - target)],
        source=f"pair:{name}",
        meta=meta,
    )


def _scores_file(path: Path) -> Path:
    found = path / SCORES if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"images={path}: no file {found}; give the {SCORES} of diffalign score or its folder")
    refuse_unfinished(found.parent)
    return found


def _refuse_bad_arguments(how: str, margin: float, ties: str, limit: int | None) -> None:
    from diffalign.data.select import check_ties

    if how not in ("best_worst", "all_pairs"):
        raise unknown("how", how, ("best_worst", "all_pairs"))
    if not 0.0 <= margin < math.inf:
        raise UserError(f"margin={margin}: give a difference of scores of at least 0")
    check_ties(ties)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of prompts of at least 1, or leave it out")

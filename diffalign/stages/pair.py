"""Turn judged pictures into preferences: of the pictures of one prompt, the better against the worse.

images=... reads scores.jsonl (written by `diffalign score`), whose pictures are grouped by prompt. data=...
takes preference data instead and labels it anew, record by record: `scorers` score its pictures (without any,
what is in the data counts), OUT/scored.jsonl keeps the scored records, OUT/images the pictures that were in
no file. Earlier labels stay in the candidates as human_label, and how often the new ones agree with them is
printed. The same command again goes on where a killed run stopped; with data=jsonl
data.path=OUT/scored.jsonl another margin needs no scoring (say by=SCORER where the data has ranks too).

by=rank and by=votes make pairs out of the lists that people ranked or voted on; data with ranks and without
`scorers` is taken by rank. Nothing is scored for that. Pictures keep their rank, votes and scores, and a pair
keeps the source of its list, so that its labels count as people's. Records without any rank are dropped
(no_rank), and so are those of one picture.

Both write OUT/preferences.jsonl, which `data=jsonl` reads. A pair keeps the order of the file, so that the
winner's place tells nothing; so does a list, which holds all pictures of a prompt with the scores of all
scorers. Pairs within the margin are ties: dropped, or kept as 0.5/0.5 with ties=soft. Several scorers vote:
the label is the majority's, with ties=soft the share of the votes. Pictures without a valid score are
dropped; all drops are counted and named in the manifest, beside the scale and range of each scorer's numbers.

Examples:
    diffalign pair images=scored out=pairs
    diffalign pair images=scored/scores.jsonl out=pairs by=clip how=all_pairs margin=0.01 max_pairs=3
    diffalign pair images=scored out=pairs by=[pickscore,hpsv2,imagereward] ties=soft \\
        margin="{pickscore: 0.1, hpsv2: 0.002}"
    diffalign pair images=scored out=lists how=lists
    diffalign pair data=pickapic data.path=pickapic_v2/data data.split=train scorers=[pickscore] \\
        out=relabelled
    diffalign pair data=imagereward data.path=test.json out=pairs how=all_pairs
    diffalign pair data=hpd data.path=HPDv2/test.json data.images=HPDv2/test out=pairs by=rank margin=2
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import Many, One, make_many, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.stages._grouping import (
    PEOPLE,
    Drops,
    Group,
    direction,
    groups_by_people,
    groups_by_prompt,
    groups_of_records,
    known_of,
    read_rows,
    score_facts,
    scorers_of,
    scores_file,
)
from diffalign.stages._preferences import preferences
from diffalign.stages._run import claim_folder
from diffalign.stages._votes import Judges, deciding_names, judges_of

if TYPE_CHECKING:
    from diffalign.data.records import Candidate, Record
    from diffalign.data.sources._base import Source
    from diffalign.scorers import Scorer

PREFERENCES = "preferences.jsonl"
DECIDES_NOTHING = ("images", "data", "scorers", "out", "cache", "batch_size", "device")
"""Keys that are no part of what a label is decided by, or are named by their content."""

REMEDIES = {
    "tie": "lower margin or use ties=soft",
    "nan_score": "pictures are broken or could not be scored, its `errors` say why",
    "no_score": "score every picture with the scorers that decide, its `errors` say which could not be",
    "no_rank": "give records with several ranked pictures",
    "no_votes": "give records with votes for several pictures",
    "missing_image": "pictures are missing, see which with diffalign check",
    "corrupt_image": "pictures are broken, see which with diffalign check",
    "single_picture": "give several pictures a prompt",
}
"""What helps where nothing is left, most dropped for a reason. Of equal ones the first: a picture that is
dropped may leave another one single."""

READ_WITH_DATA = ("scorers", "cache", "batch_size", "device")
"""Keys that only data=... reads."""


def pair(
    *,
    out: str,
    images: str | None = None,
    data: Annotated[Any, One("data.sources")] = None,
    scorers: Annotated[dict[str, Any] | None, Many("scorers")] = None,
    by: str | list[str] | None = None,
    how: Literal["best_worst", "all_pairs", "lists"] = "best_worst",
    margin: float | dict[str, float] = 0.0,
    ties: Literal["drop", "soft"] = "drop",
    max_pairs: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    cache: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> Path:
    """Returns the path of the written preferences.jsonl.

    Args:
        out: folder for preferences.jsonl and the manifest.
        images: the scored pictures: a scores.jsonl or the folder that holds it.
        data: instead of images: preference data to label anew.
        scorers: of data: what to score with; label -> options; null: take what is in the data.
        by: which scorer decides; a list of them votes. Pairs need it where there are several. Lists get their
            `rank` from it; without it they have none, and their pictures need the scores of all scorers.
            Of data also `rank` (1 is the best) or `votes`, alone: what people gave, lists keep as it is.
            null without scorers: the ranks, where the data has any.
        how: `best_worst` makes one pair a prompt (of data: a record), `all_pairs` every pair of its pictures,
            `lists` one record a prompt with all its pictures. Several scorers rank by the sum of wins.
        margin: the smallest difference of scores, on the scorer's scale (of ranks, of votes), that is a
            preference; a smaller one, and always an exact tie, is none. Of several scorers a mapping, 0 for
            those left out. Not for lists.
        ties: `drop` pairs within the margin or keep them as `soft` targets of 0.5; likewise lists whose
            pictures all have equal scores. With several scorers `soft` makes every label the share of votes.
        max_pairs: of how=all_pairs keep at most so many a prompt, drawn by lot.
        seed: of that lot.
        limit: use the first so many prompts (of data: records) only.
        cache: of data: a folder that keeps scores, as in `score`.
        batch_size: of data: pictures decoded and scored at a time.
        device: of data: auto | cpu | cuda | cuda:1 ...

    Raises:
        UserError: no such file or scorer, a row that is no scored picture, scores of several scales or
            versions, nothing to go by, or nothing to write; no preferences are written then.
    """
    recipe = resolved_recipe(pair, locals())
    _refuse_bad_arguments(recipe)
    if data is None:
        return _of_images(recipe)
    return _of_data(recipe, make_one("data.sources", data), make_many("scorers", scorers or {}))


@dataclass(frozen=True)
class Deciding:
    """Who decides: the scorers that count, whether higher is better, and as judges (None: no ranks are made).

    `by_people`: what is named is no scorer but one of PEOPLE.
    """

    directions: dict[str, bool]
    judges: Judges | None
    by_people: bool = False

    @property
    def names(self) -> list[str]:
        """The scorers that count, or the one of PEOPLE."""
        return list(self.directions)

    @property
    def source(self) -> str | None:
        """Of the records that scorers label; None where people do."""
        from diffalign.data.records import BY_SCORERS

        return None if self.by_people else BY_SCORERS + "+".join(self.names)


def _of_images(recipe: dict[str, Any]) -> Path:
    """Makes preferences of the scored pictures of prompts; returns their path."""
    from diffalign.common import files

    path = scores_file(recipe["images"])
    rows = read_rows(path)
    deciding = _deciding(scorers_of(rows), recipe, path, [row.candidate for row in rows])
    drops = Drops()
    groups = groups_by_prompt(rows, deciding.directions, recipe["limit"], drops)
    records = _records(groups, deciding, recipe, drops, str(path))
    same = {**_decides(recipe, deciding.names), "images": files.file_identity(path)}
    with claim_folder(recipe["out"], stage="pair", recipe=recipe, same=same):
        counts = {"pictures": len(rows), "prompts": len(groups)}
        return _write(records, groups, deciding, recipe, drops, {"images": path}, counts)


def _of_data(recipe: dict[str, Any], data: Source, scorers: dict[str, Scorer]) -> Path:
    """Labels preference data anew; returns the path of the preferences."""
    from diffalign.common import manifest
    from diffalign.data.records import read_records
    from diffalign.stages import _run
    from diffalign.stages._relabel import write_scored
    from diffalign.stages._score_cache import ScoreCache

    _run.earlier_run(Path(recipe["out"]), "pair")  # refuse another stage's folder before the work
    _run.refuse_in_data(recipe["out"], data)
    if Path(recipe["out"]).resolve() in (file.resolve().parent for file in data.files()):
        raise UserError(f"out={recipe['out']} is the folder of the data: choose another folder")
    people = _people(recipe, data, list(scorers))
    ready = {label: scorer.load(_run.pick_device(recipe["device"])) for label, scorer in scorers.items()}
    inputs = data.inputs()
    same = {
        **_decides(recipe, people or recipe["by"]),
        "data": {**recipe["data"], "path": manifest.identities(inputs)},
        "scorers": recipe["scorers"],
        "versions": {label: [scorer.scale, scorer.version] for label, scorer in ready.items()},
    }
    drops = Drops()
    with claim_folder(recipe["out"], stage="pair", recipe=recipe, same=same) as folder:
        manifest.withdraw_manifest(folder)
        with nullcontext() if recipe["cache"] is None else ScoreCache(recipe["cache"]) as cache:
            options = {"limit": recipe["limit"], "batch_size": recipe["batch_size"], "cache": cache}
            scored = write_scored(data, ready, folder, drops, **options)
        left_out = sum(map(len, drops.names.values()))
        found = list(read_records(scored))
        if people is None:
            candidates = [candidate for record in found for candidate in record.candidates]
            known = sorted({name for candidate in candidates for name in candidate.scores})
            deciding = _deciding(list(ready) or known, recipe, scored, candidates)
            groups = groups_of_records(found, deciding.directions, drops)
        else:
            judges = None if recipe["how"] == "lists" else judges_of([people], recipe["margin"])
            deciding = Deciding({people: PEOPLE[people]}, judges, by_people=True)
            groups = groups_by_people(found, people, drops)
        try:
            records = _records(groups, deciding, recipe, drops, str(scored) if scorers else data.path)
        except UserError:
            if not scorers:  # it took no time, and would stand in the way of another margin
                scored.unlink()
            raise
        return _write(records, groups, deciding, recipe, drops, inputs, {"records": len(found) + left_out})


def _people(recipe: Mapping[str, Any], data: Source, scorers: list[str]) -> str | None:
    """Returns which of PEOPLE decides; None where scorers do. UserError where nothing can."""
    by = recipe["by"]
    names = [by] if isinstance(by, str) else by or []
    ours = [name for name in names if name in PEOPLE]
    if ours and len(names) > 1:
        raise UserError(f"by=[{', '.join(names)}]: what people gave decides alone, choose one, by={ours[0]}")
    if scorers and not ours:
        _judging(scorers, recipe, "scorers")
        return None
    known = known_of(islice(data.records(), recipe["limit"]), ["rank"] if by is None else names)
    if not known:
        nothing = f"data.path={data.path} holds no scores, ranks or votes"
        if ours:
            rather = f"for scorers=[{', '.join(scorers)}] to decide" if scorers else "and give scorers=[...]"
            raise UserError(f"by={ours[0]}: {nothing}: leave by out, {rather}")
        raise UserError(f"{nothing}: give scorers=[...] to make scores now")
    for name in names:
        if name not in known:
            raise unknown(f"by for {data.path}", name, known)
    if ours or (by is None and "rank" in known):
        judges_of(ours or ["rank"], recipe["margin"])  # refuses a margin for somebody else
        return ours[0] if ours else "rank"
    scored = [name for name in known if name not in PEOPLE]
    if not scored and by is None:
        raise UserError(f"data.path={data.path} holds votes only: choose by=votes, or give scorers=[...]")
    _judging(scored, recipe, data.path)
    return None


def _decides(recipe: Mapping[str, Any], names: str | list[str] | None) -> dict[str, Any]:
    """Returns the settings that decide what is written, other than its inputs."""
    kept = {key: value for key, value in recipe.items() if key not in DECIDES_NOTHING}
    return {**kept, "by": "+".join(names) if isinstance(names, list) else names}


def _judging(known: list[str], recipe: Mapping[str, Any], where: Any) -> tuple[list[str], Judges | None]:
    """Returns the scorers that count, and the judges among them; none for lists without rank."""
    if recipe["how"] == "lists" and recipe["by"] is None and known:
        return known, None
    names = deciding_names(known, recipe["by"], where)
    return names, judges_of(names, recipe["margin"])


def _deciding(
    known: list[str], recipe: Mapping[str, Any], where: Any, candidates: list[Candidate]
) -> Deciding:
    """Returns who decides, of the scorers that the pictures have."""
    names, judges = _judging(known, recipe, where)
    return Deciding({name: direction(candidates, name) for name in names}, judges)


def _records(
    groups: list[Group], deciding: Deciding, recipe: Mapping[str, Any], drops: Drops, where: str
) -> list[Record]:
    """Returns the preferences. UserError when there are none."""
    records = list(preferences(groups, deciding.judges, deciding.source, recipe, drops))
    if not records:
        what = "list" if recipe["how"] == "lists" else "pair"
        counts = drops.counts()
        most = max(REMEDIES, key=lambda reason: counts.get(reason, 0))
        raise UserError(f"{where}: no {what} out of {_found(groups, recipe, drops)}: {REMEDIES[most]}")
    return records


def _found(groups: list[Group], recipe: Mapping[str, Any], drops: Drops) -> str:
    what = "prompts" if recipe["data"] is None else "records"
    return f"{len(groups)} {what} ({drops.words()})"


def _write(
    records: list[Record],
    groups: list[Group],
    deciding: Deciding,
    recipe: dict[str, Any],
    drops: Drops,
    inputs: Mapping[str, Path | str],
    counts: dict[str, Any],
) -> Path:
    """Writes preferences and manifest, and says so; returns the path of the former."""
    from diffalign.common import manifest
    from diffalign.common.progress import say
    from diffalign.data.records import write_records

    folder = Path(recipe["out"])
    target = folder / PREFERENCES
    what = "lists" if recipe["how"] == "lists" else "pairs"
    extra: dict[str, Any] = {"scores": score_facts(records)}
    extra |= {"by": deciding.names[0]} if deciding.by_people else {"scorers": deciding.names}
    if deciding.judges is not None and len(deciding.names) == 1 and not deciding.by_people:
        extra |= {"scorer": deciding.names[0], "higher_is_better": deciding.directions[deciding.names[0]]}
    agreed = _agreement(groups, deciding)
    if agreed is not None:
        extra["agreement"] = agreed
    manifest.withdraw_manifest(folder)
    write_records(target, records)
    manifest.write_manifest(
        folder,
        stage="pair",
        recipe=recipe,
        inputs=inputs,
        counts={**counts, **drops.made(what, len(records))},
        dropped=drops.names,
        extra=extra,
    )
    by = ", ".join(deciding.names)
    say(f"pair: {len(records)} {what} by {by} out of {_found(groups, recipe, drops)}: {target}")
    if agreed is not None:
        say(
            f"pair: agrees with the labels before on {100 * agreed['estimate']:.1f} % "
            f"[{100 * agreed['low']:.1f}, {100 * agreed['high']:.1f}] of the {agreed['n']} pairs that these "
            "decide"
        )
    return target


def _agreement(groups: Iterable[Group], deciding: Deciding) -> dict[str, Any] | None:
    """Returns how often the labels agree with those before, where data is labelled anew."""
    from diffalign.stages._relabel import agreement_with_people

    judged = [group for group in groups if group.record is not None]
    if deciding.by_people or deciding.judges is None or not judged:
        return None  # people agree with themselves
    return agreement_with_people(judged, deciding.judges)


def _refuse_bad_arguments(recipe: Mapping[str, Any]) -> None:
    from diffalign.data.select import check_ties

    if (recipe["images"] is None) == (recipe["data"] is None):
        raise UserError("pair needs images= (scored pictures) or data= (preference data), one of them")
    if recipe["data"] is None:
        for name in READ_WITH_DATA:
            if recipe[name] != inspect.signature(pair).parameters[name].default:
                raise UserError(f"pair reads {name} with data= only: leave it out, or score with `score`")
    if recipe["how"] not in ("best_worst", "all_pairs", "lists"):
        raise unknown("how", recipe["how"], ("best_worst", "all_pairs", "lists"))
    _refuse_bad_margin(recipe["margin"], recipe["how"])
    check_ties(recipe["ties"])
    for name, what in (("limit", "prompts"), ("max_pairs", "pairs"), ("batch_size", "pictures")):
        if recipe[name] is not None and recipe[name] < 1:
            raise UserError(f"{name}={recipe[name]}: give a number of {what} of at least 1, or leave it out")
    if recipe["max_pairs"] is not None and recipe["how"] != "all_pairs":
        raise UserError(f"max_pairs has no meaning with how={recipe['how']}: leave it out")


def _refuse_bad_margin(margin: float | Mapping[str, float], how: str) -> None:
    values = margin.values() if isinstance(margin, Mapping) else [margin]
    for value in values:
        if not 0.0 <= value < math.inf:
            raise UserError(f"margin={margin}: give a difference of scores of at least 0")
    if how == "lists" and any(value > 0.0 for value in values):
        raise UserError(f"margin={margin} has no meaning with how=lists: leave it out")

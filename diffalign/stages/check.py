"""Say what preference data holds before anything is trained on it, and write the rows that pass.

Every picture is decoded. Reported are rows, prompts, pictures, decided pairs, ties and unlabelled rows;
missing, corrupt and tiny pictures, bad labels, duplicates and pictures that look alike by row id; picture
sizes; captions that are empty, too long for CLIP or hold words not safe for work; prompts that an evaluation
uses; whether the first picture wins too often; whether people agree; votes that run in a circle.

With `filter`, `dedup`, `split` or `format` it also says which rows would be left out, and with `out` it
writes the others as a new record set in OUT/train (and OUT/validation with `split`), which data=jsonl or
data=pickapic reads. Rows that are broken are never written; the manifest of a set names every row that is
left out and why. The data itself is not changed.

With `run` it reads the folder of a training run instead of data.

Examples:
    diffalign check data=pickapic data.path=pickapic_v2/data data.split=validation_unique
    diffalign check data=pickapic data.path=yuvalkirstain/pickapic_v2 data.split=train limit=1000
    diffalign check data=pickapic data.path=train.parquet json=true > check.json
    diffalign check data=jsonl data.path=pairs/preferences.jsonl out=checked
    diffalign check data=pickapic data.path=train.parquet dedup=near split=0.02 out=clean
    diffalign check data=jsonl data.path=pairs filter.min_score_gap.clip=0.02 out=clear
    diffalign check data=jsonl data.path=pairs out=parquet format=chosen_rejected
    diffalign check run=runs/dpo
"""

from __future__ import annotations

from inspect import signature
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.data.filters import FilterSpec, Selection, Sieve, check_split, choose
from diffalign.stages._check_table import as_table
from diffalign.stages._run import claim_folder, refuse_in_data, refuse_other_run

if TYPE_CHECKING:
    from diffalign.data.census import Census

REPORT = "check.json"


def check(
    *,
    data: Annotated[Any, One("data.sources")] = None,
    run: str | None = None,
    against: str | None = None,
    near_distance: int = 4,
    filter: FilterSpec = FilterSpec(),  # noqa: B008
    dedup: Literal["none", "exact", "near"] = "none",
    split: float = 0.0,
    format: Literal["jsonl", "pickapic", "chosen_rejected"] | None = None,
    seed: int = 0,
    limit: int | None = None,
    json: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Returns the report, after printing it (as a table, or as JSON) to stdout.

    Args:
        data: the data source.
        run: output folder of `train`, to look at instead of data; it goes with `json` alone.
        against: prompts that an evaluation uses, a file or set as for `prompts`: those in the data are
            counted (case and white space do not matter).
        near_distance: pictures look alike within so many of the 64 bits of a perceptual hash, which sees
            neither colour nor small detail.
        filter: which rows are left out.
        dedup: leave out `exact` repetitions (the same prompt and picture bytes, in whatever order) or `near`
            ones too (pictures that look alike); the first row that passes is kept, whatever the labels.
        split: share of the prompts that is held out, in a set of its own; a prompt is never in both.
        format: `jsonl`, `pickapic` (parquet) or `chosen_rejected` (parquet: prompt, chosen, rejected); null:
            pickapic for data=pickapic, else jsonl. A jsonl refers to pictures that are files; those that
            are not are written beside it.
        seed: of the split.
        limit: look at the first so many rows only.
        json: print JSON instead of the table.
        out: folder for `check.json`, the sets and a manifest; nothing is written without it.

    Raises:
        UserError: the data is missing, of another layout or empty; keys make no sense, or not together; or
            no row passes.
    """
    from diffalign.common import files
    from diffalign.common.progress import say
    from diffalign.stages import _check_write

    recipe = resolved_recipe(check, locals())
    if run is not None:
        return _check_run(recipe, run, json)
    if data is None:
        raise UserError("check needs data=NAME data.path=PATH, or run=FOLDER (see diffalign check --help)")
    data = make_one("data.sources", data)
    kind = format or ("pickapic" if recipe["data"]["name"] == "pickapic" else "jsonl")
    selects = filter != FilterSpec() or dedup != "none" or split != 0.0 or format is not None
    _refuse_bad_arguments(filter, dedup, split, format, near_distance, limit, against, out)
    same = {key: value for key, value in recipe.items() if key not in ("out", "json")} if selects else None
    if out is not None:
        _check_write.refuse_taken(Path(out), data, selects=selects)  # before the work
        refuse_other_run(Path(out), "check", same)
        refuse_in_data(out, data, "train/train.parquet" if selects and kind != "jsonl" else "")
    census = _take_census(data, limit, _sieve(filter, kind, against))
    report = census.report(
        near_distance=near_distance,
        path=str(data.path),
        source=recipe["data"]["name"],
        ties_policy=data.ties,
        max_bad_share=data.max_bad_share,
        against=against,
    )
    selection = None
    if selects:
        selection = choose(census, dedup=dedup, distance=near_distance, split=split, seed=seed)
        report["selection"] = {"counts": selection.counts(), "dropped": selection.dropped}
    if json:
        import json as jsonlib

        print(jsonlib.dumps(files.to_plain(report), indent=2, ensure_ascii=False))
    else:
        print(as_table(report, drop_overlap=filter.drop_overlap))
    if out is not None:
        _write(Path(out), data, census, selection, kind, report, recipe, same)
    elif selects:
        say("check: nothing was written: give out=FOLDER")
    return report


def _take_census(data: Any, limit: int | None, sieve: Sieve) -> Census:
    """Returns the census over the first `limit` rows of a source."""
    from diffalign.common.progress import Progress
    from diffalign.data.census import Census, findings

    census = Census(evaluation=sieve.evaluation)
    total = data.size()
    if total is not None and limit is not None:
        total = min(total, limit)
    with Progress("check", total, "rows") as progress:
        for finding in findings(islice(data.records(), limit), sieve):
            census.add(finding, ties=data.ties)
            progress.update()
    return census


def _sieve(filter: FilterSpec, kind: str, against: str | None) -> Sieve:
    """Returns what a row must be to be written in the format `kind`."""
    from diffalign.data.prompts import load_prompts, prompt_file
    from diffalign.data.words import normalised

    evaluation: frozenset[str] = frozenset()
    if against is not None:
        if prompt_file(against) is None:
            raise UserError(f"against={against}: no such file; give a file of prompts or the name of a set")
        evaluation = frozenset(normalised(prompt.text) for prompt in load_prompts(against))
    needs: dict[str, Literal["any", "pair", "decided"]] = {"pickapic": "pair", "chosen_rejected": "decided"}
    return Sieve(filter, needs.get(kind, "any"), evaluation)


def _write(
    out: Path,
    data: Any,
    census: Census,
    selection: Selection | None,
    kind: str,
    report: dict[str, Any],
    recipe: dict[str, Any],
    same: dict[str, Any] | None,
) -> None:
    """Writes report and manifest to `out`, and the sets where rows were chosen."""
    from diffalign.common import files, manifest
    from diffalign.data.prompts import prompt_file
    from diffalign.stages._check_write import refuse_empty, write_sets

    if selection is not None:
        refuse_empty(selection, recipe["split"])
    counts = {"rows": report["rows"], "usable": report["usable"]}
    with claim_folder(out, stage="check", recipe=recipe, same=same) as folder:
        manifest.withdraw_manifest(folder)
        inputs = data.inputs()
        if recipe["against"] is not None and (prompts := prompt_file(recipe["against"])) is not None:
            inputs["against"] = prompts
        if selection is not None:
            written = write_sets(folder, data, selection, census.ids, kind=kind, recipe=recipe, inputs=inputs)
            counts |= {**selection.counts(), "written": written}
        files.write_json(folder / REPORT, report)
        manifest.write_manifest(
            folder,
            stage="check",
            recipe=recipe,
            inputs=inputs,
            seed=None if selection is None else recipe["seed"],
            counts=counts,
            dropped=report["problems"] if selection is None else selection.dropped,
        )


def _check_run(recipe: dict[str, Any], run: str, json: bool) -> dict[str, Any]:
    """Returns the report on a training run; keys that mean nothing there are refused."""
    from diffalign.stages._check_run import check_run

    given = {key: value for key, value in recipe.items() if key not in ("run", "json")}
    default = resolved_recipe(check, {key: p.default for key, p in signature(check).parameters.items()})
    other = [key for key, value in given.items() if value != default[key]]
    if other:
        raise UserError(f"run={run} and {other[0]}= do not go together: give one of them")
    return check_run(run, json=json)


def _refuse_bad_arguments(
    filter: FilterSpec,
    dedup: str,
    split: float,
    format: str | None,
    near_distance: int,
    limit: int | None,
    against: str | None,
    out: str | None,
) -> None:
    from diffalign.data.near import check_distance
    from diffalign.data.writers import FORMATS

    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of rows of at least 1, or leave it out")
    if dedup not in ("none", "exact", "near"):
        raise unknown("dedup", dedup, ("none", "exact", "near"))
    if format is not None and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format is not None and out is None:
        raise UserError(f"format={format} says how rows are written: give out=FOLDER too")
    if filter.drop_overlap and against is None:
        raise UserError("filter.drop_overlap=true needs against=FILE, the prompts of the evaluation")
    check_split(split)
    check_distance(near_distance)

"""`evaluate mode=scorers`: how well scorers agree with people on labelled data, and with one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.common.progress import Progress, say
from diffalign.data.records import BadLabel, Candidate, Record
from diffalign.data.tally import Tally
from diffalign.evaluation import agreement
from diffalign.evaluation._table import Table, percent
from diffalign.evaluation.agreement import Judged, judged_pairs
from diffalign.evaluation.categories import MOST_VALUES
from diffalign.stages._grouping import direction
from diffalign.stages._run import claim_folder, pick_device
from diffalign.stages._scored_records import score_records

if TYPE_CHECKING:
    from diffalign.data.sources._base import Source
    from diffalign.scorers import Scorer

ROWS_FILE, SUMMARY_FILE, TEXT_FILE = "agreement.jsonl", "agreement.json", "agreement.txt"

SHOWN = (
    "accuracy",
    "imagereward_accuracy",
    "pickscore_label_accuracy",
    "pickscore_tie_accuracy",
    "inversion_score",
)
"""Definitions in the table, in their order."""


def evaluate_scorers(
    recipe: dict[str, Any], *, data: Source, scorers: Mapping[str, Scorer] | None, out: Path
) -> Path:
    """Returns the path of `agreement.json`, after printing the table.

    Beside it are `agreement.txt` (the table), `agreement.jsonl` (one row a pair: people's target and every
    scorer's lead) and the manifest.

    Args:
        recipe: the resolved recipe; `limit` (records), `batch_size`, `device` and `seed` are read here.
        data: records that people judged: pairs with labels, lists with ranks.
        scorers: label -> scorer, not loaded; None: the scores that are in the data.
        out: folder for the files.

    Raises:
        UserError: no judged record, no score, or scores of one name on several scales; after the report, a
            scorer without any score.
    """
    for name in ("limit", "batch_size"):
        if recipe[name] is not None and recipe[name] < 1:
            raise UserError(f"{name}={recipe[name]}: give a number of at least 1")
    ready = {name: scorer.load(pick_device(recipe["device"])) for name, scorer in (scorers or {}).items()}
    tally = Tally(what=data.path)
    judged, scales, errors = _judge(data, ready, tally, recipe)
    report = as_report(judged, scales, seed=recipe["seed"])
    text = "\n".join("\n".join([table.title, *table.as_lines(), ""]) for table in tables(report))
    with claim_folder(out, stage="evaluate", recipe=recipe):
        files.write_jsonl(out / ROWS_FILE, _rows(judged))
        files.write_text(out / TEXT_FILE, text)
        files.write_json(out / SUMMARY_FILE, {"mode": "scorers", **report})
        manifest.write_manifest(
            out,
            stage="evaluate",
            recipe=recipe,
            seed=recipe["seed"],
            inputs=data.inputs(),
            counts={**tally.counts(), "pairs": len(judged)},
            dropped=tally.dropped,
        )
    print(text)
    for name, found in report["scorers"].items():
        if not found["pairs"]:
            nothing = f"scorer {name} has no score for any of {len(judged)} pairs"
            if name in errors:
                raise UserError(f"{nothing} ({errors[name]}): give data that it can judge, or leave it out")
            raise UserError(f"{nothing}: give scorers=[...] to score the data anew")
    return out / SUMMARY_FILE


def _judge(
    data: Source, ready: Mapping[str, Scorer], tally: Tally, recipe: Mapping[str, Any]
) -> tuple[Judged, dict[str, str], dict[str, str]]:
    """Returns the pairs with the leads of the scorers, and of each scorer its scale and its first error."""
    judged = Judged()
    values: list[tuple[Candidate, Candidate]] = []  # without pictures
    errors: dict[str, str] = {}
    by_scorers = 0
    with Progress("judge", recipe["limit"] or data.size(), "records") as progress:
        asked = _judged_records(data, tally, recipe["limit"])
        for batch in score_records(asked, ready, batch_size=recipe["batch_size"]):
            for record in batch:
                values += _add(judged, record)
                for candidate in record.candidates if ready else ():
                    errors = {**candidate.extra.get("errors", {}), **errors}
                by_scorers += record.labelled_by_scorers
            progress.update(len(batch))
    tally.refuse_if_empty()
    if by_scorers:
        say(f"evaluate: the labels of {by_scorers} of {tally.used} records are scorers', not people's")
    candidates = [candidate for pair in values for candidate in pair]
    names = list(ready) or sorted({name for candidate in candidates for name in candidate.scores})
    if not names:
        raise UserError(f"{data.path} holds no scores: give scorers=[...] to make them now")
    scales = {}
    for name in names:
        sign = 1.0 if direction(candidates, name) else -1.0
        judged.leads[name] = [sign * (_value(first, name) - _value(second, name)) for first, second in values]
        scales[name] = next((one.scores[name].scale for one in candidates if name in one.scores), "")
    return judged, scales, errors


def _judged_records(data: Source, tally: Tally, limit: int | None) -> Iterator[Record]:
    """Yields the records that people judged, at most `limit`."""
    for record in data.records():
        if limit is not None and tally.used >= limit:
            return
        tally.asked += 1
        if record.problem is not None:
            tally.drop(record.problem, record.id)
            continue
        try:
            found = judged_pairs(record)
        except BadLabel:
            tally.drop("bad_label", record.id)
            continue
        if not found:
            tally.drop("unlabelled" if len(record.candidates) > 1 else "single_picture", record.id)
            continue
        tally.used += 1
        yield record


def _add(judged: Judged, record: Record) -> list[tuple[Candidate, Candidate]]:
    """Adds the pairs of a scored record; returns their candidates, without their pictures."""
    light = [Candidate(type(one.image)(name=one.image.name), scores=one.scores) for one in record.candidates]
    models = [candidate.model for candidate in record.candidates]
    found = []
    for first, second, target in judged_pairs(record):
        one, other = models[first], models[second]
        judged.records.append(record.id)
        judged.prompts.append(record.prompt)
        judged.targets.append(target)
        judged.models.append(None if one is None or other is None else (one, other))
        judged.meta.append(record.meta)
        found.append((light[first], light[second]))
    return found


def _value(candidate: Candidate, name: str) -> float:
    score = candidate.scores.get(name)
    return float("nan") if score is None else score.value


def as_report(judged: Judged, scales: Mapping[str, str], *, seed: int) -> dict[str, Any]:
    """Returns the report as plain data: each scorer with people, categories, models, scorers together."""
    fields = categories(judged)
    scorers = {}
    for name, scale in scales.items():
        scorers[name] = {
            "scale": scale,
            **agreement.with_people(judged, name, scale=scale, seed=seed),
            "by": {
                field: agreement.by_label(judged, name, labels, seed=seed) for field, labels in fields.items()
            },
            "models": agreement.by_models(judged, name, seed=seed),
        }
    together = {
        f"{one} | {other}": agreement.between_scorers(judged, one, other, seed=seed)
        for one, other in combinations(scales, 2)
    }
    return {
        "pairs": len(judged),
        "records": len(set(judged.records)),
        "prompts": len(set(judged.prompts)),
        "scorers": scorers,
        "between_scorers": together,
    }


def categories(judged: Judged) -> dict[str, list[str | None]]:
    """Returns field of `meta` -> each pair's value, of the fields of texts that sort pairs into categories.

    They hold 2 to MOST_VALUES different ones.
    """
    found = {}
    for field in dict.fromkeys(name for meta in judged.meta for name in meta):
        values = [meta.get(field) for meta in judged.meta]
        texts = {value for value in values if isinstance(value, str) and value}
        if 2 <= len(texts) <= MOST_VALUES and all(
            value is None or isinstance(value, str) for value in values
        ):
            found[str(field)] = [value or None for value in values]
    return found


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of a report: scorers with people, by category, by models, scorers together."""
    scorers: Mapping[str, Any] = report["scorers"]
    extent = f"{report['pairs']} pairs of {report['records']} records, {report['prompts']} prompts"
    rows = [
        (
            f"{name} ({found['scale']})",
            *(_share(found[key]) for key in SHOWN),
            _number(found["tau_b"]),
            f"{found['ties_of_people']}/{found['ties_of_scorer']}",
            str(found["dropped"]),
        )
        for name, found in scorers.items()
    ]
    head = ("scorer", *SHOWN, "tau_b", "ties people/scorer", "no score")
    made = [Table(f"scorers against people: {extent}", head, rows)]
    for field in next(iter(scorers.values()))["by"]:
        labels = sorted({label for found in scorers.values() for label in found["by"][field]})
        rows = [
            (label, *(_share(found["by"][field].get(label)) for found in scorers.values()))
            for label in labels
        ]
        made.append(Table(f"accuracy by {field}", (field, *scorers), rows))
    for name, found in scorers.items():
        if found["models"]:
            made.append(_models_table(name, found["models"]))
    if report["between_scorers"]:
        together: list[tuple[str, ...]] = [
            (names, _share(found["alike"]), _number(found["tau_b"]))
            for names, found in report["between_scorers"].items()
        ]
        made.append(Table("scorers against one another", ("scorers", "alike", "tau_b"), together))
    return made


def _models_table(name: str, models: Mapping[str, Any]) -> Table:
    """Returns how people and a scorer see each two models."""
    rows: list[tuple[str, ...]] = []
    for both, found in models.items():
        shares = f"{100 * found['people']:.1f} %", f"{100 * found['scorer']:.1f} %"
        rows.append((both, str(found["pairs"]), *shares, _share(found["accuracy"])))
    head = ("A | B", "pairs", "people prefer A", "scorer prefers A", "accuracy")
    return Table(f"models by {name}", head, rows)


def _share(interval: Any) -> str:
    return "" if interval is None else percent(interval)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _rows(judged: Judged) -> Sequence[dict[str, Any]]:
    """Returns one plain row a pair."""
    return [
        {
            "id": judged.records[place],
            "prompt": judged.prompts[place],
            "models": judged.models[place],
            "target": judged.targets[place],
            "leads": {name: leads[place] for name, leads in judged.leads.items()},
            "meta": judged.meta[place],
        }
        for place in range(len(judged))
    ]

"""Say what preference data holds before anything is trained on it.

Every picture is decoded. Reported are rows, prompts, pictures, decided pairs, ties and unlabelled rows;
missing, corrupt and tiny pictures, bad labels and exact duplicates by row id; picture sizes; and captions
that are empty or too long for CLIP. Nothing is changed.

Examples:
    diffalign check data=pickapic data.path=pickapic_v2/data data.split=validation_unique
    diffalign check data=pickapic data.path=yuvalkirstain/pickapic_v2 data.split=train limit=1000
    diffalign check data=pickapic data.path=train.parquet json=true > check.json
    diffalign check data=jsonl data.path=pairs/preferences.jsonl out=checked
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError
from diffalign.data.select import BAD_REASONS
from diffalign.stages._run import claim_folder, earlier_run

REPORT = "check.json"
SHOWN_IDS = 16
SHOWN_SIZES = 12


def check(
    *,
    data: Annotated[Any, One("data.sources")],
    limit: int | None = None,
    json: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Returns the report, after printing it (as a table, or as JSON) to stdout.

    Args:
        data: the data source.
        limit: look at the first so many rows only.
        json: print JSON instead of the table.
        out: folder for `check.json` and a manifest; nothing is written without it.

    Raises:
        UserError: the data is missing, of another layout or empty; `limit` or `out` make no sense.
    """
    from diffalign.common import files, manifest

    recipe = resolved_recipe(check, locals())
    data = make_one("data.sources", data)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of rows of at least 1, or leave it out")
    if out is not None:
        earlier_run(Path(out), "check")  # refuse another stage's folder before the work
    report = _take_census(data, limit)
    if json:
        import json as jsonlib

        text = jsonlib.dumps(files.to_plain(report), indent=2, ensure_ascii=False)
    else:
        text = as_table(report)
    print(text)
    if out is not None:
        with claim_folder(out, stage="check", recipe=recipe) as folder:
            files.write_json(folder / REPORT, report)
            manifest.write_manifest(
                folder,
                stage="check",
                recipe=recipe,
                inputs=data.inputs(),
                counts={"rows": report["rows"], "usable": report["usable"]},
                dropped=report["problems"],
            )
    return report


def as_table(report: dict[str, Any]) -> str:
    """Returns the report for a person; long lists of ids are cut (`json=true` gives them all)."""
    rows = [
        ("rows", f"{report['rows']:,}"),
        ("prompts", f"{report['prompts']:,}"),
        ("images", f"{report['images']:,} ({report['distinct_images']:,} distinct)"),
        ("decided", f"{report['decided']:,} (first preferred in {report['first_preferred']:,})"),
        ("ties", f"{report['ties']:,}"),
        ("unlabelled", f"{report['unlabelled']:,}{_ids(report['problems'].get('unlabelled', []))}"),
        ("usable pairs", f"{report['usable']:,} (ties={report['ties_policy']})"),
        ("", ""),
    ]
    for reason in BAD_REASONS:
        names = report["problems"].get(reason, [])
        rows.append((reason.replace("_", " "), f"{len(names):,}{_ids(names)}"))
    for key in ("duplicates", "conflicting_duplicates"):
        pairs = [_same(pair["row"], pair["same_as"]) for pair in report[key]]
        rows.append((key.replace("_", " "), f"{len(pairs):,}{_ids(pairs)}"))
    for key in ("same_picture_twice", "empty_captions", "long_captions"):
        rows.append((key.replace("_", " "), f"{len(report[key]):,}{_ids(report[key])}"))
    rows.append(("non-ASCII captions", f"{report['non_ascii_captions']:,}"))
    rows.append(("", ""))
    sizes = list(report["sizes"].items())
    rows += [
        ("sizes" if index == 0 else " ", f"{size}: {n:,}")
        for index, (size, n) in enumerate(sizes[:SHOWN_SIZES])
    ]
    if len(sizes) > SHOWN_SIZES:
        rows.append((" ", f"and {len(sizes) - SHOWN_SIZES} more sizes"))
    rows.append(("pairs of two sizes", f"{report['pairs_of_two_sizes']:,}"))
    lines = [f"{report['path']} ({report['source']})", ""]
    lines += [f"  {name:<24}{text}".rstrip() for name, text in rows]
    if report["bad_share"] > report["max_bad_share"]:
        lines += [
            "",
            f"Training would refuse this data: {report['bad_share']:.1%} of the rows that could be pairs are "
            f"bad, more than max_bad_share={report['max_bad_share']:g}.",
        ]
    return "\n".join(lines)


def _take_census(data: Any, limit: int | None) -> dict[str, Any]:
    """Returns the report over the first `limit` rows of a source."""
    from diffalign.common.plugins import plugin_name
    from diffalign.common.progress import Progress
    from diffalign.data.census import Census, findings

    census = Census()
    total = data.size()
    if total is not None and limit is not None:
        total = min(total, limit)
    with Progress("check", total, "rows") as progress:
        for finding in findings(islice(data.records(), limit)):
            census.add(finding, ties=data.ties)
            progress.update()
    return census.report(
        path=str(data.path), source=plugin_name(data), ties_policy=data.ties, max_bad_share=data.max_bad_share
    )


def _same(row: str, other: str) -> str:
    """Returns "a.parquet:8=2" for two rows of one file, both names in full otherwise."""
    file, _, number = other.rpartition(":")
    return f"{row}={number if file and row.rpartition(':')[0] == file else other}"


def _ids(names: list[str]) -> str:
    """Returns the first ids for a table cell, the file named once: "  a.parquet:3, 17; b.parquet:5"."""
    by_file: dict[str, list[str]] = {}
    for name in names[:SHOWN_IDS]:
        file, _, rest = name.partition(":")
        by_file.setdefault(file if rest else "", []).append(rest or name)
    shown = "; ".join((f"{file}:" if file else "") + ", ".join(rows) for file, rows in by_file.items())
    more = f", and {len(names) - SHOWN_IDS:,} more" if len(names) > SHOWN_IDS else ""
    return f"  {shown}{more}" if names else ""

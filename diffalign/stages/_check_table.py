"""The report of `check` for a person."""

from __future__ import annotations

from typing import Any

from diffalign.data.select import BAD_REASONS

SHOWN_IDS = 16
SHOWN_SIZES = 12
SHOWN_GROUPS = 5
LEAK = 0.05
"""The share of pairs whose first picture is preferred is warned of where its interval is so far from 1/2."""

Row = tuple[str, str]


def as_table(report: dict[str, Any], *, drop_overlap: bool = False) -> str:
    """Returns the report for a person; long lists of ids are cut (`json=true` gives them all).

    `drop_overlap`: the filter leaves out the prompts of the evaluation, so nobody is warned of them.
    """
    parts = [_rows(report), _problems(report), _pictures(report), _captions(report), _votes(report)]
    lines = [f"{report['path']} ({report['source']})"]
    for part in (*parts, _selection(report)):
        lines += ["", *(f"  {name:<24}{text}".rstrip() for name, text in part)] if part else []
    for warning in warnings(report, drop_overlap=drop_overlap):
        lines += ["", warning]
    return "\n".join(lines)


def warnings(report: dict[str, Any], *, drop_overlap: bool = False) -> list[str]:
    """Returns what a person should not overlook, each in a sentence or two."""
    found = []
    share = report["first_preferred_share"]
    if share is not None and (share["low"] > 0.5 + LEAK or share["high"] < 0.5 - LEAK):
        found.append(
            f"The first picture is preferred in {_interval(share)} of the decided pairs: the position tells "
            "the label. Look whether the loader or the file puts the winner in one place."
        )
    if not drop_overlap and report["overlap"] is not None and report["overlap"]["rows"]:
        found.append(
            f"{report['overlap']['prompts']:,} prompts of against={report['against']} are in the data: an "
            "evaluation on them is not held out. filter.drop_overlap=true leaves them out."
        )
    if report["bad_share"] > report["max_bad_share"]:
        found.append(
            f"Training would refuse this data: {report['bad_share']:.1%} of the rows that could be pairs are "
            f"bad, more than max_bad_share={report['max_bad_share']:g}."
        )
    return found


def _rows(report: dict[str, Any]) -> list[Row]:
    share = report["first_preferred_share"]
    first = (
        "" if share is None else f" (first preferred in {report['first_preferred']:,}: {_interval(share)})"
    )
    return [
        ("rows", f"{report['rows']:,}"),
        ("prompts", f"{report['prompts']:,}"),
        ("images", f"{report['images']:,} ({report['distinct_images']:,} distinct)"),
        ("decided", f"{report['decided']:,}{first}"),
        ("ties", f"{report['ties']:,}"),
        ("unlabelled", _named(report["problems"].get("unlabelled", []))),
        *([("rated, no pair label", f"{report['rated']:,}")] if report["rated"] else []),
        ("usable pairs", f"{report['usable']:,} (ties={report['ties_policy']})"),
    ]


def _problems(report: dict[str, Any]) -> list[Row]:
    found = report["problems"]
    others = [reason for reason in found if reason not in (*BAD_REASONS, "unlabelled")]  # a source's own
    rows = [(reason.replace("_", " "), _named(found.get(reason, []))) for reason in (*BAD_REASONS, *others)]
    for key in ("duplicates", "conflicting_duplicates"):
        rows.append((key.replace("_", " "), _named([_same(p["row"], p["same_as"]) for p in report[key]])))
    return [*rows, ("same picture twice", _named(report["same_picture_twice"]))]


def _pictures(report: dict[str, Any]) -> list[Row]:
    near = report["near_duplicates"]
    rows = [
        ("look-alikes", f"{near['pictures']:,} pictures in {near['groups']:,} groups (within "
         f"{near['distance']} of 64 bits)"),
        *((" ", _ids(group).lstrip()) for group in near["named"][:SHOWN_GROUPS]),
    ]  # fmt: skip
    if near["groups"] > SHOWN_GROUPS:
        rows.append((" ", f"and {near['groups'] - SHOWN_GROUPS:,} more groups"))
    rows.append(("pairs of look-alikes", _named(near["within_pair"])))
    sizes = list(report["sizes"].items())
    rows += [
        ("sizes" if index == 0 else " ", f"{size}: {n:,}")
        for index, (size, n) in enumerate(sizes[:SHOWN_SIZES])
    ]
    if len(sizes) > SHOWN_SIZES:
        rows.append((" ", f"and {len(sizes) - SHOWN_SIZES} more sizes"))
    return [*rows, ("pairs of two sizes", f"{report['pairs_of_two_sizes']:,}")]


def _captions(report: dict[str, Any]) -> list[Row]:
    rows = [(key.replace("_", " "), _named(report[key])) for key in ("empty_captions", "long_captions")]
    longest = _ids([f"{one['row']} ({one['tokens_at_least']})" for one in report["longest_captions"]])
    rows.append(("longest (least tokens)", longest.lstrip()))
    rows.append(("non-ASCII captions", f"{report['non_ascii_captions']:,}"))
    rows.append(("words not for work", _named(report["nsfw_words"])))
    if report["overlap"] is not None:
        overlap = report["overlap"]
        rows.append(("also in against", f"{overlap['prompts']:,} prompts, rows {_named(overlap['rows'])}"))
    return rows


def _votes(report: dict[str, Any]) -> list[Row]:
    agreed = report["agreement"]
    if agreed is None:
        text = "no pair with the votes of two people"
    else:
        alpha = "" if agreed["alpha"] is None else f", Krippendorff's alpha {agreed['alpha']:.2f}"
        pairs = agreed["pairwise"]["n"]
        text = f"{_interval(agreed['pairwise'])} over {pairs:,} pairs, {agreed['votes']:,} votes{alpha}"
    circles = report["circular_votes"]
    return [
        ("two people agree in", text),
        ("circular votes", f"{len(circles):,}" + (_ids(circles[0]) if circles else "")),
    ]


def _selection(report: dict[str, Any]) -> list[Row]:
    chosen = report.get("selection")
    if chosen is None:
        return []
    counts = chosen["counts"]
    held = f", {counts['held_out']:,} held out" if counts["held_out"] else ""
    rows = [("kept", f"{counts['kept']:,} rows{held}"), ("left out", f"{counts['dropped']:,} rows")]
    rows += [(f"  {reason.replace('_', ' ')}", _named(names)) for reason, names in chosen["dropped"].items()]
    return rows


def _interval(interval: dict[str, Any]) -> str:
    return f"{interval['estimate']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def _same(row: str, other: str) -> str:
    """Returns "a.parquet:8=2" for two rows of one file, both names in full otherwise."""
    file, _, number = other.rpartition(":")
    return f"{row}={number if file and row.rpartition(':')[0] == file else other}"


def _named(names: list[str]) -> str:
    """Returns the number of ids and the first of them."""
    return f"{len(names):,}{_ids(names)}"


def _ids(names: list[str]) -> str:
    """Returns the first ids for a table cell, the file named once: "  a.parquet:3, 17; b.parquet:5"."""
    by_file: dict[str, list[str]] = {}
    for name in names[:SHOWN_IDS]:
        file, _, rest = name.partition(":")
        by_file.setdefault(file if rest else "", []).append(rest or name)
    shown = "; ".join((f"{file}:" if file else "") + ", ".join(rows) for file, rows in by_file.items())
    more = f", and {len(names) - SHOWN_IDS:,} more" if len(names) > SHOWN_IDS else ""
    return f"  {shown}{more}" if names else ""

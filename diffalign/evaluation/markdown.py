"""The report as Markdown: what a pull request, an issue or a model card can hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffalign.evaluation import _table
from diffalign.evaluation._table import Table
from diffalign.evaluation.summary import RATING_NOTE, Comparison, unbeaten, verdict


def as_markdown(comparison: Comparison) -> str:
    """Returns the report as one Markdown text; texts of others' files cannot break out of their cells."""
    lines = ["# Comparison with base", ""]
    for model, report in comparison.reports.items():
        lines += [f"- {_plain(line)}" for line in verdict(model, report)]
    for name, standing in comparison.standings.items():
        for table in (_table.rating_table(name, standing), _table.win_table(name, standing)):
            lines += _section(table)
        warning = unbeaten(standing)
        lines += ["", _plain(warning)] if warning else []
    lines += ["", RATING_NOTE] if comparison.standings else []
    for model, report in comparison.reports.items():
        lines += _section(_table.verdict_table(report.rewards, model, full_names=True))
        lines += ["", _plain(f"{_table.extent(report)}.")]
        if report.drift:
            lines += _section(_table.drift_table(report.drift, model))
        for column, categories in report.categories.items():
            table = _table.category_table(column, categories)
            lines += _section(Table(f"{model} by {column}", table.head, table.rows))
        notes = _table.remarks(report)
        lines += ["", *(f"- {_plain(note)}" for note in notes)] if notes else []
    for side, origin in comparison.origins.items():
        lines += _section(Table(f"Where {side} comes from", ("what", "value"), origin.rows()), right="---")
    unlike = comparison.unlike()
    lines += ["", *(f"- drawn unlike: {_plain(text)}" for text in unlike)] if unlike else []
    return "\n".join(lines) + "\n"


def _section(table: Table, *, right: str = "---:") -> list[str]:
    """Returns a heading and the table, all columns but the first at the right unless told otherwise."""
    sides = ["---", *[right] * (len(table.head) - 1)]
    rows: list[Sequence[str]] = [table.head, sides, *table.rows]
    lines = ["| " + " | ".join(cell if row is sides else _plain(cell) for cell in row) + " |" for row in rows]
    return ["", f"## {_plain(table.title)}", "", *lines]


def _plain(text: str) -> str:
    """Returns a text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<>#|~&]|\](?=\())", r"\\\1", " ".join(text.split()))

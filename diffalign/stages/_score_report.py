"""What scores say together: each scorer's numbers, ranks within a prompt, a table for other programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.stages._image_rows import Row

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 20
BARS = " ▁▂▃▄▅▆▇█"


def summary_of(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Returns the content of summary.json: label -> count, NaN, mean, std, quantiles, histogram; errors."""
    found: dict[str, Any] = {name: _numbers(rows, name) for name in names}
    return {"pictures": len(rows), "scorers": found}


def _numbers(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Returns the numbers of one scorer; std is that of the population (N)."""
    entries = [row["scores"][name] for row in rows]
    values = np.array([entry["value"] for entry in entries if entry["value"] is not None], dtype=np.float64)
    known: dict[str, Any] = {key: entries[0][key] for key in ("scale", "version", "higher_is_better")}
    known |= {"count": len(values), "nan": len(entries) - len(values)}
    if not len(values):
        return known
    counts, edges = np.histogram(values, bins=BINS)
    return known | {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "quantiles": {str(q): np.quantile(values, q) for q in QUANTILES},
        "histogram": {"edges": edges, "counts": counts},
    }


def as_text(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Returns the summary as a table for a terminal, and why pictures have no score."""
    table: list[tuple[str, ...]] = [
        ("scorer", "scale", "pictures", "mean", "median", "5 %", "95 %", "NaN", "from min to max")
    ]
    notes = []
    for name, found in summary["scorers"].items():
        quantiles = found.get("quantiles", {})
        numbers = [found.get("mean"), *(quantiles.get(q) for q in ("0.5", "0.05", "0.95"))]
        shown = ["-" if number is None else f"{number:.4f}" for number in numbers]
        table.append(
            (name, found["scale"], str(found["count"]), *shown, str(found["nan"]), _histogram(found))
        )
        failed = [row for row in rows if name in row["errors"]]
        notes += [f"{name}: {row['id']}: {row['errors'][name]}" for row in failed[:3]]
        if len(failed) > 3:
            notes.append(f"{name}: ... and {len(failed) - 3} more, see errors in scores.jsonl")
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([line.rstrip() for line in lines] + notes)


def _histogram(found: Mapping[str, Any]) -> str:
    """Returns the histogram as a line of bars, with the smallest and the largest value."""
    if "histogram" not in found:
        return ""
    counts = np.asarray(found["histogram"]["counts"])
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return f"{found['min']:.3g} |{''.join(BARS[height] for height in heights)}| {found['max']:.3g}"


def ranking_of(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, for each prompt, its pictures with their ranks, the best of the first scorer first.

    The best has rank 1; equal ones share the mean of their places; one without a value has none.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        named = (row.get("context") or {}).get("group")
        key = (row.get("prompt_id"), row.get("prompt")) if named is None else named
        groups.setdefault(key, []).append(row)
    found: list[dict[str, Any]] = []
    for group in groups.values():
        ranks = {name: _ranks([row["scores"][name] for row in group]) for name in names}
        pictures: list[dict[str, Any]] = [
            {
                "id": row["id"],
                "image": row["image"],
                "ranks": {name: ranks[name][place] for name in names},
                "values": {name: row["scores"][name]["value"] for name in names},
            }
            for place, row in enumerate(group)
        ]
        pictures.sort(key=lambda picture: picture["ranks"][names[0]] or math.inf)
        about: dict[str, Any] = {key: group[0][key] for key in ("prompt", "prompt_id") if key in group[0]}
        found.append({**about, "pictures": pictures})
    return found


def _ranks(entries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    from scipy.stats import rankdata

    sign = -1.0 if entries[0]["higher_is_better"] else 1.0
    values = np.array([np.nan if entry["value"] is None else sign * entry["value"] for entry in entries])
    ranks = rankdata(values, nan_policy="omit")
    return [None if math.isnan(value) else float(rank) for value, rank in zip(values, ranks, strict=True)]


COMMON = ("id", "image", "prompt", "prompt_id", "seed", "model")
"""Columns of a table beside those of the scorers."""


def check_table(names: Sequence[str]) -> None:
    """Checks that a table can have a column for every label and part.

    Raises:
        UserError: a label that another column has.
    """
    for name in names:
        rival = next((other for other in (*COMMON, *names) if name.startswith(f"{other}.")), None)
        if name in COMMON or rival is not None:
            raise UserError(
                f"a table cannot have a column for scorer '{name}' beside '{rival or name}': choose another "
                "label"
            )


def write_table(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Writes one flat row a picture: columns LABEL, LABEL.PART, LABEL.error; csv or parquet by the suffix."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns: dict[str, Any] = {}
    for key in COMMON:
        if any(key in row for row in rows):
            texts = [None if row.get(key) is None else str(row[key]) for row in rows]
            columns[key] = pa.array(texts, pa.string())
    for name in names:
        entries = [row["scores"][name] for row in rows]
        columns[name] = pa.array([entry["value"] for entry in entries], pa.float64())
        for part in dict.fromkeys(part for entry in entries for part in entry["parts"]):
            values = [entry["parts"].get(part) for entry in entries]
            columns[f"{name}.{part}"] = pa.array(values, pa.float64())
        columns[f"{name}.error"] = pa.array([row["errors"].get(name) for row in rows], pa.string())
    table = pa.table(columns)
    with files.atomic_path(path) as temporary:
        write = pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table
        write(table, str(temporary))

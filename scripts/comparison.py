"""Pictures of the embedded world against those of the base: drawn, graded and compared for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffalign.common import files
from diffalign.common.statistics import paired_difference, win_rate
from diffalign.demo import walk

KINDS = ("accurate", "object", "colour", "count", "position")

PICTURES = 2
"""Of each prompt, that models are compared on."""

Rows = dict[tuple[str, Any], dict[str, float]]
"""(prompt, seed) -> the grader's numbers, NaN where a caption has no such clause."""


def graded(
    out: Path, prompts: list[str], seeds: list[int], size: walk.Size, adapter: Path | None = None
) -> Path:
    """The folder of the grades of freshly drawn pictures."""
    walk.draw(out, prompts, seeds=seeds, size=size, adapter=adapter)
    scored = out.with_name(f"{out.name}-graded")
    walk.grade(scored, out)
    return scored


def judged(out: Path, base: Path, aligned: Path) -> dict[str, Any]:
    """The report of `evaluate`, with the rows of the aligned pictures."""
    return {**walk.compare(out, base, aligned), "rows": rows_of(aligned)}


def rows_of(folder: Path) -> Rows:
    """The grades of a folder."""
    rows = {}
    for row in files.read_jsonl(folder / "scores.jsonl"):
        score = row["scores"]["scene"]
        parts = {name: np.nan if score["parts"][name] is None else score["parts"][name] for name in KINDS}
        rows[row["prompt"], row["seed"]] = {"share": score["value"], **parts}
    return rows


def mean(rows: Rows, name: str) -> float:
    """Mean of one number over the pictures that have it."""
    return float(np.nanmean([row[name] for row in rows.values()]))


def pooled(results: list[dict[str, Any]], base: Path) -> dict[str, Any]:
    """All training seeds together; a prompt is one cluster across them."""
    before = rows_of(base)
    theirs = {
        (prompt, (k, seed)): row for k, r in enumerate(results) for (prompt, seed), row in r["rows"].items()
    }
    ours = {(prompt, (k, seed)): before[prompt, seed] for prompt, (k, seed) in theirs}
    per_seed = [
        {
            "win_rate": result["win_rate"],
            "accuracy": mean(result["rows"], "accurate"),
            "vendi": result["drift"]["vendi"],
        }
        for result in results
    ]
    return {**compared(theirs, ours), "per_seed": per_seed}


def difference(
    theirs: list[dict[str, float]], ours: list[dict[str, float]], prompts: list[str], name: str
) -> dict[str, Any]:
    """Aligned minus base of one number, with its interval over prompts."""
    has = [index for index, row in enumerate(ours) if not np.isnan(row[name])]
    gap = paired_difference(
        [theirs[i][name] for i in has], [ours[i][name] for i in has], clusters=[prompts[i] for i in has]
    )
    return {
        "base": float(np.mean([ours[i][name] for i in has])),
        "aligned": float(np.mean([theirs[i][name] for i in has])),
        "difference": gap.as_dict(),
    }


def best_of(first: Rows, second: Rows) -> Rows:
    """Of two pictures of each prompt and seed the better one by the grader: what picking alone buys."""
    # The seeds of the second drawing differ; both are in the order of prompts x seeds.
    pairs = zip(first.items(), second.values(), strict=True)
    return {key: max(row, other, key=lambda r: (r["share"], r["accurate"])) for (key, row), other in pairs}


def compared(theirs: Rows, ours: Rows) -> dict[str, Any]:
    """Win rate and differences of pictures against the base's, on the same prompts."""
    prompts, rows, base = [prompt for prompt, _ in ours], [theirs[key] for key in ours], list(ours.values())
    return {
        "win_rate": win_rate(
            [r["share"] for r in rows], [r["share"] for r in base], clusters=prompts
        ).as_dict(),
        "parts": {name: difference(rows, base, prompts, name) for name in KINDS},
    }


def interval(value: dict[str, Any]) -> str:
    return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def signed(value: dict[str, Any]) -> str:
    return f"{value['estimate']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"

"""Score pictures: one row a picture, with every scorer's number on its own scale.

Reads an images.jsonl (written by `diffalign generate`) or a folder of pictures, each with a .txt file of the
same name as its prompt, and writes OUT/scores.jsonl. A picture that cannot be decoded scores NaN, says why,
and never stops the run. The same command again goes on where a killed run stopped.

Examples:
    diffalign score images=base scorers=[scene] out=base-scores
    diffalign score images=base out=scored \\
        scorers="{clip: {path: laion/CLIP-ViT-H-14-laion2B-s32B-b79K}, scene: {}}"
    diffalign score images=photos scorers="{clip: {path: ViT-L-14.pt, scale: clipscore}}" out=photo-scores
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from diffalign.common.config import Many, make_many, resolved_recipe
from diffalign.common.errors import UserError

ROWS = "scores.jsonl"


def score(
    *,
    images: str | list[str],
    scorers: Annotated[dict[str, Any], Many("scorers")],
    out: str,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> Path:
    """Returns the path of the written scores.jsonl, after printing mean, median and NaN count of each scorer.

    Args:
        images: an images.jsonl, the folder that holds one, or a folder of pictures; or a list of these.
        scorers: what to score with; label -> options.
        out: folder for scores.jsonl and the manifest; not the folder of the pictures.
        limit: score the first so many pictures only.
        batch_size: pictures decoded and scored at a time.
        device: auto | cpu | cuda | cuda:1 ...

    Raises:
        UserError: no pictures, a scorer without weights or without the prompts that it needs, or `out` holds
            something else.
    """
    from diffalign.common import files, manifest
    from diffalign.common.progress import Progress
    from diffalign.stages import _run, _scoring

    recipe = resolved_recipe(score, locals())
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a number of pictures of at least 1")
    rows, source = _scoring.read_all_image_rows(images, limit=limit)
    chosen = make_many("scorers", scorers)
    _scoring.check_needs(rows, chosen)
    place = _run.pick_device(device)
    ready = {name: scorer.load(place) for name, scorer in chosen.items()}
    versions = {name: [scorer.scale, scorer.version] for name, scorer in ready.items()}
    same = {
        "scorers": recipe["scorers"],
        "versions": versions,
        "rows": manifest.recipe_identity({"rows": rows}),
        "pictures": manifest.recipe_identity({"digests": _scoring.digests(rows, source)}),
    }
    with _run.claim_folder(out, stage="score", recipe=recipe, same=same) as folder:
        path = folder / ROWS
        files.trim_torn_tail(path)
        done = {str(row["id"]) for row in files.read_jsonl(path)} if path.exists() else set()
        missing = [row for row in rows if str(row["id"]) not in done]
        if missing:
            manifest.withdraw_manifest(folder)
        with Progress("score", len(rows), "pictures", initial=len(rows) - len(missing)) as progress:
            for batch in _scoring.score_batches(missing, source, ready, batch_size=batch_size):
                files.append_jsonl(path, [_scoring.relative_to(row, source, folder) for row in batch])
                progress.update(len(batch))
        scored = files.read_jsonl(path)
        _close(folder, images, recipe, scored, ready)
    print(f"{path}:\n{summary(scored, list(ready))}")
    return path


def _close(
    folder: Path,
    images: str | list[str],
    recipe: dict[str, Any],
    scored: list[dict[str, Any]],
    ready: dict[str, Any],
) -> None:
    """Writes the manifest: how many pictures, and which ones a scorer had no value for."""
    from diffalign.common import manifest

    failed = {name: [str(row["id"]) for row in scored if name in row["errors"]] for name in ready}
    manifest.write_manifest(
        folder,
        stage="score",
        recipe=recipe,
        inputs={"images": images}
        if isinstance(images, str)
        else {f"images {number}": path for number, path in enumerate(images)},
        counts={"pictures": len(scored), **{f"{name} NaN": len(ids) for name, ids in failed.items()}},
        dropped={f"{name} NaN": ids for name, ids in failed.items() if ids},
        extra={"scorers": {name: {"scale": s.scale, "version": s.version} for name, s in ready.items()}},
    )


def summary(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Returns mean, median and NaN count of each scorer as a table, and why pictures have no score."""
    import numpy as np

    table: list[tuple[str, ...]] = [("scorer", "scale", "pictures", "mean", "median", "NaN")]
    notes = []
    for name in names:
        values = [row["scores"][name]["value"] for row in rows]
        numbers = np.array([value for value in values if value is not None])
        shown = [f"{f(numbers):.4f}" if len(numbers) else "-" for f in (np.mean, np.median)]
        scale = str(rows[0]["scores"][name]["scale"])
        table.append((name, scale, str(len(numbers)), *shown, str(len(values) - len(numbers))))
        failed = [row for row in rows if name in row["errors"]]
        notes += [f"{name}: {row['id']}: {row['errors'][name]}" for row in failed[:3]]
        if len(failed) > 3:
            notes.append(f"{name}: ... and {len(failed) - 3} more, see errors in {ROWS}")
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([line.rstrip() for line in lines] + notes)

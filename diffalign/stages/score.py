"""Score pictures: one row a picture, with every scorer's number on its own scale.

Reads an images.jsonl (written by `diffalign generate`) or a folder of pictures, their prompts from `prompts`
or from .txt files of the pictures' names, and writes OUT/scores.jsonl and summary.json. A picture that cannot
be decoded scores NaN, says why, and never stops the run. The same command again goes on where a killed run
stopped. Several processes (torchrun, or RANK and WORLD_SIZE) and machines that see OUT share the work.

Examples:
    diffalign score images=base scorers=[scene] out=base-scores
    diffalign score images=photos prompts=prompts.txt scorers=[pickscore,hpsv2,aesthetic] out=scored
    diffalign score images=base out=scored group=true table=csv cache=score-cache \\
        scorers="{clip: {path: laion/CLIP-ViT-H-14-laion2B-s32B-b79K}, scene: {}}"
    diffalign score images=aligned scorers=[pickscore] out=aligned-scores compare=base-scores
    torchrun --nproc_per_node 8 -m diffalign score images=base scorers=[hpsv2] out=base-scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import Many, make_many, resolved_recipe
from diffalign.common.errors import UserError

if TYPE_CHECKING:
    from diffalign.evaluation.pairs import Shot
    from diffalign.scorers import Scorer
    from diffalign.stages._image_rows import Row
    from diffalign.stages._score_cache import ScoreCache
    from diffalign.stages._shares import Share

SUMMARY = "summary.json"
RANKING = "ranking.jsonl"
COMPARISON = "comparison.json"


def score(
    *,
    images: str | list[str],
    scorers: Annotated[dict[str, Any], Many("scorers")],
    out: str,
    prompts: str | None = None,
    limit: int | None = None,
    group: bool = False,
    compare: str | None = None,
    table: Literal["csv", "parquet"] | None = None,
    cache: str | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "auto",
) -> Path:
    """Returns the path of the written scores.jsonl, after printing each scorer's numbers.

    Args:
        images: an images.jsonl, the folder that holds one, or a folder of pictures; or a list of these.
        scorers: what to score with; label -> options.
        out: folder for scores.jsonl, summary.json and the manifest; not the folder of the pictures.
        prompts: a file with a prompt for each picture of a folder, in their order or by a column image,
            file_name or id; or one text for all.
        limit: score the first so many pictures only.
        group: write ranking.jsonl, too: the pictures of each prompt from best to worst by the first scorer,
            with their ranks by all; pictures without a prompt are one group.
        compare: a folder that `score` wrote of the same prompts and seeds (of pictures without seeds: of the
            same names): print how often these pictures beat those, and write comparison.json.
        table: write scores.csv or scores.parquet, too, a flat column for each scorer and part.
        cache: a folder that keeps scores by picture, prompt and scorer, and gives known ones again.
        batch_size: pictures decoded and scored at a time.
        workers: threads that read, decode and prepare; null: one for each core, at most 16.
        device: auto | cpu | cuda | cuda:1 ...

    Raises:
        UserError: no pictures, a scorer without weights or without the prompts that it needs, or `out` holds
            something else.
    """
    from diffalign.common.progress import silence
    from diffalign.stages import _run, _shares

    recipe = resolved_recipe(score, locals())
    chosen = make_many("scorers", scorers)
    _refuse_bad_arguments(recipe)
    share = _shares.my_share()
    if share.index > 0:
        silence()
    rows, source = _pictures(images, prompts, limit, chosen)
    others = None if compare is None else _other_shots(compare, list(chosen))
    ready = {label: scorer.load(_run.pick_device(device)) for label, scorer in chosen.items()}
    same = _decides(recipe, ready, rows)
    with _run.claim_folder(out, stage="score", recipe=recipe, same=same, share=share) as folder:
        scored = _scored(rows, source, ready, folder, share, recipe)
        if scored is not None:
            _report(folder, scored, list(ready), group=group, table=table)
        if scored is not None and others is not None:
            _compare(folder, scored, str(compare), others)
    if scored is not None:
        _refuse_nothing(out, scored, list(ready))
    return folder / "scores.jsonl"


def _refuse_bad_arguments(recipe: Mapping[str, Any]) -> None:
    """Raises UserError for what can be known before a picture is looked for."""
    from diffalign.stages._score_report import check_table

    for name in ("batch_size", "workers"):
        if recipe[name] is not None and recipe[name] < 1:
            raise UserError(f"{name}={recipe[name]}: give a number of at least 1")
    if recipe["table"] is not None:
        check_table(list(recipe["scorers"]))
    _refuse_source(recipe["out"], recipe["images"])


def _decides(recipe: Mapping[str, Any], ready: Mapping[str, Scorer], rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what must be equal for a run to continue in its folder."""
    from diffalign.common import manifest

    return {
        "scorers": recipe["scorers"],
        "versions": {label: [scorer.scale, scorer.version] for label, scorer in ready.items()},
        "pictures and prompts": {"sha256": manifest.recipe_identity({"rows": rows})},
    }


def _pictures(
    images: str | list[str], prompts: str | None, limit: int | None, scorers: Mapping[str, Scorer]
) -> tuple[list[Row], Path]:
    """Returns the rows with their prompts, and the folder that their paths start from."""
    from diffalign.stages._image_rows import check_needs, read_all_image_rows, with_prompts

    rows, source = read_all_image_rows(images, limit=limit)
    if prompts is not None:  # those of all pictures, whatever the limit
        kept = {row["id"] for row in rows}
        everything, _ = read_all_image_rows(images)
        rows = [row for row in with_prompts(everything, prompts) if row["id"] in kept]
    check_needs(rows, scorers)
    return rows, source


def _scored(
    rows: Sequence[Row],
    source: Path,
    ready: Mapping[str, Scorer],
    folder: Path,
    share: Share,
    recipe: dict[str, Any],
) -> list[Row] | None:
    """Scores this process's share; returns all rows in the process that is to report, else None."""
    from diffalign.common.progress import say
    from diffalign.stages._parts import remove_parts
    from diffalign.stages._score_cache import ScoreCache
    from diffalign.stages._score_parts import finished_rows, refuse_changed

    scored = finished_rows(folder)
    if scored is not None:
        refuse_changed(str(folder), scored, folder)
        remove_parts(folder)  # a kill may have come just before
        say(f"{folder} is complete already")
        return scored if share.index == 0 else None
    with nullcontext() if recipe["cache"] is None else ScoreCache(recipe["cache"]) as known:
        _score_share(rows, source, ready, folder, share, recipe, known)
    scored = _finish(folder, rows, recipe, ready)
    if scored is None:
        say(f"score: share {share.index + 1} of {share.count} is done; the last one to finish joins them")
    return scored


def _refuse_source(out: str, images: str | list[str]) -> None:
    """Raises UserError when `out` is a folder of pictures: its rows would be taken for the pictures later."""
    for source in [images] if isinstance(images, str) else images:
        place = Path(source)
        if (place if place.is_dir() else place.parent).resolve() == Path(out).resolve():
            raise UserError(f"out={out} is the folder of the pictures: choose another folder")


def _score_share(
    rows: Sequence[Row],
    source: Path,
    ready: Mapping[str, Scorer],
    folder: Path,
    share: Share,
    recipe: Mapping[str, Any],
    cache: ScoreCache | None,
) -> None:
    """Scores what is missing of this process's share, appending to its part of the rows."""
    from diffalign.common import files
    from diffalign.common.progress import Progress, say
    from diffalign.stages import _parts
    from diffalign.stages._image_rows import relative_to
    from diffalign.stages._score_parts import refuse_changed
    from diffalign.stages._scoring import groups_of, score_batches

    part = _parts.own_part(folder, share)
    done = _parts.rows_so_far(folder)
    together = any(scorer.relative for scorer in ready.values())
    # Of a group that a kill has torn, every picture is scored again: values hold within the whole group only.
    own = share.of(list(groups_of(rows).values()) if together else [[row] for row in rows])
    left = [group for group in own if any(str(row["id"]) not in done for row in group)]
    missing, count = [row for group in left for row in group], sum(map(len, own))
    mine = [done[str(row["id"])] for group in own for row in group if str(row["id"]) in done]
    refuse_changed(str(folder), mine, folder)
    options = {"batch_size": recipe["batch_size"], "workers": recipe["workers"], "cache": cache}
    with Progress("score", count, "pictures", initial=count - len(missing)) as progress:
        for batch in score_batches(missing, source, ready, **options):
            files.append_jsonl(part, [relative_to(row, source, folder) for row in batch])
            progress.update(len(batch))
    if cache is not None:
        say(f"cache: {cache.hits} of {len(missing) * len(ready)} scores were known")


def _finish(
    folder: Path, rows: Sequence[Row], recipe: dict[str, Any], ready: Mapping[str, Scorer]
) -> list[Row] | None:
    """Joins the parts and completes the folder; returns its rows, None while other processes are at work."""
    from diffalign.common import files, manifest
    from diffalign.stages import _parts, _score_parts
    from diffalign.stages._score_report import summary_of

    with files.waiting_lock(folder, "join"):
        if _score_parts.finished_rows(folder) is not None:  # another process was later, and has done it
            return None
        scored = _score_parts.join_parts(folder, [str(row["id"]) for row in rows])
        if scored is None:
            return None
        failed = {name: [str(row["id"]) for row in scored if name in row["errors"]] for name in ready}
        images = recipe["images"]
        sources = {"images": images} if isinstance(images, str) else dict(enumerate(images))
        prompts = {} if recipe["prompts"] is None else {"prompts": recipe["prompts"]}
        files.write_json(folder / SUMMARY, summary_of(scored, list(ready)))
        manifest.write_manifest(
            folder,
            stage="score",
            recipe=recipe,
            inputs={name if name == "images" else f"images {name}": path for name, path in sources.items()}
            | prompts,
            counts={"pictures": len(scored), **{f"{name} NaN": len(ids) for name, ids in failed.items()}},
            dropped={f"{name} NaN": ids for name, ids in failed.items() if ids},
            extra={"scorers": {name: {"scale": s.scale, "version": s.version} for name, s in ready.items()}},
        )
        _parts.remove_parts(folder)
    return scored


def _report(folder: Path, scored: list[Row], names: list[str], *, group: bool, table: str | None) -> None:
    """Prints the summary, and writes what else was asked for."""
    from diffalign.common import files
    from diffalign.stages import _score_report

    text = _score_report.as_text(scored, files.read_json(folder / SUMMARY))
    print(f"{folder / 'scores.jsonl'}:\n{text}")
    if table is not None:
        _score_report.write_table(folder / f"scores.{table}", scored, names)
        print(f"table: {folder / f'scores.{table}'}")
    if group:
        files.write_jsonl(folder / RANKING, _score_report.ranking_of(scored, names))
        print(f"ranking: {folder / RANKING}")


def _refuse_nothing(out: str, scored: list[Row], names: list[str]) -> None:
    """Raises UserError for a scorer that could judge no picture: what follows would have nothing to go by."""
    for name in names:
        if all(row["scores"][name]["value"] is None for row in scored):
            raise UserError(
                f"scorer {name} could judge none of {len(scored)} pictures ({scored[0]['errors'][name]}): "
                f"see errors in {Path(out) / 'scores.jsonl'}"
            )


def _other_shots(other: str, names: list[str]) -> list[Shot]:
    """Returns the scored pictures of another folder; said before the work if they cannot be compared with.

    Raises:
        UserError: they are not there, or have none of the scorers called `names`.
    """
    from diffalign.stages._image_rows import read_image_rows
    from diffalign.stages._run import refuse_unfinished

    if not Path(other).exists():
        raise UserError(f"compare={other} does not exist: give a folder that score wrote")
    if Path(other).is_dir() and not (Path(other) / "scores.jsonl").is_file():
        refuse_unfinished(Path(other))
        raise UserError(f"compare={other} has no scores.jsonl: score it first")
    rows, folder = read_image_rows(Path(other) / "scores.jsonl" if Path(other).is_dir() else other)
    shots = _shots(rows, folder, f"compare={other}")
    theirs = dict.fromkeys(name for shot in shots for name in shot.scores)
    if not set(theirs) & set(names):
        raise UserError(
            f"compare={other} has scores of {', '.join(theirs) or 'nothing'}, not of {', '.join(names)}: "
            "score both with one scorer"
        )
    return shots


def _shots(rows: list[Row], folder: Path, name: str) -> list[Shot]:
    """Returns rows as what `match` pairs: by prompt and seed, or by id where there are no seeds."""
    from diffalign.evaluation.pairs import read_shots

    if not any("seed" in row for row in rows):
        rows = [{**row, "prompt_id": row["id"]} for row in rows]
    return read_shots(rows, folder, name)


def _compare(folder: Path, scored: list[Row], other: str, theirs: list[Shot]) -> None:
    """Prints and writes how often these pictures beat those of another scored folder."""
    from diffalign.common import files
    from diffalign.evaluation._table import verdict_lines
    from diffalign.evaluation.pairs import match
    from diffalign.evaluation.report import verdicts

    pairs = match(theirs, _shots(scored, folder, str(folder)))
    rewards = verdicts(pairs)
    files.write_json(folder / COMPARISON, {"base": other, "pairs": len(pairs), "rewards": rewards})
    print("\n".join([f"against {other}, {len(pairs)} pairs:", *verdict_lines(rewards)]))

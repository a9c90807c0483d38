"""`evaluate mode=images`: pictures of one model or of several against those of their base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files, manifest
from diffalign.common.config import make_many, make_one
from diffalign.common.errors import UserError
from diffalign.evaluation import _table
from diffalign.evaluation.grid import choose, draw_grid
from diffalign.evaluation.html import as_html
from diffalign.evaluation.markdown import as_markdown
from diffalign.evaluation.pairs import Pair, Shot, match, prompt_key, read_shots
from diffalign.evaluation.provenance import Origin, given_run, trace
from diffalign.evaluation.ratings import standings
from diffalign.evaluation.report import Report, compare
from diffalign.evaluation.summary import RATING_NOTE, Comparison, unbeaten
from diffalign.stages import _run

if TYPE_CHECKING:
    from diffalign.scorers import Scorer

REPORT = "report.json"
PAGE = "report.html"
TEXT = "report.md"
GRID, GRIDS = "grid.png", "grids"
BASE = "base"
ONE = "aligned"
"""What the model is called where there is one."""


@dataclass(frozen=True)
class Side:
    """The pictures of one model: as they were given, where they are listed, and their rows."""

    given: str
    path: Path
    rows: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        """The folder that the rows' paths start from."""
        return self.path if self.path.is_dir() else self.path.parent


def evaluate_images(recipe: dict[str, Any], plugins: dict[str, Any]) -> Path:
    """Returns the path of the written report.json, after printing the table.

    Args:
        recipe: the resolved recipe.
        plugins: `scorers` and `embedder` as they came.

    Raises:
        UserError: see `evaluate`.
    """
    _refuse_bad_settings(recipe)
    models = named_models(recipe["aligned"])
    runs = _runs(recipe["run"], models)
    out = Path(recipe["out"])
    _run.earlier_run(out, "evaluate")  # refuse another stage's folder before the work
    place = _run.pick_device(recipe["device"])
    chosen = make_many("scorers", plugins["scorers"]) if plugins["scorers"] is not None else {}
    made = make_one("scorers", plugins["embedder"])
    if made is not None and not hasattr(made, "embed_images"):
        raise UserError(f"embedder={recipe['embedder']['name']} gives no picture features: use embedder=clip")
    given = {BASE: recipe["base"], **models}
    sides = {name: _side(source, name, bool(chosen)) for name, source in given.items()}
    origins = {name: _origin(side, runs.get(name)) for name, side in sides.items()}
    sides = _limited(sides, recipe["limit"])
    ready = {name: scorer.load(place) for name, scorer in chosen.items()}
    shots = {name: _shots(side, name, ready, recipe["batch_size"]) for name, side in sides.items()}
    embedder = made.load(place) if made is not None else _first_embedder(ready)
    comparison = _comparison(shots, origins, embedder, recipe)
    page = as_html(comparison, pictures=recipe["pictures"], seed=recipe["seed"])
    with _run.claim_folder(out, stage="evaluate", recipe=recipe):
        _write(out, comparison, page, recipe, {name: str(side.path) for name, side in sides.items()})
    _say(comparison, out)
    return out / REPORT


def named_models(aligned: str | list[str] | dict[str, str]) -> dict[str, str]:
    """Returns name -> folder of the models to compare; of a list, the folders' names.

    Raises:
        UserError: none, two of one name, or a name that cannot be part of a file name.
    """
    if isinstance(aligned, str):
        return {ONE: aligned}
    if not aligned:
        raise UserError("aligned is empty: give a folder, or several as {name: FOLDER}")
    if isinstance(aligned, list):
        names = [Path(folder).resolve().name for folder in aligned]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"two of aligned= are folders named '{twice}': name them, {{name: FOLDER}}")
        aligned = dict(zip(names, aligned, strict=True))
    for name in aligned:
        if not name.isprintable() or not 0 < len(name.encode()) <= 200 or "/" in name or name[0] == ".":
            raise UserError(f"aligned: '{name}' cannot be part of a file name: name it, {{name: FOLDER}}")
        if name == BASE:
            raise UserError(f"aligned: a model may not be called '{BASE}': name it, {{name: FOLDER}}")
    return dict(aligned)


def as_json(comparison: Comparison, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the report as it is written.

    One model: the first reward's win rate on top, then everything. Several: that of each under `models`, and
    the `standings` of all of them by each scorer.
    """
    found = {m: _model_json(report, comparison.scorer) for m, report in comparison.reports.items()}
    top = {"mode": recipe["mode"], "reward": comparison.scorer}
    sides = {"unlike": comparison.unlike(), "base": recipe["base"], "aligned": recipe["aligned"]}
    if not comparison.standings:
        return {**top, **found[ONE], **sides}
    return {**top, "models": found, "standings": comparison.standings, **sides}


def _model_json(report: Report, scorer: str) -> dict[str, Any]:
    reward = report.rewards[scorer]
    return {
        "win_rate": reward.win_rate.estimate,
        "interval": [reward.win_rate.low, reward.win_rate.high],
        "level": reward.win_rate.level,
        "n": reward.win_rate.n,
        "prompts": report.prompts,
        "seeds": report.seeds,
        "pairs": report.pairs,
        "rewards": report.rewards,
        "drift": report.drift,
        "categories": report.categories,
        "unreadable": report.unreadable,
        "notes": report.notes,
    }


def _refuse_bad_settings(recipe: dict[str, Any]) -> None:
    """Raises UserError for settings that mode=images cannot work with."""
    for name in ("base", "aligned"):
        if recipe[name] is None:
            raise UserError(f"evaluate mode=images needs {name}=FOLDER: the output of score, or of generate")
    least = {"limit": 1, "grid_rows": 1, "batch_size": 1, "tie_epsilon": 0, "pictures": 0}
    for name, smallest in least.items():
        if recipe[name] is not None and not recipe[name] >= smallest:
            raise UserError(f"{name}={recipe[name]}: give a number of at least {smallest}")


def _runs(run: str | dict[str, str] | None, models: Mapping[str, str]) -> dict[str, str]:
    """Returns model -> folder of the training run that was given for it."""
    if run is None:
        return {}
    if isinstance(run, str):
        if len(models) > 1:
            raise UserError(f"run={run}: whose of {', '.join(models)}? give run={{name: FOLDER}}")
        return {name: run for name in models}
    for name in run:
        if name not in models:
            raise UserError(f"run: no model is called '{name}', known: {', '.join(models)}")
    return dict(run)


def _side(source: str, name: str, score_now: bool) -> Side:
    """Returns the rows of one side."""
    from diffalign.stages._image_rows import ROW_FILES, read_image_rows

    path = Path(source)
    if not path.exists():
        raise UserError(f"{name}={source} does not exist: give the output of score, or of generate")
    if path.is_dir() and not score_now:
        path = path / "scores.jsonl"
        if not path.is_file():
            raise UserError(f"{name}={source} has no scores.jsonl: score it first, or give scorers=[...]")
    rows, folder = read_image_rows(path)
    found = next((folder / name for name in ROW_FILES if (folder / name).is_file()), folder)
    return Side(source, path if path.is_file() else found, rows)


def _limited(sides: dict[str, Side], limit: int | None) -> dict[str, Side]:
    """Returns the sides with the rows of base's first `limit` prompts alone, so that no others are scored."""
    if limit is None:
        return sides
    kept = set(list(dict.fromkeys(prompt_key(row) for row in sides[BASE].rows))[:limit])
    return {
        name: replace(side, rows=[row for row in side.rows if prompt_key(row) in kept])
        for name, side in sides.items()
    }


def _origin(side: Side, run: str | None) -> Origin:
    origin = trace(side.given, side.path, side.folder / side.rows[0]["image"])
    if run is not None:
        given_run(origin, run)
    return origin


def _shots(side: Side, name: str, scorers: dict[str, Scorer], batch_size: int) -> list[Shot]:
    """Returns the pictures of one side with their scores, made now where scorers are given."""
    from diffalign.common.progress import Progress
    from diffalign.stages._image_rows import check_needs
    from diffalign.stages._scoring import score_batches

    rows = side.rows
    if scorers:
        check_needs(rows, scorers)
        plain = [{**row, "scores": {}} for row in rows]
        rows = []
        with Progress(f"score {name}={side.given}", len(plain), "pictures") as progress:
            for batch in score_batches(plain, side.folder, scorers, batch_size=batch_size):
                rows += batch
                progress.update(len(batch))
    return read_shots(rows, side.folder, f"{name}={side.given}")


def _first_embedder(scorers: dict[str, Scorer]) -> Any:
    """Returns the first of the loaded scorers that gives picture features, or None."""
    return next((scorer for scorer in scorers.values() if hasattr(scorer, "embed_images")), None)


def _comparison(
    shots: dict[str, list[Shot]], origins: dict[str, Origin], embedder: Any, recipe: dict[str, Any]
) -> Comparison:
    """Returns every model's report against base, and the standings where models were given as several."""
    settings = {"tie_epsilon": recipe["tie_epsilon"], "seed": recipe["seed"]}
    pairs: dict[str, list[Pair]] = {}
    for name, own in shots.items():
        if name != BASE:
            pairs[name] = match(shots[BASE], own, name)
    reports = {
        name: compare(found, embedder=embedder, batch_size=recipe["batch_size"], **settings)
        for name, found in pairs.items()
    }
    several = not isinstance(recipe["aligned"], str)
    return Comparison(reports, pairs, standings(pairs, reports, **settings) if several else {}, origins)


def _write(
    out: Path, comparison: Comparison, page: str, recipe: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Writes the report's files, the manifest last."""
    _write_grids(out, comparison, recipe)
    files.write_text(out / TEXT, as_markdown(comparison))
    files.write_text(out / PAGE, page)
    files.write_json(out / REPORT, as_json(comparison, recipe))
    counts, dropped = dict[str, Any](), dict[str, list[str]]()
    for name, report in comparison.reports.items():
        whose = f"{name}: " if comparison.standings else ""
        counts |= {f"{whose}pairs": report.pairs}
        counts |= {f"{whose}{scorer} NaN": reward.dropped for scorer, reward in report.rewards.items()}
        dropped |= {f"{whose}unreadable": report.unreadable} if report.unreadable else {}
    manifest.write_manifest(
        out,
        stage="evaluate",
        recipe=recipe,
        seed=recipe["seed"],
        inputs=inputs,
        counts=counts,
        dropped=dropped,
    )


def _write_grids(out: Path, comparison: Comparison, recipe: dict[str, Any]) -> None:
    """Writes grid.png, or of several models grids/NAME.png; those of an earlier report leave."""
    if not comparison.standings:
        shutil.rmtree(out / GRIDS, ignore_errors=True)
        with files.atomic_path(out / GRID) as temporary:
            _grid(comparison, ONE, recipe).save(temporary, format="PNG")
        return
    (out / GRID).unlink(missing_ok=True)
    with files.atomic_path(out / GRIDS) as temporary:
        temporary.mkdir()
        for name in comparison.pairs:
            _grid(comparison, name, recipe).save(temporary / f"{name}.png")


def _grid(comparison: Comparison, model: str, recipe: dict[str, Any]) -> Any:
    """Returns the picture of one model's wins and losses."""
    name = comparison.scorer
    reward = comparison.reports[model].rewards[name]
    higher = reward.higher_is_better
    pairs = comparison.pairs[model]
    sections = choose(pairs, name, rows=recipe["grid_rows"], seed=recipe["seed"], higher_is_better=higher)
    title = (
        f"{name} ({reward.scale}): win rate {100 * reward.win_rate.estimate:.1f} % "
        f"({reward.wins} won, {reward.ties} tied, {reward.losses} lost; a tie is half a win)"
    )
    return draw_grid(sections, name, title=title, higher_is_better=higher)


def _say(comparison: Comparison, out: Path) -> None:
    """Prints the tables and where the files are."""
    for name, standing in comparison.standings.items():
        for table in (_table.rating_table(name, standing), _table.win_table(name, standing)):
            print("\n".join([table.title, *table.as_lines(), ""]))
        if warning := unbeaten(standing):
            print(f"note: {warning}\n")
    if comparison.standings:
        print(f"{RATING_NOTE}\n")
    for model, report in comparison.reports.items():
        print(report.as_text(model))
    for text in comparison.unlike():
        print(f"note: drawn unlike base: {text}")
    print(f"page: {out / PAGE}")

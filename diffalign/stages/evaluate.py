"""Say whether the aligned model is better, and what that cost.

mode=images (the default) compares two folders of pictures of the same prompts and seeds. For every scorer:
how often aligned beats base (ties half) with a 95 % interval over prompts, a sign test, the mean difference
with its interval; beside them how far the pictures moved (pixels, embeddings) and what they lost (edges,
colours, diversity). Writes OUT/report.json, report.txt and grid.png.

mode=implicit judges by denoising errors: on pairs that people decided, how often the aligned model lowered
the error of the preferred picture more than that of the other. Writes OUT/implicit.json and implicit.jsonl.

Examples:
    diffalign evaluate base=base-scores aligned=aligned-scores out=report
    diffalign evaluate base=base aligned=aligned scorers=[scene] out=report
    diffalign evaluate base=base-scores aligned=aligned-scores out=report \\
        embedder=clip embedder.path=openai/clip-vit-base-patch32
    diffalign evaluate mode=implicit model=sdxl model.path=sdxl adapter=runs/dpo/adapter \\
        data=pickapic data.path=pickapic_v2/data data.split=validation_unique out=implicit
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import Many, One, make_many, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.data.specs import PreprocessSpec

if TYPE_CHECKING:
    from diffalign.evaluation.pairs import Shot
    from diffalign.evaluation.report import Report
    from diffalign.scorers import Scorer

REPORT = "report.json"
TEXT = "report.txt"
GRID = "grid.png"


def evaluate(
    *,
    out: str,
    mode: str = "images",
    base: str | None = None,
    aligned: str | None = None,
    scorers: Annotated[dict[str, Any] | None, Many("scorers")] = None,
    embedder: Annotated[Any, One("scorers")] = None,
    limit: int | None = None,
    model: Annotated[Any, One("models")] = None,
    data: Annotated[Any, One("data.sources")] = None,
    adapter: str | None = None,
    preprocess: PreprocessSpec = PreprocessSpec(),  # noqa: B008
    draws: int = 8,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    tie_epsilon: float = 0.0,
    grid_rows: int = 4,
    batch_size: int = 16,
    device: str = "auto",
    seed: int = 0,
) -> Path:
    """Returns the path of the written report.json, after printing the table.

    Args:
        out: folder for the report; an earlier report there is replaced.
        mode: images: compare the pictures of `base` and `aligned`; implicit: compare the denoising errors of
            `adapter` and its base on the pairs of `data`.
        base: mode=images: pictures of the base model: output folder of score, or of generate with `scorers`.
        aligned: mode=images: pictures of the aligned model, of the same prompts and seeds.
        scorers: mode=images: score the pictures now; null: take the scores that are there.
        embedder: mode=images: a scorer with picture features, for embedding distance and diversity; null: the
            first of `scorers` that has them.
        limit: the first so many prompts (mode=images) or pairs (mode=implicit) only.
        model: mode=implicit: the base.
        data: mode=implicit: preference pairs; ties are left out.
        adapter: mode=implicit: folder of the aligned LoRA or UNet.
        preprocess: mode=implicit: how pictures are fitted to the network.
        draws: mode=implicit: fixed, stratified (timestep, noise) draws a pair.
        precision: mode=implicit: of the forward passes.
        tie_epsilon: mode=images: scores that differ by at most this are a tie.
        grid_rows: mode=images: pairs in each column of the picture: biggest wins, random, biggest losses.
        batch_size: mode=images: pictures scored at a time.
        device: mode=images: auto | cpu | cuda | cuda:1 ...
        seed: mode=images: of the bootstrap and of the random pictures.

    Raises:
        UserError: a key that the mode does not read, prompts or seeds of the two sides differ, scores are
            missing or not comparable, or `out` holds something else.
    """
    recipe = resolved_recipe(evaluate, locals())
    if mode not in MODES:
        raise unknown("mode of evaluate", mode, MODES)
    _refuse_unread(recipe)
    return MODES[mode](recipe, {"scorers": scorers, "embedder": embedder, "model": model, "data": data})


def _images(recipe: dict[str, Any], plugins: dict[str, Any]) -> Path:
    """mode=images: returns the path of the report."""
    from diffalign.common import files, manifest
    from diffalign.evaluation.grid import choose, draw_grid
    from diffalign.evaluation.pairs import first_prompts, match
    from diffalign.evaluation.report import compare
    from diffalign.stages import _run

    _check_images_recipe(recipe)
    out = Path(recipe["out"])
    _run.earlier_run(out, "evaluate")  # refuse another stage's folder before the work
    place = _run.pick_device(recipe["device"])
    chosen = make_many("scorers", plugins["scorers"]) if plugins["scorers"] is not None else {}
    made = make_one("scorers", plugins["embedder"])
    if made is not None and not hasattr(made, "embed_images"):
        raise UserError(f"embedder={recipe['embedder']['name']} gives no picture features: use embedder=clip")
    sides = {name: _rows(recipe[name], name, bool(chosen)) for name in ("base", "aligned")}
    ready = {name: scorer.load(place) for name, scorer in chosen.items()}
    shots = {name: _shots(*side, ready, recipe["batch_size"]) for name, side in sides.items()}
    pairs = first_prompts(match(shots["base"], shots["aligned"]), recipe["limit"])
    report = compare(
        pairs,
        embedder=made.load(place) if made is not None else _first_embedder(ready),
        tie_epsilon=recipe["tie_epsilon"],
        seed=recipe["seed"],
        batch_size=recipe["batch_size"],
    )
    name, reward = next(iter(report.rewards.items()))
    higher = reward.higher_is_better
    sections = choose(pairs, name, rows=recipe["grid_rows"], seed=recipe["seed"], higher_is_better=higher)
    title = (
        f"{name} ({reward.scale}): win rate {100 * reward.win_rate.estimate:.1f} % "
        f"({reward.wins} won, {reward.ties} tied, {reward.losses} lost; a tie is half a win)"
    )
    with _run.claim_folder(out, stage="evaluate", recipe=recipe):
        with files.atomic_path(out / GRID) as temporary:
            draw_grid(sections, name, title=title, higher_is_better=higher).save(temporary, format="PNG")
        files.write_text(out / TEXT, report.as_text() + "\n")
        files.write_json(out / REPORT, as_json(report, recipe))
        manifest.write_manifest(
            out,
            stage="evaluate",
            recipe=recipe,
            seed=recipe["seed"],
            inputs={name: str(side[1]) for name, side in sides.items()},
            counts={"pairs": report.pairs, **{f"{n} NaN": r.dropped for n, r in report.rewards.items()}},
            dropped={"unreadable": report.unreadable} if report.unreadable else None,
        )
    print(report.as_text())
    print(f"pictures: {out / GRID}")
    return out / REPORT


def _implicit(recipe: dict[str, Any], plugins: dict[str, Any]) -> Path:
    """mode=implicit: returns the path of the summary."""
    from diffalign.stages import _implicit, _run

    for name in ("model", "data", "adapter"):
        if recipe[name] is None:
            raise UserError(
                f"evaluate mode=implicit needs {name}: the base, the pairs and the aligned adapter"
            )
    out = Path(recipe["out"])
    _run.earlier_run(out, "evaluate")
    return _implicit.evaluate_implicit(
        recipe,
        model=make_one("models", plugins["model"]),
        data=make_one("data.sources", plugins["data"]),
        out=out,
    )


MODES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Path]] = {
    "images": _images,
    "implicit": _implicit,
}
"""mode -> what it does, given the resolved recipe and its plug-ins as they came."""

READ_BY_ALL = ("out", "mode", "limit")
READ_BY = {
    "images": (
        *("base", "aligned", "scorers", "embedder", "tie_epsilon"),
        *("grid_rows", "batch_size", "device", "seed"),
    ),
    "implicit": ("model", "data", "adapter", "preprocess", "draws", "precision"),
}
"""mode -> the keys that it reads."""


def _refuse_unread(recipe: dict[str, Any]) -> None:
    """Raises UserError for a key that was changed, and that the mode does not read."""
    mode = recipe["mode"]
    parameters = inspect.signature(evaluate).parameters.values()
    defaults = resolved_recipe(evaluate, {p.name: p.default for p in parameters if p.default is not p.empty})
    for name, value in defaults.items():
        if recipe[name] != value and name not in (*READ_BY_ALL, *READ_BY[mode]):
            raise UserError(f"evaluate mode={mode} does not read {name}: leave it out")


def as_json(report: Report, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the report as it is written: the first reward's win rate on top, then everything."""
    name, reward = next(iter(report.rewards.items()))
    return {
        "mode": recipe["mode"],
        "reward": name,
        "win_rate": reward.win_rate.estimate,
        "interval": [reward.win_rate.low, reward.win_rate.high],
        "level": reward.win_rate.level,
        "n": reward.win_rate.n,
        "prompts": report.prompts,
        "seeds": report.seeds,
        "pairs": report.pairs,
        "rewards": report.rewards,
        "drift": report.drift,
        "unreadable": report.unreadable,
        "notes": report.notes,
        "base": recipe["base"],
        "aligned": recipe["aligned"],
    }


def _check_images_recipe(recipe: dict[str, Any]) -> None:
    """Raises UserError for settings that mode=images cannot work with."""
    for name in ("base", "aligned"):
        if recipe[name] is None:
            raise UserError(f"evaluate mode=images needs {name}=FOLDER: the output of score, or of generate")
    for name, least in (("limit", 1), ("grid_rows", 1), ("batch_size", 1), ("tie_epsilon", 0)):
        if recipe[name] is not None and not recipe[name] >= least:
            raise UserError(f"{name}={recipe[name]}: give a number of at least {least}")


def _rows(source: str, side: str, score_now: bool) -> tuple[list[dict[str, Any]], Path, str]:
    """Returns the rows of one side, the file or folder they come from, and its name for messages."""
    from diffalign.stages._image_rows import ROW_FILES, read_image_rows

    path = Path(source)
    if not path.exists():
        raise UserError(f"{side}={source} does not exist: give the output of score, or of generate")
    if path.is_dir() and not score_now:
        path = path / "scores.jsonl"
        if not path.is_file():
            raise UserError(f"{side}={source} has no scores.jsonl: score it first, or give scorers=[...]")
    rows, folder = read_image_rows(path)
    found = next((folder / name for name in ROW_FILES if (folder / name).is_file()), folder)
    return rows, path if path.is_file() else found, f"{side}={source}"


def _shots(
    rows: list[dict[str, Any]], source: Path, name: str, scorers: dict[str, Scorer], batch_size: int
) -> list[Shot]:
    """Returns the pictures of one side with their scores, made now where scorers are given."""
    from diffalign.common.progress import Progress
    from diffalign.evaluation.pairs import read_shots
    from diffalign.stages._image_rows import check_needs
    from diffalign.stages._scoring import score_batches

    folder = source if source.is_dir() else source.parent
    if scorers:
        check_needs(rows, scorers)
        plain = [{**row, "scores": {}} for row in rows]
        rows = []
        with Progress(f"score {name}", len(plain), "pictures") as progress:
            for batch in score_batches(plain, folder, scorers, batch_size=batch_size):
                rows += batch
                progress.update(len(batch))
    return read_shots(rows, folder, name)


def _first_embedder(scorers: dict[str, Scorer]) -> Any:
    """Returns the first of the loaded scorers that gives picture features, or None."""
    return next((scorer for scorer in scorers.values() if hasattr(scorer, "embed_images")), None)

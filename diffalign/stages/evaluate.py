"""Say whether the aligned model is better, and what that cost.

mode=images (the default) compares folders of pictures of the same prompts and seeds. For every scorer: how
often aligned beats base (ties half) with a 95 % interval over prompts, a sign test, the mean difference with
its interval, and all of it by the categories of the prompts' file; beside them how far the pictures moved
(pixels, embeddings) and what they lost (edges, colours, diversity). Several models get ratings, too. Writes
OUT/report.html (one page with pictures and charts that needs no other file), report.md, report.json and
grid.png (of several models grids/NAME.png).

mode=implicit judges by denoising errors: on pairs that people decided, how often the aligned model lowered
the error of the preferred picture more than that of the other. Writes OUT/implicit.json and implicit.jsonl.

mode=scorers judges the scorers: how well they agree with people on labelled pairs or ranked lists, by each
published definition with its interval over prompts, by category and by pair of models, and with one another.
Writes OUT/agreement.json, agreement.txt and agreement.jsonl.

Of several processes (torchrun) the first does the work; `score` is what shares the work of scoring.

Examples:
    diffalign evaluate base=base-scores aligned=aligned-scores out=report
    diffalign evaluate base=base aligned=aligned scorers=[scene] out=report
    diffalign evaluate base=base-scores aligned=aligned-scores out=report \\
        embedder=clip embedder.path=openai/clip-vit-base-patch32
    diffalign evaluate base=base-scores aligned="{dpo: dpo-scores, mapo: mapo-scores}" out=report
    diffalign evaluate mode=implicit model=sdxl model.path=sdxl adapter=runs/dpo/adapter \\
        data=pickapic data.path=pickapic_v2/data data.split=validation_unique out=implicit
    diffalign evaluate mode=implicit model=sdxl model.path=sdxl adapter=runs/dpo/adapter \\
        cache=pickapic-heldout out=implicit
    diffalign evaluate mode=scorers scorers=[pickscore,hpsv2,imagereward] data=pickapic \\
        data.path=pickapic_v2/data data.split=test_unique out=agreement
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from diffalign.common.config import Many, One, make_many, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.data.specs import PreprocessSpec


def evaluate(
    *,
    out: str,
    mode: str = "images",
    base: str | None = None,
    aligned: str | list[str] | dict[str, str] | None = None,
    scorers: Annotated[dict[str, Any] | None, Many("scorers")] = None,
    embedder: Annotated[Any, One("scorers")] = None,
    run: str | dict[str, str] | None = None,
    limit: int | None = None,
    model: Annotated[Any, One("models")] = None,
    data: Annotated[Any, One("data.sources")] = None,
    cache: str | None = None,
    adapter: str | None = None,
    preprocess: PreprocessSpec = PreprocessSpec(),  # noqa: B008
    draws: int = 8,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    tie_epsilon: float = 0.0,
    grid_rows: int = 4,
    pictures: int = 40,
    batch_size: int = 16,
    device: str = "auto",
    seed: int = 0,
) -> Path:
    """Returns the path of the written report.json, after printing the table.

    Args:
        out: folder for the report; an earlier report there is replaced.
        mode: images: compare the pictures of `base` and `aligned`; implicit: compare the denoising errors of
            `adapter` and its base on the pairs of `data`; scorers: compare `scorers` with the people who
            judged `data`.
        base: mode=images: pictures of the base model: output folder of score, or of generate with `scorers`.
        aligned: mode=images: pictures of the aligned model, of the same prompts and seeds; for several models
            a list of folders or a mapping name: folder: each against base, and against one another.
        scorers: mode=images and scorers: score the pictures now; null: take the scores that are there.
        embedder: mode=images: a scorer with picture features, for embedding distance and diversity; null: the
            first of `scorers` that has them.
        run: mode=images: output folder of train, whose health is shown (of several models a mapping
            name: folder); null: that of the adapter that the pictures were drawn with, where it is found.
        limit: the first so many prompts (mode=images), pairs (mode=implicit) or records (mode=scorers) only.
        model: mode=implicit: the base.
        data: mode=implicit: preference pairs; ties are left out. mode=scorers: labelled pairs, ranked lists.
        cache: mode=implicit: output folder of cache instead of data.
        adapter: mode=implicit: folder of the aligned LoRA or whole network.
        preprocess: mode=implicit: how pictures are fitted to the network; those of a cache are.
        draws: mode=implicit: fixed, stratified (timestep, noise) draws a pair.
        precision: mode=implicit: of the forward passes.
        tie_epsilon: mode=images: scores that differ by at most this are a tie.
        grid_rows: mode=images: pairs in each column of the picture: biggest wins, random, biggest losses.
        pictures: mode=images: prompts and seeds shown on the page; fewer where they are too big for it.
        batch_size: mode=images and scorers: pictures scored at a time.
        device: mode=images and scorers: auto | cpu | cuda | cuda:1 ...
        seed: mode=images and scorers: of the bootstrap and of the random pictures.

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
    from diffalign.stages import _evaluate_images

    return _evaluate_images.evaluate_images(recipe, plugins)


def _implicit(recipe: dict[str, Any], plugins: dict[str, Any]) -> Path:
    """mode=implicit: returns the path of the summary."""
    from diffalign.stages import _implicit, _run
    from diffalign.stages._cached import open_for

    from_cache = recipe["cache"] is not None
    if from_cache and recipe["data"] is not None:
        raise UserError("evaluate mode=implicit takes data= or cache=, both are set: leave one out")
    for name in ("model", "cache" if from_cache else "data", "adapter"):
        if recipe[name] is None:
            raise UserError(
                f"evaluate mode=implicit needs {name}: the base, the pairs (data= or cache=) and the aligned "
                "adapter"
            )
    out = Path(recipe["out"])
    _run.earlier_run(out, "evaluate")
    model = make_one("models", plugins["model"])
    if from_cache:
        pairs = open_for(recipe["cache"], PreprocessSpec(**recipe["preprocess"]))
    else:
        pairs = make_one("data.sources", plugins["data"])
    return _implicit.evaluate_implicit(recipe, model=model, pairs=pairs, out=out)


def _scorers(recipe: dict[str, Any], plugins: dict[str, Any]) -> Path:
    """mode=scorers: returns the path of the summary."""
    from diffalign.stages import _agreement, _run

    if recipe["data"] is None:
        raise UserError("evaluate mode=scorers needs data: pairs or lists that people judged")
    out = Path(recipe["out"])
    _run.earlier_run(out, "evaluate")
    return _agreement.evaluate_scorers(
        recipe,
        data=make_one("data.sources", plugins["data"]),
        scorers=None if plugins["scorers"] is None else make_many("scorers", plugins["scorers"]),
        out=out,
    )


MODES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Path]] = {
    "images": _images,
    "implicit": _implicit,
    "scorers": _scorers,
}
"""mode -> what it does, given the resolved recipe and its plug-ins as they came."""

READ_BY_ALL = ("out", "mode", "limit")
READ_BY = {
    "images": (
        *("base", "aligned", "scorers", "embedder", "run", "tie_epsilon"),
        *("grid_rows", "pictures", "batch_size", "device", "seed"),
    ),
    "implicit": ("model", "data", "cache", "adapter", "preprocess", "draws", "precision"),
    "scorers": ("data", "scorers", "batch_size", "device", "seed"),
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

"""`evaluate mode=implicit`: does the aligned model prefer, by its denoising errors, what people preferred?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.common.progress import Progress
from diffalign.common.statistics import Interval, bootstrap_interval
from diffalign.data.cache import Cache
from diffalign.data.encoded import Encoded
from diffalign.data.encoding import encode
from diffalign.data.sources._base import Source
from diffalign.data.specs import PreprocessSpec
from diffalign.data.tally import Tally
from diffalign.models._base import Model
from diffalign.models._spec import ModelSpec
from diffalign.stages import _cached
from diffalign.stages._run import claim_folder
from diffalign.training.implicit import PairJudgement, accuracy, judge
from diffalign.training.setup import accelerator_for

ROWS_FILE, SUMMARY_FILE = "implicit.jsonl", "implicit.json"


def evaluate_implicit(recipe: dict[str, Any], *, model: ModelSpec, pairs: Source | Cache, out: Path) -> Path:
    """Returns the path of `implicit.json`; beside it are `implicit.jsonl`, one row a pair, and the manifest.

    Args:
        recipe: the resolved recipe; `adapter`, `preprocess`, `draws`, `precision` and `limit` are read here.
        model: the base.
        pairs: preference pairs, to be encoded or from a cache; ties are left out.
        out: folder for the files.

    Raises:
        UserError: no adapter, an adapter or a cache for another base, no decided pair.
    """
    _check(recipe)
    preprocess = PreprocessSpec(**recipe["preprocess"])
    accelerator = accelerator_for(recipe["precision"])
    backbone = model.load(str(accelerator.device))
    backbone.check_policy(recipe["adapter"])
    encoded, tally = _encoded(pairs, backbone, preprocess, recipe["limit"])
    backbone.drop_encoders()
    backbone.load_policy(recipe["adapter"])  # only now: with the encoders it might not fit
    judgements = []
    with Progress("judge", len(encoded), "pairs") as bar:
        for judgement in judge(
            backbone.denoiser,
            encoded,
            num_draws=recipe["draws"],
            batch_size=preprocess.batch_size,
            device=accelerator.device,
            context=accelerator.autocast,
            known=backbone.known_timesteps,
        ):
            judgements.append(judgement)
            bar.update(1)
    if not judgements:
        raise UserError("no pair is decided: implicit accuracy needs pairs with a preferred image")
    summary = {
        "mode": "implicit",
        "pairs": len(judgements),
        "draws": recipe["draws"],
        "accuracy": accuracy(judgements).as_dict(),
        "base_error_accuracy": base_accuracy(judgements).as_dict(),
    }
    with claim_folder(out, stage="evaluate", recipe=recipe):
        files.write_jsonl(out / ROWS_FILE, rows_of(judgements, encoded))
        files.write_json(out / SUMMARY_FILE, summary)
        manifest.write_manifest(
            out,
            stage="evaluate",
            recipe=recipe,
            inputs={**pairs.inputs(), "adapter": recipe["adapter"]},
            counts=tally.counts(),
            dropped=tally.dropped,
            extra={"base": backbone.fingerprint()},
        )
    print(f"implicit accuracy {accuracy(judgements)}; by the base's error alone {base_accuracy(judgements)}")
    return out / SUMMARY_FILE


def _check(recipe: dict[str, Any]) -> None:
    """Refuses numbers of draws and pairs that nothing can be judged with."""
    if recipe["draws"] < 1:
        raise UserError(f"draws={recipe['draws']}: use 1 or more (8 by default)")
    if recipe["limit"] is not None and recipe["limit"] < 1:
        raise UserError(f"limit={recipe['limit']}: use 1 or more, or leave it out")


def _encoded(
    pairs: Source | Cache, model: Model, preprocess: PreprocessSpec, limit: int | None
) -> tuple[Encoded, Tally]:
    """The decided pairs as the model reads them, and the tally of the others."""
    if isinstance(pairs, Cache):
        _cached.refuse_another_base(pairs, model)
        return pairs.choose(ties="drop", limit=limit)
    groups = pairs.usable(limit=limit, ties="drop")
    return encode(groups, model, preprocess, seed=0), groups.tally


def base_accuracy(judgements: list[PairJudgement]) -> Interval:
    """How often the preferred image merely has the lower denoising error under the base."""
    return bootstrap_interval([judgement.reference_right() for judgement in judgements])


def rows_of(judgements: list[PairJudgement], encoded: Encoded) -> list[dict[str, Any]]:
    """One plain row a pair: id, prompt, margin of mean errors, whether it is right, fields to split by."""
    examples = {example.id: example for example in encoded.examples}
    return [
        {
            "id": judgement.id,
            "prompt": examples[judgement.id].prompt,
            "target": judgement.target,
            "margin": judgement.margin(),
            "right": judgement.right(),
            "base_right": judgement.reference_right(),
            "meta": examples[judgement.id].meta,
        }
        for judgement in judgements
    ]

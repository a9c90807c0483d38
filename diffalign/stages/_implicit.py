"""`evaluate mode=implicit`: does the aligned model prefer, by its denoising errors, what people preferred?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.common.progress import Progress, say
from diffalign.common.statistics import Interval, bootstrap_interval
from diffalign.data.buckets import PreprocessSpec
from diffalign.data.cache import EncodedSet, encode_pairs
from diffalign.training.implicit import PairJudgement, accuracy, judge
from diffalign.training.setup import accelerator_for

ROWS_FILE, SUMMARY_FILE = "implicit.jsonl", "implicit.json"


def evaluate_implicit(
    *,
    model: Any,
    data: Any,
    adapter: str,
    preprocess: PreprocessSpec,
    draws: int,
    precision: str,
    limit: int | None,
    folder: Path,
) -> dict[str, Any]:
    """Returns the summary, after writing one row a pair to `implicit.jsonl` and the summary to
    `implicit.json`.

    Args:
        model: the base.
        data: preference pairs; ties are left out.
        adapter: folder of the aligned LoRA or UNet.
        preprocess: how pictures are fitted to the network.
        draws: stratified (timestep, noise) draws a pair, fixed.
        precision: of the forward passes.
        limit: judge so many pairs only.
        folder: where the files go.

    Raises:
        UserError: no adapter, an adapter for another base, no decided pair.
    """
    if draws < 1:
        raise UserError(f"draws={draws}: use 1 or more (8 by default)")
    accelerator = accelerator_for(precision)
    backbone = model.load(str(accelerator.device))
    pairs = data.usable_pairs(limit=limit)
    encoded = encode_pairs(pairs, backbone, preprocess, unit="pair", seed=0)
    backbone.drop_encoders()
    backbone.load_policy(adapter)
    judgements = []
    with Progress("judge", len(encoded), "pairs") as bar:
        for judgement in judge(
            backbone.denoiser,
            encoded,
            num_draws=draws,
            batch_size=preprocess.batch_size,
            device=accelerator.device,
            context=accelerator.autocast,
        ):
            judgements.append(judgement)
            bar.update(1)
    if not judgements:
        raise UserError("no pair is decided: implicit accuracy needs pairs with a preferred image")
    files.write_jsonl(folder / ROWS_FILE, rows_of(judgements, encoded))
    summary = {
        "pairs": len(judgements),
        "draws": draws,
        "accuracy": accuracy(judgements).as_dict(),
        "base_error_accuracy": base_accuracy(judgements).as_dict(),
        "counts": pairs.tally.counts(),
        "dropped": pairs.tally.dropped,
    }
    files.write_json(folder / SUMMARY_FILE, summary)
    say(f"implicit accuracy {accuracy(judgements)}; by the base's error alone {base_accuracy(judgements)}")
    return summary


def base_accuracy(judgements: list[PairJudgement]) -> Interval:
    """How often the preferred image merely has the lower denoising error under the base."""
    return bootstrap_interval([judgement.reference_right() for judgement in judgements])


def rows_of(judgements: list[PairJudgement], encoded: EncodedSet) -> list[dict[str, Any]]:
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

"""Align a diffusion model with preferences: train a LoRA (or the whole network) on preference pairs.

Pictures and prompts are encoded once and kept in memory, then VAE and text encoders make room for the
network. The run writes checkpoints, metrics.jsonl, TensorBoard logs and, at the end, the adapter with a model
card below `out`. The same command again goes on where a stopped run was.

Examples:
    diffalign train model=sdxl model.path=stabilityai/stable-diffusion-xl-base-1.0 data=pickapic
        data.path=pickapic_v2/data data.split=train objective=diffusion_dpo out=runs/dpo precision=bf16
        model.dtype=bf16
    diffalign train --config configs/sdxl_dpo_24gb.yaml data.path=pickapic_v2/data out=runs/dpo
    diffalign train --config configs/sdxl_dpo_24gb.yaml --dry-run out=runs/dpo objective.beta=2000
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import AdapterSpec
from diffalign.training.specs import PRECISIONS, CheckpointSpec, OptimizerSpec, SampleSpec, ValidationSpec

if TYPE_CHECKING:
    from diffalign.data.cache import EncodedSet
    from diffalign.data.select import UsablePairs
    from diffalign.models._base import Model

RUN_FILE = "run.json"

NOT_IDENTITY = (
    "out",
    "log_every",
    "checkpoint",
    "samples",
    "loader.num_workers",
    "validation.every",
    "validation.draws",
    "validation.limit",
)
"""Keys that may change when a run is continued: they do not touch the weights."""


def train(
    *,
    model: Annotated[Any, One("models")],
    data: Annotated[Any, One("data.sources")],
    out: str,
    objective: Annotated[Any, One("objectives")] = "diffusion_dpo",
    adapter: AdapterSpec = AdapterSpec(),  # noqa: B008
    preprocess: PreprocessSpec = PreprocessSpec(),  # noqa: B008
    loader: LoaderSpec = LoaderSpec(),  # noqa: B008
    timesteps: TimestepSpec = TimestepSpec(),  # noqa: B008
    optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008
    validation: ValidationSpec = ValidationSpec(),  # noqa: B008
    samples: SampleSpec = SampleSpec(),  # noqa: B008
    checkpoint: CheckpointSpec = CheckpointSpec(),  # noqa: B008
    num_steps: int = 1000,
    accumulation: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    log_every: int = 10,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the closing numbers of the run: steps, skipped steps, held-out accuracy.

    Args:
        model: the base.
        data: preference pairs.
        out: folder of the run.
        objective: what is minimised.
        adapter: what is trained.
        preprocess: how pictures are fitted to the network.
        loader: how examples are drawn.
        timesteps: distribution of the training timesteps.
        optimizer: AdamW and its learning rate.
        validation: held-out accuracy while training.
        samples: pictures while training.
        checkpoint: how often the run is kept.
        num_steps: optimizer steps.
        accumulation: micro-batches of `loader.batch_size` groups in one optimizer step.
        precision: of the forward and backward pass; errors and losses are float32 in any case.
        log_every: optimizer steps between two lines of metrics.
        limit: use so many pairs only.
        seed: of every draw.
    """
    recipe = resolved_recipe(train, locals())
    _check_numbers(num_steps=num_steps, accumulation=accumulation, log_every=log_every, limit=limit)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    model, data, objective = (
        make_one("models", model),
        make_one("data.sources", data),
        make_one("objectives", objective),
    )

    from diffalign.common import files, manifest
    from diffalign.training import loop
    from diffalign.training.card import model_card
    from diffalign.training.setup import accelerator_for
    from diffalign.training.watch import Watch

    folder = Path(out)
    finished = _finished(folder, recipe)
    if finished is not None:
        return finished
    accelerator = accelerator_for(precision)
    backbone: Model = model.load(str(accelerator.device))
    base = backbone.fingerprint()
    timesteps.check(backbone.process.num_timesteps)
    pairs = data.usable_pairs(limit=limit)
    encoded = _encode(pairs, backbone, preprocess, objective.unit, seed)
    train_set, heldout = _split(encoded, validation, seed)
    embedded = backbone.embed_for_generation(samples.prompts) if samples.prompts else None
    backbone.drop_encoders()
    backbone.start_training(
        adapter, seed=seed, with_reference=objective.uses_reference or heldout is not None
    )

    with files.folder_lock(folder):
        for inside in (folder, folder / "samples"):
            files.remove_leftovers(inside)
        identity = _claim(folder, recipe, base, adapter.init, data.inputs())
        run = loop.Run(
            model=backbone,
            objective=objective,
            train_set=train_set,
            out=folder,
            identity=identity,
            accelerator=accelerator,
            num_steps=num_steps,
            accumulation=accumulation,
            seed=seed,
            log_every=log_every,
            loader=loader,
            timesteps=timesteps,
            optimizer=optimizer,
            checkpoint=checkpoint,
            watch=Watch(validation, heldout, samples, embedded, folder, accelerator, preprocess.batch_size),
        )
        summary = loop.fit(run)
        loop.finish(run, model_card(recipe, base_identity=base, counts=pairs.tally.counts(), summary=summary))
        manifest.write_manifest(
            folder,
            stage="train",
            recipe=recipe,
            inputs=data.inputs(),
            seed=seed,
            counts=pairs.tally.counts(),
            dropped=pairs.tally.dropped,
            extra={"identity": identity, "base": base, "summary": summary},
        )
    return summary


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: use 1 or more")


def _encode(
    pairs: UsablePairs, backbone: Model, preprocess: PreprocessSpec, unit: str, seed: int
) -> EncodedSet:
    from diffalign.common.progress import Progress, say
    from diffalign.data.cache import encode_pairs

    with Progress("encode", None, "pairs") as bar:

        def counted() -> Any:
            for pair in pairs:
                yield pair
                bar.update(1)

        encoded = encode_pairs(counted(), backbone, preprocess, unit=unit, seed=seed)
    say(f"{len(encoded)} examples of {pairs.tally.asked} rows; dropped: {pairs.tally.reasons()}")
    return encoded


def _split(
    encoded: EncodedSet, validation: ValidationSpec, seed: int
) -> tuple[EncodedSet, EncodedSet | None]:
    if validation.share == 0.0:
        return encoded, None
    from diffalign.data.loader import split_by_prompt

    if encoded.examples[0].target is None:
        raise UserError(
            "validation.share needs pairs: this objective trains on single images, set validation.share=0"
        )
    train_set, heldout = split_by_prompt(encoded, validation.share, seed=seed)
    heldout = heldout.subset(range(min(len(heldout), validation.limit or len(heldout))))
    if all(example.target == 0.5 for example in heldout.examples):
        raise UserError(
            f"all {len(heldout)} held-out pairs are ties: raise validation.share or validation.limit, or use "
            "data.ties=drop"
        )
    return train_set, heldout


def _finished(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The closing numbers of a run that is already complete in `folder`, or None.

    Raises:
        UserError: `folder` is a file, or holds something else.
    """
    from diffalign.common import files, manifest
    from diffalign.common.progress import say

    done = manifest.read_manifest(folder)
    if done is None:
        if folder.is_file():
            raise UserError(f"out={folder} is a file: give a folder")
        if (folder / RUN_FILE).is_file():  # said now, not after an hour of encoding
            _refuse_other(folder, files.read_json(folder / RUN_FILE)["recipe"], recipe)
        return None
    if done["stage"] != "train":
        raise UserError(f"{folder} holds the output of {done['stage']!r}: choose another folder")
    _refuse_other(folder, done["recipe"], recipe)
    say(f"{folder} holds this run, finished after {done['summary']['steps']} steps; nothing to do")
    summary: dict[str, Any] = done["summary"]
    return summary


def _claim(folder: Path, recipe: dict[str, Any], base: str, init: str | None, inputs: dict[str, Any]) -> str:
    """Writes what the run in `folder` is, or checks that it is this one; returns its identity."""
    from diffalign.common import files, manifest

    reference = manifest.identities({} if init is None else {"adapter.init": init})
    identity = manifest.recipe_identity(
        {
            "recipe": _binding(recipe),
            "base": base,
            "reference": reference,
            "data": manifest.identities(inputs),
        }
    )
    path = folder / RUN_FILE
    if path.is_file():
        known = files.read_json(path)
        _refuse_other(folder, known["recipe"], recipe)
        if known["identity"] != identity:
            raise UserError(
                f"base, adapter.init or data of the run in {folder} have changed: choose another out="
            )
    else:
        files.write_json(path, {"identity": identity, "recipe": recipe, "base": base})
    return identity


def _refuse_other(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    before, now = _binding(theirs), _binding(ours)
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key}={now.get(key)} (there: {before.get(key)})" for key in different[:3])
        raise UserError(f"{folder} holds another run: {changes}; choose another out= or the same recipe")


def _binding(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The recipe as dotted keys, without those that may change when a run is continued."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if key in NOT_IDENTITY:
            continue
        if isinstance(value, dict):
            flat |= _binding(value, f"{key}.")
        else:
            flat[key] = value
    return flat

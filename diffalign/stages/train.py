"""Align a diffusion model with preferences: train a LoRA (or the whole network) on preference pairs.

Pictures and prompts are encoded once and kept in memory, then VAE and text encoders make room for the
network. The run writes checkpoints, metrics.jsonl, TensorBoard logs and, at the end, the adapter with a model
card below `out`. The same command again goes on where a stopped run was.

Examples:
    diffalign train model=sdxl model.path=stabilityai/stable-diffusion-xl-base-1.0 data=pickapic
        data.path=pickapic_v2/data data.split=train objective=diffusion_dpo out=runs/dpo precision=bf16
        model.dtype=bf16
    diffalign train --config configs/sdxl_dpo_lora_24gb.yaml data.path=pickapic_v2/data out=runs/dpo
    diffalign train --config configs/sdxl_dpo_lora_24gb.yaml --dry-run out=runs/dpo objective.beta=2000
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import AdapterSpec
from diffalign.stages import _folder
from diffalign.training.specs import CheckpointSpec, OptimizerSpec, SampleSpec, Settings, ValidationSpec

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data.cache import EncodedSet
    from diffalign.data.select import UsablePairs
    from diffalign.models._base import Model
    from diffalign.objectives._base import Objective
    from diffalign.training.watch import Watch


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
    given = locals()
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    model = make_one("models", model)
    data = make_one("data.sources", data)
    objective = make_one("objectives", objective)
    _check_unit(objective, data, validation)
    finished = _folder.finished(Path(out), recipe)
    return finished or _train(model, data, objective, settings, recipe, Path(out))


def _train(
    spec: Any, data: Any, objective: Any, settings: Settings, recipe: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Prepares, runs and closes a run that is not complete yet."""
    from diffalign.common import files, manifest
    from diffalign.training import loop
    from diffalign.training.card import model_card
    from diffalign.training.setup import accelerator_for

    accelerator = accelerator_for(settings.precision)
    model: Model = spec.load(str(accelerator.device))
    base = model.fingerprint()
    settings.timesteps.check(model.process.num_timesteps)
    model.check_training(settings.adapter)
    inputs = data.inputs()
    pairs = data.usable_pairs(limit=settings.limit)
    train_set, watch = _prepare(pairs, model, objective, settings, folder, accelerator)
    with files.folder_lock(folder):
        for inside in (folder, folder / "samples"):
            files.remove_leftovers(inside)
        identity = _folder.claim(folder, recipe, base, settings.adapter.init, inputs)
        run = loop.Run(model, objective, train_set, folder, identity, accelerator, settings, watch)
        summary = loop.fit(run)
        counts = pairs.tally.counts()
        loop.finish(run, model_card(recipe, base_identity=base, counts=counts, summary=summary))
        manifest.write_manifest(
            folder,
            stage="train",
            recipe=recipe,
            inputs=inputs,
            seed=settings.seed,
            counts=counts,
            dropped=pairs.tally.dropped,
            extra={"identity": identity, "base": base, "summary": summary},
        )
    return summary


def _check_unit(objective: Objective, data: Any, validation: ValidationSpec) -> None:
    """Refuses what an objective on single images cannot use."""
    if objective.unit == "pair":
        return
    if data.ties == "soft":
        raise UserError(
            f"data.ties=soft needs pairs, objective={plugin_name(objective)} trains on {objective.unit} "
            "images: use data.ties=drop"
        )
    if validation.share > 0.0:
        raise UserError(
            f"validation.share={validation.share:g} needs pairs, objective={plugin_name(objective)} trains "
            f"on {objective.unit} images: set validation.share=0"
        )


def _prepare(
    pairs: UsablePairs,
    model: Model,
    objective: Objective,
    settings: Settings,
    folder: Path,
    accelerator: Accelerator,
) -> tuple[EncodedSet, Watch]:
    """Encodes all data, frees the encoders and sets up the policies; the training set and the watch."""
    from diffalign.training.watch import Watch

    encoded = _encode(pairs, model, settings.preprocess, objective.unit, settings.seed)
    train_set, heldout = _split(encoded, settings.validation, settings.seed)
    prompts = settings.samples.prompts
    embedded = model.embed_for_generation(prompts) if prompts else None
    model.drop_encoders()
    with_reference = objective.uses_reference or heldout is not None
    model.start_training(settings.adapter, seed=settings.seed, with_reference=with_reference)
    return train_set, Watch(settings, heldout, embedded, folder, accelerator)


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

    train_set, heldout = split_by_prompt(encoded, validation.share, seed=seed)
    heldout = heldout.subset(range(min(len(heldout), validation.limit or len(heldout))))
    if all(example.target == 0.5 for example in heldout.examples):
        raise UserError(
            f"all {len(heldout)} held-out pairs are ties: raise validation.share or validation.limit, or use "
            "data.ties=drop"
        )
    return train_set, heldout

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

from collections.abc import Iterator
from contextlib import contextmanager
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
from diffalign.training.specs import (
    CheckpointSpec,
    OptimizerSpec,
    ReferenceSpec,
    SampleSpec,
    Settings,
    ValidationSpec,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data.cache import EncodedSet
    from diffalign.data.select import UsableGroups
    from diffalign.models._base import Model
    from diffalign.objectives._base import Objective
    from diffalign.training.feed import Feed
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
    reference: ReferenceSpec = ReferenceSpec(),  # noqa: B008
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
        reference: what the policy is held against.
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
    _check_objective(objective, settings)
    finished = _folder.finished(Path(out), recipe)
    return finished or _train(model, data, objective, settings, recipe, Path(out))


def _train(
    spec: Any, data: Any, objective: Objective, settings: Settings, recipe: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Prepares, runs and closes a run that is not complete yet."""
    from diffalign.common import manifest
    from diffalign.training import loop
    from diffalign.training.card import model_card
    from diffalign.training.setup import accelerator_for

    accelerator = accelerator_for(settings.precision)
    groups = data.usable(
        unit=objective.unit,
        undesirable=objective.undesirable,
        reject=objective.reject,
        limit=settings.limit,
    )
    objective.check_data(data.score_facts())
    model: Model = spec.load(str(accelerator.device))
    base = model.fingerprint()
    settings.timesteps.check(model.process.num_timesteps)
    model.check_training(settings.adapter)
    inputs = data.inputs()
    feed, watch = _prepare(groups, model, objective, settings, folder, accelerator)
    with _claimed(folder, accelerator) as is_main:
        identity = _folder.claim(folder, recipe, base, settings.adapter.init, inputs, write=is_main)
        accelerator.wait_for_everyone()
        run = loop.Run(model, objective, feed, folder, identity, accelerator, settings, watch)
        summary = loop.fit(run)
        counts = groups.tally.counts()
        if is_main:
            loop.finish(run, model_card(recipe, base_identity=base, counts=counts, summary=summary))
            manifest.write_manifest(
                folder,
                stage="train",
                recipe=recipe,
                inputs=inputs,
                seed=settings.seed,
                counts=counts,
                dropped=groups.tally.dropped,
                extra={"identity": identity, "base": base, "summary": summary},
            )
        accelerator.wait_for_everyone()
    return summary


@contextmanager
def _claimed(folder: Path, accelerator: Accelerator) -> Iterator[bool]:
    """Locks and tidies the folder in the first process; yields whether this is it."""
    from diffalign.common import files

    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield False
        return
    with files.folder_lock(folder):
        for inside in (folder, folder / "samples"):
            files.remove_leftovers(inside)
        accelerator.wait_for_everyone()
        yield True


def _check_objective(objective: Objective, settings: Settings) -> None:
    """Refuses settings that an objective cannot use."""
    if settings.validation.share > 0.0 and objective.unit != "pair":
        raise UserError(
            f"validation.share={settings.validation.share:g} needs pairs, "
            f"objective={plugin_name(objective)} trains on {objective.unit} images: set validation.share=0"
        )
    if settings.reference.mode != "frozen" and not objective.uses_reference:
        raise UserError(
            f"reference.mode={settings.reference.mode}: objective={plugin_name(objective)} has no reference; "
            "leave it out"
        )


def _prepare(
    groups: UsableGroups,
    model: Model,
    objective: Objective,
    settings: Settings,
    folder: Path,
    accelerator: Accelerator,
) -> tuple[Feed, Watch]:
    """Encodes all data, frees the encoders and sets up the policies; what gives micro-batches, the watch."""
    from diffalign.training.feed import Offline
    from diffalign.training.watch import Watch

    encoded = _encode(groups, model, settings, objective.unit)
    train_set, heldout = _split(encoded, settings.validation, settings.seed)
    prompts = settings.samples.prompts
    embedded = model.embed_for_generation(prompts) if prompts else None
    model.drop_encoders()
    model.start_training(
        settings.adapter,
        seed=settings.seed,
        with_reference=objective.uses_reference or heldout is not None,
        moving_reference=settings.reference.mode != "frozen",
    )
    feed = Offline(train_set, settings, model.process.num_timesteps, objective.noise)
    return feed, Watch(settings, heldout, embedded, folder, accelerator)


def _encode(groups: UsableGroups, backbone: Model, settings: Settings, unit: str) -> EncodedSet:
    from diffalign.common.progress import Progress, say
    from diffalign.data.cache import encode

    with Progress("encode", None, f"{unit}s") as bar:

        def counted() -> Any:
            for group in groups:
                yield group
                bar.update(1)

        encoded = encode(counted(), backbone, settings.preprocess, seed=settings.seed)
    say(f"{len(encoded)} examples of {groups.tally.asked} rows; dropped: {groups.tally.reasons()}")
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

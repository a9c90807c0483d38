"""Align a diffusion model: train a LoRA (or the whole network) on preferences, or on a reward alone.

Given pictures (data=) and prompts are encoded once and kept in memory, then VAE and text encoders make room
for the network; of much data make a cache first (diffalign cache), and give cache=. An on-policy objective
(dragon) is given prompts= and scorers=, and draws its own pictures. The run writes checkpoints,
metrics.jsonl, TensorBoard logs and, at the end, the adapter with a model card below `out`. The same command
again goes on where a stopped run was.

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
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard

from diffalign.common.config import Many, One, make_one, resolved_recipe
from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import AdapterSpec
from diffalign.stages import _folder
from diffalign.stages._examples import CachedPictures, GivenPictures, OwnPictures
from diffalign.training.specs import (
    CheckpointSpec,
    EmaSpec,
    OptimizerSpec,
    ReferenceSpec,
    RolloutSpec,
    SampleSpec,
    Settings,
    StopRule,
    ValidationSpec,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data.encoded import Encoded
    from diffalign.models._base import Model
    from diffalign.objectives._base import Objective, OnPolicyObjective
    from diffalign.stages._examples import Examples
    from diffalign.training.feed import Feed
    from diffalign.training.watch import Watch


def train(
    *,
    model: Annotated[Any, One("models")],
    out: str,
    data: Annotated[Any, One("data.sources")] = None,
    cache: str | None = None,
    objective: Annotated[Any, One("objectives")] = "diffusion_dpo",
    prompts: str | list[str] | None = None,
    scorers: Annotated[dict[str, Any] | None, Many("scorers")] = None,
    adapter: AdapterSpec = AdapterSpec(),  # noqa: B008
    preprocess: PreprocessSpec = PreprocessSpec(),  # noqa: B008
    loader: LoaderSpec = LoaderSpec(),  # noqa: B008
    timesteps: TimestepSpec = TimestepSpec(),  # noqa: B008
    optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008
    validation: ValidationSpec = ValidationSpec(),  # noqa: B008
    samples: SampleSpec = SampleSpec(),  # noqa: B008
    checkpoint: CheckpointSpec = CheckpointSpec(),  # noqa: B008
    reference: ReferenceSpec = ReferenceSpec(),  # noqa: B008
    rollout: RolloutSpec = RolloutSpec(),  # noqa: B008
    ema: EmaSpec = EmaSpec(),  # noqa: B008
    stop_when: dict[str, StopRule] | None = None,
    trackers: list[str] = ["tensorboard"],  # noqa: B006  # it is only read
    compile: bool = False,
    shard: bool = False,
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
        out: folder of the run.
        data: preferences; for all objectives but those that draw their own pictures (dragon).
        cache: instead of data, what `diffalign cache` made of it: nothing is encoded, memory stays flat.
        objective: what is minimised.
        prompts: what an on-policy objective draws: a text, a list of texts, a file of prompts, or the name of
            a published set, as in `generate`.
        scorers: the one scorer that rewards an on-policy objective's pictures.
        adapter: what is trained.
        preprocess: how pictures are fitted to the network.
        loader: how examples are drawn.
        timesteps: distribution of the training timesteps.
        optimizer: kind of optimizer and its learning rate.
        validation: held-out accuracy while training.
        samples: pictures while training.
        checkpoint: how often the run is kept.
        reference: what the policy is held against.
        rollout: how an on-policy objective draws.
        ema: a moving average of the weights: held-out accuracy and samples are measured on it, `adapter` is
            the average, and `adapter_last` the weights of the last step.
        stop_when: numbers of metrics.jsonl that end the run, each {above or below: x, rows: how many one
            after another}: `stop_when={saturated: {above: 0.5, rows: 3}}`; of numbers further down by their
            path: `implicit_accuracy/estimate`.
        trackers: where the numbers go beside metrics.jsonl: tensorboard, wandb, trackio, comet_ml, aim,
            mlflow, clearml, dvclive, swanlab; each is set up by its own environment variables.
        compile: compile the network's repeated blocks with torch.compile; each shape costs minutes once.
        shard: split the network, its frozen copy, gradients and optimizer over the processes (torch's FSDP2
            `fully_shard`), of which there must be several: each holds its part of the weights and puts one
            block at a time together. With adapter.kind=full and precision=bf16 also set
            model.gradient_checkpointing=true: else bf16 copies of all weights are kept for the backward pass.
            A run may go on without it, and in another number of processes.
        num_steps: optimizer steps.
        accumulation: micro-batches of `loader.batch_size` groups in one optimizer step.
        precision: of the forward and backward pass; errors and losses are float32 in any case.
        log_every: optimizer steps between two lines of metrics.
        limit: use so many records only, or so many prompts.
        seed: of every draw.
    """
    model = make_one("models", model)
    adapter = model.with_targets(adapter)
    recipe = resolved_recipe(train, locals())
    given = locals()
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    objective = make_one("objectives", objective)
    _check_objective(objective, settings)
    finished = _folder.finished(Path(out), recipe)
    if finished is not None:
        return finished
    examples = _examples_of(objective, settings, data, cache, prompts, scorers)
    from diffalign.training.ranks import lost_process_told  # imports torch

    with lost_process_told():
        return _train(model, examples, objective, settings, recipe, Path(out))


def _train(
    spec: Any,
    examples: Examples,
    objective: Objective,
    settings: Settings,
    recipe: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Prepares, runs and closes a run that is not complete yet."""
    from diffalign.common import manifest, progress
    from diffalign.training import loop
    from diffalign.training.card import model_card
    from diffalign.training.metrics import check_trackers
    from diffalign.training.optimizers import check_optimizer
    from diffalign.training.setup import accelerator_for
    from diffalign.training.stored import StoredReference

    accelerator = accelerator_for(settings.precision, shard=settings.shard)
    if not accelerator.is_main_process:
        progress.silence()
    check_optimizer(settings.optimizer)
    check_trackers(settings.trackers)
    accelerator.wait_for_everyone()  # all have looked at the folder before one of them locks it
    model: Model = spec.load(str(accelerator.device))
    base = model.fingerprint()
    model.check_timesteps(settings.timesteps)
    model.check_training(settings.adapter)
    _say_doubts(model, objective, settings)
    feed, heldout = examples.prepare(model, accelerator)
    inputs = examples.inputs()
    if settings.reference.store is not None:
        feed = _with_store(feed, objective, settings, base, recipe, inputs)
    watch = _set_up(model, objective, settings, heldout, folder, accelerator)
    with _claimed(folder, accelerator) as is_main:
        identity = _folder.claim(folder, recipe, base, settings.adapter.init, inputs, write=is_main)
        accelerator.wait_for_everyone()
        run = loop.Run(model, objective, feed, folder, identity, accelerator, settings, watch, recipe)
        summary = loop.fit(run)
        counts, dropped = examples.counts()
        if isinstance(feed, StoredReference):
            progress.say(f"reference.store: {feed.found:,} of {feed.asked:,} errors were known")
        if is_main:
            written = loop.finish(run, model_card(recipe, base_identity=base, counts=counts, summary=summary))
            manifest.write_manifest(
                folder,
                stage="train",
                recipe=recipe,
                inputs=inputs,
                seed=settings.seed,
                counts=counts,
                dropped=dropped,
                extra={"identity": identity, "base": base, "summary": summary},
            )
            progress.say(f"written: {written}")
        accelerator.wait_for_everyone()
    return summary


def _say_doubts(model: Model, objective: Objective, settings: Settings) -> None:
    """Says where a default is meant for other errors, and where training goes to what is never drawn from."""
    from diffalign.common.progress import say

    dropout = settings.loader.caption_dropout
    if dropout > 0.0 and not model.has_unprompted_branch:
        say(
            f"WARNING: loader.caption_dropout={dropout:g} trains the model without a prompt, which is never "
            "drawn from: set loader.caption_dropout=0"
        )
    doubt = objective.doubtful_default(model.process)
    if doubt is not None:
        say(f"WARNING: {doubt}")


def _with_store(
    feed: Feed,
    objective: Objective,
    settings: Settings,
    base: str,
    recipe: dict[str, Any],
    inputs: dict[str, Path | str],
) -> Feed:
    """The feed, whose draws know the reference's errors of earlier runs."""
    from diffalign.common import manifest
    from diffalign.training.stored import ReferenceStore, StoredReference

    assert settings.reference.store is not None
    init = {} if settings.adapter.init is None else {"adapter.init": settings.adapter.init}
    keys = ("model", "preprocess", "timesteps", "precision", "compile", "seed")
    decides = {
        "base": base,
        "inputs": manifest.identities(inputs),
        "adapter.init": manifest.identities(init),
        "caption_dropout": settings.loader.caption_dropout,
        "posterior": settings.loader.posterior,
        **{key: recipe[key] for key in keys},
    }
    return StoredReference(feed, ReferenceStore(settings.reference.store, decides), objective.noise)


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
    name = plugin_name(objective)
    on_policy = _is_on_policy(objective)
    if settings.validation.share > 0.0 and (objective.unit != "pair" or on_policy):
        what = "its own" if on_policy else objective.unit
        raise UserError(
            f"validation.share={settings.validation.share:g} needs given pairs, objective={name} trains on "
            f"{what} images: set validation.share=0"
        )
    for key, value in (("mode", settings.reference.mode), ("store", settings.reference.store)):
        if value not in (None, "frozen") and not objective.uses_reference:
            raise UserError(f"reference.{key}={value}: objective={name} has no reference; leave it out")
    uneven = "pictures of its own" if on_policy else objective.uneven_passes
    if settings.shard and uneven is not None:
        raise UserError(
            "shard=true: all processes must run the network equally often, which they may not with "
            f"objective={name} and {uneven}: use another, or shard=false"
        )
    if settings.reference.store is not None and on_policy:
        raise UserError(f"reference.store: objective={name} draws its own pictures; leave it out")
    if settings.reference.mode != "frozen" and settings.validation.share > 0.0:
        raise UserError(
            f"reference.mode={settings.reference.mode}: held-out accuracy needs the reference of step 0; set "
            "validation.share=0 and use evaluate mode=implicit afterwards"
        )


def _examples_of(
    objective: Objective,
    settings: Settings,
    data: Any,
    cache: str | None,
    prompts: str | list[str] | None,
    scorers: Any,
) -> Examples:
    """Given pictures, or the policy's own; refuses the keys of the other kind."""
    if _is_on_policy(objective):
        _refuse_given(objective, data=data, cache=cache)
        return OwnPictures(objective, settings, prompts, scorers)
    rollout = None if settings.rollout == RolloutSpec() else settings.rollout
    _refuse_given(objective, prompts=prompts, scorers=scorers, rollout=rollout)
    if cache is None:
        return GivenPictures(objective, settings, data)
    if data is not None:
        raise UserError(
            f"data and cache={cache} are both set, and a cache holds its own data: leave data out, or set "
            "cache=null and keep data"
        )
    return CachedPictures(objective, settings, cache)


def _is_on_policy(objective: Objective) -> TypeGuard[OnPolicyObjective]:
    from diffalign.objectives._base import OnPolicyObjective  # imports torch

    return isinstance(objective, OnPolicyObjective)


def _refuse_given(objective: Objective, **given: Any) -> None:
    """Refuses keys that mean nothing to an objective."""
    for key, value in given.items():
        if value is not None:
            why = "draws its own pictures" if _is_on_policy(objective) else "trains on given pictures"
            raise UserError(f"{key} is set, but objective={plugin_name(objective)} {why}: leave {key} out")


def _set_up(
    model: Model,
    objective: Objective,
    settings: Settings,
    heldout: Encoded | None,
    folder: Path,
    accelerator: Accelerator,
) -> Watch:
    """Frees the encoders and sets up the policies; what is looked at while training."""
    from diffalign.training.watch import Watch

    prompts = settings.samples.prompts
    embedded = model.embed_for_generation(prompts) if prompts else None
    model.drop_encoders()
    model.start_training(
        settings.adapter,
        seed=settings.seed,
        with_reference=objective.uses_reference or heldout is not None,
        moving_reference=settings.reference.mode != "frozen",
    )
    if settings.compile:
        model.compile_blocks()
    if settings.shard:
        model.shard()
    return Watch(settings, heldout, embedded, folder, accelerator)

"""How a run is optimised, watched and kept: plain data, quick to import."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from diffalign.common.errors import UserError, unknown
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import AdapterSpec

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")
TRACKERS = (
    "tensorboard",
    "wandb",
    "trackio",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
)
"""Those that accelerate knows."""


@dataclass
class OptimizerSpec:
    """The optimizer and its learning rate.

    Args:
        kind: "adamw"; "adamw8bit": with moments of a quarter of the size (needs bitsandbytes); "adafactor":
            no first moment, and two vectors in the place of a matrix's second.
        lr: peak learning rate.
        betas: decay of the first and second moment; not of adafactor.
        weight_decay: decoupled, times lr a step.
        eps: added to the root of the second moment; not of adafactor.
        schedule: after warm-up "constant", "linear" to 0 or "cosine" to 0.
        warmup_steps: optimizer steps of linear warm-up from 0.
        max_grad_norm: gradients are scaled down to this global norm; 0: never.
    """

    kind: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise unknown("optimizer.kind", self.kind, OPTIMIZERS)
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr is {self.lr}: use a value above 0")
        for key, value in (
            ("weight_decay", self.weight_decay),
            ("eps", self.eps),
            ("max_grad_norm", self.max_grad_norm),
        ):
            if not 0 <= value < math.inf:
                raise UserError(f"optimizer.{key} is {value}: use 0 or more")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}: give two values in [0, 1), e.g. [0.9,0.999]")
        if self.schedule not in SCHEDULES:
            raise unknown("optimizer.schedule", self.schedule, SCHEDULES)
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}: use 0 or more")
        if self.kind == "adafactor":
            plain = OptimizerSpec()
            for name in ("betas", "eps"):
                if getattr(self, name) != getattr(plain, name):
                    raise UserError(
                        f"optimizer.{name} means nothing in optimizer.kind=adafactor: leave it out"
                    )


@dataclass
class EmaSpec:
    """A moving average of the trained weights; if there is one, it is what is watched and saved.

    Args:
        decay: how much of the old average stays at a move, once it has warmed up; 0: no average.
        every: optimizer steps between two moves.
        start: optimizer steps before averaging begins; until then the average is the weights themselves.
    """

    decay: float = 0.0
    every: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"ema.decay is {self.decay}: use a value in [0, 1)")
        if self.decay == 0.0:
            for name in ("every", "start"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UserError(
                        f"ema.{name} means nothing without ema.decay: set it, e.g. ema.decay=0.999"
                    )
        if self.every < 1:
            raise UserError(f"ema.every is {self.every}: use 1 or more")
        if self.start < 0:
            raise UserError(f"ema.start is {self.start}: use 0 or more")


@dataclass
class StopRule:
    """When a number of metrics.jsonl ends the run.

    Args:
        above: rows count in which the number is larger than this; give it or `below`.
        below: rows count in which the number is smaller than this.
        rows: so many of them one after another end the run.
    """

    above: float | None = None
    below: float | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise UserError(
                f"stop_when: above={self.above} and below={self.below}: give one of them, e.g. "
                "stop_when={saturated: {above: 0.5, rows: 3}}"
            )
        if self.rows < 1:
            raise UserError(f"stop_when: rows is {self.rows}: use 1 or more")

    def holds(self, value: float) -> bool:
        """Whether a row with this number counts; NaN does not."""
        return value > self.above if self.above is not None else value < (self.below or 0.0)

    def __str__(self) -> str:
        """Such as "above 0.5 for 3 rows"."""
        side = f"below {self.below:g}" if self.above is None else f"above {self.above:g}"
        return f"{side} for {self.rows} row{'s' if self.rows > 1 else ''}"


@dataclass
class ValidationSpec:
    """Held-out implicit accuracy while training.

    Args:
        share: of the prompts that is held out; 0: no validation.
        every: optimizer steps between two measurements; the last step is always measured.
        draws: fixed, stratified (timestep, noise) draws a pair.
        limit: measure at most so many pairs.
    """

    share: float = 0.0
    every: int = 100
    draws: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise UserError(f"validation.share is {self.share}: use a share in [0, 1)")
        if self.every < 1 or self.draws < 1:
            raise UserError(f"validation.every={self.every}, draws={self.draws}: use 1 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"validation.limit is {self.limit}: use 1 or more, or leave it out")


@dataclass
class SampleSpec:
    """Pictures on fixed prompts and seeds while training.

    Args:
        prompts: texts to draw; empty: no pictures.
        every: optimizer steps between two sets of pictures; step 0 and the last step are always drawn.
        seed: of the initial noise.
        guidance_scale: null: the pipeline's default.
        num_inference_steps: null: the pipeline's default.
    """

    prompts: list[str] = field(default_factory=list)
    every: int = 250
    seed: int = 0
    guidance_scale: float | None = None
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"samples.every is {self.every}: use 1 or more")


@dataclass
class CheckpointSpec:
    """What is kept of a run that may stop at any time.

    Args:
        every: optimizer steps between two checkpoints; the last step is always kept.
        keep: how many of the newest stay on disk.
    """

    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError(f"checkpoint.every={self.every}, keep={self.keep}: use 1 or more")


@dataclass
class ReferenceSpec:
    """What the policy is held against.

    Args:
        mode: "frozen": the policy of step 0; "ema": a moving average of the policy; "refresh": the policy as
            it was at the last multiple of `every`.
        every: optimizer steps between two moves.
        decay: of the moving average: how much of the old reference stays at a move.
        store: a folder that keeps the errors of a frozen reference, for all runs of a sweep over beta, the
            learning rate or the objective: with the same base, data, batches, timesteps and seed they are
            computed once, and each later run saves a forward pass.
    """

    mode: Literal["frozen", "ema", "refresh"] = "frozen"
    every: int = 1
    decay: float = 0.99
    store: str | None = None

    def __post_init__(self) -> None:
        if self.store is not None and self.mode != "frozen":
            raise UserError(f"reference.store keeps errors of a frozen reference, not of mode={self.mode}")
        if self.mode not in ("frozen", "ema", "refresh"):
            raise unknown("reference.mode", self.mode, ("frozen", "ema", "refresh"))
        for name in {"frozen": ("every", "decay"), "refresh": ("decay",)}.get(self.mode, ()):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"reference.{name} means nothing in reference.mode={self.mode}: leave it out")
        if self.every < 1:
            raise UserError(f"reference.every is {self.every}: use 1 or more")
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"reference.decay is {self.decay}: use a value in [0, 1)")


@dataclass
class RolloutSpec:
    """How an on-policy objective draws its own pictures: two a prompt.

    Args:
        steps: optimizer steps that one rollout is made for; it has as many pairs as they take.
        num_inference_steps: few are enough (Bai et al. 2025); null: the pipeline's default.
        guidance_scale: null: the pipeline's default.
        scheduler: class name of a diffusers scheduler; null: the base's own.
        batch_size: pictures drawn at once.
    """

    steps: int = 1
    num_inference_steps: int | None = 10
    guidance_scale: float | None = None
    scheduler: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"rollout.{name} is {value}: use 1 or more")


@dataclass
class Settings:
    """All of a run but its components (model, data, objective) and its folder; the keys of `diffalign train`,
    where each is explained.
    """

    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    loader: LoaderSpec = field(default_factory=LoaderSpec)
    timesteps: TimestepSpec = field(default_factory=TimestepSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    samples: SampleSpec = field(default_factory=SampleSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    reference: ReferenceSpec = field(default_factory=ReferenceSpec)
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    ema: EmaSpec = field(default_factory=EmaSpec)
    stop_when: dict[str, StopRule] | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    compile: bool = False
    shard: bool = False
    num_steps: int = 1000
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: int = 10
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "accumulation", "log_every", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: use 1 or more")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown("tracker", name, TRACKERS)
        if self.shard:
            self._refuse_with_shard()

    def _refuse_with_shard(self) -> None:
        """Refuses what would need whole weights, or takes more passes in one process than in another."""
        kind, decay, reference = self.optimizer.kind, self.ema.decay, self.reference
        for refused, setting, instead in (
            (self.precision == "fp16", "precision=fp16", "precision=bf16"),
            (self.compile, "compile=true", "compile=false"),
            (kind != "adamw", f"optimizer.kind={kind}", "optimizer.kind=adamw"),
            (decay > 0.0, f"ema.decay={decay:g}", "ema.decay=0"),
            (reference.mode != "frozen", f"reference.mode={reference.mode}", "reference.mode=frozen"),
            (reference.store is not None, f"reference.store={reference.store}", "reference.store=null"),
        ):
            if refused:
                raise UserError(f"shard=true does not go with {setting}: use {instead}, or shard=false")

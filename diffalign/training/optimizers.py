"""The optimizers that a run may choose; each keeps its whole state in its `state_dict`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffalign.common.errors import UserError, brief
from diffalign.models._sharding import part
from diffalign.training.specs import OptimizerSpec


def check_optimizer(spec: OptimizerSpec) -> None:
    """Refuses an optimizer that is not installed, before anything large is loaded.

    Raises:
        UserError: says what to install.
    """
    if spec.kind == "adamw8bit":
        _adamw8bit()


def make_optimizer(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `spec.kind` over `parameters`, at the peak learning rate; the loop sets each step's.

    Convention: "adafactor" is the one of transformers with `scale_parameter=False, relative_step=False`, as
    in the Diffusion-DPO code for SDXL (SalesforceAIResearch/DiffusionDPO, train.py): `lr` is absolute, as
    AdamW's is. `torch.optim.Adafactor` always multiplies it by the size of the weights, which is next to
    nothing for the half of a LoRA that starts at 0. Adafactor limits its update to root mean square 1 itself;
    `max_grad_norm` holds beside that, as it does in that code.

    Raises:
        UserError: the optimizer is not installed.
    """
    betas = (spec.betas[0], spec.betas[1])
    if spec.kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=spec.lr,
            weight_decay=spec.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    cls: Any = _adamw8bit() if spec.kind == "adamw8bit" else torch.optim.AdamW
    made: torch.optim.Optimizer = cls(
        parameters, lr=spec.lr, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay
    )
    return made


def load_optimizer(optimizer: Any, state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
    """Puts back a whole `state_dict`; of parameters that are split over processes this one's part."""

    def own(value: Any, parameter: nn.Parameter) -> Any:  # a moment is as large as its parameter
        is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return part(value, parameter) if is_moment else value

    parts = {
        number: {name: own(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def learning_rate(spec: OptimizerSpec, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): pure, so that resuming needs no schedule state.

    Linear warm-up reaches `lr` at step `warmup_steps`; then constant, or down to 0 at `num_steps`.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / (spec.warmup_steps + 1)
    progress = (step - spec.warmup_steps) / max(1, num_steps - spec.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return spec.lr * factor[spec.schedule]


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its own library does not load
        raise UserError(
            f"optimizer.kind=adamw8bit needs bitsandbytes ({brief(error)}): pip install diffalign[bnb]"
        ) from error
    return AdamW8bit

"""The accelerator of a run: device and precision."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from diffalign.common.errors import UserError
from diffalign.training.ranks import launched

PATIENCE = timedelta(hours=12)
"""The first process measures held-out pairs and draws samples while the others wait for it."""

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def accelerator_for(precision: str) -> Accelerator:
    """An accelerator on the best device there is, computing in `precision` ("fp32", "bf16" or "fp16").

    Raises:
        UserError: fp16 without a GPU, or processes that were started together and do not find one another.
    """
    # accelerate keeps one precision a process; several runs in one (a test, a sweep) may want different ones.
    AcceleratorState._reset_state()
    accelerator = _accelerator("no")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=fp32 or bf16 here")
    if accelerator.num_processes < launched():
        raise UserError(
            f"{launched()} processes were started, but accelerate does not join them on device "
            f"{accelerator.device.type}: start one, or set ACCELERATE_USE_CPU=true"
        )
    AcceleratorState._reset_state()
    return _accelerator(MIXED_PRECISION[precision])


def _accelerator(mixed_precision: str) -> Accelerator:
    """Without a GPU accelerate joins the processes of torchrun only when it is told to use the CPU."""
    return Accelerator(
        cpu=launched() > 1 and not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )

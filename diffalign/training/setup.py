"""The accelerator of a run: device and precision."""

from __future__ import annotations

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from diffalign.common.errors import UserError

PATIENCE = timedelta(hours=12)
"""The first process measures held-out pairs and draws samples while the others wait for it."""

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def accelerator_for(precision: str) -> Accelerator:
    """An accelerator on the best device there is, computing in `precision` ("fp32", "bf16" or "fp16").

    Raises:
        UserError: fp16 without a GPU.
    """
    # accelerate keeps one precision a process; several runs in one (a test, a sweep) may want different ones.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=fp32 or bf16 here")
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=MIXED_PRECISION[precision],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )

"""The accelerator of a run: device and precision."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffalign.common.errors import UserError

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def accelerator_for(precision: str) -> Accelerator:
    """An accelerator on the best device there is, computing in `precision` ("fp32", "bf16" or "fp16").

    Raises:
        UserError: fp16 without a GPU.
    """
    # accelerate keeps one precision a process; several runs in one (a test, a sweep) may want different ones.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=fp32 or bf16 here")
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=MIXED_PRECISION[precision])

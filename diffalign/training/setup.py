"""The accelerator of a run: device and precision."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from diffalign.common.errors import UserError
from diffalign.training.ranks import launched

PATIENCE = timedelta(hours=12)
"""The first process measures held-out pairs and draws samples while the others wait for it."""

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

SPLITTERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""How `accelerate launch` asks for weights that are split between processes."""


def accelerator_for(precision: str, *, shard: bool = False) -> Accelerator:
    """An accelerator on the best device there is, computing in `precision` ("fp32", "bf16" or "fp16").

    `shard` says that the network will be split over the processes.

    Raises:
        UserError: fp16 without a GPU, processes that were started together and do not find one another, or a
            launcher that asks for split weights; `shard` with one process alone.
    """
    _refuse_splitters()
    # accelerate keeps one precision a process; several runs in one (a test, a sweep) may want different ones.
    AcceleratorState._reset_state()
    accelerator = _accelerator("no", shard)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=fp32 or bf16 here")
    if accelerator.num_processes < launched():
        raise UserError(
            f"{launched()} processes were started, but accelerate does not join them on device "
            f"{accelerator.device.type}: start one, or set ACCELERATE_USE_CPU=true"
        )
    if shard and accelerator.num_processes == 1:
        raise UserError(
            "shard=true splits the network over several processes, and this is one: start it with torchrun "
            "--nproc_per_node N -m diffalign, or use shard=false"
        )
    AcceleratorState._reset_state()
    return _accelerator(MIXED_PRECISION[precision], shard)


def _refuse_splitters() -> None:
    """Raises UserError where the launcher asks for another split of the weights than `shard`."""
    for variable, name in SPLITTERS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{name} was asked for ({variable}), but here the recipe says how weights are split: start "
                "with torchrun, or accelerate launch --multi_gpu, and use shard=true"
            )


def _accelerator(mixed_precision: str, shard: bool) -> Accelerator:
    """What the recipe says holds, not what a launcher was configured with (precision, accumulation).

    Of a split network autocast keeps no copies: it would hold one of every weight until a forward pass ends,
    also of blocks whose activations are recomputed.

    Without a GPU accelerate joins the processes of torchrun only when it is told to use the CPU.
    """
    return Accelerator(
        cpu=launched() > 1 and not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop divides by itself
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), AutocastKwargs(cache_enabled=not shard)],
    )

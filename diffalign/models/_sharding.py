"""A network whose weights are split over the processes of a run, by torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: Any, device: torch.device) -> None:
    """Leaves each process its part of every weight, in place; a block's are put together while it runs.

    The blocks are those that diffusers says must stay in one piece. Gradients are summed over the processes
    during the backward pass. From now on every process must run the network equally often.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    for module in (*reversed(blocks), network):  # the inner ones first
        # Never left whole after a forward pass: without gradients no backward pass would follow to split it.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # The loop's losses are scaled for a sum (the default is a mean), and gloo knows the plain one alone.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds only a part of it."""
    return isinstance(tensor, DTensor)


def whole(value: Any) -> Any:
    """The value (tensors in dicts and lists) with what is split in one piece, on the CPU.

    To be called by every process; in all but the first None is in the place of what is split.
    """
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    if not is_split(value):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if torch.distributed.get_rank() == 0 else None


def part(tensor: Tensor, like: Tensor | None) -> Tensor:
    """What this process holds of a whole tensor, split as `like` is; all of it where `like` is not split."""
    if like is None or not is_split(like):
        return tensor
    # No process sends anything: all have read the same file.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

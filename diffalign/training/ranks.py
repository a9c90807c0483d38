"""What the processes of one run tell one another; a single process sends nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign.common.errors import UserError, brief
from diffalign.models._sharding import is_split


def launched() -> int:
    """How many processes this run was started with, before any of them talks (torchrun says so)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def lost_process_told() -> Iterator[None]:
    """Tells in a line what the libraries raise in one process when another one has gone without a word.

    Raises:
        UserError: in place of their errors; all others pass.
    """
    try:
        yield
    except RuntimeError as error:
        gloo = "/gloo/" in str(error)  # raises plain RuntimeErrors that name its source file
        if not (gloo or isinstance(error, torch.distributed.DistError)):
            raise
        cause = "" if gloo else f" ({brief(error)})"
        raise UserError(
            f"another process of this run has gone{cause}: see what it said last; the same command goes on "
            "from the last checkpoint"
        ) from error


BUCKET_ELEMENTS = 2**25
"""Numbers sent at once: enough to fill a network, little beside a model."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Gradients are summed here and not by a wrapper around the network, so that an objective may run it as
    often and in as many pieces as it likes.

    Args:
        accelerator: knows how many there are and how they talk.
    """

    accelerator: Accelerator

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.index == 0

    def gather(self, values: Tensor) -> Tensor:
        """The `[n, ...]` tensors of all processes one after another, the same everywhere; n may differ."""
        if self.count == 1:
            return values
        return torch.cat(gather_object([values.cpu()])).to(values.device)

    def gather_rows(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Columns `[n]` by name, of all processes one after another; one that has none adds nothing."""
        if self.count == 1:
            return rows
        found: list[dict[str, Tensor]] = gather_object([rows])
        names = dict.fromkeys(name for columns in found for name in columns)
        return {name: torch.cat([columns[name] for columns in found if name in columns]) for name in names}

    def total(self, value: float) -> float:
        """The sum of every process's number."""
        return value if self.count == 1 else float(sum(gather_object([value])))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return flag if self.count == 1 else any(gather_object([flag]))

    def fail_together(self, failure: Exception | None) -> None:
        """Raises `failure`, or that another process has one: none is left waiting for the others."""
        if self.any(failure is not None):
            raise failure or UserError("another process has stopped with an error: see its message")

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.accelerator.wait_for_everyone()

    def part_of(self, step: int) -> int:
        """How many of the `step` micro-batches of an optimizer step each process takes.

        Raises:
            UserError: they cannot be shared evenly.
        """
        if step % self.count:
            fitting = [str(n) for n in range(1, step + 1) if step % n == 0]
            raise UserError(
                f"the run takes {step} micro-batches a step, which {self.count} processes cannot share "
                f"evenly: go on with {' or '.join(fitting)}"
            )
        return step // self.count

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by the sum over processes; one that is missing counts as 0."""
        if self.count == 1 or is_split(parameters[0]):  # those of a split network are sums already
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Scales the gradients down to a global norm (0: never); returns the one that they had."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
        return float(norm.full_tensor() if is_split(norm) else norm)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together about BUCKET_ELEMENTS numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(held.numel() for held in bucket) >= BUCKET_ELEMENTS
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket

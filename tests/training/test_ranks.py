"""What the processes of a run share out and tell; that they do it together is shown where two run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.training.ranks import Ranks, lost_process_told


def ranks(count: int) -> Ranks:
    """The first of so many."""
    accelerator: Any = SimpleNamespace(num_processes=count, process_index=0)
    return Ranks(accelerator)


def test_a_step_is_shared_evenly_or_not_at_all() -> None:
    assert [ranks(count).part_of(12) for count in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(UserError, match=r"takes 6 micro-batches .* which 4 .* go on with 1 or 2 or 3 or 6$"):
        ranks(4).part_of(6)
    with pytest.raises(UserError, match=r"go on with 1 or 2$"):
        ranks(3).part_of(2)


def test_a_lost_process_is_told_and_other_errors_are_not_touched() -> None:
    with pytest.raises(UserError, match=r"^another process of this run has gone: see"), lost_process_told():
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset")
    with pytest.raises(UserError, match=r"has gone \(NCCL error: remote"), lost_process_told():
        raise torch.distributed.DistBackendError("NCCL error: remote process exited")
    with pytest.raises(RuntimeError, match="shapes differ") as found, lost_process_told():
        raise RuntimeError("shapes differ")
    assert not isinstance(found.value, UserError)

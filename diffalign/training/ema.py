"""A moving average of the weights that training changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from diffalign.training.specs import EmaSpec


class Average:
    """The average of `parameters`, in float32; without a decay it is nothing and costs nothing.

    Move number n, counted from `start`, keeps d of the average and takes `1 - d` of the weights: d = 0 the
    first time (a copy), then `min(decay, n / (9 + n))`: 2/11, 3/12, 4/13 and so on up to `decay`.

    Convention: this warm-up is that of diffusers' EMAModel, which does the work; a decay that is constant
    from the first step on keeps a fresh adapter near 0 for 1 / (1 - decay) steps.

    Args:
        spec: decay, and when it moves.
        parameters: what is averaged, in the order of the checkpoint.
    """

    def __init__(self, spec: EmaSpec, parameters: Sequence[nn.Parameter]) -> None:
        self._spec, self._parameters = spec, parameters
        self._ema: EMAModel | None = None
        if spec.decay > 0.0:
            self._ema = EMAModel(parameters, decay=spec.decay, update_after_step=spec.start // spec.every)
            self._ema.to(dtype=torch.float32)

    def move(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (from 1), if a move is due."""
        if self._ema is not None and step % self._spec.every == 0:
            self._ema.step(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the average stands in for the weights; they are put back bit for bit."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters)
        try:
            self._ema.copy_to(self._parameters)
            yield
        finally:
            self._ema.restore(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of moves; nothing without a decay."""
        if self._ema is None:
            return {}
        return {"moves": self._ema.optimization_step, "weights": self._ema.shadow_params}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        if self._ema is None:
            return
        self._ema.optimization_step = state["moves"]
        for ours, theirs in zip(self._ema.shadow_params, state["weights"], strict=True):
            ours.copy_(theirs)

"""What tells a healthy run from one that is turning to noise: numbers gathered from the objective's logs.

The loss of a pair says little: it stays near log 2 while images improve and while they fall apart. The errors
of winner and loser against the reference say which of the two is happening.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

NUM_BUCKETS = 4
SATURATED_FACTOR = 0.01
"""A decided pair whose gradient factor is below this no longer teaches (target 1: margin above 4.6)."""


_SUMMARISED = {"loss", "t", "err_w", "err_l", "ref_err_w", "ref_err_l", "margin", "target"}
"""Names with a meaning of their own; of any other the mean is reported."""


@dataclass
class Health:
    """Gathers micro-batches between two log lines.

    Args:
        num_timesteps: of the process; split into `NUM_BUCKETS` equal ranges for the per-timestep report.
    """

    num_timesteps: int
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _grad_norms: list[float] = field(default_factory=list)

    def add(self, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Takes the losses `[N]` and logs of one micro-batch (kept where they are: no device sync)."""
        for name, value in {"loss": loss.detach(), **logs}.items():
            self._rows.setdefault(name, []).append(value)

    def add_grad_norm(self, norm: float) -> None:
        """Takes the gradient norm of one optimizer step, before clipping."""
        self._grad_norms.append(norm)

    def report(
        self, gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda rows: rows
    ) -> dict[str, float | dict[str, dict[str, float]]]:
        """Means since the last report, overall and by timestep range ("0-249": {...}); empties the store.

        Nothing when there was nothing. `gather` brings in the rows of other processes, which may have none.
        """
        own = {name: torch.cat(values).cpu().double() for name, values in self._rows.items()}
        self._rows = {}
        rows = gather(own)
        if not rows:
            return {}
        result: dict[str, float | dict[str, dict[str, float]]] = {}
        result.update(_summary(rows))
        if self._grad_norms:
            result["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
            result["grad_norm_max"] = max(self._grad_norms)
        if "t" in rows:
            result["by_timestep"] = self._by_timestep(rows)
        self._grad_norms = []
        return result

    def _by_timestep(self, rows: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        width = -(-self.num_timesteps // NUM_BUCKETS)
        buckets = {}
        for start in range(0, self.num_timesteps, width):
            inside = (rows["t"] >= start) & (rows["t"] < start + width)
            if bool(inside.any()):
                name = f"{start}-{min(start + width, self.num_timesteps) - 1}"
                buckets[name] = _summary({key: value[inside] for key, value in rows.items()})
        return buckets


def _summary(rows: dict[str, Tensor]) -> dict[str, float]:
    means: dict[str, float] = {"groups": float(len(rows["loss"])), "loss": _mean(rows["loss"])}
    for name in ("err_w", "err_l"):
        if name in rows:
            means[name] = _mean(rows[name])
        if f"ref_{name}" in rows:
            means[f"{name}_vs_ref"] = _mean(rows[name] - rows[f"ref_{name}"])
    if "margin" in rows:
        margin, target = rows["margin"], rows["target"]
        factor = (target - torch.sigmoid(margin)).abs()  # of the cross-entropy's gradient by the margin
        means["margin"] = _mean(margin)
        means["margin_abs_max"] = float(margin.abs().max())
        means["gradient_factor"] = _mean(factor)
        decided = target != 0.5
        if bool(decided.any()):
            right = (margin > 0).double() + 0.5 * (margin == 0).double()
            means["accuracy"] = _mean(right[decided])
            means["saturated"] = _mean((factor[decided] < SATURATED_FACTOR).double())
    means.update({name: _mean(values) for name, values in rows.items() if name not in _SUMMARISED})
    return means


def _mean(values: Tensor) -> float:
    return float(values.mean())

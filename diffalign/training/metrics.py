"""The record of a run: `metrics.jsonl`, and TensorBoard beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends rows `{step, kind, ...}`; a resumed run first drops the rows that it will write again.

    Args:
        out: folder of the run.
        resume_step: rows of later steps are dropped.
        writes: False in processes that leave the files to another one.
    """

    def __init__(self, out: Path, *, resume_step: int, writes: bool = True) -> None:
        self._board: Any = None
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / FILE_NAME
        if self.path.exists():
            rows = files.read_jsonl(self.path, drop_torn_tail=True)
            files.write_jsonl(self.path, [row for row in rows if row["step"] <= resume_step])
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds one row; numbers one level down (`by_timestep`) get a path of names in TensorBoard."""
        if self._board is None:
            return
        files.append_jsonl(self.path, [{"step": step, "kind": kind, **values}])
        for name, value in _flat(kind, values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._board.close()


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found.extend(_flat(f"{prefix}/{name}", value))
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{name}", float(value)))
    return found

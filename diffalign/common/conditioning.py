"""What a backbone's network is conditioned on, as one object that rows can be taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch


class Conditioning(Mapping[str, torch.Tensor]):
    """An open mapping from names to tensors whose first dimension is the batch.

    The backbone that makes it owns the names; everybody else only takes rows, joins and moves it.

    Raises:
        ValueError: no tensor, a tensor without batch dimension, or batch sizes that differ.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not tensors:
            raise ValueError("a conditioning needs at least one tensor")
        sizes = {name: (tensor.shape[0] if tensor.ndim else None) for name, tensor in tensors.items()}
        if None in sizes.values() or len(set(sizes.values())) != 1:
            raise ValueError(f"tensors of a conditioning share a leading batch dimension, got {sizes}")
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of tensors, as for any mapping; `batch_size` is the number of rows."""
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.items())
        return f"Conditioning({shapes})"

    @property
    def batch_size(self) -> int:
        """The number of rows B."""
        return int(next(iter(self._tensors.values())).shape[0])

    def rows(self, index: slice | torch.Tensor | Sequence[int]) -> Conditioning:
        """Returns the rows that a slice, an int64 (or bool `[B]`) tensor or a list of ints selects."""
        if isinstance(index, slice):
            return Conditioning({name: tensor[index] for name, tensor in self.items()})
        chosen = torch.as_tensor(index)
        if chosen.ndim != 1:
            raise ValueError(f"rows are chosen by a one-dimensional index, got shape {tuple(chosen.shape)}")
        if chosen.numel() == 0:
            chosen = chosen.long()
        return Conditioning({name: tensor[chosen.to(tensor.device)] for name, tensor in self.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Returns the parts' rows one after the other.

        Raises:
            ValueError: nothing to join, or the parts hold different names.
        """
        if not parts:
            raise ValueError("nothing to join: give at least one conditioning")
        names = set(parts[0])
        for part in parts[1:]:
            if set(part) != names:
                raise ValueError(f"conditionings hold different tensors: {sorted(names)} and {sorted(part)}")
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Returns it on another device; `dtype` applies to floating tensors only (ids stay integers)."""
        moved = {}
        for name, tensor in self.items():
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            moved[name] = tensor.to(device=device, dtype=wanted)
        return Conditioning(moved)

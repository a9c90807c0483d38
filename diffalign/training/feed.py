"""Where the loop's micro-batches come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from diffalign.data.batches import Batch
from diffalign.data.encoded import Encoded
from diffalign.data.loader import batches
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.training.sampling import training_draws
from diffalign.training.specs import Settings


class Feed(Protocol):
    """An endless stream of micro-batches, numbered over all processes; a run may enter it anywhere.

    Attributes:
        why_empty: what it means, and what to do, when there is nothing to learn from for many steps.
    """

    why_empty: ClassVar[str]

    def micro_batches(self, start: int, rank: int, num_ranks: int) -> Iterator[tuple[Batch, Draws] | None]:
        """Micro-batches number `start + rank`, then every `num_ranks`-th, with their draws; on the CPU.

        None where there is nothing to learn from.
        """
        ...

    def news(self) -> list[dict[str, float]]:
        """What there is to log since the last call."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on in the middle needs beside the number; plain data and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        ...


@dataclass
class Offline:
    """Encoded examples, epoch after epoch: a pure function of the seed, so that nothing need be kept.

    Args:
        encoded: the examples.
        settings: loader, timesteps and seed of the run.
        process: of the model.
        noise: one for all images of a group ("shared") or one for each ("independent").
    """

    encoded: Encoded
    settings: Settings
    process: Process
    noise: Literal["shared", "independent"] = "shared"

    why_empty: ClassVar[str] = "there are no examples: give other data"

    def micro_batches(self, start: int, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Batch, Draws]]:
        """Micro-batches of this rank, with their draws; on the CPU."""
        settings = self.settings
        incoming = batches(
            self.encoded, settings.loader, seed=settings.seed, start=start + rank, step=num_ranks
        )
        for batch in incoming:
            yield (
                batch,
                training_draws(batch, settings.timesteps, self.process, seed=settings.seed, noise=self.noise),
            )

    def news(self) -> list[dict[str, float]]:
        """Nothing."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

"""What draws the pictures of `generate`: a model with its adapters, which may embed all prompts first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.common.progress import Progress

if TYPE_CHECKING:
    from diffalign.common.conditioning import Conditioning
    from diffalign.models._base import Model
    from diffalign.stages.generate import AdapterUse


class Painter:
    """Draws batches of prompts under settings that stay the same.

    Args:
        model: the base; nothing large of it is loaded yet.
        uses: the adapters to draw with.
        settings: further arguments of the model's `generate`.
        encode_first: `prepare` embeds the prompts and frees the text encoders before the network is loaded.

    Raises:
        UserError: an adapter that does not fit, or with `encode_first` changes the text encoders.
    """

    def __init__(
        self, model: Model, uses: Sequence[AdapterUse], settings: dict[str, Any], *, encode_first: bool
    ) -> None:
        self.model, self.settings = model, settings
        self._uses, self._encode_first = uses, encode_first
        self._embedded: dict[tuple[str, ...], tuple[Conditioning, Conditioning]] = {}
        for use in uses:
            if encode_first:
                model.check_adapter(use.path)
            else:
                model.load_adapter(use.path, weight=use.weight)

    def prepare(self, batches: Iterable[list[str]]) -> None:
        """Takes the prompts of every batch that will be drawn."""
        if not self._encode_first:
            return
        wanted = list(dict.fromkeys(map(tuple, batches)))  # prompts with several seeds come again
        with Progress("encode", len(wanted), "batches of prompts") as bar:
            for texts in wanted:
                embedded = self.model.embed_for_generation(list(texts), self.settings["negative_prompt"])
                cond, negative = (each.to("cpu") for each in embedded)
                self._embedded[texts] = cond, negative.rows([0])  # all rows of it are equal
                bar.update(1)
        self.model.drop_encoders()
        for use in self._uses:
            self.model.load_adapter(use.path, weight=use.weight)

    def __call__(self, texts: list[str], seeds: list[int]) -> list[Any]:
        """One PIL image a text and seed, of a batch that `prepare` was told of."""
        if not self._encode_first:
            return self.model.generate(texts, seeds, **self.settings)
        cond, negative = self._embedded[tuple(texts)]
        embedded = cond, negative.rows([0] * len(texts))
        return self.model.generate(texts, seeds, **self.settings, embedded=embedded)

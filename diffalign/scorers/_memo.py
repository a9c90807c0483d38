"""What a scorer need not compute twice: features of pictures within one pass, features of texts always."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

TEXTS = 4096
"""Features of so many texts are kept, the latest used: 16 MB of 1,024 numbers each."""


class TextMemo:
    """Features of texts by the text itself: prompts repeat, once for each picture of theirs."""

    def __init__(self, encode: Callable[[list[str]], torch.Tensor]) -> None:
        self._encode = encode
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Returns features [B, d] of the texts; each new one is encoded once."""
        unique = list(dict.fromkeys(texts))
        missing = [text for text in unique if text not in self._known]
        rows: dict[str, torch.Tensor] = {text: self._known[text] for text in unique if text in self._known}
        if missing or not texts:
            with torch.no_grad():
                fresh = self._encode(missing)
            if not texts:
                return fresh
            rows |= dict(zip(missing, fresh, strict=True))
        for text in unique:
            self._known[text] = rows[text]
            self._known.move_to_end(text)
        while len(self._known) > TEXTS:
            self._known.popitem(last=False)
        return torch.stack([rows[text] for text in texts])


class PictureMemo:
    """Pixels and features of the pictures of one pass, for all scorers that stand on the same network.

    Pictures are known by their identity and held while they are, so that no other picture can be taken for
    one of them. Outside of a pass nothing is kept: a caller may change a picture between two calls. Several
    threads may be in a pass at once; what is known is dropped when the last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._known: dict[tuple[Hashable, int], tuple[Any, torch.Tensor]] = {}

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Keeps what is computed until the end of the block; passes may nest."""
        with self._lock:
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._known.clear()

    def forget(self, images: Sequence[Any]) -> None:
        """Drops what is known of these pictures."""
        gone = {id(image) for image in images}
        with self._lock:
            for key in [key for key in self._known if key[1] in gone]:
                del self._known[key]

    def __call__(
        self, images: Sequence[Any], kind: Hashable, compute: Callable[[list[Any]], torch.Tensor]
    ) -> torch.Tensor:
        """Returns `compute(images)`, [B, ...]; in a pass only of those not seen before in this `kind`."""
        if self._depth == 0 or not images:
            return compute(list(images))
        keys = [(kind, id(image)) for image in images]
        with self._lock:
            known = {key: self._known[key][1] for key in keys if key in self._known}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in known}
        if missing:
            fresh = dict(zip(missing, compute(list(missing.values())), strict=True))
            known |= fresh
            with self._lock:
                if self._depth > 0:
                    self._known |= {key: (missing[key], row) for key, row in fresh.items()}
        return torch.stack([known[key] for key in keys])

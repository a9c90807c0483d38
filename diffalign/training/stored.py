"""Reference errors that are computed once and used by every run of a sweep over beta or objectives.

The reference is frozen and draws are keyed, so the error of the reference is a function of the micro-batch,
its timesteps and its noise: what one run has computed, the next one looks up. Kept is a number a picture.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.common.manifest import recipe_identity
from diffalign.data.batches import Batch
from diffalign.diffusion.likelihood import Draws
from diffalign.training.feed import Feed

FILE = "reference.sqlite"

WAIT_SECONDS = 60.0
"""How long one process waits for another that is writing."""


class ReferenceStore:
    """A file of reference errors in a folder; several processes and runs may use it at once.

    Args:
        folder: holds the file; made if needed.
        decides: all that the errors depend on beside the micro-batch: base, data, precision, seed and so on.

    Raises:
        UserError: the folder cannot be used, or holds the errors of another reference or other draws.
    """

    def __init__(self, folder: str | Path, decides: Mapping[str, Any]) -> None:
        self._path = path = Path(folder) / FILE
        identity = recipe_identity(decides)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last rows, no more
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS errors (key BLOB PRIMARY KEY, errors BLOB NOT NULL)"
            )
            self._database.execute("CREATE TABLE IF NOT EXISTS about (identity TEXT, decides TEXT)")
            self._database.execute(
                "INSERT INTO about SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM about)",
                (identity, json.dumps(dict(decides), default=str)),
            )
            (found, said) = self._database.execute("SELECT identity, decides FROM about").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"reference.store={folder} cannot be used ({error}): give another folder"
            ) from error
        if found != identity:
            theirs, ours = json.loads(said), json.loads(json.dumps(dict(decides), default=str))
            changed = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            raise UserError(
                f"reference.store={folder} holds the errors of another reference or of other draws "
                f"({', '.join(changed)} changed): give another folder"
            )

    def get(self, key: bytes, count: int) -> Tensor | None:
        """The errors `[count]` float32 kept under a key, None where there are none."""
        row = self._database.execute("SELECT errors FROM errors WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        errors = torch.from_numpy(np.frombuffer(row[0], dtype=np.float32).copy())
        if len(errors) != count:
            raise UserError(f"{self._path} is damaged: remove it, and it is made again")
        return errors

    def put(self, key: bytes, errors: Tensor) -> None:
        """Keeps errors `[M]`."""
        content = errors.detach().float().cpu().numpy().tobytes()
        self._database.execute("INSERT OR IGNORE INTO errors VALUES (?, ?)", (key, content))


@dataclass
class KnownErrors:
    """The stored errors of one micro-batch's draws; what `Draws.known` holds.

    Args:
        store: where they are.
        about: what tells the micro-batch from others.
        feed: counts how often it was asked and could answer.
    """

    store: ReferenceStore
    about: bytes
    feed: StoredReference

    def get(self, error_space: str, like: Tensor) -> Tensor | None:
        """The reference's errors in a space, as `like` `[M]`; None where they are not known yet."""
        self.feed.asked += 1
        found = self.store.get(self._key(error_space), len(like))
        if found is None:
            return None
        self.feed.found += 1
        return found.to(like.device)

    def put(self, error_space: str, errors: Tensor) -> None:
        """Keeps the errors that were computed."""
        self.store.put(self._key(error_space), errors)

    def _key(self, error_space: str) -> bytes:
        return hashlib.blake2b(self.about + error_space.encode(), digest_size=16).digest()


@dataclass
class StoredReference:
    """A feed whose draws know, or will keep, the errors of the reference.

    Args:
        feed: the micro-batches of given pictures.
        store: the errors.
        noise: "shared" or "independent", as the draws are.

    Attributes:
        asked: how often an objective has asked for stored errors.
        found: how often they were there.
    """

    feed: Feed
    store: ReferenceStore
    noise: str
    asked: int = 0
    found: int = 0
    _given: bool = False
    _taught: bool = False

    why_empty: ClassVar[str] = "there are no examples: give other data"

    def micro_batches(self, start: int, rank: int, num_ranks: int) -> Iterator[tuple[Batch, Draws] | None]:
        """Those of the feed."""
        for item in self.feed.micro_batches(start, rank, num_ranks):
            if item is None:
                yield None
                continue
            batch, draws = item
            self._given = True
            yield batch, replace(draws, known=KnownErrors(self.store, self._about(batch, draws), self))

    def _about(self, batch: Batch, draws: Draws) -> bytes:
        """All that tells a micro-batch from others of the run, its shape included."""
        shape = [*batch.latents.shape, *batch.counts.tolist()]
        said = [batch.ids, batch.epoch, draws.t.tolist(), shape, self.noise]
        return json.dumps(said).encode()

    def news(self) -> list[dict[str, float]]:
        """That of the feed. UserError when nobody has asked for the errors of a step that is over."""
        if self._taught and not self.asked:
            raise UserError(
                "reference.store is set, but the objective makes draws of its own, whose errors are not "
                "stored: leave reference.store out"
            )
        self._taught = self._given
        return self.feed.news()

    def state_dict(self) -> dict[str, Any]:
        """That of the feed: the errors are in the store."""
        return self.feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.feed.load_state_dict(state)

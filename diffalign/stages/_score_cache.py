"""Scores made before: by the picture's bytes, the prompt, and all that decides a scorer's numbers."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffalign.common.config import plain_plugin
from diffalign.common.errors import UserError
from diffalign.common.manifest import versions
from diffalign.common.progress import say

if TYPE_CHECKING:
    from diffalign.scorers import Scorer
    from diffalign.stages._image_rows import Row

FILE = "scores.sqlite"
SPEED_ONLY = ("batch_size", "retries", "timeout", "workers")
"""Options of scorers that change no value."""

WAIT_SECONDS = 60.0
"""How long one process waits for another that is writing."""


class ScoreCache:
    """A file of scores in a folder, which several processes may use at once.

    Scores of groups, scores with a context (which may name files) and NaN are never kept.

    Args:
        folder: holds the file; made if needed.

    Raises:
        UserError: the folder cannot be used, or holds something else under that name.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = path = Path(folder) / FILE
        self._broken = False
        self.hits = 0
        self._lock = threading.Lock()
        self._identities: dict[int, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=WAIT_SECONDS, check_same_thread=False)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, entry TEXT NOT NULL)"
            )
            self._database.execute("SELECT key, entry FROM scores LIMIT 1")  # or it is another program's
            self._database.commit()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cache={folder} cannot be used ({error}): give another folder") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def find(self, digest: str, row: Row, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
        """Returns label -> entry of the scores that are known; safe to call from several threads."""
        keys = {
            label: self._key(digest, row, scorer) for label, scorer in scorers.items() if _keeps(scorer, row)
        }
        found = {}
        with self._lock, self._unless_broken():
            for label, key in keys.items():
                with closing(
                    self._database.execute("SELECT entry FROM scores WHERE key = ?", (key,))
                ) as rows:
                    entry = rows.fetchone()
                if entry is not None:
                    found[label] = json.loads(entry[0])
            self.hits += len(found)
        return found

    def keep(self, scorer: Scorer, entries: Iterable[tuple[str | None, Row, dict[str, Any]]]) -> None:
        """Keeps the scores of some pictures: (digest, row, entry)."""
        rows = [
            (self._key(digest, row, scorer), json.dumps(entry))
            for digest, row, entry in entries
            if digest is not None and entry["value"] is not None and _keeps(scorer, row)
        ]
        with self._lock, self._unless_broken(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)

    @contextmanager
    def _unless_broken(self) -> Iterator[None]:
        """Goes on without the cache, and says so once, when the file fails: it saves work, it holds none."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            if not self._broken:
                say(f"cache: {self._path} fails ({error}): scores are not looked up or kept where it does")
            self._broken = True

    def _key(self, digest: str, row: Row, scorer: Scorer) -> bytes:
        identity = self._identities.get(id(scorer))
        if identity is None:
            identity = self._identities[id(scorer)] = _identity(scorer)
        prompt = row.get("prompt") if scorer.takes("prompts") else None
        return hashlib.sha256(json.dumps([digest, prompt, identity]).encode()).digest()


def _keeps(scorer: Scorer, row: Row) -> bool:
    reads_context = "context" in scorer.needs or (scorer.takes("context") and bool(row.get("context")))
    return not scorer.relative and not reads_context


def _identity(scorer: Scorer) -> str:
    """Returns all that decides the numbers of a loaded scorer: options, weights, and this code's version."""
    options = {name: value for name, value in plain_plugin(scorer).items() if name not in SPEED_ONLY}
    return json.dumps([options, scorer.scale, scorer.version, versions()["diffalign"]], sort_keys=True)

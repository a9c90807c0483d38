"""Ctrl-C and SIGTERM that wait for a safe moment."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from diffalign.common.errors import Interrupted
from diffalign.common.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside the block, Ctrl-C and SIGTERM only set `requested`; the owner stops at its next safe moment.

    Launchers pass Ctrl-C on as SIGTERM, so a second signal often follows at once and changes nothing; the
    third leaves immediately, without saving.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._count = 0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether someone asked to stop."""
        return self.number is not None

    def raise_if_requested(self) -> None:
        """Raises `Interrupted` if someone asked to stop."""
        if self.number is not None:
            raise Interrupted(self.number)

    def __enter__(self) -> Self:
        try:
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        except ValueError:  # Signals belong to the main thread; elsewhere the host program decides.
            self._previous = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # A forked loader worker: its parent decides what happens.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self._count += 1
        if self._count == 1:
            self.number = number
            say("stopping after this step, to save it")
        elif self._count > 2:
            os._exit(128 + number)

"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterable

ALIKE = 0.61
"""Share of letters in common from which one name may be meant for another: `limit` for `drift_limit` (0.63),
not `split` for `limit` (0.6).
"""


class UserError(ValueError):
    """A mistake in the input, told in one line: what is wrong and what to do.

    The command line prints the line and leaves with exit code 2; line breaks in the message are folded
    into spaces so that it stays one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised in the main thread so that a stage can save and leave.

    It derives from KeyboardInterrupt: `except Exception` does not swallow it, `finally` blocks run.

    Attributes:
        signal_number: the signal that arrived; the exit code is 128 + this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number


def brief(error: BaseException) -> str:
    """Returns what a library's error says as one line of bearable length; its class where it says nothing.

    The hub's libraries call a file missing that no connection could be made for; that is said beside it.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else text[:297] + "..."
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError):
            said = " ".join(str(cause).split()) or type(cause).__name__
            return f"{text} (the network was not reached: {said})"
        cause = cause.__cause__ or cause.__context__
    return text


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `name` is most likely a misspelling of, or None."""
    matches = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=ALIKE)
    return matches[0] if matches else None


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Returns the error for a name that nobody knows; the caller raises it.

    Args:
        kind: what the name should have been, for example "objective" or "key of train".
        name: what was given.
        known: every name that would have been accepted.
    """
    names = sorted(known)
    match = nearest(str(name), names)
    hint = f"did you mean '{match}'? " if match else ""
    listing = ", ".join(names) if names else "none"
    return UserError(f"unknown {kind} '{name}': {hint}known: {listing}")

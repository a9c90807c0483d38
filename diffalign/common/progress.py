"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


_silent = False


def silence() -> None:
    """From now on this process shows nothing: of several that do the same, one speaks."""
    global _silent
    _silent = True


class Progress:
    """A count that a person can follow, as a context manager.

    On a terminal it is a bar with rate and expected time; elsewhere (a log file) it prints the first update,
    then at most one line per 10 s, and the last state.

    Args:
        label: what is going on.
        total: how many units there are, None when unknown.
        unit: what is counted, in the plural ("pairs").
        initial: units done before (a resumed run); they do not count for the rate.
    """

    def __init__(self, label: str, total: int | None, unit: str = "items", initial: int = 0) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.initial = initial
        self.count = initial
        self._postfix: dict[str, Any] = {}
        self._bar: Any = None
        self._started = 0.0
        self._printed_at: float | None = None
        self._printed_count: int | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if sys.stderr.isatty() and not _silent:
            sized = _has_size()
            self._bar = tqdm(
                desc=self.label,
                total=self.total,
                initial=self.initial,
                unit=f" {self.unit}",
                dynamic_ncols=sized,
                ncols=None if sized else 100,
                nrows=None if sized else 20,
                file=sys.stderr,
            )
        return self

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Counts `n` more units; `postfix` values (loss=0.69) are shown behind the rate."""
        self.count += n
        self._postfix.update(postfix)
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix_str(self._postfix_text(), refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if self._printed_at is None or now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print_line(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._printed_count != self.count and (error is None or self.count != self.initial):
            self._print_line(time.monotonic())

    def _print_line(self, now: float) -> None:
        self._printed_at = now
        self._printed_count = self.count
        if not _silent:
            print(self.line(now - self._started), file=sys.stderr, flush=True)

    def line(self, elapsed: float) -> str:
        """Returns the state as one plain line, `elapsed` seconds after the start."""
        done = self.count - self.initial
        rate = done / elapsed if elapsed > 0 else 0.0
        of_total = f"{self.count}/{self.total}" if self.total is not None else f"{self.count}"
        pieces = [f"{self.label}: {of_total} {self.unit}", f"{_rate_text(rate, self.unit)}"]
        if self.total is not None and rate > 0 and self.count < self.total:
            pieces.append(f"ETA {_clock((self.total - self.count) / rate)}")
        elif done and elapsed >= 1:
            pieces.append(f"in {_clock(elapsed)}")
        postfix = self._postfix_text()
        return ", ".join([*pieces, postfix] if postfix else pieces)

    def _postfix_text(self) -> str:
        return ", ".join(f"{key}={_value_text(value)}" for key, value in self._postfix.items())


def say(text: str) -> None:
    """Prints a line to stderr without breaking a bar that is on the screen."""
    if _silent:
        return
    if sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def _has_size() -> bool:
    """Whether the terminal knows its size; on one that says 0 tqdm would draw nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rate_text(rate: float, unit: str) -> str:
    if 0 < rate < 1:
        return f"{1 / rate:.1f} s each"
    return f"{rate:.1f} {unit}/s"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

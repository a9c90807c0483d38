"""Runs `diffalign WORDS` and fails on warnings that are not on the commented list tests/allowed_warnings.txt.

Python warnings and log records at level WARNING or above count. They are collected, not raised, so that a
library that handles its own warnings behaves as it does for people. Exit code 1 after unexpected ones.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

LIST = Path(__file__).parent.parent / "tests" / "allowed_warnings.txt"


def entries() -> list[tuple[str, str, re.Pattern[str]]]:
    """Returns (kind, category or logger, message pattern) of every line of the list."""
    lines = [line.strip() for line in LIST.read_text(encoding="utf-8").splitlines()]
    split = [line.split(":", 2) for line in lines if line and not line.startswith("#")]
    return [(kind, name, re.compile(pattern, re.DOTALL)) for kind, name, pattern in split]


def collect(found: list[str]) -> None:
    """Makes every warning that is not on the list end up in `found` (and on stderr, as usual)."""
    allowed = entries()
    show = warnings.showwarning
    call_handlers = logging.Logger.callHandlers

    def on_warning(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        names = {cls.__name__ for cls in category.__mro__}
        if any(k == "warning" and n.split(".")[-1] in names and p.match(str(message)) for k, n, p in allowed):
            return
        found.append(f"{filename}:{lineno}: {category.__name__}: {message}")
        show(message, category, filename, lineno, *rest)

    def on_record(logger: logging.Logger, record: logging.LogRecord) -> None:
        text = record.getMessage()
        inside = [
            p for k, n, p in allowed if k == "log" and (record.name == n or record.name.startswith(n + "."))
        ]
        if record.levelno >= logging.WARNING:
            if any(pattern.match(text) for pattern in inside):
                return
            found.append(f"log {record.name}: {record.levelname}: {text}")
        call_handlers(logger, record)

    warnings.simplefilter("default")
    warnings.showwarning = on_warning
    logging.Logger.callHandlers = on_record  # type: ignore[method-assign]


def main() -> int:
    """Runs the words of the command line; returns the exit code."""
    found: list[str] = []
    collect(found)
    from diffalign.cli import main as run

    code = run(sys.argv[1:])
    if found:
        print(f"error: {len(found)} warnings that are not in {LIST.name}:", file=sys.stderr)
        print(*sorted(set(found)), sep="\n", file=sys.stderr)
    return code or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

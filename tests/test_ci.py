"""`.ci/strict.py` lets nothing pass that is not on the commented list."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERB = '''
"""Warn."""
import logging, warnings

def warn(*, how: str) -> None:
    """Args:
        how: which way.
    """
    if how == "python":
        warnings.warn("odd thing", DeprecationWarning)
    if how == "log":
        logging.getLogger("some.library").warning("odd %s", "record")
    if how == "info":
        logging.getLogger("some.library").info("nothing")
'''
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/.ci", {folder!r}]
import strict
strict.LIST = Path({folder!r}, "list.txt")
from diffalign import cli
cli.VERBS["warn"] = "t_warn:warn"
sys.argv = ["strict", "warn", "how=" + sys.argv[1]]
sys.exit(strict.main())
"""


@pytest.mark.parametrize(
    ("how", "listed", "message"),
    [
        ("info", "", None),
        ("python", "", "DeprecationWarning: odd thing"),
        ("log", "", "log some.library: WARNING: odd record"),
        ("python", "warning:DeprecationWarning:odd", None),
        ("python", "warning:UserWarning:odd", "DeprecationWarning: odd thing"),
        ("python", "warning:DeprecationWarning:thing", "DeprecationWarning: odd thing"),
        ("log", "# why\nlog:some:odd r", None),
        ("log", "log:other:odd", "log some.library: WARNING: odd record"),
    ],
)
def test_only_listed_warnings_pass(tmp_path: Path, how: str, listed: str, message: str | None) -> None:
    (tmp_path / "t_warn.py").write_text(VERB)
    (tmp_path / "list.txt").write_text(f"# reasons\n{listed}\n")
    program = textwrap.dedent(PROGRAM).format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True)
    assert done.returncode == (0 if message is None else 1), done.stderr
    assert ("error: 1 warnings that are not in list.txt" in done.stderr) == (message is not None)
    assert message is None or message in done.stderr


def test_every_line_of_the_list_has_its_reason() -> None:
    lines = (ROOT / "tests" / "allowed_warnings.txt").read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith("#"):
            assert line.startswith(("warning:", "log:")) and line.count(":") == 2, line
            assert before.startswith("#") or before.startswith(("warning:", "log:")), (
                f"no reason above: {line}"
            )

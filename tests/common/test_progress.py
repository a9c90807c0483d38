"""Progress is a bar on a terminal and sparse lines elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

from diffalign.common import progress
from diffalign.common.progress import Progress, say


def test_lines_elsewhere_are_first_every_ten_seconds_and_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("train", 40, "pairs", initial=8) as bar:
        for step in range(16):
            now[0] += 2
            bar.update(2, loss=0.693147 - step / 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 10/40 pairs, 1.0 pairs/s, ETA 0:30, loss=0.6931",
        "train: 20/40 pairs, 1.0 pairs/s, ETA 0:20, loss=0.6431",
        "train: 30/40 pairs, 1.0 pairs/s, ETA 0:10, loss=0.5931",
        "train: 40/40 pairs, 1.0 pairs/s, in 0:32, loss=0.5431",
    ]


def test_slow_work_tells_seconds_each_and_hours() -> None:
    bar = Progress("draw", 1000, "pictures")
    bar.count = 1
    assert bar.line(10.0) == "draw: 1/1000 pictures, 10.0 s each, ETA 2:46:30"
    assert Progress("read", None, "rows").line(1.0) == "read: 0 rows, 0.0 rows/s"


def test_the_last_line_comes_after_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("draw", 9, "pictures") as bar:
        bar.update()
        bar.update()
        raise KeyboardInterrupt
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "draw: 1/9 pictures",
        "draw: 2/9 pictures",
    ]


def test_an_error_before_the_first_unit_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Progress("read", 9, "rows"):
        raise ValueError
    assert capsys.readouterr().err == ""
    with Progress("read", 9, "rows", initial=9):
        pass
    assert capsys.readouterr().err == "read: 9/9 rows, 0.0 rows/s\n"


def test_say_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


SCRIPT = """
from diffalign.common.progress import Progress, say
with Progress("draw", 3, "pictures") as bar:
    for i in range(3):
        bar.update(1, loss=0.5)
        say(f"line {i}")
"""


def test_a_terminal_gets_a_bar() -> None:
    terminal, end = pty.openpty()
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=end, check=True)
    os.close(end)
    text = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "100%" in text and "3/3" in text and "loss=0.5" in text
    assert all(f"line {i}\r\n" in text for i in range(3))

"""Examples are true: those of the README and of `--help` resolve to a recipe, its offline Python runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from diffalign import cli
from diffalign.common.plugins import names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OFFLINE = re.findall(r"<!-- offline -->\n```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
HELP = [
    re.sub(
        r" *\\?\n {5,}",
        " ",
        (importlib.import_module(f"diffalign.stages.{verb}").__doc__ or "").split("Examples:")[1],
    )
    for verb in names("stages")
]
COMMANDS = [
    words
    for block in [*SHELL, *HELP]
    for line in block.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True)) and words[0] == "diffalign"
]


def test_there_is_something_to_check() -> None:
    assert len(OFFLINE) >= 1
    assert len(COMMANDS) >= 20


@pytest.mark.readme
@pytest.mark.parametrize("code", OFFLINE)
def test_offline_example_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


@pytest.mark.readme
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_command_resolves(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in words[1:]]
    monkeypatch.chdir(tmp_path)
    arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
    code = cli.main([*arguments, *(["--dry-run"] if "--dry-run" not in arguments else [])])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "out:" in captured.out or words[1] == "check"
    assert list(tmp_path.iterdir()) == []

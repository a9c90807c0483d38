"""The command line as a person meets it."""

from __future__ import annotations

import re
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from diffalign import cli
from diffalign.common import _schema, plugins
from diffalign.common.config import Many, One

ROOT = Path(__file__).parent.parent
SHARED_PLUGINS: dict[str, One | Many] = {
    "model": One("models"),
    "data": One("data.sources"),
    "scorers": Many("scorers"),
    "objective": One("objectives"),
}
SHARED = {
    "model",
    "adapter",
    "data",
    "cache",
    "prompts",
    "images",
    "scorers",
    "objective",
    "out",
    "seed",
    "limit",
}
"""The keys shared by all verbs; the list is frozen, recipes depend on it."""
SHARED_BY_SOME = {"batch_size", "device", "dtype", "format", "precision", "preprocess", "run"}
"""Further keys of two verbs or more, with one meaning."""

STAGE = '''
"""Walk the dog.

More words.

Examples:
    diffalign walk out=park
"""
import os, signal, sys
from pathlib import Path
from diffalign.common.errors import UserError

def walk(*, out: str, seed: int = 0, mode: str = "write") -> None:
    """Returns nothing.

    Args:
        out: where to.
    """
    if mode == "refuse":
        raise UserError("the dog\\nis asleep: wake it")
    if mode == "denied":
        raise PermissionError(13, "Permission denied", out)
    if mode == "bug":
        raise RuntimeError("a bug")
    if mode == "interrupt":
        raise KeyboardInterrupt
    if mode in ("wait", "twice"):
        try:
            print("waiting", flush=True)
            signal.pause()
        finally:
            if mode == "twice":
                os.kill(os.getpid(), signal.SIGTERM)
            Path(out).write_text("saved")
    if mode == "lines":
        for _ in range(100_000):
            print("line")
        return
    Path(out).write_text(f"seed {seed}")
'''


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A verb `walk`; yields the file it writes to."""
    (tmp_path / "t_walk.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "walk", "t_walk:walk")
    monkeypatch.setitem(cli.SUMMARIES, "walk", "walk the dog")
    yield tmp_path / "park"
    sys.modules.pop("t_walk", None)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Returns a running `diffalign walk` process."""
    program = f"""
        import sys
        from diffalign import cli
        sys.path.insert(0, {str(folder)!r})
        cli.VERBS["walk"] = "t_walk:walk"
        sys.exit(cli.main(["walk", *sys.argv[1:]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_verb_runs_with_its_recipe(walk: Path, tmp_path: Path) -> None:
    assert cli.main(["walk", f"out={walk}", "seed=3"]) == 0
    assert walk.read_text() == "seed 3"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {walk}\nseed: 4\n")
    for config in (["--config", str(recipe)], [f"--config={recipe}"]):
        walk.unlink()
        assert cli.main([*config, "walk"]) == 0 and walk.read_text() == "seed 4"
    assert cli.main(["walk", "seed=5", "--config", str(recipe)]) == 0 and walk.read_text() == "seed 5"


def test_dry_run_prints_the_recipe_and_does_nothing(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["walk", f"out={walk}", "--dry-run", "mode=a: b"]) == 0
    assert capsys.readouterr().out == f"out: {walk}\nseed: 0\nmode: 'a: b'\n"
    assert not walk.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wlak"], "unknown verb 'wlak': did you mean 'walk'? known: "),
        (["walk"], "walk needs out=FOLDER (see diffalign walk --help)"),
        (["walk", "sed=1"], "unknown key of walk 'sed': did you mean 'seed'? known: mode, out, seed"),
        (["walk", "out=park", "seed=x"], "seed=x: expected a whole number, found 'x'"),
        (["walk", "--dry-rum"], "unknown option '--dry-rum': did you mean '--dry-run'?"),
        (
            ["walk", "--out=park"],
            "unknown option '--out=park': keys are written without dashes, as key=value",
        ),
        (["walk", "out=caf\udce9"], "out=caf\\udce9 is not UTF-8: rename the file or folder"),
        (["walk", "--config"], "--config needs a file: --config recipe.yaml"),
        (["walk", "--config", "none.yaml"], "--config none.yaml cannot be read: No such file or directory"),
        (["walk", "out=park", "mode=refuse"], "the dog is asleep: wake it"),
        (["walk", "out=/park", "mode=denied"], "Permission denied: /park"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    walk: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not walk.exists()


def test_a_bug_keeps_its_traceback(walk: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["walk", "out=x", "mode=bug"])


def test_general_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, summary in cli.SUMMARIES.items():
        assert f"  {verb:<8}  {summary}\n" in text
    assert text.rstrip().splitlines()[-1].startswith("  diffalign ")
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == text
    assert set(cli.SUMMARIES) == set(cli.VERBS)


def test_help_of_a_verb(walk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["walk", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Walk the dog.\n" in text and "More words" not in text
    assert "  out   text; required\n        where to.\n  seed  int; default 0\n" in text
    assert text.endswith("Examples:\n  diffalign walk out=park\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    try:
        version = metadata.version("diffalign")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    assert capsys.readouterr().out == f"diffalign {version}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_let_the_stage_save(walk: Path, number: signal.Signals, code: int) -> None:
    process = start(walk.parent, f"out={walk}", "mode=wait")
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and walk.read_text() == "saved"
    assert err == f"stopped by {number.name}\n"


def test_a_second_signal_does_not_disturb_the_saving(walk: Path) -> None:
    process = start(walk.parent, f"out={walk}", "mode=twice")
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and walk.read_text() == "saved"
    assert "once more leaves without saving" in err and "Traceback" not in err


def test_plain_keyboard_interrupt_is_130(walk: Path) -> None:
    assert cli.main(["walk", f"out={walk}", "mode=interrupt"]) == 130


def test_a_reader_that_leaves_is_no_error(walk: Path) -> None:
    process = start(walk.parent, f"out={walk}", "mode=lines")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE


HEAVY = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "datasets", "pyarrow", "pandas")


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_is_quick(words: list[str]) -> None:
    """No heavy library is imported, and the processor time of the whole process stays below 1.5 s."""
    program = (
        "import sys; from diffalign.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == "[]\n"
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.5
    _, _, examples = done.stdout.rpartition("\nExamples:\n")
    assert examples.startswith("  diffalign ")


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "trian"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown verb 'trian': did you mean 'train'?")


def stage_keys(verb: str) -> dict[str, Any]:
    function, _ = cli._stage(verb)
    return _schema.keys_of(function)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_shared_keys_mean_the_same_everywhere(verb: str) -> None:
    keys = stage_keys(verb)
    for name, mark in SHARED_PLUGINS.items():
        # The demo takes a model and an objective by name alone: the settings are its own.
        assert name not in keys or keys[name].plugin == mark or verb == "demo"
    for name, key in keys.items():
        if key.plugin is not None and name not in SHARED_PLUGINS:
            assert key.plugin.kind in {mark.kind for mark in SHARED_PLUGINS.values()}
    assert "out" in keys and all(key.note for key in keys.values()), "every key needs a line in Args:"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_keys_of_sections_are_explained_too(verb: str) -> None:
    def bare(keys: Mapping[str, _schema.Key], path: str) -> list[str]:
        below = [found for key in keys.values() if key.section for found in bare(key.section.keys, key.name)]
        return [f"{path}.{key.name}" for key in keys.values() if not key.note] + below

    assert bare(stage_keys(verb), verb) == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_that_a_hint_names_is_there(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is missing, of whatever plug-in: the words of the hint are those of the command line."""
    hints = set()
    needed = {"model": "sdxl"} if "model" in stage_keys(verb) else {}
    for name, key in stage_keys(verb).items():
        for plugin in plugins.names(key.plugin.kind) if key.plugin is not None else ():
            words = [f"{key}={value}" for key, value in {**needed, name: plugin}.items()]
            if cli.main([verb, *words, "--dry-run"]) != 0:
                hints.update(re.findall(r"\(see (diffalign .*? --help)\)", capsys.readouterr().err))
                assert hints, words
    for hint in hints:
        assert cli.main(shlex.split(hint)[1:]) == 0, hint
    assert verb != "train" or "diffalign train data=jsonl model=sdxl --help" in hints


def test_the_list_of_shared_keys_is_frozen() -> None:
    count = Counter(name for verb in cli.VERBS for name in stage_keys(verb))
    assert {name for name, times in count.items() if times > 1} <= SHARED | SHARED_BY_SOME


def test_keys_of_a_model() -> None:
    for name in plugins.names("models"):
        fields = _schema.Section.of_class(name, plugins.get("models", name)).keys
        assert {"path", "dtype", "revision", "variant", "vae"} <= set(fields)


def test_help_says_what_a_named_plug_in_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "scorers=[geneval,jpeg]", "--help"]) == 0
    text = capsys.readouterr().out
    for said in (
        "include: [{class, count, color?, position?: [relation, index of an",  # of the class
        "correct    1 where every clause is fulfilled",  # of the module
        "incompressibility",
    ):
        assert said in text
    assert cli.main(["score", "--help"]) == 0
    assert "incompressibility" not in capsys.readouterr().out


def test_help_names_every_argument_that_takes_a_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--help"]) == 0
    assert (
        "name it: diffalign evaluate scorers=NAME embedder=NAME model=NAME data=NAME --help"
        in capsys.readouterr().out
    )

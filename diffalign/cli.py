"""The command line: `diffalign VERB [--config FILE] [--dry-run] [key=value ...]`.

Without a verb the file is a recipe of several.

Nothing heavy is imported before the words are parsed, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import FrameType
from typing import Any

from diffalign.common.errors import Interrupted, UserError, brief, nearest, unknown
from diffalign.common.files import printable

VERBS = {
    "check": "diffalign.stages.check:check",
    "generate": "diffalign.stages.generate:generate",
    "score": "diffalign.stages.score:score",
    "pair": "diffalign.stages.pair:pair",
    "cache": "diffalign.stages.cache:cache",
    "train": "diffalign.stages.train:train",
    "evaluate": "diffalign.stages.evaluate:evaluate",
    "export": "diffalign.stages.export:export",
    "demo": "diffalign.demo:demo",
}
"""Verb -> "module:function"; the module is imported when the verb is used."""

SUMMARIES = {
    "check": "say what is in a preference data set, and what is wrong with it",
    "generate": "draw pictures: prompts x seeds x models",
    "score": "score pictures",
    "pair": "turn scored pictures into preferences",
    "cache": "encode preferences once, onto disk",
    "train": "align a model with preferences; writes an adapter",
    "evaluate": "compare pictures, or judge held-out preferences",
    "export": "write an adapter for other programs, or merged into its base",
    "demo": "walk through all of it with an embedded tiny model",
}

FIRST_PROCESS_ONLY = ("check", "pair", "evaluate", "export", "demo")
"""Verbs that do not share their work: of several processes the first does it."""

OPTIONS = {
    "--config FILE": "read keys from a YAML file; key=value words are stronger",
    "--dry-run": "print the resolved recipe as YAML and stop; nothing is loaded or written",
    "--help, -h": "say what can be said, and stop",
    "--version": "print the version and stop",
}

_THE_MACHINES_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}
"""Refusals of a file system that a person can mend: no right to write, disk full, a file for a folder."""

_EXAMPLES = """\
Examples:
  diffalign demo
  diffalign check data=pickapic data.path=pickapic/validation.parquet
  diffalign generate model=sdxl model.path=FOLDER_OR_HUB_ID prompts=prompts.txt out=base
  diffalign train --help
"""


@dataclass
class _Command:
    """The parsed words of a command line."""

    verb: str | None = None
    config: str | None = None
    dry_run: bool = False
    help: bool = False
    version: bool = False
    overrides: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 after a mistake in the input, 128 + signal.

    Args:
        arguments: the words after `diffalign`; None: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _signals():
            code = _run(_parse(words))
            sys.stdout.flush()  # a reader that has left is noticed here, not while Python shuts down
            return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        number = interrupt.signal_number if isinstance(interrupt, Interrupted) else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + int(number)
    except BrokenPipeError:  # `diffalign ... | head`: the reader has left, there is nobody to tell
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + int(signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _THE_MACHINES_REFUSALS:
            raise
        print(f"error: {error.strerror}: {error.filename or 'see out='}", file=sys.stderr)
        return 2
    except Exception as error:
        # Weights meet a full disk as an error of safetensors' own, a type that only they may import.
        if type(error).__name__ != "SafetensorError" or "I/O error" not in str(error):
            raise
        print(f"error: {brief(error)}: see out=", file=sys.stderr)
        return 2


def _run(command: _Command) -> int:
    """Runs the parsed command and returns the exit code."""
    if command.version:
        print(f"diffalign {_version()}")
        return 0
    if command.verb is None and command.config is not None and not command.help:
        return _run_steps(command)
    if command.verb is None:
        print(_general_help(), file=sys.stdout if command.help else sys.stderr)
        return 0 if command.help else 2
    function, documentation = _stage(command.verb)
    # After the verb is known: omegaconf is not needed for general help.
    from diffalign.common import config, helptext

    if command.help:
        rows = helptext.help_rows(function, command.config, command.overrides)
        texts = helptext.help_texts(function, command.config, command.overrides)
        print(_verb_help(command.verb, documentation, rows, helptext.plug_in_keys(function), texts))
        return 0
    recipe = config.load_recipe(function, command.config, command.overrides)
    if command.dry_run:
        print(recipe.as_yaml(), end="")
        return 0
    _do(command.verb, function, recipe.arguments)
    return 0


def _do(verb: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Runs a stage in this process, or leaves it to the first one."""
    from diffalign.stages import _shares

    if verb not in FIRST_PROCESS_ONLY:
        function(**arguments)
        return
    with _shares.first_of_all() as works:
        if works:
            function(**arguments)
        else:
            print(f"{verb} does not share its work: the first process does it", file=sys.stderr)


def _run_steps(command: _Command) -> int:
    """Runs a recipe of several verbs."""
    from diffalign.common import recipes
    from diffalign.stages import _shares

    if not _shares.my_share().alone:
        raise UserError("a recipe of several verbs runs in one process: start its verbs one after another")
    stages = {verb: lambda verb=verb: _stage(verb)[0] for verb in VERBS}
    assert command.config is not None
    steps = recipes.load_steps(command.config, command.overrides, stages)
    for number, step in enumerate(steps, start=1):
        if command.dry_run:
            print(f"---\n# step {number}: {step.verb}\n{step.recipe.as_yaml()}", end="")
            continue
        print(f"step {number} of {len(steps)}: {step.verb}", file=sys.stderr)
        step.function(**step.recipe.arguments)
    return 0


def _parse(words: Sequence[str]) -> _Command:
    """Returns the parsed words; raises UserError on an unknown verb or option."""
    command = _Command()
    rest = iter(words)
    for word in rest:
        if printable(word) != word:
            raise UserError(f"{printable(word)} is not UTF-8: rename the file or folder")
        name, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--dry-run":
            command.dry_run = True
        elif word == "--version":
            command.version = True
        elif name == "--config":
            given = value if equals else next(rest, "")
            if not given:
                raise UserError("--config needs a file: --config recipe.yaml")
            command.config = given
        elif word.startswith("-"):
            raise _unknown_option(word)
        elif command.verb is None and not (command.config and equals):
            if word not in VERBS:
                raise unknown("verb", word, VERBS)
            command.verb = word
        else:
            command.overrides.append(word)
    return command


def _unknown_option(word: str) -> UserError:
    name, equals, _ = word.partition("=")
    known = ["--config", "--dry-run", "--help", "--version"]
    match = nearest(name, known)
    if match is None or equals:
        return UserError(f"unknown option '{word}': keys are written without dashes, as key=value")
    return UserError(f"unknown option '{word}': did you mean '{match}'?")


def _stage(verb: str) -> tuple[Callable[..., Any], str]:
    """Returns the function of a verb and the docstring of its module."""
    module_name, _, function_name = VERBS[verb].partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, function_name), module.__doc__ or ""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into `Interrupted`, raised in the main thread.

    Launchers pass Ctrl-C on as SIGTERM, so a second signal often follows at once: it does not disturb the
    saving that the first one began. The third leaves immediately.
    """
    owner = os.getpid()
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != owner:  # a forked worker: its parent decides what happens
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        received += 1
        if received == 1:
            raise Interrupted(number)
        if received == 2:
            os.write(2, b"\nsaving; once more leaves without saving\n")
            return
        os._exit(128 + number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (called from a notebook's worker): signals are not ours
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _version() -> str:
    try:
        return metadata.version("diffalign")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _general_help() -> str:
    verbs = _table([(verb, SUMMARIES[verb]) for verb in VERBS])
    options = _table(list(OPTIONS.items()))
    return (
        "usage: diffalign VERB [--config FILE] [--dry-run] [key=value ...]\n"
        "       diffalign --config RECIPE_OF_SEVERAL_VERBS [--dry-run] [key=value ...]\n\n"
        "Aligns text-to-image diffusion models with preferences and rewards.\n\n"
        f"Verbs (diffalign VERB --help lists the keys of one):\n{verbs}\n\n"
        f"Options:\n{options}\n\n{_EXAMPLES}"
    ).rstrip()


def _verb_help(
    verb: str,
    documentation: str,
    rows: Sequence[tuple[str, str, str, str]],
    plug_ins: Sequence[str],
    texts: Mapping[str, str],
) -> str:
    """Returns the help of a verb: what it does and its named plug-ins say, keys, options, examples."""
    text, _, examples = textwrap.dedent(documentation).strip().partition("Examples:")
    described = []
    for key, kind, default, note in rows:
        value = {"required": "required", "": ""}.get(default, f"default {default}")
        described.append((key, "; ".join(part for part in (kind, value) if part), note))
    parts = [
        f"usage: diffalign {verb} [--config FILE] [--dry-run] [key=value ...]",
        text.strip().split("\n\n")[0],
        "Keys:\n" + _key_table(described),
        "Options:\n" + _table(list(OPTIONS.items())[:3]),
    ]
    parts[2:2] = [f"{name}:\n{textwrap.indent(about, '  ')}" for name, about in texts.items()]
    if plug_ins:
        words = " ".join(f"{key}=NAME" for key in plug_ins)
        parts.insert(len(parts) - 1, f"For the keys of a plug-in name it: diffalign {verb} {words} --help")
    shown = textwrap.indent(textwrap.dedent(examples.strip("\n")), "  ") if examples.strip() else ""
    parts.append("Examples:\n" + (shown or f"  diffalign {verb} --dry-run"))
    return "\n\n".join(parts)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)


def _key_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Returns one entry per key: name and type on a line, the note indented below."""
    width = min(28, max((len(key) for key, _, _ in rows), default=0))
    columns = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = []
    for key, kind, note in rows:
        lines.append(f"  {key:<{width}}  {kind}".rstrip())
        indent = " " * (width + 4)
        lines.extend(textwrap.wrap(note, columns, initial_indent=indent, subsequent_indent=indent))
    return "\n".join(lines)

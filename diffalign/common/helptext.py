"""What `--help` says of a stage: its keys, and what the plug-ins that are named say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from diffalign.common import _schema, _values, plugins
from diffalign.common._choices import Source, expand, parse_word, read_file
from diffalign.common._schema import Key, Many, Section


def help_rows(
    function: Callable[..., Any], config_file: str | Path | None, overrides: Sequence[str]
) -> list[tuple[str, str, str, str]]:
    """Returns (key, type, default, note) of every key, in order.

    The keys of a plug-in are listed when the file or a word names it (which imports it); otherwise its
    argument lists the names only, so that help stays quick.
    """
    shown = _shown_keys(function, config_file, overrides)
    return [row for name, key in shown.items() for row in _rows(key, name)]


def help_texts(
    function: Callable[..., Any], config_file: str | Path | None, overrides: Sequence[str]
) -> dict[str, str]:
    """Returns, for each plug-in that the file or a word names, what its module and class say of it."""
    texts: dict[str, str] = {}

    def collect(section: Section | None) -> None:
        if section is None:
            return
        if section.build is not None and section.build.__name__ == "Plugin":
            module = inspect.getmodule(section.build)
            about = [inspect.getdoc(module) or "", (inspect.getdoc(section.build) or "").split("\nArgs:")[0]]
            texts[plugins.plugin_name(section.build)] = "\n\n".join(text.strip() for text in about if text)
        for key in section.keys.values():
            collect(key.section)

    for key in _shown_keys(function, config_file, overrides).values():
        if key.plugin is not None:
            collect(key.section)
    return texts


def _shown_keys(
    function: Callable[..., Any], config_file: str | Path | None, overrides: Sequence[str]
) -> dict[str, Key]:
    """Returns the keys of a stage, with those of the plug-ins that the file or a word names below them."""
    verb = function.__name__
    keys = _schema.keys_of(function)
    words = [parse_word(text, keys, verb) for text in overrides if "=" in text]
    nodes = read_file(config_file, keys, verb) if config_file is not None else {}
    named = {word.path[0] for word in words} | set(nodes)
    shown: dict[str, Key] = {}
    for name, key in keys.items():
        shown[name] = key
        if key.plugin is not None and name in named:
            only = [word for word in words if word.path[0] == name]
            root, _ = expand(verb, {name: key}, nodes, only, Source(str(config_file), is_file=True))
            shown[name] = root.keys[name]
    return shown


def plug_in_keys(function: Callable[..., Any]) -> list[str]:
    """Returns the arguments of a stage that take plug-ins."""
    return [name for name, key in _schema.keys_of(function).items() if key.plugin is not None]


def _rows(key: Key, path: str) -> list[tuple[str, str, str, str]]:
    """Returns the help rows of a key and of the keys below it."""
    default = "required" if key.default is MISSING else _default_text(key.default)
    rows = []
    if key.plugin is not None:
        joined = "|".join(plugins.names(key.plugin.kind))
        many = isinstance(key.plugin, Many)
        rows.append((path, f"[{joined}, ...]" if many else joined, default, key.note))
    elif key.section is None:
        rows.append((path, _values.type_label(key.annotation), default, key.note))
    elif key.note and (key.name == path or key.default is None):
        rows.append((path, "section", "null" if key.default is None else "", key.note))
    for inner in key.section.keys.values() if key.section else ():
        rows.extend(_rows(inner, f"{path}.{inner.name}"))
    return rows


def _default_text(default: Any) -> str:
    if isinstance(default, str):
        return default or "''"
    return str(yaml.safe_dump(_schema.plain(default), default_flow_style=True, width=10_000)).split("\n")[0]

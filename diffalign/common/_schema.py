"""Keys and sections: what a signature or a dataclass declares, and the OmegaConf schema made of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from diffalign.common import _values, plugins
from diffalign.common.errors import UserError, unknown


@dataclass(frozen=True)
class One:
    """Marks an argument that is one plug-in of a kind: `Annotated[Any, One("objectives")]`."""

    kind: str


@dataclass(frozen=True)
class Many:
    """Marks an argument that is several plug-ins of a kind: `Annotated[dict[str, Any], Many("scorers")]`."""

    kind: str


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: of the argument or field.
        annotation: its declared type.
        default: MISSING where the key is required.
        note: what it means, from the docstring.
        plugin: its mark, for plug-in arguments.
        section: the keys below it; for plug-ins known only after the first pass.
    """

    name: str
    annotation: Any
    default: Any
    note: str = ""
    plugin: One | Many | None = None
    section: Section | None = None

    @property
    def optional(self) -> bool:
        """Whether null is allowed."""
        return self.default is None or _values.unwrap(self.annotation)[1]


@dataclass(frozen=True)
class Section:
    """The keys of a stage, of a plug-in or of a plain dataclass.

    Attributes:
        title: what error messages call it ("train", "objective mapo").
        keys: name -> key, in order of declaration.
        build: the dataclass that the values make, None for a stage and for several plug-ins.
        kind: of the plug-in that `build` is; None: it is none.
    """

    title: str
    keys: Mapping[str, Key]
    build: type | None = None
    kind: str | None = None

    @functools.cached_property
    def schema(self) -> type:
        """The dataclass that OmegaConf makes a structured config of (one class, made once)."""
        return _schema_class(self)

    def refuse(self, name: str) -> UserError | None:
        """Returns the error for a key that is none of these, with the plug-ins that have it; else None."""
        if name in self.keys:
            return None
        others = plugins.with_key(self.kind, name) if self.kind is not None else []
        if not others:
            return unknown(f"key of {self.title}", name, self.keys)
        return UserError(
            f"unknown key of {self.title} '{name}': a key of {', '.join(others)} only; known: "
            f"{', '.join(sorted(self.keys))}"
        )

    @staticmethod
    def of_plugin(kind: str, name: str) -> Section:
        """Returns the section of the plug-in of this (resolved) name."""
        section = Section.of_class(f"{plugins.label(kind)} {name}", plugins.get(kind, name))
        return dataclasses.replace(section, kind=kind)

    @staticmethod
    def of_class(title: str, cls: type, defaults: Any = MISSING) -> Section:
        """Returns the section of a dataclass: its init fields, defaults taken from an instance if given."""
        hints = typing.get_type_hints(cls, include_extras=True)
        notes = docstring_notes(cls)
        keys = {}
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            default = field.default
            if dataclasses.is_dataclass(defaults):
                default = getattr(defaults, field.name)
            elif field.default_factory is not MISSING:
                default = field.default_factory()
            keys[field.name] = _key(field.name, hints[field.name], default, notes.get(field.name, ""))
        return Section(title, keys, cls)


def keys_of(function: Callable[..., Any]) -> dict[str, Key]:
    """Returns the keys of a stage, in order of its signature.

    Raises:
        TypeError: an argument is not keyword-only or not annotated (a mistake of the stage's author).
    """
    hints = typing.get_type_hints(function, include_extras=True)
    notes = docstring_notes(function)
    keys = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name not in hints:
            raise TypeError(f"{function.__name__}: argument '{name}' must be keyword-only and annotated")
        default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        keys[name] = _key(name, hints[name], default, notes.get(name, ""))
    return keys


def _key(name: str, annotation: Any, default: Any, note: str) -> Key:
    inner, _, metadata = _values.unwrap(annotation)
    mark = next((m for m in metadata if isinstance(m, One | Many)), None)
    section = None
    if mark is None and isinstance(inner, type) and dataclasses.is_dataclass(inner):
        section = Section.of_class(name, inner, default)
    return Key(name, annotation, default, note, mark, section)


def _schema_class(section: Section) -> type:
    """Returns the schema of a section.

    Several plug-ins are an open mapping at first; `load_recipe` puts their schemas in, since their labels
    need not be Python names.
    """
    fields: list[tuple[str, Any, Any]] = []
    for key in section.keys.values():
        if isinstance(key.plugin, Many) or (key.plugin is not None and key.section is None):
            fields.append((key.name, Any, None))
        elif key.section is not None:
            inner = key.section.schema
            starts_none = key.plugin is None and key.default is None
            annotation = inner | None if key.optional and key.plugin is None else inner
            default: Any = None if starts_none else dataclasses.field(default_factory=inner)
            fields.append((key.name, annotation, default))
        else:
            fields.append((key.name, *_leaf(key)))
    return dataclasses.make_dataclass(re.sub(r"\W", "_", section.title), fields)


def _leaf(key: Key) -> tuple[Any, Any]:
    """Returns (annotation, default) of a key without keys below it."""
    annotation = _values.schema_type(key.annotation, lambda cls: Section.of_class(key.name, cls).schema)
    if key.default is MISSING:
        return annotation, "???"
    if key.default is None and annotation is not Any:
        annotation = annotation | None
    default = map_texts(plain(key.default), _values.escape)
    if isinstance(default, list | dict):
        return annotation, dataclasses.field(default_factory=lambda: default.copy())
    return annotation, default


def plain(value: Any) -> Any:
    """Returns a value in YAML's own types: dataclasses become mappings, paths texts, tuples lists."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def plain_fields(instance: Any) -> dict[str, Any]:
    """Returns the init fields of a dataclass instance in plain types."""
    return {f.name: plain(getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.init}


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a plain value with every text (keys excepted) changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list) else value


def docstring_notes(owner: Any) -> dict[str, str]:
    """Returns name -> description out of the `Args:` and `Attributes:` of a docstring, bases first."""
    owners = reversed(owner.__mro__) if isinstance(owner, type) else [owner]
    notes: dict[str, str] = {}
    for each in owners:
        text = inspect.cleandoc(getattr(each, "__doc__", None) or "")
        inside = False
        name = ""
        for line in text.splitlines():
            if not line.startswith(" "):
                inside = line.strip() in ("Args:", "Attributes:") or (inside and not line.strip())
                name = ""
                continue
            entry = re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)
            if inside and entry:
                name = entry[1]
                notes[name] = entry[2].strip()
            elif inside and name and line.startswith("      "):
                notes[name] += " " + line.strip()
    return notes

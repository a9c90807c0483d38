"""First pass over a recipe: which plug-ins it names, and which values come with the naming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffalign.common import _values, plugins
from diffalign.common._schema import Key, Many, One, Section
from diffalign.common.errors import UserError, unknown

_NULL_TAG = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Source:
    """Where a YAML node was written: a file, or a word of the command line.

    Attributes:
        name: the file's path or the word.
        is_file: in a word `${` means these two characters, in a file it begins an interpolation.
    """

    name: str
    is_file: bool

    def at(self, node: yaml.Node) -> str:
        """Returns file:line, or the word."""
        return f"{self.name}:{node.start_mark.line + 1}" if self.is_file else self.name

    def items(
        self,
        node: yaml.MappingNode,
        refuse: Callable[[str], UserError | None] = lambda key: None,
    ) -> dict[str, yaml.Node]:
        """Returns key -> node of a mapping.

        Args:
            node: the mapping.
            refuse: gives the error for a key, None where it is welcome.

        Raises:
            UserError: a key stands there twice or is refused.
        """
        try:
            pairs = _values.mapping_items(node)
        except _values.BadValue as error:
            raise UserError(f"{self.at(error.node or node)}: {error}") from error
        for key, _ in pairs:
            refusal = refuse(key.value)
            if refusal is not None:
                raise UserError(f"{self.at(key)}: {refusal}")
        return {key.value: value for key, value in pairs}


@dataclass(frozen=True)
class Word:
    """One `key=value` word of the command line."""

    path: tuple[str, ...]
    text: str

    @property
    def source(self) -> Source:
        """The word as a source of nodes."""
        return Source(f"{'.'.join(self.path)}={self.text}", is_file=False)


@dataclass
class Choice:
    """The plug-ins chosen for one argument.

    Attributes:
        chosen: label -> plug-in name (One: the label is ''); None: no plug-in.
        values: (label, what was given along with the choice) in order of growing strength: a mapping from
            the signature's default, or a YAML node with its source.
    """

    chosen: dict[str, str] | None
    values: list[tuple[str, Mapping[str, Any] | tuple[yaml.MappingNode, Source]]] = field(
        default_factory=list
    )


def parse_word(text: str, keys: Mapping[str, Key], verb: str) -> Word:
    """Returns the parsed word; raises UserError when it is no `key=value` or the key is unknown."""
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals:
        raise UserError(
            f"'{text}' is not of the form key=value: put quotes around a value with blanks, and see "
            f"diffalign {verb} --help"
        )
    if path[0] not in keys:
        inside = [key.name for key in keys.values() if key.section and path[0] in key.section.keys]
        if inside:
            raise UserError(f"unknown key of {verb} '{path[0]}': did you mean '{inside[0]}.{path[0]}'?")
        raise unknown(f"key of {verb}", path[0], keys)
    return Word(path, value)


def read_file(config_file: str | Path, keys: Mapping[str, Key], verb: str) -> dict[str, yaml.Node]:
    """Returns key -> node of a YAML recipe; raises UserError naming file:line."""
    try:
        node = _values.compose(Path(config_file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {config_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {config_file} is not UTF-8 text: give a YAML recipe") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{config_file}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{config_file}:1: not valid YAML: {error}") from error
    if node is None:
        return {}
    source = Source(str(config_file), is_file=True)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{source.at(node)}: a recipe is a mapping, lines of key: value")
    return source.items(node, lambda key: None if key in keys else unknown(f"key of {verb}", key, keys))


def expand(
    verb: str,
    keys: Mapping[str, Key],
    nodes: Mapping[str, yaml.Node],
    words: Sequence[Word],
    file: Source,
) -> tuple[Section, dict[str, Choice]]:
    """Returns the recipe's section with the chosen plug-ins in their places, and the choices."""
    expanded: dict[str, Key] = {}
    choices: dict[str, Choice] = {}
    for name, key in keys.items():
        expanded[name] = key
        if key.plugin is None:
            continue
        choice = _choose(key, nodes.get(name), [w for w in words if w.path[0] == name], file)
        if choice is None:
            raise UserError(f"{verb} needs {name}=NAME: one of {_names(key)} (see diffalign {verb} --help)")
        choices[name] = choice
        expanded[name] = dataclasses.replace(key, section=_section_of(key, choice))
    return Section(verb, expanded), choices


def label_of(key: Key, text: str) -> str:
    """Returns the canonical name where the text names a plug-in (or an alias), else the text as a label."""
    assert key.plugin is not None
    try:
        return plugins.resolve(key.plugin.kind, text)
    except UserError:
        return text


def _section_of(key: Key, choice: Choice) -> Section | None:
    """Returns the section that the chosen plug-ins make, None for no plug-in."""
    if choice.chosen is None or key.plugin is None:
        return None
    kind = key.plugin.kind
    parts = {}
    for label, name in choice.chosen.items():
        resolved = plugins.resolve(kind, name)
        parts[label] = Section.of_plugin(kind, resolved)
    if isinstance(key.plugin, One):
        return parts[""]
    return Section(key.name, {label: Key(label, p.build, MISSING, section=p) for label, p in parts.items()})


def _choose(key: Key, node: yaml.Node | None, words: Sequence[Word], file: Source) -> Choice | None:
    """Returns what the default, then the file, then the words choose; None when nothing does."""
    many = isinstance(key.plugin, Many)
    choice = _of_default(key) if key.default is not MISSING else None
    if node is not None:
        choice = _of_node(key, node, file, None if many else choice)
    for word in words:
        if len(word.path) == 1:
            choice = _of_word(key, word)
    for word in words:
        if many and len(word.path) > 1:
            choice = choice or Choice({})
            choice.chosen = choice.chosen or {}
            label = label_of(key, word.path[1])
            choice.chosen.setdefault(label, label)
            if word.path[2:] == ("name",):
                choice.chosen[label] = word.text
        elif not many and word.path[1:] == ("name",):
            current = choice.chosen[""] if choice and choice.chosen else None
            choice = choice if choice and current == word.text else Choice({"": word.text})
    return choice


def _of_default(key: Key) -> Choice:
    """Returns the choice of a signature's default: None, a name, a list of names or a mapping."""
    value = key.default
    if value is None:
        return Choice(None)
    if isinstance(key.plugin, One):
        entries: dict[str, Any] = {"": {"name": value} if isinstance(value, str) else value}
    elif isinstance(value, Mapping):
        entries = dict(value)
    else:
        entries = {name: {} for name in ([value] if isinstance(value, str) else value)}
    chosen: dict[str, str] = {}
    choice = Choice(chosen)
    for label, entry in entries.items():
        values = dict(entry or {})
        chosen[label] = values.pop("name", label)
        choice.values.append((label, values))
    return choice


def _of_word(key: Key, word: Word) -> Choice:
    text = word.text.strip()
    if text == "null" and key.optional:
        return Choice(None)
    if not text or text == "null":
        raise UserError(f"{word.source.name}: {key.name} is needed, name one of {_names(key)}")
    if text[0] in ("{", "["):
        try:
            node = _values.compose(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"{word.source.name}: not valid YAML: write [name, name] or {{name: {{key: value}}}}"
            ) from error
        assert node is not None
        return _of_node(key, node, word.source, None)
    if isinstance(key.plugin, One):
        return Choice({"": text})
    return Choice({label_of(key, text): text})


def _of_node(key: Key, node: yaml.Node, source: Source, base: Choice | None) -> Choice:
    """Returns the choice that a YAML node makes; for One a mapping without name keeps that of `base`."""
    where = f"{source.at(node)}: {key.name}"
    one = isinstance(key.plugin, One)
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL_TAG and key.optional:
            return Choice(None)
        if node.tag == _NULL_TAG:
            raise UserError(f"{where} is null but needed: name one of {_names(key)}")
        return Choice({"" if one else label_of(key, node.value): node.value})
    if isinstance(node, yaml.SequenceNode):
        if one or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            shape = "one name" if one else "a list of names, or a mapping of names"
            raise UserError(f"{where}: expected {shape}, from {_names(key)}")
        return Choice({label_of(key, item.value): item.value for item in node.value})
    assert isinstance(node, yaml.MappingNode)
    if not one:
        return _of_mapping(key, node, source)
    default = base.chosen[""] if base is not None and base.chosen else None
    name = _name_in(source.items(node)) or default
    if name is None:
        raise UserError(f"{where} needs a name: one of {_names(key)}")
    kept = base.values if base is not None and name == default else []
    return Choice({"": name}, [*kept, ("", (node, source))])


def _of_mapping(key: Key, node: yaml.MappingNode, source: Source) -> Choice:
    """Returns the choice of several plug-ins written as label -> keys."""
    chosen: dict[str, str] = {}
    choice = Choice(chosen)
    for written, entry in source.items(node).items():
        label = label_of(key, written)
        chosen[label] = label
        if isinstance(entry, yaml.MappingNode):
            chosen[label] = _name_in(source.items(entry)) or label
            choice.values.append((label, (entry, source)))
        elif not (isinstance(entry, yaml.ScalarNode) and entry.tag == _NULL_TAG):
            raise UserError(f"{source.at(entry)}: {key.name}.{written}: expected a mapping of its keys")
    return choice


def _name_in(items: Mapping[str, yaml.Node]) -> str | None:
    node = items.get("name")
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _names(key: Key) -> str:
    assert key.plugin is not None
    return ", ".join(plugins.names(key.plugin.kind)) or "none (no plug-in is there)"

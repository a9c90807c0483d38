"""A stage's signature is its recipe: reads recipes from YAML and `key=value` words and checks them.

Two passes. First the plug-in names are read from the signature's defaults, the file and the words; then the
named `Plugin` dataclasses take their place in an OmegaConf structured schema made of the signature, the
values are read by their declared types and put in, and the arguments of the stage come out.

A stage is a function with keyword-only, fully annotated arguments; arguments without default are required.
Annotations are evaluated at run time, so their names must exist in the stage's module (not only under
TYPE_CHECKING). The `Args:` of its docstring are what `--help` says about the keys.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffalign.common import _schema, _values, plugins
from diffalign.common._choices import Choice, Source, Word, expand, label_of, parse_word, read_file
from diffalign.common._schema import Key, Many, One, Section
from diffalign.common.errors import UserError, brief, unknown

__all__ = [
    "Many",
    "One",
    "Recipe",
    "filled_recipe",
    "load_recipe",
    "make_many",
    "make_one",
    "plain_plugin",
    "resolved_recipe",
]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        verb: the name of the stage's function.
        arguments: call the stage with `function(**arguments)`.
        resolved: every key with its value, in plain types: for manifests and `--dry-run`.
    """

    verb: str
    arguments: dict[str, Any]
    resolved: dict[str, Any]

    def as_yaml(self) -> str:
        """Returns the resolved recipe as YAML that `--config` reads back to the same recipe."""
        escaped = _schema.map_texts(self.resolved, _values.escape)
        return str(yaml.safe_dump(escaped, sort_keys=False, allow_unicode=True, width=110))


def load_recipe(
    function: Callable[..., Any], config_file: str | Path | None, overrides: Sequence[str]
) -> Recipe:
    """Returns the checked recipe of a stage.

    Args:
        function: the stage.
        config_file: a YAML recipe, or None.
        overrides: words `key=value`, stronger than the file. `objective=mapo` replaces the whole section and
            `objective.beta=500` sets one key of it, in whatever order they stand.

    Raises:
        UserError: an unknown key or name, a value of another type, a required key missing, a broken file.
    """
    verb = function.__name__
    keys = _schema.keys_of(function)
    words = [parse_word(text, keys, verb) for text in overrides]
    nodes = read_file(config_file, keys, verb) if config_file is not None else {}
    file = Source(str(config_file), is_file=True)
    root, choices = expand(verb, keys, nodes, words, file)
    tree = OmegaConf.structured(root.schema)
    try:
        _fill_choices(tree, root, choices)
        for name, node in nodes.items():
            if root.keys[name].plugin is None:
                _put_node(tree, root, root.keys[name], (name,), node, file)
        for word in words:
            _put_word(tree, root, word)
        _refuse_missing(tree, root, choices)
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{config_file or verb}: {brief(error)}") from error
    arguments = {name: _build(key, plain[name]) for name, key in root.keys.items()}
    return Recipe(verb, arguments, resolved_recipe(function, arguments))


def resolved_recipe(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a stage as its plain recipe; a stage may call it first, with `locals()`.

    Args:
        function: the stage; only its own arguments are taken.
        arguments: the arguments' values; plug-ins as instances, names or mappings.
    """
    resolved: dict[str, Any] = {}
    for key in _schema.keys_of(function).values():
        if key.name not in arguments:
            continue
        value = arguments[key.name]
        if isinstance(key.plugin, One) and value is not None:
            made = make_one(key.plugin.kind, value)
            value = plain_plugin(made)
        elif isinstance(key.plugin, Many) and value is not None:
            value = {label: _entry(label, made) for label, made in make_many(key.plugin.kind, value).items()}
        resolved[key.name] = _schema.plain(value)
    return resolved


def filled_recipe(function: Callable[..., Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plain recipe, or a part of one, of an earlier version with today's defaults for new keys.

    That is of keys of the stage, of plain sections, and of plug-ins that the recipe names and that are here.
    """
    return _filled(_schema.keys_of(function), recipe)


def _filled(keys: Mapping[str, Key], recipe: Mapping[str, Any]) -> dict[str, Any]:
    new = {name: _schema.plain(key.default) for name, key in keys.items() if key.default is not MISSING}
    found = {**new, **recipe}
    for name in keys.keys() & recipe.keys():
        key, value = keys[name], recipe[name]
        if not isinstance(value, Mapping):
            continue
        if key.section is not None:
            found[name] = _filled(key.section.keys, value)
        elif isinstance(key.plugin, One):
            found[name] = _filled_plugin(key.plugin.kind, value.get("name"), value)
        elif isinstance(key.plugin, Many):
            found[name] = {
                label: _filled_plugin(key.plugin.kind, entry.get("name", label), entry)
                for label, entry in value.items()
            }
    return found


def _filled_plugin(kind: str, name: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    if name not in plugins.names(kind):
        return dict(value)
    return _filled(Section.of_plugin(kind, name).keys, value)


def plain_plugin(made: Any) -> dict[str, Any]:
    """Returns the name and options of a plug-in instance in plain types."""
    return {"name": plugins.plugin_name(made), **_schema.plain_fields(made)}


def make_one(kind: str, value: Any) -> Any:
    """Returns a plug-in instance for a name, a mapping `{name: X, **keys}` or an instance (kept as it is).

    A stage that is called from Python gets its signature's default, a name; this makes it a plug-in.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    given = {str(key): item for key, item in value.items()}
    if "name" not in given:
        raise UserError(f"the {plugins.label(kind)} needs a name: one of {', '.join(plugins.names(kind))}")
    name = plugins.resolve(kind, given.pop("name"))
    section = Section.of_plugin(kind, name)
    for key in given:
        refusal = section.refuse(key)
        if refusal is not None:
            raise refusal
    missing = [k.name for k in section.keys.values() if k.default is MISSING and k.name not in given]
    if missing:
        raise UserError(f"{section.title} needs {', '.join(missing)}")
    return _construct(section, given, section.title)


def make_many(kind: str, value: Any) -> dict[str, Any]:
    """Returns label -> plug-in instance for a name, a list of names, or a mapping label -> keys."""
    if isinstance(value, str):
        value = [value]
    entries = dict(value) if isinstance(value, Mapping) else {str(name): {} for name in value}
    if len(entries) < len(value):
        raise UserError(f"the {plugins.label(kind)} list names one twice: {', '.join(map(str, value))}")
    made = {}
    for label, entry in entries.items():
        keys_given = isinstance(entry, Mapping) or entry is None
        made[str(label)] = make_one(kind, {"name": label, **(entry or {})} if keys_given else entry)
    return made


def _entry(label: str, made: Any) -> dict[str, Any]:
    name = plugins.plugin_name(made)
    return {**({} if label == name else {"name": name}), **_schema.plain_fields(made)}


def _fill_choices(tree: DictConfig, root: Section, choices: Mapping[str, Choice]) -> None:
    """Puts the plug-ins' schemas (where there are several) and the values that came with the choices."""
    for name, choice in choices.items():
        section = root.keys[name].section
        if section is None:
            continue
        many = isinstance(root.keys[name].plugin, Many)
        if many:
            parts = {label: key.section for label, key in section.keys.items()}
            tree[name] = {label: OmegaConf.structured(p.schema) for label, p in parts.items() if p}
        for label, values in choice.values:
            part = section.keys[label].section if many else section
            path = (name, label) if many else (name,)
            assert part is not None
            if isinstance(values, tuple):
                _put_section(tree, root, path, *values, skip="name")
                continue
            for key_name, value in values.items():
                if key_name not in part.keys:
                    raise unknown(f"key of {part.title}", key_name, part.keys)
                plain = _schema.map_texts(_schema.plain(value), _values.escape)
                _put(tree, root, (*path, key_name), plain)


def _section_node(tree: DictConfig, root: Section, path: tuple[str, ...]) -> Any:
    """Returns the node at `path`; sections on the way that are null come to life with their defaults."""
    node: Any = tree
    section: Section | None = root
    for part in path:
        section = section.keys[part].section if section is not None else None
        if node[part] is None:
            node[part] = section.schema if section is not None else {}
        node = node[part]
    return node


def _put(tree: DictConfig, root: Section, path: tuple[str, ...], value: Any) -> None:
    """Sets one key."""
    node = _section_node(tree, root, path[:-1])
    if isinstance(node, DictConfig) and path[-1] not in node:
        node[path[-1]] = value  # a new key of an open mapping
    else:
        OmegaConf.update(node, path[-1], value, merge=False)


def _put_section(
    tree: DictConfig,
    root: Section,
    path: tuple[str, ...],
    node: yaml.MappingNode,
    source: Source,
    *,
    skip: str = "",
) -> None:
    """Sets the keys that a YAML mapping gives to the section at `path`."""
    section = root
    for part in path:
        inner = section.keys[part].section
        assert inner is not None
        section = inner
    if not node.value:
        _section_node(tree, root, path)
    for name, value in source.items(node, lambda key: None if key == skip else section.refuse(key)).items():
        if name != skip:
            _put_node(tree, root, section.keys[name], (*path, name), value, source)


def _put_node(
    tree: DictConfig, root: Section, key: Key, path: tuple[str, ...], node: yaml.Node, source: Source
) -> None:
    if key.section is not None and isinstance(node, yaml.MappingNode):
        _put_section(tree, root, path, node, source)
        return
    try:
        value = _values.from_node(key.annotation, node, literal=not source.is_file)
    except _values.BadValue as error:
        where = f"{source.at(node)}: {'.'.join(path)}" if source.is_file else source.name
        raise UserError(f"{where}: {error}") from error
    _put(tree, root, path, value)


def _put_word(tree: DictConfig, root: Section, word: Word) -> None:
    """Sets the key that one word of the command line names."""
    key = root.keys[word.path[0]]
    rest = word.path[1:]
    if key.plugin is not None:
        if not rest or rest[-1:] == ("name",):
            return  # the first pass has read it
        if key.section is None:
            raise UserError(f"{word.source.name}: {key.name} is null: name it first, {key.name}=NAME")
        if isinstance(key.plugin, Many):
            rest = (label_of(key, rest[0]), *rest[1:])
    path: tuple[str, ...] = (key.name,)
    while rest and key.section is not None:
        refusal = key.section.refuse(rest[0])
        if refusal is not None:
            raise refusal
        key, path, rest = key.section.keys[rest[0]], (*path, rest[0]), rest[1:]
    annotation = key.annotation
    inner = _values.unwrap(annotation)[0]
    if rest and (inner is dict or typing.get_origin(inner) is dict):  # a key of an open mapping
        path = (*path, ".".join(rest))
        annotation = (typing.get_args(inner) or (str, Any))[1]
    elif rest:
        raise UserError(
            f"{word.source.name}: {'.'.join(path)} has no keys below it: set {'.'.join(path)}=..."
        )
    if key.section is not None and word.text.lstrip().startswith("{"):
        node = _compose_word(word)
        if isinstance(node, yaml.MappingNode):
            _put_section(tree, root, path, node, word.source)
            return
    try:
        _put(tree, root, path, _values.from_text(annotation, word.text))
    except _values.BadValue as error:
        raise UserError(f"{word.source.name}: {error}") from error


def _compose_word(word: Word) -> yaml.Node | None:
    try:
        return _values.compose(word.text)
    except yaml.YAMLError as error:
        raise UserError(f"{word.source.name}: not valid YAML: write {{key: value}}") from error


def _refuse_missing(tree: DictConfig, root: Section, choices: Mapping[str, Choice]) -> None:
    """Raises UserError naming the required keys without a value; an empty text is none."""
    missing = OmegaConf.missing_keys(tree)
    for name, key in root.keys.items():
        if key.default is MISSING and key.plugin is None and name not in missing and tree[name] == "":
            missing.add(name)
    if missing:
        places = {"out": "FOLDER", "path": "PATH"}
        wanted = [f"{key}={places.get(key.rsplit('.', 1)[-1], '...')}" for key in sorted(missing)]
        inside = sorted({key.split(".")[0] for key in missing} & choices.keys())
        named = "".join(f" {name}={_names_in(choices[name])}" for name in inside)
        raise UserError(f"{root.title} needs {' '.join(wanted)} (see diffalign {root.title}{named} --help)")


def _names_in(choice: Choice) -> str:
    """Returns the plug-ins of a choice as the command line takes them."""
    names = list(dict.fromkeys((choice.chosen or {}).values()))
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _build(key: Key, value: Any) -> Any:
    """Returns the argument that a resolved plain value makes."""
    if key.plugin is None:
        try:
            return _values.check(key.annotation if value is not None or not key.optional else Any, value)
        except UserError:
            raise
        except ValueError as error:  # a wrong value, or refused by a section's __post_init__
            raise UserError(f"{key.name}: {error}") from error
    if value is None or key.section is None:
        return None
    if isinstance(key.plugin, One):
        return _construct(key.section, value, key.name)
    parts = {label: inner.section for label, inner in key.section.keys.items()}
    return {label: _construct(p, value[label], f"{key.name}.{label}") for label, p in parts.items() if p}


def _construct(section: Section, given: Mapping[str, Any], where: str) -> Any:
    """Returns the dataclass instance; ValueErrors of its own checks become one-line errors."""
    assert section.build is not None
    values = {}
    for name, value in given.items():
        try:
            values[name] = _values.check(section.keys[name].annotation, value)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{where}.{name}: {error}") from error
    try:
        return section.build(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error

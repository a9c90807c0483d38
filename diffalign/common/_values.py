"""Turns what a person typed, or wrote into a YAML file, into values of a declared type.

Texts are read by the type that is expected of them, never by how they look: for a text field `off`, `0123`
and `a: b` are those very characters. A text from the command line is YAML only where a list or a mapping is
expected.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from omegaconf import OmegaConf

from diffalign.common.errors import nearest

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_PRIMITIVES = (bool, int, float, str)
_NULL_TAG = "tag:yaml.org,2002:null"


class BadValue(ValueError):
    """A value that does not fit its type; the message says what was expected and what was found.

    Attributes:
        node: the YAML node at fault, where there is one.
    """

    def __init__(self, message: str, node: yaml.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


def expected(what: str, found: object) -> BadValue:
    """Returns the error for a value that is not `what`."""
    text = found if isinstance(found, str) else repr(found)
    return BadValue(f"expected {what}, found '{text if len(text) <= 60 else text[:57] + '...'}'")


def unwrap(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """Returns (type without None and Annotated, whether None is allowed, the metadata of Annotated)."""
    if typing.get_origin(annotation) is Annotated:
        inner, optional, deeper = unwrap(typing.get_args(annotation)[0])
        return inner, optional, (*typing.get_args(annotation)[1:], *deeper)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        kept = tuple(member for member in members if member is not type(None))
        if len(kept) == 1:
            inner, optional, metadata = unwrap(kept[0])
            return inner, optional or len(kept) < len(members), metadata
        return Union[kept], len(kept) < len(members), ()  # noqa: UP007 (made at run time)
    return annotation, False, ()


def type_label(annotation: Any) -> str:
    """Returns the type as a person reads it in `--help`: text, int, true|false, eps|x0, [int, ...]."""
    inner, _, _ = unwrap(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments if choice is not None)
    if origin is Union:
        return " or ".join(type_label(member) for member in arguments)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return f"[{', '.join(type_label(member) for member in arguments)}]"
    if (origin or inner) in (list, tuple):
        return f"[{type_label(arguments[0]) if arguments else 'any'}, ...]"
    if (origin or inner) is dict:
        return f"{{text: {type_label(arguments[1]) if arguments else 'any'}}}"
    names = {str: "text", bool: "true|false", Path: "path", Any: "any", object: "any"}
    return names.get(
        inner, "section" if dataclasses.is_dataclass(inner) else getattr(inner, "__name__", "any")
    )


def escape(text: str) -> str:
    """Returns the text so that OmegaConf reads it back as it is: `${` does not begin an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def from_text(annotation: Any, text: str) -> Any:
    """Returns the plain value (escaped for OmegaConf) of a text typed on the command line.

    Raises:
        BadValue: it does not fit the type.
    """
    inner, optional, _ = unwrap(annotation)
    if optional and text == "null":
        return None
    if _is_container(inner) or (_takes_container(inner) and text.lstrip()[:1] in ("[", "{")):
        try:
            node = compose(text)
            if node is not None and not isinstance(node, yaml.ScalarNode):
                return from_node(annotation, node, literal=True)
        except (yaml.YAMLError, BadValue) as error:
            if isinstance(error, BadValue) and not _takes_text(inner):
                raise
            if not _takes_text(inner):  # "[masterpiece] a cat" is a prompt, not a broken list
                raise expected(f"{_spoken(annotation)} (in YAML's notation)", text) from error
    if _base(inner) in (list, tuple):  # one item without brackets is a list of one
        return [from_text(_item_type(inner, 0), text)] if text else []
    return _scalar(inner, text, literal=True)


def from_node(annotation: Any, node: yaml.Node, *, literal: bool = False) -> Any:
    """Returns the plain value of a YAML node.

    Args:
        annotation: the expected type.
        node: of a composed document, so that the characters as written are still known.
        literal: `${` means these two characters; False (a recipe file): it begins an interpolation.

    Raises:
        BadValue: it does not fit the type.
    """
    inner, optional, _ = unwrap(annotation)
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL_TAG:
            if optional or inner in (Any, object):
                return None
            raise expected(_spoken(annotation), "null")
        if not literal and "${" in node.value:
            return node.value  # checked once it is resolved
        if inner in (Any, object):
            return _untyped(node, literal)
        if _base(inner) in (list, tuple):  # one item without brackets is a list of one
            return [from_node(_item_type(inner, 0), node, literal=literal)]
        return _scalar(inner, node.value, literal=literal)
    for member in typing.get_args(inner) if typing.get_origin(inner) is Union else (inner,):
        base = _base(member)
        if isinstance(node, yaml.SequenceNode) and base in (list, tuple):
            return [from_node(_item_type(member, i), n, literal=literal) for i, n in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and base is dict:
            value_type = (typing.get_args(member) or (str, Any))[1]
            return {k.value: from_node(value_type, n, literal=literal) for k, n in mapping_items(node)}
        if base in (Any, object) or (isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(base)):
            return _untyped(node, literal)
    raise expected(_spoken(annotation), "a list" if isinstance(node, yaml.SequenceNode) else "a mapping")


def check(annotation: Any, value: Any) -> Any:
    """Returns a plain value (resolved by OmegaConf, or a default) as the Python type that is annotated.

    Raises:
        BadValue: it does not fit the type.
    """
    inner, optional, _ = unwrap(annotation)
    if value is None:
        if optional or inner in (Any, object):
            return None
        raise expected(_spoken(annotation), "null")
    if typing.get_origin(inner) is Union:
        return _check_union(annotation, inner, value)
    base = _base(inner)
    if inner in (Any, object):
        return value
    if base in (list, tuple) and isinstance(value, list | tuple):
        items = [check(_item_type(inner, i), item) for i, item in enumerate(value)]
        arguments = typing.get_args(inner)
        if base is tuple and arguments and arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise expected(f"{len(arguments)} values", list(value))
        return items if base is list else tuple(items)
    if base is dict and isinstance(value, dict):
        value_type = (typing.get_args(inner) or (str, Any))[1]
        return {str(key): check(value_type, item) for key, item in value.items()}
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return _check_dataclass(base, value)
    if isinstance(value, str):
        return Path(value) if inner is Path else _scalar(inner, value, literal=False)
    if inner is Path and isinstance(value, Path):
        return value
    return _check_number(annotation, inner, value)


def schema_type(annotation: Any, section: Callable[[type], type]) -> Any:
    """Returns the annotation that OmegaConf supports for this type (Any where it has none).

    Args:
        annotation: a declared type.
        section: turns a dataclass into its schema class.
    """
    inner, optional, _ = unwrap(annotation)
    base, arguments = _base(inner), typing.get_args(inner)
    found: Any = Any
    if base in _PRIMITIVES:
        found = base
    elif base is Path:
        found = str
    elif base is Literal and len({type(choice) for choice in arguments} - {type(None)}) == 1:
        found = type(next(choice for choice in arguments if choice is not None))
    elif isinstance(base, type) and dataclasses.is_dataclass(base):
        found = section(base)
    elif base is list and arguments and unwrap(arguments[0])[0] in _PRIMITIVES:
        found = list[arguments[0]]  # type: ignore[valid-type]
    elif base is dict and arguments and unwrap(arguments[1])[0] in _PRIMITIVES:
        found = dict[str, arguments[1]]  # type: ignore[valid-type]
    return found | None if optional and found is not Any else found


def compose(text: str) -> yaml.Node | None:
    """Returns the node tree of one YAML document, merge keys expanded; None when it is empty."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _flatten(loader, node)
        return node
    finally:
        loader.dispose()


def mapping_items(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Returns the (key, value) nodes of a mapping.

    Raises:
        BadValue: a key is no text or stands there twice.
    """
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise BadValue("a key must be a plain word", key)
        if key.value in seen:
            raise BadValue(f"the key '{key.value}' stands there twice", key)
        seen.add(key.value)
    return list(node.value)


def _flatten(loader: yaml.SafeLoader, node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        for _, value in node.value:
            _flatten(loader, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _flatten(loader, item)


def _untyped(node: yaml.Node, literal: bool) -> Any:
    """Returns a node as YAML means it (OmegaConf's dialect: 1e-5 is a number)."""
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "value")
    wrapped = yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)])
    value = OmegaConf.to_container(OmegaConf.create(yaml.serialize(wrapped)), resolve=False)
    plain = typing.cast(dict[str, Any], value)["value"]
    return _escape_all(plain) if literal else plain


def _escape_all(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: _escape_all(item) for key, item in value.items()}
    return [_escape_all(item) for item in value] if isinstance(value, list) else value


def _base(inner: Any) -> Any:
    return typing.get_origin(inner) or inner


def _is_container(inner: Any) -> bool:
    base = _base(inner)
    return base in (list, tuple, dict) or dataclasses.is_dataclass(base)


def _takes_container(inner: Any) -> bool:
    if typing.get_origin(inner) is Union:
        return any(_takes_container(member) for member in typing.get_args(inner))
    return _is_container(inner) or inner in (Any, object)


def _takes_text(inner: Any) -> bool:
    if _base(inner) in (list, tuple):
        return _takes_text(_item_type(inner, 0))
    if typing.get_origin(inner) is Union:
        return any(_takes_text(member) for member in typing.get_args(inner))
    return inner in (str, Path, Any, object)


def _item_type(inner: Any, index: int) -> Any:
    arguments = typing.get_args(inner)
    if not arguments:
        return Any
    if typing.get_origin(inner) is tuple and arguments[-1] is not Ellipsis:
        return arguments[min(index, len(arguments) - 1)]
    return arguments[0]


def _scalar(inner: Any, text: str, *, literal: bool) -> Any:
    """Returns the text read as a scalar of the type."""
    if inner in (str, Path, Any, object):
        return escape(text) if literal else text
    if inner is bool:
        lowered = text.lower()
        if lowered in _TRUE | _FALSE:
            return lowered in _TRUE
        raise expected(_spoken(bool), text)
    if inner in (int, float):
        try:
            number: int | float = inner(text)
        except ValueError:
            raise expected(_spoken(inner), text) from None
        if isinstance(number, float) and math.isnan(number):
            raise expected(_spoken(float), text)
        return number
    origin = typing.get_origin(inner)
    if origin is Literal:
        return _choice(inner, text)
    if origin is Union:
        members = sorted(
            typing.get_args(inner), key=lambda m: m in (str, Path, Any, object)
        )  # text takes all
        for member in members:
            try:
                return _scalar(unwrap(member)[0], text, literal=literal)
            except BadValue:
                continue
    raise expected(_spoken(inner), text)


def _choice(inner: Any, value: Any) -> Any:
    choices = [choice for choice in typing.get_args(inner) if choice is not None]
    for choice in choices:
        if str(choice) == str(value):
            return choice
    match = nearest(str(value), [str(choice) for choice in choices])
    problem = expected(f"one of {', '.join(map(str, choices))}", value)
    raise BadValue(f"{problem}: did you mean '{match}'?") if match else problem


def _check_union(annotation: Any, inner: Any, value: Any) -> Any:
    members = typing.get_args(inner)
    exact = [member for member in members if _base(member) is type(value)]
    for member in (*exact, *members):
        try:
            return check(member, value)
        except BadValue:
            continue
    raise expected(_spoken(annotation), value)


def _check_number(annotation: Any, inner: Any, value: Any) -> Any:
    if typing.get_origin(inner) is Literal:
        return _choice(inner, value)
    if inner is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if inner is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if inner is bool and isinstance(value, bool):
        return value
    raise expected(_spoken(annotation), value)


def _check_dataclass(cls: type, value: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise expected("a mapping", value)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in value:
        if name not in fields:
            match = nearest(name, fields)
            raise BadValue(
                f"unknown key '{name}'"
                + (f": did you mean '{match}'?" if match else f", known: {sorted(fields)}")
            )
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if not has_default and name not in value:
            raise BadValue(f"the key '{name}' is needed")
    return cls(**{name: check(hints[name], item) for name, item in value.items()})


def _spoken(annotation: Any) -> str:
    """Returns the type as a noun of an error message."""
    inner, _, _ = unwrap(annotation)
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    if inner in nouns:
        return nouns[inner]
    if typing.get_origin(inner) is Union:
        return " or ".join(_spoken(member) for member in typing.get_args(inner))
    if _base(inner) in (list, tuple):
        return f"a list {type_label(inner)}"
    if _base(inner) is dict or dataclasses.is_dataclass(inner):
        return "a mapping {key: value}"
    return type_label(inner)

"""Finds plug-ins by their file name.

A kind is the package path below `diffalign` ("objectives", "models", "scorers", "data.sources"). A plug-in
is one module of that package whose name has no leading underscore and which exposes a dataclass `Plugin`.
Listing reads file names only and aliases are read from the source text, so that nothing heavy is imported
until a plug-in is asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import pkgutil
from pathlib import Path

from diffalign.common.errors import UserError, unknown

_LABELS = {"objectives": "objective", "models": "model", "scorers": "scorer", "data.sources": "data source"}


def label(kind: str) -> str:
    """Returns what a person calls one plug-in of this kind ("objective" for "objectives")."""
    return _LABELS.get(kind, kind.rsplit(".", 1)[-1])


def names(kind: str) -> list[str]:
    """Returns the sorted names of the plug-ins of a kind, found by file name, without importing them."""
    found = (module.name for module in pkgutil.iter_modules(_folders(kind)))
    return sorted(name for name in found if not name.startswith("_"))


def resolve(kind: str, name: str) -> str:
    """Returns the module name that `name` (a name or an alias, '-' standing for '_') stands for.

    Raises:
        UserError: no plug-in of the kind has this name or alias; the nearest match is named.
    """
    wanted = str(name).replace("-", "_")
    known = names(kind)
    if wanted in known:
        return wanted
    aliases = {alias: module for module in known for alias in _aliases(kind, module)}
    if wanted in aliases:
        return aliases[wanted]
    raise unknown(label(kind), name, [*known, *aliases])


def get(kind: str, name: str) -> type:
    """Returns the `Plugin` dataclass of the named plug-in (its module is imported now).

    Raises:
        UserError: the name is unknown, or a package that the plug-in needs is not installed.
    """
    module_name = resolve(kind, name)
    try:
        module = importlib.import_module(f"diffalign.{kind}.{module_name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("diffalign"):
            raise
        raise UserError(
            f"the {label(kind)} '{module_name}' needs the package '{error.name}', which is not installed: "
            f"python -m pip install {error.name}"
        ) from error
    plugin = getattr(module, "Plugin", None)
    if not (isinstance(plugin, type) and dataclasses.is_dataclass(plugin)):
        raise TypeError(f"{module.__name__} must expose a dataclass named Plugin")
    return plugin


def with_key(kind: str, key: str) -> list[str]:
    """Returns the plug-ins of a kind that have the key (their modules are imported now)."""
    found = []
    for name in names(kind):
        try:
            fields = dataclasses.fields(get(kind, name))
        except UserError:  # a package that it needs is not installed
            continue
        if any(field.init and field.name == key for field in fields):
            found.append(name)
    return found


def plugin_name(plugin: object) -> str:
    """Returns the name of a plug-in, given its `Plugin` class or one of its instances."""
    owner = plugin if isinstance(plugin, type) else type(plugin)
    return owner.__module__.rsplit(".", 1)[-1]


def _folders(kind: str) -> list[str]:
    """Returns the folders that hold the modules of a kind."""
    spec = importlib.util.find_spec(f"diffalign.{kind}")
    if spec is None or spec.submodule_search_locations is None:
        raise LookupError(f"diffalign.{kind} is not a package of plug-ins")
    return list(spec.submodule_search_locations)


def _aliases(kind: str, module_name: str) -> tuple[str, ...]:
    """Returns the module's `aliases`, read from its source text (a literal at the top level)."""
    for folder in _folders(kind):
        path = Path(folder) / f"{module_name}.py"
        if not path.is_file():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            value = _assigned(node, "aliases")
            if value is not None:
                return tuple(alias.replace("-", "_") for alias in ast.literal_eval(value))
    return ()


def _assigned(node: ast.stmt, name: str) -> ast.expr | None:
    """Returns the expression that a statement assigns to `name`, or None."""
    if isinstance(node, ast.AnnAssign):
        return node.value if isinstance(node.target, ast.Name) and node.target.id == name else None
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
        return node.value
    return None

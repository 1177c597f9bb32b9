"""Configs from the command line: clear answers to unknown keys, one way to build by name."""

import difflib
import importlib
import inspect
import json
import keyword
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


class UserError(Exception):
    """Bad input from the user: printed as one sentence, exit code 2, no traceback."""

    code = 2


class StorageError(UserError):
    """A full disk or a file system that fails, which another start may mend: code 74 (EX_IOERR)."""

    code = 74


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a.b.c", value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """Return "Did you mean a, b?" for the known names closest to `name`, or all known."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = {k: k.rsplit(".", 1)[-1] for k in known}
    scores = {
        k: max(
            difflib.SequenceMatcher(None, name, k).ratio(),
            difflib.SequenceMatcher(None, leaf, by_leaf[k]).ratio(),
        )
        for k in known
    }
    close = [k for k in sorted(scores, key=scores.get, reverse=True) if scores[k] > 0.5][:count]
    if close:
        return f"Did you mean {', '.join(close)}?"
    return f"Known: {', '.join(sorted(known))}."


def check_overrides(argv: Sequence[str], config: ConfigDict, flag: str = "config") -> None:
    """Refuse `--config.a.b=...` for a key the config does not have, naming the nearest keys.

    ml_collections refuses it too, with a long traceback that ends in an AttributeError.

    Raises:
      UserError: for the first unknown key.
    """
    known = [path for path, _ in flatten(config)]
    sections = {path.rsplit(".", i)[0] for path in known for i in range(1, path.count(".") + 1)}
    for argument in argv:
        body = argument.lstrip("-")
        if not argument.startswith("-"):
            continue
        body = body.removeprefix("no") if body.startswith(f"no{flag}.") else body
        if not body.startswith(f"{flag}."):
            continue
        key = body.split("=", 1)[0].removeprefix(f"{flag}.")
        if key in sections:
            inside = [k.removeprefix(f"{key}.") for k in known if k.startswith(f"{key}.")]
            raise UserError(f"'{key}' is a section; set one of its keys: {', '.join(inside)}.")
        if key not in known:
            raise UserError(f"No setting '{key}' in this config. {nearest(key, known)}")


def as_key(argument: str) -> str:
    """Write a setting whose name is a word of Python so that ml_collections can read it.

    LGDEA's `--config.recipe.weights.global=0` becomes `--config.recipe.weights["global"]=0`; all
    others are returned as they are.
    """
    name, given, value = argument.partition("=")
    section, _, key = name.rpartition(".")
    return f'{section}["{key}"]{given}{value}' if section and keyword.iskeyword(key) else argument


def build(package: str, name: str, /, **fields: Any) -> Any:
    """Call `make(**fields)` of the module `name` inside `package`: how configs name components.

    Raises:
      UserError: if there is no such module, or `make` has no such parameter.
    """
    parent = importlib.import_module(package)
    names = [m.name for m in pkgutil.iter_modules(parent.__path__) if m.name != "base"]
    if name not in names:
        raise UserError(f"No '{name}' in {package}. {nearest(name, names)}")
    make = importlib.import_module(f"{package}.{name}").make
    parameters = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for field in fields:
        if field not in parameters and not open_ended:
            raise UserError(
                f"{package}.{name} takes no '{field}'. {nearest(field, list(parameters))}"
            )
    return make(**fields)


def to_json(config: Mapping[str, Any]) -> str:
    """Return the resolved config as indented JSON; tuples become lists."""
    return json.dumps(config, indent=2, sort_keys=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the leaves that differ between two resolved configs as "key: old -> new"."""
    a = {k: json.loads(json.dumps(v)) for k, v in flatten(old)}
    b = {k: json.loads(json.dumps(v)) for k, v in flatten(new)}
    missing = object()
    return [
        f"{k}: {a.get(k, '(absent)')!r} -> {b.get(k, '(absent)')!r}"
        for k in sorted({*a, *b})
        if a.get(k, missing) != b.get(k, missing)
    ]

"""YAML with line numbers, read into frozen dataclasses; every mistake of a file is told at once, each with its line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from students.errors import ConfigError
from students.settings import coerce, flatten

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Keys and list positions that lead to a value."""
WRONG = object()  # stands for a value that was noted as wrong
WORDS = ("title", "label", "claim", "source")
"""Fields that only people read: where one is missing, all else can still be checked."""


@dataclass(kw_only=True)
class Source:
    """A YAML file with the line of every value, and the mistakes found in it so far."""

    path: Path
    """The file."""
    tree: Any = None
    """Its content as plain values."""
    lines: dict[Place, int] = field(default_factory=dict)
    """Line of every key and list item, from 1."""
    problems: set[tuple[int, str]] = field(default_factory=set)
    """(line, what is wrong)."""

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest thing around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def wrong(self, line: int, text: str) -> None:
        """Note a mistake."""
        self.problems.add((line, text))

    def check(self) -> None:
        """Stop if there were mistakes.

        Raises:
            ConfigError: one line for each, in the order of the file.
        """
        if self.problems:
            raise ConfigError("\n".join(f"{self.path}:{line}: {text}" for line, text in sorted(self.problems)))


def load(path: Path) -> Source:
    """Read a YAML file.

    Raises:
        ConfigError: it is missing, no YAML, or no mapping.
    """
    source = Source(path=path)
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no experiment file {path}; see examples/micro_matrix.yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise _no_yaml(path, error) from None
    try:
        root = loader.get_single_node()
        source.tree = None if root is None else _plain(source, loader, root, ())
    except yaml.YAMLError as error:
        raise _no_yaml(path, error) from None
    except RecursionError:
        raise ConfigError(f"{path} holds an alias that contains itself; write the part out.") from None
    finally:
        loader.dispose()
    if not isinstance(source.tree, dict):
        raise ConfigError(f"{path} must hold `name: value` lines; see examples/micro_matrix.yaml.")
    return source


def _no_yaml(path: Path, error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return ConfigError(f"{path}:{mark.line + 1 if mark else 1}: this is not valid YAML: {what}.")


def _plain(source: Source, loader: yaml.SafeLoader, node: yaml.Node, place: Place) -> Any:
    source.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        own = [str(key.value) for key, _ in node.value]
        for i, (key_node, _) in enumerate(node.value):  # before merge keys bring in what may be given again
            if own[i] in own[:i]:
                source.wrong(key_node.start_mark.line + 1, f"{own[i]} is given twice; keep one.")
        loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            try:
                key = str(loader.construct_object(key_node, deep=True))
            except ValueError as error:
                key = str(key_node.value)
                source.wrong(key_node.start_mark.line + 1, f"the key {key} cannot be read ({error}); put it in quotes.")
            source.lines[(*place, key)] = key_node.start_mark.line + 1
            values[key] = _plain(source, loader, value_node, (*place, key))
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(source, loader, item, (*place, i)) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # a date that does not exist, say
        source.wrong(node.start_mark.line + 1, f"{_name(place)} cannot be read ({error}); put it in quotes.")
        return str(node.value)


def read(cls: type[T], source: Source, value: Any = None, place: Place = ()) -> T | None:
    """The dataclass that a part of the file describes, None where that is hopeless; mistakes go to the source.

    Unknown keys and wrong values of optional fields are left out after they are noted, so that what can be said of the
    rest is said in the same go.

    A field called ``line`` gets the line of the part. A tuple field also takes a single value. A field of type
    ``dict[str, Any]`` takes free settings, which are flattened to dotted names.

    Args:
        cls: frozen dataclass.
        source: the file.
        value: the part; by default all of it.
        place: where the part stands.
    """
    value = source.tree if not place else value
    line = source.line(place)
    if not isinstance(value, Mapping):
        text = "is empty; fill it or leave it out" if value is None else f"must hold `name: value` pairs, not {value!r}"
        source.wrong(line, f"{_name(place)} {text}.")
        return None
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.name != "line"}
    hints = get_type_hints(cls)
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}."
            source.wrong(source.line((*place, key)), f"unknown key {_name((*place, key))}; {hint}")
    parts: dict[str, Any] = {}
    hopeless = False
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name in value:
            part = _value(source, value[name], hints[name], (*place, name))
        else:
            part = WRONG
            if required:
                source.wrong(line, f"{_name((*place, name))} is missing.")
        if part is not WRONG:
            parts[name] = part
        elif required and name in WORDS:
            parts[name] = ""
        elif required:
            hopeless = True
    if hopeless:
        return None
    if "line" in hints:
        parts["line"] = line
    try:
        return cls(**parts)
    except ConfigError as error:
        source.wrong(line, str(error))
        return None


def _value(source: Source, value: Any, hint: Any, place: Place) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _value(source, value, hint, place)
    if dataclasses.is_dataclass(hint):
        part = read(cast(Any, hint), source, value, place)
        return WRONG if part is None else part
    if value is None and origin in (tuple, dict):
        source.wrong(source.line(place), f"{_name(place)} is empty; fill it or leave it out.")
        return WRONG
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        parts = [_value(source, item, arguments[0], (*place, i)) for i, item in enumerate(items)]
        return tuple(part for part in parts if part is not WRONG)
    if origin is dict:
        if not isinstance(value, Mapping):
            source.wrong(source.line(place), f"{_name(place)} must hold `name: value` pairs, not {value!r}.")
            return WRONG
        if arguments[1] is Any:
            flat = flatten(value)
            for name, setting in flat.items():
                if isinstance(setting, float) and not math.isfinite(setting):
                    source.wrong(source.line(place), f"{_name(place)}: {name} is {setting}; give a finite number.")
            if len(flat) < _leaves(value):
                source.wrong(source.line(place), f"{_name(place)} gives a setting twice, dotted and nested; keep one.")
            return flat
        found = {key: _value(source, item, arguments[1], (*place, key)) for key, item in value.items()}
        return {key: part for key, part in found.items() if part is not WRONG}
    try:
        return coerce(value, hint, _name(place), "")
    except ConfigError as error:
        source.wrong(source.line(place), str(error).removeprefix(": "))
        return WRONG


def _leaves(value: Any) -> int:
    """Settings in a nested mapping."""
    return sum(map(_leaves, value.values())) if isinstance(value, Mapping) else 1


def _name(place: Place) -> str:
    """A place as people write it.

    >>> _name(("cells", 0, "m"))
    'cells[0].m'
    """
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the file"

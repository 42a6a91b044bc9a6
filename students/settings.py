"""Settings read from layers (YAML files, environment, flags) into frozen dataclasses, strictly.

A layer is a flat dictionary ``{"optimiser.lr": 1e-4}`` with the name of where it came from; later layers win. A YAML
file may name a parent with ``base_config: other.yaml`` (a path relative to itself) and then states only what differs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from students.errors import ConfigError

T = TypeVar("T")
PARENT = "base_config"


class Layer(NamedTuple):
    """Settings of one origin."""

    source: str
    """File, environment or flags: named in every error about these settings."""
    values: dict[str, Any]
    """Dotted name to value."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of a nested mapping.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def yaml_layers(path: Path, _below: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a YAML file: its chain of parents first, itself last.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, or names itself as an ancestor.
    """
    path = Path(path)
    if path.resolve() in _below:
        raise ConfigError(f"{_below[0]}: {PARENT} leads back to {path}; break the circle.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        child = f" (named as {PARENT} in {_below[-1]})" if _below else ""
        raise ConfigError(f"there is no config file {path}{child}; see examples/ for presets.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or any(not isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must hold `name: value` lines, not {type(tree).__name__}.")
    parent = tree.pop(PARENT, None)
    above: list[Layer] = []
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: {PARENT} must be a path, not {parent!r}.")
        above = yaml_layers(path.parent / parent, (*_below, path.resolve()))
    return [*above, Layer(str(path), flatten(tree))]


def flag_layer(assignments: Iterable[str]) -> Layer:
    """The layer of ``--set name=value`` flags; values are read as YAML.

    Raises:
        ConfigError: an assignment is not of the form ``name=value``.

    >>> flag_layer(["student.h=3"]).values
    {'student.h': 3}
    """
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {text}: write --set name=value, for example --set student.h=2.")
        values[name.strip()] = _scalar(value, f"--set {text}")
    return Layer("--set", values)


def environment_layer(environ: Mapping[str, str], prefix: str) -> Layer:
    """The layer of environment variables ``<prefix>SECTION__NAME`` (two underscores part a section from its setting).

    >>> environment_layer({"TMD_EVAL_TRAIN__STUDENT__H": "3"}, "TMD_EVAL_TRAIN__").values
    {'student.h': 3}
    """
    values = {
        variable[len(prefix) :].lower().replace("__", "."): _scalar(value, variable)
        for variable, value in environ.items()
        if variable.startswith(prefix)
    }
    return Layer(f"environment ({prefix}*)", values)


def _scalar(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{source}: {text!r} is not a valid value.") from None


def merge(layers: Iterable[Layer]) -> dict[str, tuple[Any, str]]:
    """Dotted name to (value, source), the last layer winning."""
    return {name: (value, layer.source) for layer in layers for name, value in layer.values.items()}


def build(cls: type[T], settings: Mapping[str, tuple[Any, str]], sections: Mapping[str, type] | None = None) -> T:
    """The dataclass that the settings describe; what they leave out keeps its default.

    Args:
        cls: frozen dataclass; its dataclass fields are sections.
        settings: from :func:`merge`.
        sections: class of those sections whose class depends on another setting.

    Raises:
        ConfigError: a name is unknown (the message has the nearest one and the source), or a value has the wrong type.
    """
    known: set[str] = set()
    result = _build(cls, settings, sections or {}, "", known, None)
    for name, (_, source) in settings.items():
        if name not in known:
            raise ConfigError(_unknown(name, source, known))
    return result()


def _build(
    cls: type,
    settings: Mapping[str, tuple[Any, str]],
    sections: Mapping[str, type],
    prefix: str,
    known: set[str],
    default: Any,
) -> Callable[[], Any]:
    """A function that constructs, so that unknown names are told before a constructor complains about values."""
    hints = get_type_hints(cls)
    parts: dict[str, Callable[[], Any]] = {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, sections.get(prefix + field.name, hints[field.name])
        if dataclasses.is_dataclass(hint):
            inner = getattr(default, field.name) if default is not None else _default(field)
            parts[field.name] = _build(hint, settings, sections, name + ".", known, inner)  # type: ignore[arg-type]
            continue
        known.add(name)
        if name in settings:
            parts[field.name] = functools.partial(coerce, settings[name][0], hint, name, settings[name][1])
        elif default is None and _default(field) is dataclasses.MISSING:
            parts[field.name] = functools.partial(_missing, name)
    if default is None or default is dataclasses.MISSING:
        return lambda: cls(**{key: part() for key, part in parts.items()})
    return lambda: dataclasses.replace(default, **{key: part() for key, part in parts.items()})


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _missing(name: str) -> None:
    raise ConfigError(f"setting {name} is required: give it in the YAML file or with --set {name}=...")


def _unknown(name: str, source: str, known: set[str]) -> str:
    inside = sorted(k for k in known if k.startswith(name + "."))
    if inside:
        return f"{source}: {name} is a section and takes no value; it holds {', '.join(inside)}."
    by_leaf = {k.rpartition(".")[2]: k for k in sorted(known, reverse=True)}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if not near:  # the right name in the wrong section
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, 1, 0.6)]
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
    return f"{source}: unknown key {name}; {advice}"


def coerce(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value as the type of its field: YAML's ``1e-4`` (a string) is a float, a list becomes a tuple.

    Raises:
        ConfigError: it is not of that type.
    """

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{source}: {name} must be {expected}, not {value!r}.")

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return coerce(value, hint, name, source)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise wrong("one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong("a list")
        return tuple(coerce(item, arguments[0], name, source) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint in (int, float):
        try:
            number = float("nan" if isinstance(value, bool) or value is None else value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or (hint is int and not number.is_integer()):
            raise wrong("a whole number" if hint is int else "a number")
        return int(value) if hint is int and isinstance(value, int) else hint(number)
    if hint is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise wrong("a text")
        return str(value)
    raise TypeError(f"{name}: settings of type {hint} are not supported")


def to_tree(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain values, in the order of its fields: what :func:`yaml.safe_dump` writes."""
    return {
        field.name: (
            to_tree(value)
            if dataclasses.is_dataclass(value := getattr(config, field.name))
            else list(value)
            if isinstance(value, tuple)
            else value
        )
        for field in dataclasses.fields(config)
    }

"""Configuration from YAML and the command line: defaults, then the file, then `--section.key=value`.

jsonargparse converts and checks types field by field; unknown keys and every problem are reported together.
"""

import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lowmem.config import RunConfig
from lowmem.config_check import config_problems
from lowmem.config_schema import hints, item_class, known_keys
from lowmem.errors import ConfigError

T = typing.TypeVar("T")


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar as the text that was written; merge keys still work."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 (PyYAML's own attribute)


def load_run_config(path: str | Path = "", overrides: Sequence[str] = (), *, check: bool = True) -> RunConfig:
    """The checked configuration of a run; see `load_config`.

    Args:
        check: look for contradictions between fields too; unknown keys and wrong types are always refused.
    """
    return load_config(RunConfig, path, overrides, find_problems=config_problems if check else lambda config: [])


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str], find_problems: Callable[[T], list[str]]) -> T:
    """A configuration of type `cls`.

    Args:
        cls: a dataclass whose fields may be sections, and lists of dataclasses.
        path: a YAML file; empty starts from the defaults.
        overrides: "section.key=value", later ones win.
        find_problems: contradictions between fields, one line each.
    Raises:
        ConfigError: the file cannot be read, or the configuration has problems; all of them are listed.
    """
    values, problems = _read_yaml(Path(path), cls) if path else {}, []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--{override} has no value; write --{key}=VALUE")
            continue
        try:
            _set_dotted(values, key, _parse_yaml(known_keys(cls).get(key), text))
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"--{key}: {_one_line(error)}")
    config = None if problems else _build_at_once(cls, values)
    if config is None:  # something is wrong: look at every key on its own to report all of it
        problems += list(_unknown_keys(values, cls, known_keys(cls)))
        problems += [problem for leaf in _leaves(values, cls) for problem in leaf.problems()]
        config = None if problems else _build(cls, values)
    if config is not None:
        problems = find_problems(config)
    if problems or config is None:
        where = f"{path}: " if path else ""
        raise ConfigError(where + f"{len(problems)} problem{'s' if len(problems) > 1 else ''}\n" + "\n".join(f"  {p}" for p in problems))
    return config


def _build_at_once(cls: type[T], values: dict) -> T | None:
    """The configuration if every key and type is right, else None."""
    try:
        return None if any(leaf.value is None for leaf in _leaves(values, cls)) else _build(cls, values)
    except (ArgumentError, TypeError, ValueError, AttributeError):
        return None


def _build(cls: typing.Any, values: dict) -> typing.Any:
    """A dataclass from checked values. Sections and the entries of lists are built one by one: jsonargparse would merge lists with
    their defaults."""
    plain, built = {}, {}
    for name, value in values.items():
        kind = hints(cls).get(name)
        if is_dataclass(kind):
            built[name] = _build(kind, value)
        elif item_class(kind):
            built[name] = [_build(item_class(kind), entry) for entry in value]
        else:
            plain[name] = value
    parsed = _parser(cls).instantiate(_parser(cls).parse_object(plain))
    return cls(**{item.name: built[item.name] if item.name in built else parsed[item.name] for item in fields(cls)})


def _read_yaml(path: Path, cls: type) -> dict:
    try:
        values = _parse_yaml(cls, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        nearby = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:5]) or "none"
        raise ConfigError(f"--config: {path} does not exist; YAML files there: {nearby}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} holds a {type(values).__name__}, expected sections such as model: and train:")
    return values


def _parse_yaml(kind: typing.Any, text: str) -> typing.Any:
    """The value of a field of type `kind`, or of a whole configuration."""
    if not text and kind is str:
        return ""
    return _keep_text(kind, get_loader("yaml")(text), yaml.load(text, _TextLoader))


def _keep_text(kind: typing.Any, value: typing.Any, as_text: typing.Any) -> typing.Any:
    """`value` with numbers and booleans in text fields put back as `as_text`, the same YAML read by _TextLoader, has them."""
    if kind is str and isinstance(value, (bool, int, float)):
        return as_text
    if is_dataclass(kind) and isinstance(value, dict) and isinstance(as_text, dict):
        return {name: _keep_text(hints(kind).get(name), item, as_text.get(str(name))) for name, item in value.items()}
    if item_class(kind) and isinstance(value, list):
        return [_keep_text(item_class(kind), *pair) for pair in zip(value, as_text, strict=True)]
    return value


def _set_dotted(values: dict, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{parent} is not a section")
        values = child
    values[last] = value


@cache
def _parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    return parser


def _unknown_keys(values: dict, cls: typing.Any, candidates: typing.Collection[str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        kind, dotted = hints(cls).get(key), f"{prefix}{key}"
        if kind is None:
            yield f"{dotted} is not a known key{_nearest(key if '[' in prefix else dotted, candidates)}"
        elif is_dataclass(kind) and isinstance(value, dict):
            yield from _unknown_keys(value, kind, candidates, f"{dotted}.")
        elif (inside := item_class(kind)) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    yield from _unknown_keys(entry, inside, list(hints(inside)), f"{dotted}[{index}].")


def _nearest(key: str, known: typing.Collection[str]) -> str:
    """The best match by full key, else by the last part alone (a right name in a wrong section)."""
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        tails = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [tails[match] for match in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)]
    return f"; the nearest valid key is {close[0]}" if close else "; see --print_config for all keys"


@dataclass(frozen=True)
class _Leaf:
    """A value that is no section: where it stands, and the field that it is for; an entry of a list that is no section has no field."""

    dotted: str
    cls: typing.Any
    name: str
    value: object

    def problems(self) -> list[str]:
        if not self.name:
            first = fields(self.cls)[0].name
            return [f"{self.dotted} is {self.value!r}, expected keys such as {first}: {'FILE' if first == 'path' else first.upper()}"]
        kind = hints(self.cls)[self.name]
        if is_dataclass(kind):
            return [f"{self.dotted} is {self.value!r}, expected a section with keys below it"]
        try:
            if self.value is None:  # jsonargparse takes it for any type
                raise TypeError("null")
            _parser(self.cls).parse_object({self.name: self.value})
        except (ArgumentError, TypeError, ValueError):
            return [f"{self.dotted} is {self.value!r}, expected {_describe(kind)}"]
        return []


def _leaves(values: dict, cls: typing.Any, prefix: str = "") -> Iterator[_Leaf]:
    for key, value in values.items():
        kind, dotted = hints(cls).get(key), f"{prefix}{key}"
        if kind is None:
            continue
        inside = item_class(kind)
        if is_dataclass(kind) and isinstance(value, dict):
            yield from _leaves(value, kind, f"{dotted}.")
        elif inside and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    yield from _leaves(entry, inside, f"{dotted}[{index}].")
                else:
                    yield _Leaf(f"{dotted}[{index}]", inside, "", entry)
        else:
            yield _Leaf(dotted, cls, key, value)


def _describe(kind: type) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (list, tuple):
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return f"a map of {_describe(args[0])} to {_describe(args[1])}"
    if args:
        return " or ".join(_describe(arg) for arg in args)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

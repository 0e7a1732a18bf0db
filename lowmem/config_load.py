"""Configuration from YAML and the command line: defaults, then the file, then `--section.key=value`.

jsonargparse converts and checks types field by field; unknown keys and every problem are reported together.
"""

import copy
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lowmem.config import RunConfig, SourceConfig
from lowmem.config_check import config_problems
from lowmem.config_schema import known_keys
from lowmem.errors import ConfigError


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar as the text that was written; merge keys still work."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 (PyYAML's own attribute)


def load_run_config(path: str | Path = "", overrides: Sequence[str] = (), *, check: bool = True) -> RunConfig:
    """A checked configuration.

    Args:
        path: a YAML file; empty starts from the defaults.
        overrides: "section.key=value", later ones win.
        check: look for contradictions between fields too; unknown keys and wrong types are always refused.
    Raises:
        ConfigError: the file cannot be read, or the configuration has problems; all of them are listed.
    """
    values, problems = _read_yaml(Path(path)) if path else {}, []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--{override} has no value; write --{key}=VALUE")
            continue
        try:
            _set_dotted(values, key, _parse_yaml(key, text))
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"--{key}: {_one_line(error)}")
    config = None if problems else _build_at_once(values)
    if config is None:  # something is wrong: look at every key on its own to report all of it
        known = known_keys()
        problems += list(_unknown_keys(values, known))
        problems += [problem for key, value in _leaves(values, known) for problem in _type_problems(key, value)]
        config = None if problems else _build(values)
    if config is not None and check:
        problems = config_problems(config)
    if problems or config is None:
        where = f"{path}: " if path else ""
        raise ConfigError(where + f"{len(problems)} problem{'s' if len(problems) > 1 else ''}\n" + "\n".join(f"  {p}" for p in problems))
    return config


def _build_at_once(values: dict) -> RunConfig | None:
    """The configuration if every key and type is right, else None."""
    try:
        has_null = any(value is None for _, value in _leaves(values, known_keys()))
        return None if has_null else _build(values)
    except (ArgumentError, TypeError, ValueError, AttributeError):
        return None


def _build(values: dict) -> RunConfig:
    """Dataclasses from checked values. Sources are built one by one: jsonargparse would merge them with the default source."""
    values = copy.deepcopy(values)  # jsonargparse changes what it is given
    sources = values.get("data", {}).pop("sources", None)
    config = _instantiate(RunConfig, values)
    if sources is not None:
        config.data.sources = [_instantiate(SourceConfig, source) for source in sources]
    return config


def _instantiate(cls: type, values: dict) -> typing.Any:
    parsed = _parser(cls).instantiate(_parser(cls).parse_object(values))
    return cls(**{item.name: getattr(parsed, item.name) for item in fields(cls)})


def _read_yaml(path: Path) -> dict:
    try:
        values = _parse_yaml("", path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        nearby = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:5]) or "none"
        raise ConfigError(f"--config: {path} does not exist; YAML files there: {nearby}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} holds a {type(values).__name__}, expected sections such as model: and train:")
    return values


def _parse_yaml(key: str, text: str) -> typing.Any:
    """The value of `key`, or the whole configuration if `key` is empty."""
    if not text and key in _text_keys():
        return ""
    return _keep_text(key, get_loader("yaml")(text), yaml.load(text, _TextLoader))


def _keep_text(key: str, value: typing.Any, as_text: typing.Any) -> typing.Any:
    """`value` with numbers and booleans in text fields put back as `as_text`, the same YAML read by _TextLoader, has them."""
    if key in _text_keys() and isinstance(value, (bool, int, float)):
        return as_text
    is_section = not key or key == "data.sources" or is_dataclass(known_keys().get(key))
    if is_section and isinstance(value, dict) and isinstance(as_text, dict):
        return {name: _keep_text(f"{key}.{name}".lstrip("."), item, as_text.get(str(name))) for name, item in value.items()}
    if key == "data.sources" and isinstance(value, list):
        return [_keep_text(key, *pair) if isinstance(pair[0], dict) else pair[0] for pair in zip(value, as_text, strict=True)]
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


@cache
def _text_keys() -> set[str]:
    """Dotted keys of text fields; those of a source as "data.sources.path"."""
    known = {**known_keys(), **{f"data.sources.{name}": kind for name, kind in typing.get_type_hints(SourceConfig).items()}}
    return {key for key, kind in known.items() if kind is str}


def _unknown_keys(values: dict, known: dict[str, type], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            yield f"{dotted} is not a known key{_nearest(dotted, known)}"
        elif is_dataclass(known[dotted]) and isinstance(value, dict):
            yield from _unknown_keys(value, known, f"{dotted}.")
        elif dotted == "data.sources" and isinstance(value, list):
            names = [item.name for item in fields(SourceConfig)]
            for index, source in enumerate(value):
                for name in source if isinstance(source, dict) else ():
                    if name not in names:
                        yield f"data.sources[{index}].{name} is not a known key{_nearest(name, names)}"


def _nearest(key: str, known: typing.Collection[str]) -> str:
    """The best match by full key, else by the last part alone (a right name in a wrong section)."""
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        tails = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [tails[match] for match in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)]
    return f"; the nearest valid key is {close[0]}" if close else "; see --print_config for all keys"


def _leaves(values: dict, known: dict[str, type], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        kind = known.get(dotted)
        if kind is None:
            continue
        if is_dataclass(kind) and isinstance(value, dict):
            yield from _leaves(value, known, f"{dotted}.")
        elif dotted == "data.sources" and isinstance(value, list):
            yield from ((f"data.sources[{i}].{k}", v) for i, s in enumerate(value) if isinstance(s, dict) for k, v in s.items())
            yield from ((f"data.sources[{i}]", s) for i, s in enumerate(value) if not isinstance(s, dict))
        else:
            yield dotted, value


def _type_problems(key: str, value: object) -> list[str]:
    if key.startswith("data.sources["):
        name = key.partition("].")[2]
        if not name:
            return [f"{key} is {value!r}, expected keys such as path: FILE"]
        if name not in {item.name for item in fields(SourceConfig)}:
            return []  # already reported as unknown
        parser, nested = _parser(SourceConfig), {name: value}
    else:
        parser, nested = _parser(RunConfig), {}
        _set_dotted(nested, key, value)
    if is_dataclass(known_keys().get(key)):
        return [f"{key} is {value!r}, expected a section with keys below it"]
    try:
        if value is None:  # jsonargparse takes it for any type
            raise TypeError("null")
        parser.parse_object(nested)
    except (ArgumentError, TypeError, ValueError):
        return [f"{key} is {value!r}, expected {_describe(_expected_type(key))}"]
    return []


def _expected_type(key: str) -> type:
    if key.startswith("data.sources["):
        return typing.get_type_hints(SourceConfig)[key.partition("].")[2]]
    return known_keys()[key]


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

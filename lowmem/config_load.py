"""Configuration from YAML and the command line: defaults, then the file, then `--section.key=value`.

jsonargparse converts and checks types field by field; unknown keys and every problem are reported together.
"""

import copy
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lowmem.config import RunConfig, SourceConfig
from lowmem.config_check import config_problems
from lowmem.errors import ConfigError


def load_run_config(path: str | Path = "", overrides: Sequence[str] = ()) -> RunConfig:
    """A checked configuration.

    Args:
        path: a YAML file; empty starts from the defaults.
        overrides: "section.key=value", later ones win.
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
            _set_dotted(values, key, get_loader("yaml")(text))
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"--{key}: {_one_line(error)}")
    config = None
    if not problems:
        config = _build_at_once(values)
    if config is None:  # something is wrong: look at every key on its own to report all of it
        known = _known_keys()
        problems += list(_unknown_keys(values, known))
        problems += [problem for key, value in _leaves(values, known) for problem in _type_problems(key, value)]
        config = None if problems else _build(values)
    if config is not None:
        problems = config_problems(config)
    if problems:
        where = f"{path}: " if path else ""
        raise ConfigError(where + f"{len(problems)} problem{'s' if len(problems) > 1 else ''}\n" + "\n".join(f"  {p}" for p in problems))
    assert config is not None
    return config


def dump_run_config(config: RunConfig, comments: bool = False) -> str:
    """YAML of every field; `load_run_config` reads it back to an equal configuration.

    Args:
        comments: write each field's docstring above it.
    """
    plain = asdict(config)
    plain["optim"]["betas"] = list(plain["optim"]["betas"])
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=140)
    if not comments:
        return text
    docs, lines, section = field_docs(), [], ""
    for line in text.splitlines():
        key = line.partition(":")[0]
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            section = key.strip()
        doc = docs.get(key.strip() if indent == 0 else f"{section}.{key.strip()}", "") if indent <= 2 else ""
        lines += [" " * indent + "# " + doc] if doc else []
        lines.append(line)
    return "\n".join(lines) + "\n"


@cache
def field_docs() -> dict[str, str]:
    """The docstring of every field by dotted key, such as "model.dim"."""
    from docstring_parser import parse_from_object  # the docstring reader that jsonargparse uses

    docs: dict[str, str] = {}

    def collect(cls: typing.Any, prefix: str) -> None:
        parsed = {item.arg_name: item.description or "" for item in parse_from_object(cls).params}
        for name, kind in typing.get_type_hints(cls).items():
            docs[prefix + name] = " ".join(parsed.get(name, "").split())
            if is_dataclass(kind):
                collect(kind, f"{prefix}{name}.")

    collect(RunConfig, "")
    return docs


def _build_at_once(values: dict) -> RunConfig | None:
    """The configuration if every key and type is right, else None."""
    try:
        return _build(values)
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
        values = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        nearby = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:5]) or "none"
        raise ConfigError(f"--config: {path} does not exist; YAML files there: {nearby}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} holds a {type(values).__name__}, expected sections such as model: and train:")
    return values


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
def _known_keys() -> dict[str, type]:
    """Dotted key -> type; sections map to their dataclass."""
    known: dict[str, type] = {}

    def collect(cls: typing.Any, prefix: str) -> None:
        for name, kind in typing.get_type_hints(cls).items():
            known[prefix + name] = kind
            if is_dataclass(kind):
                collect(kind, f"{prefix}{name}.")

    collect(RunConfig, "")
    return known


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


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    """The best match by full key, else by the last part alone (a right name in a wrong section)."""
    known = list(known)
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
        elif is_dataclass(kind):
            yield dotted, value
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
    if is_dataclass(_known_keys().get(key)):
        return [f"{key} is {value!r}, expected a section with keys below it"]
    try:
        parser.parse_object(nested)
    except (ArgumentError, TypeError, ValueError):
        return [f"{key} is {value!r}, expected {_describe(_expected_type(key))}"]
    return []


def _expected_type(key: str) -> type:
    if key.startswith("data.sources["):
        return typing.get_type_hints(SourceConfig)[key.partition("].")[2]]
    return _known_keys()[key]


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

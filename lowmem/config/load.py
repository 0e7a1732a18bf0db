"""Configuration from YAML and the command line: defaults, then the file, then `--section.key=value`.

jsonargparse converts and checks types field by field; unknown keys and every problem are reported together.
"""

import difflib
import itertools
import re
import stat
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lowmem.config.checks import config_problems
from lowmem.config.keys import (
    MAX_ENTRIES,
    REFUSED_VALUES,
    RENAMED,
    bounded,
    expand_home,
    hints,
    item_class,
    known_keys,
    shown,
    value_problems,
)
from lowmem.config.schema import RunConfig
from lowmem.system.errors import ConfigError

MAX_FILE_BYTES = 2 << 20
MAX_DEPTH = 32
MAX_VALUES = 200_000

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?")
_NONFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_MAX_DIGITS = 100  # of a number, so that it is a float, too: beyond, it is text, which no field for numbers takes


class _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Syntax alone: no scalar has a meaning yet."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


@dataclass
class _Node:
    """A scalar's text, a list's nodes, or a map's pairs of key nodes and value nodes.

    Attributes:
        plain: a scalar without quotes, which may be a number.
        line: where it begins, counted from 1.
        size: values in it, those that an alias repeats counted again.
    """

    content: typing.Any
    line: int
    plain: bool = False
    size: int = 1


def read_config_text(path: Path) -> str:
    """The text of a configuration file, without a byte order mark.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is no regular file, too large, or no UTF-8; in one line, without the path.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ValueError(f"it is {kind}, expected a YAML file")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has {found.st_size} bytes, a configuration has at most {MAX_FILE_BYTES}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); save it as UTF-8") from error


def parse_yaml(text: str, kind: typing.Any = None) -> typing.Any:
    """The value in a YAML document, for a field of type `kind` or a whole configuration; None for an empty one.

    Raises:
        ValueError: no YAML, or YAML that has no place in a configuration: a key twice, tags, several documents, aliases of themselves,
            more than 32 levels or 200,000 values; in one line, with the number of the line.
    """
    try:
        node = _Composer(yaml.parse(text, _Reader)).document()
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{' '.join(str(error.problem or error.context).split())}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split()).replace(' in "<unicode string>",', "")) from error
    return None if node is None else _value(node, kind)


def parse_scalar(text: str) -> typing.Any:
    """What a word is that stands in YAML without quotes: a number, a boolean, null or text."""
    word = text.strip()
    if word in _NULL:
        return None
    if word.lower() in _TRUE | _FALSE and word in (word.lower(), word.capitalize(), word.upper()):
        return word.lower() in _TRUE
    if len(word) <= _MAX_DIGITS and _INT.fullmatch(word):
        return int(word.replace("_", ""))
    if len(word) <= _MAX_DIGITS and _FLOAT.fullmatch(word):
        return float(word.replace("_", ""))
    if match := _NONFINITE.fullmatch(word):
        return float(match[1] + match[2])
    return text


class _Composer:
    """Nodes from events, with limits: PyYAML's own follows every alias and any depth."""

    def __init__(self, events: Iterator[typing.Any]):  # yaml.Event, whose stubs know neither tags nor anchors
        self._events = events
        self._anchors: dict[str, _Node] = {}
        self._open: set[str] = set()
        self._count = 0

    def document(self) -> _Node | None:
        """The only document, None if there is none."""
        found = None
        for event in self._events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                if found is not None:
                    raise ValueError(f"line {line}: a second document begins; a configuration is one")
                found = self._node(next(self._events), 1)
        return found

    def _node(self, event: typing.Any, depth: int) -> _Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), line)
        self._add(1, line)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {line}: more than {MAX_DEPTH} levels of lists and maps; a configuration has fewer")
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise ValueError(f"line {line}: the tag {event.tag} is not read here; write the plain value")
        if event.anchor:
            self._open.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(event.value, line, plain=event.implicit[0])
        else:
            node = self._items(isinstance(event, yaml.MappingStartEvent), line, depth)
        if event.anchor:
            self._open.discard(event.anchor)
            self._anchors[event.anchor] = node
        return node

    def _items(self, is_map: bool, line: int, depth: int) -> _Node:
        nodes = []
        while not isinstance(event := next(self._events), (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            nodes.append(self._node(event, depth + 1))
        size = 1 + sum(node.size for node in nodes)
        return _Node(_pairs(nodes) if is_map else nodes, line, size=size)

    def _alias(self, name: str, line: int) -> _Node:
        if name in self._open:
            raise ValueError(f"line {line}: *{name} stands inside &{name} itself")
        if name not in self._anchors:
            raise ValueError(f"line {line}: *{name} names no anchor before it; text that begins with * needs quotes")
        self._add(self._anchors[name].size, line)
        return self._anchors[name]

    def _add(self, count: int, line: int) -> None:
        self._count += count
        if self._count > MAX_VALUES:
            raise ValueError(f"line {line}: more than {MAX_VALUES} values, aliases followed; a configuration has fewer")


@dataclass
class _Pairs:
    """A map's pairs in order, and those that `<<` merges in below them."""

    own: list[tuple[_Node, _Node]] = field(default_factory=list)
    merged: list["_Pairs"] = field(default_factory=list)


def _pairs(nodes: list[_Node]) -> _Pairs:
    """Keys and values in turn, as a map in which every key stands once."""
    pairs = _Pairs()
    seen: dict[str, int] = {}
    for key, value in zip(nodes[::2], nodes[1::2], strict=True):
        if not isinstance(key.content, str):
            raise ValueError(f"line {key.line}: a list or a map cannot be a key")
        if key.plain and key.content == "<<":
            sources = value.content if isinstance(value.content, list) else [value]
            if not all(isinstance(source.content, _Pairs) for source in sources):
                raise ValueError(f"line {key.line}: << takes a map or a list of maps")
            pairs.merged += [source.content for source in sources]
            continue
        if key.content in seen:
            raise ValueError(
                f"line {key.line}: {_short(key.content)} stands here again, first in line {seen[key.content]}; keep one of the two"
            )
        seen[key.content] = key.line
        pairs.own.append((key, value))
    return pairs


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat_pairs(pairs: _Pairs) -> dict[str, tuple[_Node, _Node]]:
    """Merged pairs under the own ones, of several maps the first wins."""
    flat: dict[str, tuple[_Node, _Node]] = {}
    for source in reversed(pairs.merged):
        flat |= _flat_pairs(source)
    return flat | {key.content: (key, value) for key, value in pairs.own}


def _value(node: _Node, kind: typing.Any) -> typing.Any:
    if isinstance(node.content, str):
        meant = parse_scalar(node.content) if node.plain else node.content
        return node.content if kind is str and meant is not None else meant
    args = typing.get_args(kind)
    if isinstance(node.content, list):
        inside = item_class(kind) or (args[0] if typing.get_origin(kind) in (list, tuple) else None)
        return [_value(item, inside) for item in node.content]
    values = {}
    for name, (key, value) in _flat_pairs(node.content).items():
        if typing.get_origin(kind) is dict:
            values[_value(key, args[0]) if args[0] is not str else name] = _value(value, args[1])
        else:
            values[name] = _value(value, hints(kind).get(name) if is_dataclass(kind) else None)
    return values


T = typing.TypeVar("T")
_MOST_SHOWN = 10


def load_run_config(path: str | Path = "", overrides: Sequence[str] = (), *, check: bool = True, defaults: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a run; see `load_config`. `data=FILE` stands for data.sources with that one path.

    Args:
        check: look for contradictions between fields too; unknown keys and wrong types are always refused.
    """
    return load_config(RunConfig, path, overrides, config_problems if check else lambda config: [], defaults)


def load_config(
    cls: type[T], path: str | Path, overrides: Sequence[str], find_problems: Callable[[T], list[str]], defaults: Sequence[str] = ()
) -> T:
    """A configuration of type `cls`: defaults, then the file, then the overrides.

    Args:
        cls: a dataclass whose fields may be sections, and lists of dataclasses.
        path: a YAML file; empty starts from the defaults.
        overrides: "section.key=value", later ones win; a text field takes the value as it is, other fields read it as YAML.
        find_problems: contradictions between fields, one line each.
        defaults: like overrides, below the file.
    Raises:
        ConfigError: the file cannot be read, or the configuration has problems; all of them are listed, the first ten at length.
    """
    values: dict = {}
    problems = _set_all(values, defaults, cls)
    if path:
        _lay_over(values, _read_yaml(Path(path), cls), cls)
    problems += _set_all(values, overrides, cls)
    return _checked(cls, values, problems, find_problems, where=f"{path}: " if path else "")


def _set_all(values: dict, overrides: Sequence[str], cls: typing.Any) -> list[str]:
    """Put each "section.key=value" into `values`; those that cannot be read, one line each."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--{_cut(override)} has no value; write --{_cut(key)}=VALUE")
            continue
        try:
            if key == "data" and cls is RunConfig and not text.lstrip().startswith("{"):
                key, value = "data.sources", _one_source(text)
            else:
                value = _parse_override(known_keys(cls).get(key), text)
            _set_dotted(values, key, value)
        except ValueError as error:
            problems.append(f"--{_cut(key)}: {error}")
    return problems


def _one_source(path: str) -> typing.Any:
    return [{"path": path}]


def _lay_over(values: dict, more: dict, cls: typing.Any) -> None:
    """Put `more` over `values`, section by section."""
    for key, value in more.items():
        if key == "data" and cls is RunConfig and isinstance(value, str):
            value = {"sources": _one_source(value)}
        below = values.get(key)
        kind = hints(cls).get(key)
        if isinstance(value, dict) and isinstance(below, dict) and is_dataclass(kind):
            _lay_over(below, value, kind)
        else:
            values[key] = value


def config_from_values(cls: type[T], values: dict[str, typing.Any]) -> T:
    """A configuration from nested dictionaries, as `dataclasses.asdict` and JSON have them; contradictions are not looked for.

    Raises:
        ConfigError: unknown keys, wrong types, numbers out of range.
    """
    return _checked(cls, values, [], lambda config: [], where="")


def _checked(cls: type[T], values: dict, problems: list[str], find_problems: Callable[[T], list[str]], where: str) -> T:
    entries = _count_entries(values, cls)
    if entries > MAX_ENTRIES:
        raise ConfigError(f"{where}{entries} sources and phases are listed, at most {MAX_ENTRIES} are read; name folders or globs instead")
    config = None if problems else _build_at_once(cls, values)
    found: Iterator[Callable[[], str]] = iter(())
    if config is None:  # something is wrong: look at every key on its own to report all of it
        found = itertools.chain(
            _unknown_keys(values, cls, known_keys(cls)),
            (partial(str, problem) for leaf in _leaves(values, cls) for problem in leaf.problems()),
        )
    listed: list[Callable[[], str]] = [partial(str, problem) for problem in problems]
    listed += list(found)
    if config is None and not listed:
        config = _build(cls, values)
    if config is not None:
        simple = expand_home(config)
        wrong = value_problems(config)
        contradictions = find_problems(bounded(config, wrong) if wrong else config)
        contradictions = [problem for problem in contradictions if not any(key in problem for key in wrong)]
        everything = [*simple, *itertools.chain(*wrong.values()), *contradictions]
        listed += [partial(str, problem) for problem in everything]
    if listed or config is None:
        raise ConfigError(where + _listing(listed))
    return config


def _listing(problems: Sequence[Callable[[], str]]) -> str:
    """One problem on one line; several below their number, the first ten at length."""
    if len(problems) == 1:
        return problems[0]()
    lines = [f"  {problem()}" for problem in problems[:_MOST_SHOWN]]
    rest = len(problems) - len(lines)
    return "\n".join([f"{len(problems)} problems", *lines, *([f"  and {rest} more"] if rest else [])])


def _build_at_once(cls: type[T], values: dict) -> T | None:
    """The configuration if every key and type is right, else None."""
    if next(_unknown_keys(values, cls, ()), None) or any(leaf.misfit() for leaf in _leaves(values, cls)):
        return None
    try:
        return _build(cls, values)
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
            plain[name] = _normal(kind, value)
    parsed = _parser(cls).instantiate(_parser(cls).parse_object(plain))
    return cls(**{item.name: built[item.name] if item.name in built else parsed[item.name] for item in fields(cls)})


def _read_yaml(path: Path, cls: type) -> dict:
    name = _cut(str(path), most=300)
    try:
        values = parse_yaml(read_config_text(path), cls)
    except FileNotFoundError as error:
        nearby = ", ".join(sorted(map(str, itertools.islice(path.parent.glob("*.yaml"), 5)))) or "none"
        raise ConfigError(f"--config: {name} does not exist; YAML files there: {nearby}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--config: {name} cannot be read: {why}") from error
    if not isinstance(values, dict):
        what = "nothing" if values is None else "a list" if isinstance(values, list) else "a single value"
        raise ConfigError(f"--config: {path} holds {what}, expected sections such as model: and train:")
    return values


def _parse_override(kind: typing.Any, text: str) -> typing.Any:
    """The value that a word of the command line is for a field of type `kind`, None for an unknown key.

    Raises:
        ValueError: a list, a map or a section that is no YAML.
    """
    if kind is str or kind is None:
        return text
    if is_dataclass(kind) or item_class(kind) or typing.get_origin(kind) in (list, tuple, dict):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it is no UTF-8 text; write it in UTF-8") from error
        return parse_yaml(text, kind)
    return parse_scalar(text)


def _cut(text: str, most: int = 80) -> str:
    return shown(text, quotes=False, most=most)


def _count_entries(values: dict, cls: typing.Any) -> int:
    """Entries of lists of sections, lists inside them counted too."""
    count = 0
    for key, value in values.items():
        kind = hints(cls).get(key)
        if is_dataclass(kind) and isinstance(value, dict):
            count += _count_entries(value, kind)
        elif (inside := item_class(kind)) and isinstance(value, list):
            count += len(value) + sum(_count_entries(entry, inside) for entry in value if isinstance(entry, dict))
    return count


def _normal(kind: typing.Any, value: typing.Any) -> typing.Any:
    """`value` with text that stands for a number, as in quotes, as that number; jsonargparse would read 010 as 8.

    Raises:
        ValueError: text where a field takes none, or a number where it takes another kind of value.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and not _takes_text(kind, value):
        value = parse_scalar(value)
        if value is None or isinstance(value, str):
            raise ValueError("text")
    if origin is typing.Literal and not any(type(value) is type(arg) and value == arg for arg in args):
        raise ValueError("not among the values")
    if kind is int and type(value) is not int:
        raise ValueError("no whole number")
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return [_normal(args[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {_normal(args[0], key): _normal(args[1], item) for key, item in value.items()}
    return value


def _takes_text(kind: typing.Any, text: str) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return text in typing.get_args(kind)
    return kind is str or any(_takes_text(arg, text) for arg in typing.get_args(kind) if typing.get_origin(kind) in _UNIONS)


_UNIONS = (typing.Union, types.UnionType)


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


def _unknown_keys(values: dict, cls: typing.Any, candidates: typing.Collection[str], prefix: str = "") -> Iterator[Callable[[], str]]:
    """A message for each key that is none; the nearest one is looked up when the message is wanted, which takes a while."""
    for key, value in values.items():
        kind, dotted = hints(cls).get(key), f"{prefix}{key}"
        if kind is None:
            name = key if "[" in prefix else dotted
            yield lambda dotted=dotted, name=name: _unknown(dotted, name, candidates)  # type: ignore[misc]
        elif is_dataclass(kind) and isinstance(value, dict):
            yield from _unknown_keys(value, kind, candidates, f"{dotted}.")
        elif (inside := item_class(kind)) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    yield from _unknown_keys(entry, inside, list(hints(inside)), f"{dotted}[{index}].")


def _unknown(dotted: str, name: str, candidates: typing.Collection[str]) -> str:
    if dotted in RENAMED:
        return f"{dotted} is no key any more; use {RENAMED[dotted]}"
    return f"{_cut(dotted) or repr('')} is not a known key{_nearest(name, candidates)}"


def _nearest(key: str, known: typing.Collection[str]) -> str:
    """The best match by full key, else by the last part alone (a right name in a wrong section)."""
    key = key[:100]
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

    def misfit(self) -> bool:
        """Whether it is null or of another kind than its field, as far as that is told without jsonargparse, which takes null for any."""
        kind = hints(self.cls)[self.name] if self.name else None
        if self.value is None or kind is None or is_dataclass(kind) or (item_class(kind) and not isinstance(self.value, list)):
            return True
        try:
            _normal(kind, self.value)
        except (ValueError, TypeError):
            return True
        return False

    def problems(self) -> list[str]:
        if not self.name:
            first = fields(self.cls)[0].name
            return [f"{self.dotted} is {shown(self.value)}, expected keys such as {first}: {'FILE' if first == 'path' else first.upper()}"]
        kind = hints(self.cls)[self.name]
        if is_dataclass(kind):
            return [f"{self.dotted} is {shown(self.value)}, expected a section with keys below it"]
        refused = REFUSED_VALUES.get(self.dotted, {}).get(self.value, "") if isinstance(self.value, str) else ""
        wrong = [f"{self.dotted} is {shown(self.value)}, expected {_describe(kind)}" + (f"; {refused}" if refused else "")]
        if self.misfit():
            return wrong
        try:
            _parser(self.cls).parse_object({self.name: _normal(kind, self.value)})
        except (ArgumentError, TypeError, ValueError):
            return wrong
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


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _describe(kind: typing.Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if inside := item_class(kind):
        return f"a list of entries with keys such as {fields(inside)[0].name}"
    if origin is tuple:
        return f"a list of {len(args)} {_PLURALS[args[0]]}"
    if origin is list:
        return f"a list of {_PLURALS.get(args[0]) or _describe(args[0])}"
    if origin is dict:
        return f"a map of {_PLURALS[args[0]]} to {_PLURALS.get(args[1]) or _describe(args[1])}"
    if args:
        return " or ".join(_describe(arg) for arg in args)
    return _NAMES[kind]

"""YAML as configurations use it: text stays as it was written, a key stands once, and nothing is read that explodes. Imports no torch.

A value becomes what the field that it is for asks for: text where the field takes text, else a number, a boolean, null, a list or a map.
Numbers are decimal; 010, 0x10 and 1:30, which YAML 1.1 takes for 8, 16 and 90, are text, and so no number.
"""

import re
import stat
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import yaml

from lowmem.config_schema import hints, item_class

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

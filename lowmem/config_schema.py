"""Every key of the configuration with its type and its docstring, read off the dataclasses."""

import typing
from dataclasses import fields, is_dataclass
from functools import cache

from lowmem.config import RunConfig
from lowmem.config_values import allowed


def known_keys(cls: typing.Any = RunConfig) -> dict[str, type]:
    """Dotted key -> type; sections map to their dataclass. What is inside a list is no key of its own."""
    return _known_keys(cls)


@cache
def _known_keys(cls: typing.Any) -> dict[str, type]:
    known: dict[str, type] = {}
    for name, kind in hints(cls).items():
        known[name] = kind
        if is_dataclass(kind):
            known |= {f"{name}.{key}": inner for key, inner in known_keys(kind).items()}
    return known


def hints(cls: typing.Any) -> dict[str, typing.Any]:
    """The fields of a section with their types."""
    return _hints(cls)


@cache
def _hints(cls: typing.Any) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def item_class(kind: typing.Any) -> typing.Any:
    """The dataclass of which `kind` is a list, or None."""
    inside = typing.get_args(kind)
    return inside[0] if typing.get_origin(kind) is list and is_dataclass(inside[0]) else None


@cache
def field_docs(cls: typing.Any = RunConfig) -> dict[str, str]:
    """The docstring of every field by dotted key, such as "model.dim"."""
    known = known_keys(cls)
    sections = {"": cls, **known}
    return {key: docs_of(sections[key.rpartition(".")[0]])[key.rpartition(".")[2]] for key in known}


def docs_of(cls: typing.Any) -> dict[str, str]:
    """The docstrings of the fields of a section, and the ranges of those that are numbers."""
    return _docs_of(cls)


@cache
def _docs_of(cls: typing.Any) -> dict[str, str]:
    from docstring_parser import parse_from_object  # the docstring reader that jsonargparse uses

    parsed = {item.arg_name: " ".join((item.description or "").split()) for item in parse_from_object(cls).params}
    return {item.name: parsed.get(item.name, "") + _allowed(cls, item.name) for item in fields(cls)}


def _allowed(cls: typing.Any, name: str) -> str:
    return f" Allowed: {found}." if (found := allowed(cls, name)) else ""

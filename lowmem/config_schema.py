"""Every key of the configuration with its type and its docstring, read off the dataclasses."""

import typing
from dataclasses import fields, is_dataclass
from functools import cache

from lowmem.config import RunConfig


@cache
def known_keys() -> dict[str, type]:
    """Dotted key -> type; sections map to their dataclass."""
    known: dict[str, type] = {}

    def collect(cls: typing.Any, prefix: str) -> None:
        for name, kind in typing.get_type_hints(cls).items():
            known[prefix + name] = kind
            if is_dataclass(kind):
                collect(kind, f"{prefix}{name}.")

    collect(RunConfig, "")
    return known


@cache
def field_docs() -> dict[str, str]:
    """The docstring of every field by dotted key, such as "model.dim"."""
    sections = {"": RunConfig, **known_keys()}
    return {key: docs_of(sections[key.rpartition(".")[0]])[key.rpartition(".")[2]] for key in known_keys()}


@cache
def docs_of(cls: typing.Any) -> dict[str, str]:
    from docstring_parser import parse_from_object  # the docstring reader that jsonargparse uses

    parsed = {item.arg_name: item.description or "" for item in parse_from_object(cls).params}
    return {item.name: " ".join(parsed.get(item.name, "").split()) for item in fields(cls)}

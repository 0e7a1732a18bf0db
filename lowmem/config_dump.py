"""A configuration as YAML, one key a line, with its docstrings as comments if asked for."""

import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass

import yaml

from lowmem.config_schema import docs_of, hints, item_class


class _Dumper(yaml.SafeDumper):
    """Quotes text that jsonargparse's loader, unlike PyYAML's, takes for a number; never breaks text over lines."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_.]*[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Dumper.add_representer(str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style='"' if "\n" in s else None))


def dump_config(config: typing.Any, comments: bool = False) -> str:
    """YAML of every field of a configuration, one a line; `load_config` reads it back to an equal one.

    Args:
        config: a dataclass, such as `RunConfig`.
        comments: write each field's docstring above it, those of the fields inside a list above the list.
    """
    return "\n".join(_section_lines(config, "", comments)) + "\n"


def _section_lines(section: typing.Any, pad: str, comments: bool) -> Iterator[str]:
    for item in fields(section):
        value, inside = getattr(section, item.name), item_class(hints(type(section))[item.name])
        if comments:
            yield from _comment(docs_of(type(section))[item.name], pad)
            for name, doc in docs_of(inside).items() if inside else ():
                yield from _comment(f"  {name}: {doc}", pad)
        if is_dataclass(value):
            yield f"{pad}{item.name}:"
            yield from _section_lines(value, f"{pad}  ", comments)
        elif inside and value:
            yield f"{pad}{item.name}:"
            yield from (f"{pad}- {_inline(_without_empty(asdict(entry)))}" for entry in value)
        else:
            yield f"{pad}{item.name}: {_inline(value)}"


def _without_empty(entry: dict) -> dict:
    """The fields of an entry, which stands on one line, without empty lists and maps."""
    return {name: value for name, value in entry.items() if value not in ({}, [])}


def _comment(text: str, pad: str) -> list[str]:
    return textwrap.wrap(text, 140, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_long_words=False)


def _inline(value: object) -> str:
    """`value` on one line: the inside of a flow list, where text is quoted wherever it could be mistaken."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=float("inf")).strip()[1:-1]

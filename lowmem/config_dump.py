"""A configuration as YAML, one key a line, with its docstrings as comments if asked for."""

import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass

import yaml

from lowmem.config import RunConfig, SourceConfig
from lowmem.config_schema import docs_of, field_docs


class _Dumper(yaml.SafeDumper):
    """Quotes text that jsonargparse's loader, unlike PyYAML's, takes for a number; never breaks text over lines."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_.]*[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Dumper.add_representer(str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style='"' if "\n" in s else None))


def dump_run_config(config: RunConfig, comments: bool = False) -> str:
    """YAML of every field, one a line; `load_run_config` reads it back to an equal configuration.

    Args:
        comments: write each field's docstring above it, those of a source's fields above the list of sources.
    """
    return "\n".join(_section_lines(config, "", comments)) + "\n"


def _section_lines(section: typing.Any, prefix: str, comments: bool) -> Iterator[str]:
    pad = "  " * prefix.count(".")
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if comments:
            yield from _comment(field_docs()[key], pad)
            for name, doc in docs_of(SourceConfig).items() if key == "data.sources" else ():
                yield from _comment(f"  {name}: {doc}", pad)
        if is_dataclass(value):
            yield f"{pad}{item.name}:"
            yield from _section_lines(value, f"{key}.", comments)
        elif key == "data.sources" and value:
            yield f"{pad}{item.name}:"
            yield from (f"{pad}- {_inline(asdict(source))}" for source in value)
        else:
            yield f"{pad}{item.name}: {_inline(value)}"


def _comment(text: str, pad: str) -> list[str]:
    return textwrap.wrap(text, 140, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_long_words=False)


def _inline(value: object) -> str:
    """`value` on one line: the inside of a flow list, where text is quoted wherever it could be mistaken."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=float("inf")).strip()[1:-1]

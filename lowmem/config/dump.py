"""A configuration as YAML, one key a line, with its docstrings as comments if asked for."""

import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass

import yaml

from lowmem.config.keys import allowed, docs_of, field_docs, hints, item_class, known_keys
from lowmem.config.schema import PhaseConfig, RunConfig, SourceConfig


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


PAGE = """# Configuration: what each key takes

Written by `python -m lowmem.config.dump > docs/configuration.md` from the table that checks configurations (`lowmem/config/keys.py`); a
test compares the two. `lowmem pretrain --print_config` and `lowmem finetune --print_config` print every key with its meaning.

A configuration is one YAML file and `--section.key=value` on the command line, where text is taken as it is given: `#`, `*`, `[` and quotes
are part of it. In YAML a key stands once, numbers are decimal, and `~` at the start of a path is the home directory. Not-a-number and
infinity are refused everywhere, sizes of memory have a unit (`4GiB`), and all problems of a configuration are reported at once with exit
code 2: nothing has been read or written by then.
"""


def configuration_page() -> str:
    """The content of docs/configuration.md: the keys that take numbers, with their ranges and defaults."""
    tables = (
        ("lowmem pretrain, finetune, plan, profile", _rows(RunConfig)),
        ("An entry of `data.sources` or of a phase's `sources`", _rows(SourceConfig)),
        ("An entry of `phases`", _rows(PhaseConfig)),
    )
    return PAGE + "".join(
        f"\n## {title}\n\n| key | default | allowed |\n|---|---|---|\n" + "\n".join(rows) + "\n" for title, rows in tables
    )


def _rows(cls: typing.Any) -> Iterator[str]:
    sections, defaults = {"": cls, **known_keys(cls)}, cls()
    for key in field_docs(cls):
        section, _, name = key.rpartition(".")
        if found := allowed(sections[section], name):
            value = defaults
            for part in key.split("."):
                value = getattr(value, part)
            yield f"| `{key}` | `{_inline(value)}` | {found} |"


if __name__ == "__main__":
    print(configuration_page(), end="")

"""Command line options, with bad usage reported like every other failure."""

import argparse
import re
from collections.abc import Mapping
from typing import NoReturn

from lowmem.system.errors import ConfigError


class OptionParser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises `ConfigError` instead of ending the process.

    Args:
        prog: the command, such as "lowmem generate".
        description: what it does, in one sentence.
        keys: of a configuration with what they mean, for --help.
    """

    def __init__(self, prog: str, description: str, keys: Mapping[str, str] | None = None):
        epilog = "\n".join(["configuration keys:", *(f"  --{key}  {doc}" for key, doc in keys.items())]) if keys else None
        kind = argparse.RawDescriptionHelpFormatter if keys else argparse.HelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=kind, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {plain_words(message)}; see {self.prog} --help")


def plain_words(message: str) -> str:
    """What argparse says of an option, without the names of Python's types, and with the beginning of long values only."""
    message = re.sub(r"'(.{40})[^']{40,}'", r"'\1...'", message)
    message = re.sub(r"invalid int value: (.*)", r"\1 is no whole number", message)
    return re.sub(r"invalid float value: (.*)", r"\1 is no number", message)


def dotted_overrides(rest: list[str], command: str) -> list[str]:
    """`--a.b=c` and `--a.b c` as "a.b=c".

    Raises:
        ConfigError: a word that is no option.
    """
    overrides, index = [], 0
    while index < len(rest):
        word = rest[index]
        if not word.startswith("--"):
            raise ConfigError(f"found {word!r}; expected --section.key=value or one of the options of {command} --help")
        word = word[2:]
        if "=" not in word and index + 1 < len(rest) and not rest[index + 1].startswith("--"):
            index += 1
            word = f"{word}={rest[index]}"
        overrides.append(word)
        index += 1
    return overrides

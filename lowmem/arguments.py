"""Command line options, with bad usage reported like every other failure."""

import argparse
from typing import NoReturn

from lowmem.errors import ConfigError


class OptionParser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises `ConfigError` instead of ending the process.

    Args:
        prog: the command, such as "lowmem generate".
        description: what it does, in one sentence.
    """

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")

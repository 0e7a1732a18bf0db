"""`lowmem export` as a script."""

import sys

from lowmem.cli import run_command
from lowmem.export.command import export_main

if __name__ == "__main__":
    sys.exit(run_command(export_main))

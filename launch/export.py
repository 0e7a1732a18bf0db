"""`lowmem export` as a script."""

import sys

from lowmem.cli.export import export_main
from lowmem.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command(export_main))

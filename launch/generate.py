"""`lowmem generate` as a script, so that a launcher can start it."""

import sys

from lowmem.cli.generate import generate_main
from lowmem.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command(generate_main))

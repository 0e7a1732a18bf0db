"""`lowmem generate` as a script, so that a launcher can start it."""

import sys

from lowmem.cli import run_command
from lowmem.generate import generate_main

if __name__ == "__main__":
    sys.exit(run_command(generate_main))

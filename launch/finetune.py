"""`lowmem finetune` as a script, so that a launcher can start it."""

import sys

from lowmem.cli import run_command
from lowmem.finetune.command import finetune_main

if __name__ == "__main__":
    sys.exit(run_command(finetune_main))

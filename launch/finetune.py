"""`lowmem finetune` as a script, so that a launcher can start it."""

import sys

from lowmem.cli.finetune import finetune_main
from lowmem.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command(finetune_main))

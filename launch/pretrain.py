"""`lowmem pretrain` as a script, so that a launcher can start it."""

import sys

from lowmem.cli import run_command
from lowmem.train.pretrain import pretrain_main

if __name__ == "__main__":
    sys.exit(run_command(pretrain_main))

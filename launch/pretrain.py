"""`lowmem pretrain` as a script, so that a launcher can start it."""

from lowmem.cli import run_command
from lowmem.engine.distributed import leave
from lowmem.train.pretrain import pretrain_main

if __name__ == "__main__":
    leave(run_command(pretrain_main))

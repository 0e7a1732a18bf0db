"""`lowmem pretrain` as a script, so that a launcher can start it."""

from lowmem.cli.main import run_command
from lowmem.cli.pretrain import pretrain_main
from lowmem.engine.deepspeed.processes import leave

if __name__ == "__main__":
    leave(run_command(pretrain_main))

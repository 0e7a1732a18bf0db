"""`lowmem finetune` as a script, so that a launcher can start it."""

from lowmem.cli.finetune import finetune_main
from lowmem.cli.main import run_command
from lowmem.engine.deepspeed.processes import leave

if __name__ == "__main__":
    leave(run_command(finetune_main))

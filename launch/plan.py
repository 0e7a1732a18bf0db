"""`lowmem plan` as a script."""

import sys

from lowmem.cli.main import run_command
from lowmem.cli.plan import plan_main

if __name__ == "__main__":
    sys.exit(run_command(plan_main))

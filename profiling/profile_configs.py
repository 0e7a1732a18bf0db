"""Peak memory of configurations, predicted and measured, each in a fresh process: `lowmem profile` as a script.

    python profiling/profile_configs.py configs/cpu/*.yaml --steps 10 --out profiling/results/configs

Writes what the command writes: a JSON file for each, profile.md, profile.html and the figures as SVG.
"""

import sys

from lowmem.cli.main import run_command
from lowmem.cli.profile import profile_main

if __name__ == "__main__":
    sys.exit(run_command(profile_main))

"""Memory measured in a fresh process, so that nothing else moves it.

Tolerance: the kernel keeps resident counters in per-core batches (at most 64 pages of 4 KiB per core and counter, three
counters), which is 1.5 MiB on 2 cores and 6 MiB on 8; Python's own allocations in a block are below 1 MiB. 8 MiB covers both
and is an eighth or less of every quantity tested.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TOLERANCE_MIB = 8.0
linux_only = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def run_and_read_mib(code: str) -> list[float]:
    """Runs `code` in a fresh process and returns the byte counts it prints, in MiB."""
    prelude = """
        import os, subprocess, sys, time
        from lowmem.memory.measure import host_peak_bytes, host_rss_bytes, measure_peak
        MIB = 1 << 20
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return [int(word) / 2**20 for word in result.stdout.split()]

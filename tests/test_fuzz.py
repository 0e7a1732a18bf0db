"""Two minutes of the fuzzer, always the same trials; profiling/fuzz.py says what it does."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "profiling" / "fuzz.py"


@pytest.mark.slow
def test_two_minutes_of_bad_input_find_no_fault(tmp_path):
    command = [sys.executable, str(FUZZ), "--trials", "100", "--jobs", "2", "--keep", str(tmp_path / "faults")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " 0 faults" in done.stdout

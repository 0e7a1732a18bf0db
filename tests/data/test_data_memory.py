"""Memory does not grow with the corpus."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "profiling" / "data_memory.py"
ALLOWED_BYTES = 50_000_000


@pytest.mark.memory
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_fifteen_times_the_text_takes_the_same_memory(tokenizer):
    peaks = {}
    for megabytes in (10, 150):
        command = [sys.executable, str(SCRIPT), "--megabytes", str(megabytes), "--tokenizer", tokenizer]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert result["text_bytes"] == megabytes * 1_000_000
        peaks[megabytes] = result["host_peak_bytes"]
    # the corpus grew by 140 MB and its tokens by 100 to 300 MB: holding either would show
    assert peaks[150] - peaks[10] < ALLOWED_BYTES

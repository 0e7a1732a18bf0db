"""A run whose blocks live on a disk, killed or left without room at any moment, goes on from its last checkpoint to the same bits."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import ROOT, final_bits, metrics, tiny_arguments, write_text

STREAMED = ["--train.update=layerwise", "--train.weights_at=disk", "--train.boundary_offload=disk", "--optim.state_bits=8"]
KILLS, FULL = 8, 6  # profiling/storage_faults.py makes more


def drive(fault: str, call: int, arguments: list[str]) -> subprocess.CompletedProcess:
    driver = Path(__file__).parent / "storage_fault_driver.py"
    command = [sys.executable, str(driver), fault, str(call), "pretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def interrupted(tmp_path: Path, kills: int, full: int) -> None:
    text = write_text(tmp_path / "text.txt")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = drive("kill", 0, [*tiny_arguments(whole, text), *STREAMED])
    assert reference.returncode == 0, reference.stderr
    calls, chooser = int(reference.stdout.split()[-1]), random.Random(7)
    faults, finished = [*["kill"] * kills, *["full"] * full], 0
    chooser.shuffle(faults)
    while faults:
        arguments = [*tiny_arguments(broken, text), *STREAMED]
        leg = drive(faults[0], chooser.randint(1, calls // 2), arguments)
        if leg.returncode == 0:  # it had reached its end before: begin another one
            assert final_bits(broken) == final_bits(whole)
            finished += 1
            broken = tmp_path / f"broken-{finished}"
            continue
        assert leg.returncode == (-signal.SIGKILL if faults[0] == "kill" else 7), leg.stderr
        if faults.pop(0) == "full":
            assert "No space left on device" in leg.stderr.splitlines()[-1]
            assert "Traceback" not in leg.stderr
        assert not [path for path in broken.iterdir() if path.name.startswith(".lowmem-")]
    last = drive("kill", 0, [*tiny_arguments(broken, text), *STREAMED])
    assert last.returncode == 0, last.stderr
    assert final_bits(broken) == final_bits(whole)
    assert metrics(broken) == metrics(whole)


@pytest.mark.slow
def test_killed_and_full_at_any_moment_ends_bit_equal(tmp_path):
    interrupted(tmp_path, KILLS, FULL)

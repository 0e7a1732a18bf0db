"""A run killed at random moments, also inside saves, and resumed by the same command ends bit-equal to one never stopped."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import ROOT, final_bits, metrics, tiny_arguments, write_text

KILLS = 24


def drive(run_dir: Path, event: int, delay_s: float, arguments: list[str]) -> subprocess.CompletedProcess:
    driver = Path(__file__).parent / "kill_driver.py"
    command = [sys.executable, str(driver), str(run_dir), str(event), str(delay_s), "pretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_killed_two_dozen_times_ends_bit_equal(tmp_path):
    text = write_text(tmp_path / "text.txt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = drive(whole, 0, 0, tiny_arguments(whole, text))
    assert reference.returncode == 0, reference.stderr
    events = int(reference.stdout.split()[-1])
    assert events > 200  # 14 saves of more than ten file operations each: kills do fall inside saves

    chooser = random.Random(20)
    arguments = tiny_arguments(killed, text)
    kills, inside_save = 0, 0
    while kills < KILLS:
        # up to a seventh of the whole run each time, so that the run advances and is killed two dozen times
        event, delay_s = chooser.randint(1, events // 7), chooser.choice([0, 0, chooser.random() * 0.004])
        leg = drive(killed, event, delay_s, arguments)
        if leg.returncode == 0:  # finished before it could be killed: start another run to kill
            assert final_bits(killed) == final_bits(whole)
            arguments = [*[a for a in arguments if a != "--fresh"], "--fresh"]
            leg = drive(killed, chooser.randint(20, events // 3), 0, arguments)
            arguments.remove("--fresh")
        assert leg.returncode == -signal.SIGKILL, leg.stderr
        kills += 1
        inside_save += any((killed / "checkpoints").glob(".writing-*"))
    finished = drive(killed, 0, 0, arguments)
    assert finished.returncode == 0, finished.stderr
    assert inside_save >= 3
    assert final_bits(killed) == final_bits(whole)
    assert metrics(killed) == metrics(whole)
    assert not list((killed / "checkpoints").glob(".*ing-*"))

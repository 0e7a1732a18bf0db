"""A run killed at random moments, also inside saves, and resumed by the same command ends bit-equal to one never stopped."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import ROOT, final_bits, metrics, tiny_arguments, write_text

KILLS = 24


def drive(folder: Path, event: int, delay_s: float, arguments: list[str]) -> subprocess.CompletedProcess:
    driver = Path(__file__).parent / "kill_driver.py"
    command = [sys.executable, str(driver), str(folder), str(event), str(delay_s), "pretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_killed_two_dozen_times_ends_bit_equal(tmp_path):
    text = write_text(tmp_path / "text.txt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = drive(whole, 0, 0, tiny_arguments(whole, text))
    assert reference.returncode == 0, reference.stderr
    events = int(reference.stdout.split()[-1])

    chooser = random.Random(20)
    arguments = tiny_arguments(killed, text)
    kills = inside_save = finished = 0
    while kills < KILLS:
        delay_s = chooser.choice([0, 0, chooser.random() * 0.004])
        if kills % 2:  # inside a save: some operation in the folder that a checkpoint is written to, in the first or second save
            leg = drive(killed / "checkpoints" / ".writing-", chooser.randint(1, 12), delay_s, arguments)
        else:  # anywhere: up to a fifth of the whole run's operations
            leg = drive(killed, chooser.randint(1, events // 5), delay_s, arguments)
        if leg.returncode == 0:  # it had reached its end before it was to be killed: begin another one
            assert final_bits(killed) == final_bits(whole)
            finished += 1
            killed = tmp_path / f"killed-{finished}"
            arguments = tiny_arguments(killed, text)
            continue
        assert leg.returncode == -signal.SIGKILL, leg.stderr
        kills += 1
        inside_save += any((killed / "checkpoints").glob(".writing-*"))
    last = drive(killed, 0, 0, arguments)
    assert last.returncode == 0, last.stderr
    assert inside_save >= KILLS // 4
    assert final_bits(killed) == final_bits(whole)
    assert metrics(killed) == metrics(whole)
    assert not list((killed / "checkpoints").glob(".*ing-*"))

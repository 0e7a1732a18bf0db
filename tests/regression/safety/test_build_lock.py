"""A lock that a killed build of DeepSpeed's operators left is removed; one that is held is waited for."""

import os
import subprocess
import sys
import time

import pytest

from lowmem.engine.deepspeed import operators
from lowmem.system.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux")
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); "


def test_a_lock_that_nobody_holds_is_removed(tmp_path):
    (tmp_path / "lock").touch()
    lines = []
    operators.wait_for_build(tmp_path, lines.append)
    assert not (tmp_path / "lock").exists()
    assert lines == [f"{tmp_path.name}: removed {tmp_path / 'lock'}, which a build that was killed has left"]
    operators.wait_for_build(tmp_path, lines.append)
    assert len(lines) == 1


def test_a_lock_that_is_held_is_waited_for(tmp_path):
    lock = tmp_path / "lock"
    code = HOLD + "time.sleep(1); os.remove(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-S", "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        lines = []
        operators.wait_for_build(tmp_path, lines.append)
        assert lines == [f"{tmp_path.name}: waiting for process {process.pid}, which compiles it"]
        assert not lock.exists()


def test_a_holder_that_dies_leaves_nothing_to_wait_for(tmp_path):
    lock = tmp_path / "lock"
    code = HOLD + "time.sleep(600)"
    with subprocess.Popen([sys.executable, "-S", "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"

        def report(line: str) -> None:
            process.kill()
            process.wait()

        operators.wait_for_build(tmp_path, report)
    assert not lock.exists()


def test_where_the_holder_cannot_be_known_the_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="remove that file") as caught:
        operators.wait_for_build(tmp_path, print)
    assert str(tmp_path / "lock") in str(caught.value)
    assert time.monotonic() - began < 10

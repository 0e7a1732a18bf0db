"""Compiling DeepSpeed's operators ahead of a run, as the command a user types."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_command_builds_what_is_missing_without_the_environment_on_path() -> None:
    """ninja sits beside this Python, which is called by its full name here; a first run compiles for minutes."""
    environment = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [sys.executable, "-m", "lowmem.engine.deepspeed.operators"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "cpu_adam: built, cpu_lion: built"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.stdout == "cpu_adam: built, cpu_lion: built\n"


def test_compiler_failure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.engine.deepspeed import operators
    from lowmem.system.errors import ConfigError

    class BrokenBuilder:
        name = "cpu_adam"

        def load(self, verbose: bool) -> None:
            raise RuntimeError("first line\nError building extension 'cpu_adam'")

    monkeypatch.setattr(operators, "import_deepspeed", lambda device_type: None)
    monkeypatch.setattr(operators, "_builder", lambda name: BrokenBuilder())
    monkeypatch.setattr(operators, "_status", lambda builder: "not built")
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"cpu_adam does not compile \(Error building extension 'cpu_adam'\); it needs g\+\+ and ninja"):
        operators.build_deepspeed_ops(report=lines.append)
    assert lines == ["cpu_adam: compiling, about 110 s on two cores"]

"""Who this process is among the ranks, from the launcher's environment variables."""

import subprocess
import sys

import pytest
import torch

from lowmem.engine.deepspeed.processes import launched_by_deepspeed, local_rank, local_world_size, rank, rank_device, world_size

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert not launched_by_deepspeed()
    assert (rank(), world_size(), local_rank(), local_world_size()) == (0, 1, 0, 1)
    assert rank_device(torch.device("cuda", 0)) == torch.device("cuda", 0)


@pytest.mark.parametrize("local_size_name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_launcher_variables_name_the_rank_and_its_gpu(monkeypatch: pytest.MonkeyPatch, local_size_name: str) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), (local_size_name, "4")):
        monkeypatch.setenv(name, value)
    assert launched_by_deepspeed()
    assert (rank(), world_size(), local_rank(), local_world_size()) == (5, 8, 1, 4)
    assert rank_device(torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert rank_device(torch.device("cpu")) == torch.device("cpu")


def test_engine_modules_do_not_import_deepspeed() -> None:
    code = "import sys, lowmem.engine.deepspeed.engine, lowmem.engine.deepspeed.operators; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0

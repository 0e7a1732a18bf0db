"""Memory limits in fresh processes: refused when already exceeded, and an error, not a kill, for what goes past them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.memory.procfs import status_bytes
from tests.train.tiny_run import ROOT, lowmem, tiny_arguments, write_text

pytestmark = pytest.mark.skipif("VmData" not in (status_bytes() or {}), reason="this kernel does not tell a process's private memory")

MIB = 1 << 20


def python(code: str, *arguments: object) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_limit_below_what_is_used_is_refused_and_not_set():
    code = """
import resource
from lowmem.system.errors import MemoryBudgetError
from lowmem.memory.limits import limit_host_memory
ballast = b"x" * (100 << 20)
before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    limit_host_memory(100 << 20)  # the ballast alone takes as much, the interpreter and torch come on top
except MemoryBudgetError as error:
    print(error)
assert resource.getrlimit(resource.RLIMIT_DATA) == before
"""
    message = python(code)
    assert message.startswith("this process already has ")
    assert "its limit is 100" in message
    assert message.endswith("use a larger budget.ram, or leave it empty")


def test_allocations_past_the_limit_raise_out_of_memory_and_the_process_lives_on():
    code = """
import numpy, torch
from lowmem.memory.limits import is_out_of_memory, limit_host_memory
from lowmem.memory.procfs import status_bytes
limit_host_memory(status_bytes()["VmRSS"] + (220 << 20))
size = 400 << 20
for allocate in (lambda: torch.empty(size, dtype=torch.uint8), lambda: bytearray(size), lambda: numpy.empty(size, numpy.uint8)):
    try:
        allocate()
    except (MemoryError, RuntimeError) as error:
        print(is_out_of_memory(error))
    fits = torch.ones(50 << 20, dtype=torch.uint8)
    assert fits[-1] == 1
    del fits
print(is_out_of_memory(RuntimeError("shapes differ")), is_out_of_memory(ValueError("out of memory")))
"""
    assert python(code).split() == ["True", "True", "True", "False", "False"]


SET_UP = """
import sys
from lowmem.config.load import load_run_config
from lowmem.memory.procfs import status_bytes
from lowmem.train.display import make_display
from lowmem.train.setup import set_up
run = set_up(load_run_config("", sys.argv[1:]), make_display(quiet=True))
print(status_bytes()["VmHWM"])
"""


def limited_arguments(folder: Path, spare_mib: int, shape: dict[str, object]) -> list[str]:
    """Of a run whose budget is what its set-up needs, measured without a limit, and `spare_mib`."""
    shape = {"model.dim": 64, "train.activation_checkpointing": "none", "train.eval_every": 0, **shape}
    write_text(folder / "text.txt", lines=6000)
    measured = tiny_arguments(folder / "measured", folder / "text.txt", **shape)
    set_up_bytes = int(python(SET_UP, *(argument.removeprefix("--") for argument in measured)))
    return tiny_arguments(folder / "run", folder / "text.txt", **shape, **{"budget.ram": f"{set_up_bytes // MIB + spare_mib}MiB"})


@pytest.mark.slow
def test_a_step_that_is_too_big_is_done_with_smaller_micro_batches(tmp_path: Path):
    # A step keeps more than qkv (3 * 64 numbers) and gate_up (2 * 192) of each of 2 layers and 256 * 256 tokens in fp32:
    # 2 * 576 * 65536 * 4 bytes = 302 MB. 160 MiB = 168 MB are there; micro-batches of 4 sequences need a 64th of a step's activations.
    shape: dict[str, object] = {"data.seq_len": 256, "train.global_batch_size": 256, "train.micro_batch_size": 256, "train.steps": 2}
    result = lowmem("pretrain", "--quiet", "--force", *limited_arguments(tmp_path, 160, shape))
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["tokens"] for record in steps] == [256 * 256, 2 * 256 * 256]
    assert all(record["micro_batch_size"] in (128, 64, 32, 16, 8, 4) for record in steps)


@pytest.mark.slow
def test_a_sequence_that_is_too_big_ends_with_3(tmp_path: Path):
    # one sequence keeps more than 2 * 576 * 8192 * 4 bytes = 38 MB; 24 MiB are there
    shape: dict[str, object] = {"data.seq_len": 8192, "train.global_batch_size": 2, "train.micro_batch_size": 2, "train.steps": 1}
    result = lowmem("pretrain", "--quiet", "--force", *limited_arguments(tmp_path, 24, shape))
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith("lowmem: error: memory ran out with micro-batches of 1 sequence (")
    assert "use train.activation_checkpointing=block, train.update=layerwise, optim.state_bits=4, a shorter data.seq_len" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_budget_below_what_the_program_itself_needs_is_refused_before_the_start(tmp_path: Path):
    write_text(tmp_path / "text.txt")
    arguments = tiny_arguments(tmp_path / "run", tmp_path / "text.txt", budget__ram="20MiB")
    result = lowmem("pretrain", "--quiet", *arguments)
    assert result.returncode == 3, result.stderr
    assert "of RAM, the budget is 20MiB" in result.stderr
    assert "--force starts it all the same" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
    forced = lowmem("pretrain", "--quiet", "--force", *arguments)
    assert forced.returncode == 3, forced.stderr
    assert "its limit is 20" in forced.stderr
    assert "Traceback" not in forced.stderr

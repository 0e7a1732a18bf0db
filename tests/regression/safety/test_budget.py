"""A limit on memory ends in a recovered step or in exit code 3 with one line, never in a segmentation fault or a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.memory import host
from lowmem.memory.allocator import block_cache_library
from lowmem.memory.limits import is_out_of_memory
from lowmem.planning import check
from lowmem.system.devices import cxx_compiler
from lowmem.system.errors import StorageError
from lowmem.system.files import compiled_root
from tests.train.tiny_run import ROOT, finetune_arguments, lowmem, tiny_arguments, write_text

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")
needs_compiler = pytest.mark.skipif(sys.platform != "linux" or not cxx_compiler(), reason="Linux, a compiler")

LIMITED = """
import sys, ctypes, json, mmap, os, signal
from pathlib import Path
import torch
from lowmem.memory.allocator import set_up_host_memory
from lowmem.memory.limits import limit_host_memory
from lowmem.memory.host import own_memory
torch.set_num_threads(1)
if sys.argv[1] == "cache":
    assert set_up_host_memory(Path(sys.argv[2])) == ""
torch.ones(1 << 20).sum()
limit_host_memory(own_memory()[0] + (100 << 20))
"""


def process(code: str, kind: str = "cache") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED + code, kind, str(compiled_root())]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@needs_compiler
def test_a_refused_tensor_leaves_memory_to_every_other_library():
    code = """
limit, blocks = own_memory()[0] + (100 << 20), []
try:
    while True:
        blocks.append(torch.ones(1 << 20, dtype=torch.uint8))
except RuntimeError as error:
    refused = isinstance(error, torch.OutOfMemoryError)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
small = [libc.malloc(ctypes.c_size_t(300_000)) for _ in range(100)]  # 30 MB, which nobody touches
print(json.dumps([refused, len(blocks), own_memory()[0], None in small, limit]))
"""
    result = process(code)
    assert result.returncode == 0, result.stderr
    refused, blocks, resident, failed, limit = json.loads(result.stdout)
    assert refused
    assert 80 <= blocks <= 100  # 100 MiB less the reserve of 8 and what else grew, and 4 that were kept from before
    assert resident <= limit
    assert not failed


@needs_compiler
def test_what_the_kernel_counts_as_resident_stays_below_the_limit():
    code = """
limit = own_memory()[0] + (100 << 20)
limit_host_memory(limit)
peak = 0
for size in (1, 3, 7, 20, 60):  # blocks that are kept make room for others; none is touched before the next one is made
    try:
        blocks = [torch.empty(size << 20, dtype=torch.uint8) for _ in range(200)]
    except RuntimeError:
        pass
    blocks = []
    try:
        while True:
            blocks.append(torch.ones(size << 20, dtype=torch.uint8))
            peak = max(peak, own_memory()[0])
    except RuntimeError:
        pass
print(json.dumps([limit, peak, own_memory()[1]]))
"""
    result = process(code)
    assert result.returncode == 0, result.stderr
    limit, peak, high_water = json.loads(result.stdout)
    assert peak <= high_water <= limit


@linux
def test_a_crash_near_the_limit_is_one_line_and_3():
    code = """
kept = mmap.mmap(-1, 60 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # 76 MiB are left of the budget: 60 of them are used up
ctypes.string_at(0)
"""
    result = process(code, "no cache")
    assert result.returncode == 3
    assert result.stderr.startswith("lowmem: error: memory ran out: a library ended with SIGSEGV after ")
    assert len(result.stderr.splitlines()) == 1


@linux
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("can't start new thread"),
        ImportError("libfoo.so: failed to map segment from shared object"),
        OSError(12, os.strerror(12)),
    ],
)
def test_other_libraries_words_for_memory_that_ran_out_are_known(error):
    assert is_out_of_memory(error)
    report = StorageError("cannot be written")
    report.__cause__ = error
    assert is_out_of_memory(report)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("spare_mib", [-60, -20, 6, 20, 60])
def test_every_budget_ends_in_order_and_holds(tmp_path: Path, spare_mib: int):
    text = write_text(tmp_path / "text.txt", lines=6000)
    shape: dict[str, object] = {"model.dim": 64, "data.seq_len": 64, "train.steps": 2, "train.eval_every": 2, "train.save_every": 2}
    tiny = {"train.micro_batch_size": 1, "train.global_batch_size": 8, "train.steps": 1}
    shape |= {"train.global_batch_size": 512, "train.micro_batch_size": 512, "train.activation_checkpointing": "none"}
    small = tiny_arguments(tmp_path / "small", text, **{**shape, **tiny})
    assert lowmem("pretrain", "--quiet", *small).returncode == 0
    base = json.loads((tmp_path / "small" / "memory.json").read_text())["measured"]["host_peak_bytes"]
    budget = base // MIB + spare_mib
    arguments = tiny_arguments(tmp_path / "run", text, **shape, **{"budget.ram": f"{budget}MiB"})
    result = lowmem("pretrain", "--quiet", "--force", *arguments)
    assert result.returncode in (0, 3), result.stderr
    assert len(result.stderr.splitlines()) == (1 if result.returncode else 0), result.stderr
    if result.returncode == 0:
        peak = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["host_peak_bytes"]
        assert peak <= budget * MIB


def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    """Nor one that is damaged, or not what was compiled: each is compiled anew."""
    if not cxx_compiler():
        pytest.skip("a compiler")
    block_cache_library.cache_clear()
    folder = tmp_path / "compiled"
    library, problem = block_cache_library(folder)
    assert (library is not None, problem) == (True, "")
    path = next(folder.glob("*.so"))
    whole = path.read_bytes()

    def again() -> bytes:
        block_cache_library.cache_clear()
        library, problem = block_cache_library(folder)
        assert (library is not None, problem) == (True, "")
        return path.read_bytes()

    planted = b"\x7fELF planted"
    for damaged in (whole[: len(whole) // 2], planted, whole[:2000] + b"\0" + whole[2001:], b""):
        path.unlink()
        path.write_bytes(damaged)
        assert len(again()) > 1000
    mark = path.stat().st_ino
    path.chmod(0o666)
    again()
    assert path.stat().st_ino != mark
    mark = path.stat().st_ino
    folder.chmod(0o777)
    again()
    assert path.stat().st_ino != mark
    assert folder.stat().st_mode & 0o022 == 0
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    os.chown(folder, 23456, -1)
    block_cache_library.cache_clear()
    library, problem = block_cache_library(folder)
    assert library is None
    assert f"{folder} belongs to user 23456" in problem
    assert len(problem.splitlines()) == 1
    block_cache_library.cache_clear()


def within(monkeypatch, room: int | None) -> None:
    """A container that leaves `room` bytes to this process."""
    monkeypatch.setattr(host, "cgroup_room_bytes", lambda own_bytes: room)


@pytest.mark.parametrize(
    "budget, room, holds, said",
    [
        (0, None, 0, ""),
        (4 << 30, None, 4 << 30, ""),
        (1 << 30, 2 << 30, 1 << 30, ""),
        (0, 2 << 30, 2 << 30, "leaves 2.00 GiB: that is the budget"),
        (4 << 30, 2 << 30, 2 << 30, "leaves 2.00 GiB, less than budget.ram=4.00 GiB: that is the budget"),
    ],
)
def test_the_smaller_of_budget_and_container_holds(budget, room, holds, said, monkeypatch):
    within(monkeypatch, room)
    granted, line = host.granted_memory(budget)
    assert granted == holds
    assert line.endswith(said) if said else not line


def test_pretraining_and_finetuning_stay_within_the_container(base, chat, monkeypatch, tmp_path, capsys):
    within(monkeypatch, 50 * MIB)  # less than this process has: either is refused before anything is read
    text = write_text(tmp_path / "text.txt")
    for words in (["pretrain", *tiny_arguments(tmp_path / "run", text)], ["finetune", *finetune_arguments(base, chat, tmp_path / "tuned")]):
        capsys.readouterr()
        assert main(words) == 3
        error = capsys.readouterr().err
        assert "the memory limit of this container (its control group) leaves 50" in error
        assert "its limit is 50" in error


def test_a_budget_beyond_the_container_is_predicted_by_the_container(base, chat, monkeypatch, tmp_path, capsys):
    within(monkeypatch, 50 * MIB)
    asked = []

    def refused(config, *_):
        asked.append(config.budget.ram)
        return {"predicted": {}, "summary": "", "micro_batch_size": 1, "refusal": "too large"}

    monkeypatch.setattr(check, "check_run", refused)
    assert main(["finetune", *finetune_arguments(base, chat, tmp_path / "tuned", budget__ram="1GiB")]) == 3
    assert asked == [f"{50 * MIB}B"]


def test_a_prediction_that_the_kernel_killed_is_a_refusal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    arguments = tiny_arguments(tmp_path / "run", write_text(tmp_path / "text.txt"), **{"budget.ram": "4GiB"})
    assert main(["pretrain", "--quiet", *arguments]) == 3
    assert "could not be predicted: the process that predicts it takes some 400 MB and was killed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""The cost of interpreter and libraries: measured once per kind, kept, measured anew when something that decides it changes.

The measuring run is stubbed: a process that writes the memory.json and the config.yaml that a run would.
"""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

from lowmem.config.dump import dump_config
from lowmem.config.load import load_run_config
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.memory.allocator import block_cache_library
from lowmem.planning import base_cost
from lowmem.planning.base_cost import CUDA_HOST_BYTES, data_bytes, measured_base
from lowmem.system.errors import ConfigError, MemoryBudgetError
from lowmem.system.files import compiled_root
from tests.planning.small import small_config

MEASURED, TENSORS = 300_000_000, 7_000_000


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """Commands of the measuring runs so far."""
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        overrides = [word[2:] for word in command if word.startswith("--") and "=" in word]
        folder = Path(next(word for word in overrides if word.startswith("run_dir=")).partition("=")[2])
        folder.mkdir()
        (folder / "memory.json").write_text(json.dumps({"measured": {"host_peak_bytes": MEASURED}}))
        (folder / "config.yaml").write_text(dump_config(load_run_config(overrides=overrides)))
        return subprocess.CompletedProcess(command, 0, "", "")

    block_cache_library(compiled_root())  # its compiler is a process too
    monkeypatch.setattr(platform, "processor", lambda: "a processor")  # asks `uname`, a process too
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def base(tmp_path: Path, *settings: str, ranks: int = 1) -> base_cost.Base:
    return measured_base(small_config(f"data.cache_dir={tmp_path}", *settings), ranks, lambda config, world_size: TENSORS)


def test_it_is_what_a_tiny_run_takes_beyond_its_tensors_and_batches(tmp_path, runs):
    found = base(tmp_path)
    assert found.source == "measured"
    assert found.size_bytes == MEASURED - TENSORS - 3 * 8 * 4 * 257  # of the trial: 4 sequences of 256 tokens and one
    assert len(runs) == 1
    assert "pretrain" in runs[0]
    assert not Path(next(word for word in runs[0] if word.startswith("--run_dir=")).partition("=")[2]).parent.exists()


def test_the_second_time_it_is_read_from_the_cache(tmp_path, runs):
    assert base(tmp_path) == base(tmp_path)
    assert base(tmp_path, "model.dim=128", "train.steps=9", "data.seq_len=64") == base(tmp_path)  # the same kind
    assert base(tmp_path, "model.positions=alibi", "model.norm=layernorm") == base(tmp_path)
    assert base(tmp_path, "optim.state_bits=8") == base(tmp_path, "optim.state_bits=4")
    base(tmp_path, "optim.state_bits=8", "optim.name=lion")  # the same library: lowmem's own
    assert len(runs) == 2
    assert len(list((tmp_path / "base").iterdir())) == 2


@pytest.mark.parametrize("settings", [
    ["optim.state_bits=8"], ["train.update=layerwise"], ["train.precision=bf16"], ["train.threads=7"], ["optim.name=lion"],
    ['loggers=["tensorboard"]'], ["engine.name=deepspeed"], ["train.weight_dtype=int8"],
])  # fmt: skip
def test_another_kind_of_run_is_measured_anew(tmp_path, runs, settings):
    base(tmp_path)
    base(tmp_path, *settings)
    assert len(runs) == 2
    assert f"--{settings[0]}" in runs[1]


def test_other_versions_threads_and_ranks_are_measured_anew(tmp_path, runs, monkeypatch):
    base(tmp_path)
    monkeypatch.setattr(base_cost, "version", lambda name: "0.0.1")
    base(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "97")
    base(tmp_path)
    base(tmp_path, "engine.name=deepspeed", ranks=2)
    assert len(runs) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000)))
    base(tmp_path)
    assert len(runs) == 5
    base(tmp_path)
    assert len(runs) == 5


def test_ranks_are_started_by_the_launcher(tmp_path, runs):
    base(tmp_path, "engine.name=deepspeed", ranks=2)
    assert any(Path(word).name == "deepspeed" for word in runs[0][: runs[0].index("--num_gpus")])
    assert runs[0][runs[0].index("--num_gpus") + 1] == "2"


@pytest.mark.parametrize("stderr, stdout, last", [("first\nlowmem: error: no\n", "", "lowmem: error: no"), ("", "a\nb\n", "b")])
def test_a_trial_that_fails_is_reported_with_its_last_line(tmp_path, runs, monkeypatch, stderr, stdout, last):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 4, stdout, stderr))
    with pytest.raises(ConfigError, match=f"its trial ended with 4: {last}$"):
        base(tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


def test_without_cuda_the_cost_of_a_gpu_is_estimated_from_that_of_a_cpu(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(base_cost, "_cuda_here", lambda: False)
    on_cpu = base(tmp_path, "train.precision=bf16")
    found = base(tmp_path, "device=cuda", "train.precision=fp16")
    assert (found.size_bytes, found.source) == (on_cpu.size_bytes + CUDA_HOST_BYTES, "estimated")
    assert len(runs) == 1


def test_tokenizers_and_batches_are_counted():
    batches = 3 * 8 * 4 * 33
    assert data_bytes(small_config()) == base_cost.UNSEEN_BYTES + batches
    rows = 3000 * base_cost._TOKENIZER_BYTES_PER_ROW
    own = ["data.tokenizer=bpe", "data.tokenizer_vocab_size=3000"]
    assert data_bytes(small_config(*own, "model.vocab_size=3000")) == base_cost.UNSEEN_BYTES + batches + rows
    assert data_bytes(small_config(*own, "model.vocab_size=50000")) == base_cost.UNSEEN_BYTES + batches + rows  # rows of the model alone


def test_a_tokenizer_file_tells_its_rows_and_its_kind(tmp_path):
    library = Library(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    library.save(str(tmp_path / "library.json"))
    ByteTokenizer().save(tmp_path / "bytes.json")
    config = small_config(f"data.tokenizer={tmp_path}/library.json", "model.vocab_size=100")
    assert base_cost.tokenizer_rows(config.data) == 3
    assert "data.tokenizer=bpe" in base_cost._kind(config)
    config = small_config(f"data.tokenizer={tmp_path}/bytes.json")
    assert base_cost.tokenizer_rows(config.data) == ByteTokenizer().vocab_size
    assert "data.tokenizer=bytes" in base_cost._kind(config)


@pytest.mark.parametrize("code", [-9, 137, 3])
def test_a_trial_that_memory_ends_is_a_refusal(tmp_path, runs, monkeypatch, code):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, "", ""))
    with pytest.raises(MemoryBudgetError, match=f"its trial ended with {code}"):
        base(tmp_path)


def test_a_trial_with_a_tokenizer_prepares_its_text_in_another_process(tmp_path, runs, monkeypatch):
    prepared = []
    train = subprocess.run

    def run(command, **more):
        if "pretrain" in command:
            return train(command, **more)
        prepared.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    base(tmp_path)
    assert prepared == []
    base(tmp_path, "data.tokenizer=bpe")
    assert len(prepared) == 1
    assert "--data.tokenizer=bpe" in runs[-1]

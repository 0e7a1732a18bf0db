"""What a run costs before its first tensor: interpreter, libraries, compiled kernels. Measured on this machine, once per kind of run.

The measurement is a run of a model of a few thousand parameters in fresh processes, with everything a run does; what the predictor says
its tensors take is subtracted. Results are kept in the cache, by versions and machine.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from lowmem.config import RunConfig
from lowmem.config_load import load_run_config
from lowmem.data.storage import cache_root, json_sha256
from lowmem.errors import ConfigError

CUDA_HOST_BYTES = 1_300_000_000  # libraries and driver of a process that uses CUDA; an estimate where it cannot be measured
_TOKENIZER_BYTES_PER_ROW = 1_500  # a byte-level BPE in memory: its vocabulary and merges, both ways
_LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "lion-pytorch", "tokenizers", "numpy", "lowmem")
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 2000


@dataclass(frozen=True)
class Base:
    """Bytes of all processes of a run, and where the number comes from."""

    size_bytes: int
    source: Literal["measured", "estimated"]


def data_bytes(config: RunConfig) -> int:
    """Tokenizer and batches on the host."""
    rows = config.model.vocab_size if config.data.tokenizer not in ("bytes", "chars") else 0
    return rows * _TOKENIZER_BYTES_PER_ROW + 3 * 8 * config.train.global_batch_size * (config.data.seq_len + 1)


def measured_base(config: RunConfig, world_size: int, tensor_peak: Callable[[RunConfig, int], int]) -> Base:
    """The base cost of a run like `config`.

    Args:
        config: resolved.
        world_size: ranks on this machine.
        tensor_peak: predicts what the tensors of a run take on the host.
    Raises:
        ConfigError: the measuring run failed; the message has its last line.
    """
    if config.device == "cuda" and not _cuda_here():
        cpu = measured_base(_on_cpu(config), world_size, tensor_peak)
        return Base(cpu.size_bytes + CUDA_HOST_BYTES * world_size, "estimated")
    settings = _kind(config)
    key = json_sha256(
        [settings, world_size, _versions(), platform.processor(), len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]
    )
    path = cache_root(config.data.cache_dir) / "base" / f"{key[:24]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        size = _measure(settings, world_size, tensor_peak)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"base_bytes": size, "settings": settings, "world_size": world_size}))
        temporary.replace(path)
    return Base(json.loads(path.read_text())["base_bytes"], "measured")


def _kind(config: RunConfig) -> list[str]:
    """The settings that decide which libraries and kernels a run loads, as overrides."""
    model, train, optim, engine = config.model, config.train, config.optim, config.engine
    bits = optim.state_bits if optim.state_bits == 32 else 8
    return [
        f"model.name={model.name}", "model.dim=256", "model.num_layers=2", "model.num_heads=4",
        f"model.activation={model.activation}", f"model.norm={model.norm}", f"model.positions={model.positions}",
        f"train.precision={train.precision}", f"train.weight_dtype={train.weight_dtype}", f"train.update={train.update}",
        f"optim.name={optim.name}", f"optim.state_bits={bits}", f"optim.backend={optim.backend}", f"device={config.device}",
        f"engine.name={engine.name}", f"engine.zero_stage={engine.zero_stage}", f"engine.offload={engine.offload}",
        f"engine.config={Path(engine.config).resolve() if engine.config else ''}", f"train.threads={train.threads}",
    ]  # fmt: skip


def _measure(settings: Sequence[str], world_size: int, tensor_peak: Callable[[RunConfig, int], int]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="lowmem-base-"))
    try:
        (folder / "text.txt").write_text(_TEXT)
        overrides = [
            *settings, f"data.sources=[{{path: {folder}/text.txt}}]", "data.tokenizer=bytes", "data.seq_len=256", "data.val_fraction=0.1",
            f"data.cache_dir={folder / 'cache'}", f"train.global_batch_size={4 * world_size}", "train.micro_batch_size=2",
            "train.steps=4", "train.eval_every=4", "train.eval_sequences=4", "train.save_every=4", f"run_dir={folder / 'run'}",
        ]  # fmt: skip
        arguments = ["lowmem.cli", "pretrain", "--quiet", *(f"--{override}" for override in overrides)]
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
        environment = {**inherited, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [sys.executable, "-m", *arguments]
        if world_size > 1:
            launcher = str(Path(sys.executable).parent / "deepspeed")
            command = [
                launcher,
                "-q",
                "--no_local_rank",
                "--master_port",
                str(_free_port()),
                "--num_gpus",
                str(world_size),
                "--module",
                *arguments,
            ]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        report = folder / "run" / "memory.json"
        if result.returncode or not report.exists():
            last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            raise ConfigError(
                f"the base cost of such a run could not be measured, its trial ended with {result.returncode}: {' '.join(last)}"
            )
        measured = json.loads(report.read_text())["measured"]["host_peak_bytes"]
        config = load_run_config(folder / "run" / "config.yaml")
        return measured - tensor_peak(config, world_size) - data_bytes(config) * world_size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _on_cpu(config: RunConfig) -> RunConfig:
    from copy import deepcopy

    config = deepcopy(config)
    config.device = "cpu"
    config.train.precision = "bf16" if config.train.precision == "fp16" else config.train.precision
    config.train.weight_dtype = "bf16" if config.train.weight_dtype == "fp16" else config.train.weight_dtype
    return config


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _cuda_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

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
from typing import Any, Literal

from lowmem.config.checks import QUANTIZED
from lowmem.config.load import load_run_config
from lowmem.config.schema import DataConfig, RunConfig
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.memory.allocator import KEEP_FROM_BYTES, MAP_FROM_BYTES, block_cache_library
from lowmem.system.devices import cpu_model, usable_cores
from lowmem.system.errors import ConfigError, MemoryBudgetError
from lowmem.system.files import cache_root, cached_json, compiled_root, file_sha256, json_sha256
from lowmem.system.light_imports import LEFT_OUT
from lowmem.system.process import KILLED, with_parent
from lowmem.system.tensors import write_tensors

CUDA_HOST_BYTES = 1_300_000_000  # libraries and driver of a process that uses CUDA; an estimate where it cannot be measured
UNSEEN_BYTES = 8_000_000  # what a larger model than the trial's adds besides tensors: kernels for more shapes, autograd's nodes
_TOKENIZER_BYTES_PER_ROW = 1_200  # a byte-level BPE in memory: vocabulary and merges, both ways; 27 MB of 24,000 rows, 12 of 8,000
_TRIAL_TOKENIZER_ROWS = 300
_TRIAL_MODEL, _TRIAL_SHAPE = "TRIAL", ("model.dim=256", "model.num_layers=2", "model.num_heads=4")
_MOST_BYTES = 1 << 50  # of a base cost that can be true
_LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "lion-pytorch", "peft", "transformers", "tokenizers", "numpy", "lowmem")
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 2000


@dataclass(frozen=True)
class Base:
    """Bytes of all processes of a run, and where the number comes from."""

    size_bytes: int
    source: Literal["measured", "estimated"]


def data_bytes(config: RunConfig) -> int:
    """Tokenizer, batches, and what is no tensor and yet grows, on the host."""
    rows = min(config.model.vocab_size, tokenizer_rows(config.data) or config.model.vocab_size) if _has_library(config.data) else 0
    return UNSEEN_BYTES + rows * _TOKENIZER_BYTES_PER_ROW + 3 * 8 * config.train.global_batch_size * (config.data.seq_len + 1)


def tokenizer_rows(data: DataConfig) -> int:
    """Rows the tokenizer will have: its configured size for those that are trained; 0 where only the text or the hub tells."""
    if data.tokenizer in ("bpe", "chunk"):
        return data.tokenizer_vocab_size
    if data.tokenizer == "bytes":
        return ByteTokenizer().vocab_size
    path = Path(data.tokenizer).expanduser()
    return load_tokenizer(path).vocab_size + len(data.add_tokens) if data.tokenizer != "chars" and path.exists() else 0


def _has_library(data: DataConfig) -> bool:
    """Whether the tokenizer is one of the tokenizers library."""
    path = Path(data.tokenizer).expanduser()
    if data.tokenizer in ("bytes", "chars", "chunk"):
        return False
    return not path.exists() or load_tokenizer(path).kind in ("bpe", "huggingface")


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
    document = file_sha256(Path(config.engine.config)) if config.engine.config else ""
    kept = KEEP_FROM_BYTES, MAP_FROM_BYTES, not block_cache_library(compiled_root())[1]  # another rule of the allocator is another cost
    threads = os.environ.get("OMP_NUM_THREADS")
    key = json_sha256([settings, document, world_size, _versions(), cpu_model(), usable_cores(), threads, kept, LEFT_OUT])
    path = cache_root(config.data.cache_dir) / "base" / f"{key[:24]}.json"

    def measure() -> dict[str, Any]:
        print(f"measuring what such a run costs before its first tensor (once, some seconds): {path.stem}", file=sys.stderr)
        return {"base_bytes": _measure(settings, world_size, tensor_peak), "settings": settings, "world_size": world_size}

    return Base(cached_json(path, _base_bytes, measure), "measured")


def _base_bytes(value: Any) -> int:
    """What a file of the cache says.

    Raises:
        ValueError: it says nothing that can be true.
    """
    size = value["base_bytes"]
    if type(size) is not int or not 0 < size < _MOST_BYTES:
        raise ValueError("no number of bytes")
    return size


def _kind(config: RunConfig) -> list[str]:
    """The settings that decide which libraries and kernels a run loads, as overrides; a test compares the modules.

    lowmem's own optimizers are one kind, for all widths of states and of floating-point weights; torch's and lion-pytorch's import more,
    and so do quantised weights, PEFT for adapters other than a prefix, and bitsandbytes for NF4. Tokenizers of the tokenizers library are
    one kind, and those of lowmem, which are plain Python, another.
    """
    model, train, optim, engine = config.model, config.train, config.optim, config.engine
    adapted = config.adapter.method not in ("none", "head", "last_k")  # what is trained has 32 bits then, whatever the weights have
    narrow_weights = train.weight_dtype != "fp32" and not adapted
    narrow = optim.state_bits != 32 or narrow_weights or train.update == "layerwise" or optim.name == "spectron"
    own = optim.backend == "lowmem" and narrow and engine.name == "local"
    weights = "int8" if train.weight_dtype in QUANTIZED else "fp32" if own and train.weight_dtype != "nf4" else train.weight_dtype
    tokenizer = ["data.tokenizer=bpe", f"data.tokenizer_vocab_size={_TRIAL_TOKENIZER_ROWS}"] if _has_library(config.data) else []
    tokenizer = ["data.tokenizer=bpe"] if tokenizer and model.path else tokenizer  # of the model's own directory
    return [
        *([f"model.path={_TRIAL_MODEL}"] if model.path else [f"model.name={model.name}", *_TRIAL_SHAPE]),
        f"adapter.method={config.adapter.method if config.adapter.method == 'prefix' else 'lora' if adapted else 'none'}",
        f"train.precision={train.precision}",
        f"train.update={train.update}",
        f"train.weight_dtype={weights}",
        f"optim.name={'adamw' if own else optim.name}",
        f"optim.state_bits={8 if own else optim.state_bits}",
        f"optim.backend={optim.backend}",
        f"device={config.device}",
        f"engine.name={engine.name}",
        f"engine.zero_stage={engine.zero_stage}",
        f"engine.offload={engine.offload}",
        f"engine.config={Path(engine.config).resolve() if engine.config else ''}",
        f"train.threads={train.threads}",
        f"loggers={json.dumps([name for name in config.loggers if name == 'tensorboard'])}",
        *(tokenizer or ["data.tokenizer=bytes"]),
    ]


def trial_settings(settings: Sequence[str], folder: Path, world_size: int) -> list[str]:
    """Overrides of the run that is measured; its text is written to `folder`."""
    (folder / "text.txt").write_text(_TEXT)
    if f"model.path={_TRIAL_MODEL}" in settings:
        write_trial_model(folder / "model")
        settings = [setting.replace(_TRIAL_MODEL, str(folder / "model")) for setting in settings]
    return [
        *settings, f"data.sources=[{{path: {folder}/text.txt}}]", "data.seq_len=256", "data.val_fraction=0.1",
        f"data.cache_dir={folder / 'cache'}", f"train.global_batch_size={4 * world_size}", "train.micro_batch_size=2",
        "train.steps=4", "train.eval_every=4", "train.eval_sequences=4", "train.save_every=4", f"run_dir={folder / 'run'}",
    ]  # fmt: skip


def write_trial_model(folder: Path) -> None:
    """A Llama of transformers of some thousand parameters with a tokenizer: all families import about the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2 * _TRIAL_TOKENIZER_ROWS, **shape))
    model.config.save_pretrained(folder)  # the model's own would import DeepSpeed, which talks on standard output
    write_tensors(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
    HuggingFaceTokenizer.train([_TEXT], _TRIAL_TOKENIZER_ROWS).save(folder / "tokenizer.json")


def _measure(settings: Sequence[str], world_size: int, tensor_peak: Callable[[RunConfig, int], int]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="lowmem-base-"))
    try:
        overrides = [f"--{override}" for override in trial_settings(settings, folder, world_size)]
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
        environment = {**inherited, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        if (
            "data.tokenizer=bytes" not in settings and f"model.path={_TRIAL_MODEL}" not in settings
        ):  # what a tokenizer takes while it is trained is no part of the base
            _run([sys.executable, "-c", _PREPARE, *overrides], environment)
        _run(_command(["lowmem", "pretrain", "--quiet", *overrides], world_size), environment)
        report = folder / "run" / "memory.json"
        if not report.exists():
            raise ConfigError("the base cost of such a run could not be measured: its trial left no memory.json")
        measured = json.loads(report.read_text())["measured"]["host_peak_bytes"]
        config = load_run_config(folder / "run" / "config.yaml")
        return measured - tensor_peak(config, world_size) - (data_bytes(config) - UNSEEN_BYTES) * world_size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_PREPARE = """
import sys
from lowmem.config.load import load_run_config
from lowmem.data.prepare import prepare_data
config = load_run_config(overrides=[argument[2:] for argument in sys.argv[1:]])
prepare_data(config.data, seed=config.train.seed)
"""


def _command(arguments: list[str], world_size: int) -> list[str]:
    """What starts a module on so many ranks."""
    if world_size == 1:
        return [sys.executable, "-m", *arguments]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--no_local_rank", "--master_port", str(_free_port())]
    return [*launcher, "--num_gpus", str(world_size), "--module", *arguments]


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a part of the trial.

    Raises:
        MemoryBudgetError: it ran out of memory, or was killed, which is what the system does then.
        ConfigError: it failed.
    """
    result = subprocess.run(with_parent(command), capture_output=True, text=True, env=environment)
    if not result.returncode:
        return
    last = " ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-1:])
    problem = f"the base cost of such a run could not be measured, its trial ended with {result.returncode}: {last}"
    if result.returncode in (*KILLED, MemoryBudgetError.exit_code):
        raise MemoryBudgetError(f"{problem}; a run of a few thousand parameters does not fit the memory that is free: free some")
    raise ConfigError(problem)


def _on_cpu(config: RunConfig) -> RunConfig:
    from copy import deepcopy

    config = deepcopy(config)
    config.device = "cpu"
    config.train.precision = "bf16" if config.train.precision in ("fp16", "fp8") else config.train.precision
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

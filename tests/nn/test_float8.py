"""fp8 layers: numerics by torchao's emulation in a process of its own, refusals without torchao's import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem.config.load import load_run_config
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.nn.float8 import fits_float8, use_float8
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.planning.levers import levers
from lowmem.planning.trace import trace_run
from lowmem.system import devices
from lowmem.system.errors import ConfigError

HALF_ULP = 2.0**-8  # of bf16, relative
WORKER = Path(__file__).with_name("float8_worker.py")


def check_worker(device: str) -> None:
    command = [sys.executable, "-W", "ignore", str(WORKER), device]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    layer = found["layer"]
    assert layer["output"] < 2 * HALF_ULP  # of the product, and of the sum with the bias
    assert layer["grad_weight"] < HALF_ULP * 1.01  # fp32 sums beside one rounding
    assert layer["grad_bias"] < HALF_ULP * 1.01
    assert layer["grad_x"] < 4 * HALF_ULP  # of two products and their sum, which is smaller than they are
    assert 4 * HALF_ULP < layer["from_bf16"] < 2 * 2.0**-4  # fp8 was used: e4m3 rounds each operand by up to 2^-4
    losses, reference = found["fp8"], found["bf16"]
    assert losses[-1] < losses[0] / 3
    assert losses != reference
    assert max(abs(a - b) / b for a, b in zip(losses, reference, strict=True)) < 2.0**-5


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_emulated_products_equal_rounded_operands_and_train_like_bf16():
    check_worker("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not devices.cuda_has_native_fp8() or importlib.util.find_spec("torchao") is None,
    reason="needs a GPU with native fp8, and torchao",
)
def test_native_products_equal_rounded_operands_and_train_like_bf16():
    check_worker("cuda")


def test_only_layers_of_multiples_of_16_take_part():
    fitting, narrow, split = Linear(32, 48), Linear(32, 24), Linear(32, 48, splits=(24, 24))
    assert [fits_float8(layer) for layer in (fitting, narrow, split)] == [True, False, False]
    low_rank = LoRPtLinear(64, 64, rank=8)
    assert use_float8(torch.nn.ModuleList([fitting, narrow, split, low_rank])) == 1
    assert fitting.float8 is not None
    assert narrow.float8 is None
    with pytest.raises(ConfigError, match=r"no dense layer .* multiples of 16 .* compute in bf16\); use train.precision=bf16"):
        use_float8(torch.nn.ModuleList([narrow, low_rank]))


@pytest.mark.parametrize(("native", "word"), [(True, "native"), (False, "emulated")])
def test_a_cpu_is_refused_in_one_line(native, word, monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_native_bf16", lambda: native)
    with pytest.raises(ConfigError) as caught:
        devices.resolve_precision("fp8", torch.device("cpu"))
    message = str(caught.value)
    assert "\n" not in message
    assert f"capability 8.9 or newer (Ada, Hopper); this run computes on a CPU, which has fp32 and bf16 ({word}): use" in message


@pytest.mark.parametrize(
    ("capability", "found", "problem"),
    [
        ((7, 5), True, "this GPU has capability 7.5, with fp16 and fp32: use train.precision=auto"),
        ((8, 6), True, "this GPU has capability 8.6, with bf16, fp16 and fp32: use train.precision=auto"),
        ((8, 9), False, "torchao, which multiplies it, is not installed; run: pip install 'lowmem[fp8]', or use train.precision=bf16"),
    ],
)
def test_a_gpu_needs_the_capability_and_torchao(capability, found, problem, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    with pytest.raises(ConfigError) as caught:
        devices.resolve_precision("fp8", torch.device("cuda", 0))
    assert str(caught.value).endswith(problem)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_can_is_accepted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 9))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert devices.resolve_precision("fp8", torch.device("cuda", 0)) == "fp8"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cpu"], "train.precision=fp8 needs a GPU that multiplies fp8, but device is cpu"),
        (["engine.name=deepspeed"], "train.precision=fp8 needs engine.name=local, found deepspeed"),
        (["train.weight_dtype=fp16"], "train.weight_dtype=fp16 needs train.precision fp16 or auto, found fp8"),
    ],
)
def test_combinations_that_exist_nowhere(overrides, message):
    basic = ["train.precision=fp8", "train.steps=1", "data.sources=[{stdlib: true}]"]
    load_run_config(overrides=[*basic, "train.weight_dtype=bf16"])
    with pytest.raises(ConfigError, match=message):
        load_run_config(overrides=[*basic, *overrides])


def test_the_engine_sets_the_layers_of_blocks_and_the_planner_counts_bf16():
    shape = ["model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=64", "model.max_seq_len=16", "data.seq_len=16"]
    basic = [*shape, "train.steps=1", "train.global_batch_size=2", "data.sources=[{stdlib: true}]", "device=cuda"]
    config = load_run_config(overrides=[*basic, "train.precision=fp8", "train.weight_dtype=bf16"])
    model = build_configured_model(config)
    engine = build_local_engine(config, model, torch.device("cpu"), "fp8", 1)
    assert engine.autocast_dtype is None  # bf16 weights, and bf16 is what surrounds fp8 products
    assert not engine.scaler.is_enabled()
    linears = {name: module.float8 for name, module in model.named_modules() if isinstance(module, Linear)}
    assert all((products is not None) is name.startswith("blocks.") for name, products in linears.items())
    assert sum(products is not None for products in linears.values()) == 2 * 4  # qkv, out, gate_up, down

    sizes = []
    for precision in ("fp8", "bf16"):
        config.train.precision = precision
        sizes.append(sorted(storage.size_bytes for storage in trace_run(config)[0].storages))
    assert sizes[0] == sizes[1]
    wide = load_run_config(overrides=[*basic, "train.precision=fp8"])
    assert "--train.precision=fp8 --train.weight_dtype=bf16" in [lever.text for lever in levers(wide)]

"""One run without memory: its phases, devices that are not here, ranks, and that it takes no memory itself."""

import json
import subprocess
import sys

import pytest
import torch

from lowmem.planning.allocators import live_peaks
from lowmem.planning.predict import resolve_without_data
from lowmem.planning.trace import trace_run
from lowmem.system.dry_run import autocast_kind, device_kind, is_fake, pretend_device, repeats, representative
from lowmem.system.errors import ConfigError
from tests.planning.small import I3, LAYERWISE, small_config
from tests.train.tiny_run import ROOT


def test_phases_are_those_of_a_run():
    trace, model = trace_run(resolve_without_data(small_config("train.eval_every=3")))
    assert [name for name, _ in trace.phases] == ["load", "first_step", "steady_steps", "evaluation", "save"]
    assert all(parameter.is_meta for parameter in model.parameters())
    trace, _ = trace_run(resolve_without_data(small_config()))
    assert "evaluation" not in dict(trace.phases)
    assert all(storage.category for storage in trace.storages)


@pytest.mark.parametrize("settings", [
    [], LAYERWISE, [*LAYERWISE, "train.weight_dtype=fp16"], [*LAYERWISE, "train.boundary_offload=cpu"], I3,
    ["optim.name=lion", "optim.state_bits=8"],
])  # fmt: skip
def test_a_gpu_needs_not_be_here(settings):
    config = resolve_without_data(small_config("device=cuda", "train.precision=fp16", *settings))
    assert config.device == "cuda"
    trace, model = trace_run(config)
    stored = 2 if config.train.weight_dtype == "fp16" else 4
    assert live_peaks(trace, {"weights"})["steady_steps"] == stored * model.num_parameters()
    assert device_kind(torch.zeros(1)) == "cpu"  # pretended no longer


@pytest.mark.parametrize("device, time", [("cuda", 256), ("cuda", 1088)])
def test_attention_on_a_gpu_keeps_no_scores(device, time):
    settings = [f"device={device}", "train.precision=bf16", "train.micro_batch_size=1", f"data.seq_len={time}", "model.num_layers=1"]
    trace, _ = trace_run(resolve_without_data(small_config(*settings)))
    squares = [storage.shape for storage in trace.storages if storage.shape[-2:] == (time, time)]
    assert squares == []


def test_ranks_share_the_batch():
    whole, half = (
        trace_run(resolve_without_data(small_config("train.micro_batch_size=1", f"train.global_batch_size={n}")))[0] for n in (4, 2)
    )
    shared = trace_run(resolve_without_data(small_config("train.micro_batch_size=1")), world_size=2)[0]
    assert [len(x.events) for x in (shared, half)] == [len(half.events)] * 2
    flops = [trace.costs["steady_steps"].matmul_flops["float32"] for trace in (whole, half, shared)]
    assert flops == [flops[0], flops[0] // 2, flops[0] // 2]


def test_bitsandbytes_is_counted_as_8_bit_states():
    counted = [
        live_peaks(trace_run(resolve_without_data(small_config("optim.state_bits=8", f"optim.backend={name}")))[0], {"optimizer_states"})
        for name in ("bitsandbytes", "lowmem")
    ]
    assert counted[0] == counted[1]


def test_pretended_devices_end_with_their_block():
    x = torch.zeros(1, device="meta")
    assert (is_fake(x), is_fake(torch.zeros(1)), autocast_kind(x)) == (True, False, "cpu")
    with pretend_device("cuda"):
        assert device_kind(x) == "cuda"
        with pretend_device("cpu"):
            assert device_kind(x) == "cpu"
        with pytest.raises(ConfigError), pretend_device("cpu"):
            raise ConfigError("a dry run that fails")
        assert device_kind(x) == "cuda"
    assert device_kind(x) == "meta"


def test_representative_passes_stand_for_the_others():
    fake, real = torch.zeros(1, device="meta"), torch.zeros(1)
    assert list(representative(range(5), real)) == [0, 1, 2, 3, 4]
    assert list(representative([], fake)) == []
    seen = [
        (item, repeats(), inner, repeats()) for item in representative(range(5), fake, distinct=2) for inner in representative("abc", fake)
    ]
    assert [(item, inner) for item, _, inner, _ in seen] == [(0, "a"), (1, "a")]
    counts = []
    for _ in representative(range(5), fake, distinct=2):
        for _ in representative("abc", fake):
            counts.append(repeats())
    assert counts == [3, 12]  # 3 + 12 passes of the inner loop in all
    assert repeats() == 1


MEASURE = """
import json, sys, torch
from lowmem.config.load import load_run_config
from lowmem.memory.procfs import status_bytes
from lowmem.planning.predict import resolve_without_data
from lowmem.planning.trace import trace_run
before = status_bytes()["VmHWM"]
_, model = trace_run(resolve_without_data(load_run_config(sys.argv[1], sys.argv[2:])))
print(json.dumps([model.num_parameters(), before, status_bytes()["VmHWM"]]))
"""


@pytest.mark.memory
def test_a_model_of_200_million_parameters_takes_no_memory():
    command = [sys.executable, "-c", MEASURE, "configs/cpu/llama_215m.yaml", "model.vocab_size=32000"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    parameters, before, peak = json.loads(result.stdout)
    assert parameters > 200_000_000
    assert peak < 700_000_000  # Python, PyTorch and what they keep of the trace; the weights alone would be 860 MB
    assert peak - before < 250_000_000

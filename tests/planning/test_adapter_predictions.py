"""Predictions of runs that train a part of a model: weights as stored, no gradients or states of what is frozen, NF4 never whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig, resolve_micro_batch_size
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.planning.base_cost import Base, _kind, write_trial_model
from lowmem.planning.predict import predict_peak, resolve_without_data, zero_peaks
from lowmem.planning.trace import trace_run
from tests.planning.small import stub_measurements
from tests.reference.tiny_families import save_tiny

pytest.importorskip("peft")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
NF4 = ("train.weight_dtype=nf4",)
CASES: list[tuple[str, ...]] = [
    ("adapter.method=prefix",), ("adapter.method=prefix", "train.update=layerwise", *NF4),
    ("adapter.method=lora",), ("adapter.method=dora", *NF4), ("adapter.method=lora", "train.double_quant=false", *NF4),
    ("adapter.method=ia3", "train.update=layerwise", *NF4), ("adapter.method=last_k", "train.update=layerwise"), ("adapter.method=head",),
    ("adapter.method=lora", "train.precision=bf16", "train.weight_dtype=bf16"), ("adapter.method=lora", 'data.add_tokens=["<a>","<b>"]'),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama", **SHAPE)
    return folder


def config_of(directory: Path, *overrides: str) -> RunConfig:
    given = [
        "device=cpu", "data.seq_len=32", "train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_every=0",
        f"model.path={directory}", *([] if any("precision" in text for text in overrides) else ["train.precision=fp32"]), *overrides,
    ]  # fmt: skip
    return resolve_without_data(load_run_config(overrides=given))


@pytest.mark.parametrize("overrides", CASES)
def test_what_is_predicted_is_what_is_stored(directory, overrides):
    if NF4[0] in overrides:
        pytest.importorskip("bitsandbytes")
    config = config_of(directory, *overrides)
    trace, outline = trace_run(config)
    new = (318, 319) if config.data.add_tokens else ()
    model = build_configured_model(config, new)
    assert outline.component_bytes() == model.component_bytes()
    assert (outline.num_parameters(), outline.num_trained_parameters()) == (model.num_parameters(), model.num_trained_parameters())
    engine = build_local_engine(config, model, torch.device("cpu"), config.train.precision, resolve_micro_batch_size(config, 1))
    counted = engine.memory_components()
    found: dict[str, int] = {}
    for storage in trace.storages:
        found[storage.category] = found.get(storage.category, 0) + storage.size_bytes
    assert found["optimizer_states"] == counted["optimizer_states"]
    # tables of rotary positions are no weights
    assert 0 <= found["weights"] - counted["weights"] < 4096


def peak_of(directory: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Any:
    stub_measurements(monkeypatch)
    return predict_peak(config_of(directory, *overrides), base=Base(1 << 20, "measured"))


def test_frozen_weights_have_neither_gradients_nor_states(directory, monkeypatch):
    whole, lora = (peak_of(directory, monkeypatch, f"adapter.method={method}") for method in ("none", "lora"))
    for name, times in (("gradients", 4), ("optimizer_states", 8)):
        assert whole.host.components[name] >= times * whole.parameters
        assert lora.host.components[name] < 1.1 * times * lora.trained_parameters + 4096
    assert lora.trained_parameters < 0.3 * lora.parameters
    assert f"of which {lora.trained_parameters:,} are trained" in lora.lines()[0]
    assert "trained" not in whole.lines()[0]
    assert lora.report()["trained_parameters"] == lora.trained_parameters


def test_a_base_in_nf4_is_never_whole_in_a_dry_run(directory):
    pytest.importorskip("bitsandbytes")
    trace, model = trace_run(config_of(directory, "adapter.method=lora", *NF4))
    linears = 4 * sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2 and not p.requires_grad)
    load = trace.events[: trace.phases[1][1]]
    held = sum(trace.storages[event].size_bytes if event >= 0 else -trace.storages[~event].size_bytes for event in load)
    peak = running = 0
    for event in load:
        running += trace.storages[event].size_bytes if event >= 0 else -trace.storages[~event].size_bytes
        peak = max(peak, running)
    assert peak - held < linears / 4


def test_a_layerwise_step_keeps_no_boundary_below_what_is_trained(directory, monkeypatch):
    deep = ("train.update=layerwise", "train.global_batch_size=64")
    low, high = (
        peak_of(directory, monkeypatch, "adapter.method=lora", f"adapter.target_modules=[layers.{index}.mlp.up_proj]", *deep)
        for index in (0, 2)
    )
    boundary = 64 * 32 * 128 * 4
    assert low.host.components["activations"] - high.host.components["activations"] > 1.5 * boundary


def test_adapters_and_nf4_are_kinds_of_runs_of_their_own(directory):
    plain, lora, nf4 = (
        _kind(config_of(directory, *overrides)) for overrides in ((), ("adapter.method=dora",), ("adapter.method=lora", *NF4))
    )
    assert "adapter.method=none" in plain
    assert "adapter.method=lora" in lora
    assert "adapter.method=prefix" in _kind(config_of(directory, "adapter.method=prefix"))  # without PEFT
    assert "train.weight_dtype=nf4" in nf4
    # 32-bit adapters beside bf16 weights are updated by torch's optimizer, as those beside fp32 weights are
    narrow = _kind(config_of(directory, "adapter.method=lora", "train.precision=bf16", "train.weight_dtype=bf16"))
    assert "optim.state_bits=32" in narrow
    assert "train.weight_dtype=bf16" in narrow
    part = _kind(config_of(directory, "adapter.method=head", "train.precision=bf16", "train.weight_dtype=bf16"))
    assert "optim.state_bits=8" in part
    assert "adapter.method=none" in part


def test_zero_divides_what_is_trained(directory):
    zero = ("engine.name=deepspeed", "adapter.method=lora")
    for stage in (1, 2):
        config = config_of(directory, f"engine.zero_stage={stage}", *zero)
        local = config_of(directory, "adapter.method=lora")
        trace, model = trace_run(local)
        here, _ = zero_peaks(config, trace, model, 2)
        trained = model.num_trained_parameters()
        assert here.components["weights"] == 4 * model.num_parameters() + 4 * -(-trained // 2)
        assert here.components["optimizer_states"] <= 4 * trained + 4096


def test_the_trial_of_a_base_cost_writes_nothing_to_standard_output(tmp_path, capfd):
    write_trial_model(tmp_path)
    assert capfd.readouterr().out == ""
    assert build_configured_model(config_of(tmp_path, "adapter.method=lora")).num_trained_parameters() > 0

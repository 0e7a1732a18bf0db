"""Engines train what is trainable and nothing else: gradients of both updates, checkpoints of what is trained, runs that go on exactly.

Gradients are sums of the same numbers in another order: some hundred roundings of 2**-24 of the largest, more where large terms cancel.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowmem.config.schema import AdapterConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.optim.clipping import global_norm

pytest.importorskip("peft")
ROUNDINGS = 5_000 * 2**-24
CPU = torch.device("cpu")
CASES = [
    ("llama", "lora", {}, ()), ("llama", "head", {}, ()), ("llama", "last_k", {}, ()), ("llama", "dora", {}, (7, 321)),
    ("llama", "lora", {"target_modules": ["model.layers.1.mlp.up_proj"]}, ()), ("llama", "lora", {"target_modules": ["lm_head"]}, ()),
    ("gpt2", "lora", {}, (7,)), ("gpt2", "head", {}, ()), ("gemma3_text", "ia3", {}, ()), ("gemma3_text", "lora_plus", {}, (7,)),
    ("gemma3_text", "last_k", {"last_k": 2}, ()), ("falcon_h1", "lora", {}, ()),
    ("llama", "prefix", {"num_virtual_tokens": 16}, ()), ("qwen3", "prefix", {}, ()), ("gemma2", "prefix", {}, ()),
    ("gpt2", "prefix", {}, ()),
    ("gemma3_text", "lora", {"target_modules": ["q_proj", "lm_head"]}, ()),
    ("gemma3_text", "lora", {"target_modules": ["embed_tokens", "lm_head"]}, ()),
]  # fmt: skip


def engine_of(
    path: Path, method: str, update: str, new: tuple[int, ...] = (), optim: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None, **adapter: Any,
) -> LocalEngine:  # fmt: skip
    settings = TrainConfig(
        **{"precision": "fp32", "update": update, "activation_checkpointing": "block", "loss_chunk_tokens": 9, **(train or {})}
    )
    config = RunConfig(
        model=ModelConfig(path=str(path), max_seq_len=64), adapter=AdapterConfig(method=method, **adapter), train=settings,
        optim=OptimConfig(**{"lr": 1e-2, "clip": 0.0, **(optim or {})}),
    )  # fmt: skip
    config.data.seq_len = 12
    model = build_configured_model(config, new)
    return build_local_engine(config, model, CPU, settings.precision, 2)


def batch_of(step: int, rows: int = 6) -> Batch:
    """Frequent tokens, and rows that predict different numbers of them."""
    random = np.random.default_rng(step)
    windows = random.integers(3, 300, (rows, 13))
    windows[random.random((rows, 13)) < 0.5] = 7
    batch = Batch.from_windows(windows)
    targets = batch.targets.copy()
    for row in range(rows):
        targets[row, : 2 * (row % 5)] = IGNORE_INDEX
    return Batch(batch.inputs, targets)


def loud(engine: LocalEngine) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def applied_gradients(engine: LocalEngine) -> dict[str, torch.Tensor]:
    """What a step on the first batch gives to the optimizer, by name; weights stay."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    if not isinstance(engine, LayerwiseEngine):
        engine.model.train()
        engine._accumulate(batch_of(0))
        gradients = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
        engine._discard()
        return gradients
    found: dict[str, torch.Tensor] = {}

    def note(parameter: torch.Tensor, window: Any, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        flat = found.setdefault(names[id(parameter)], torch.zeros(parameter.numel()))
        flat[start : start + grad.numel()] += grad.float().flatten() * grad_scale

    engine.optimizer.apply = note
    engine.step(batch_of(0), 0.0)
    shapes = {name: p.shape for name, p in engine.model.named_parameters()}
    return {name: gradient.view(shapes[name]) for name, gradient in found.items()}


@pytest.mark.parametrize("checkpointing", ["block", "none"])
@pytest.mark.parametrize("family, method, more, new", CASES)
def test_both_updates_have_the_gradients_of_one_pass_over_what_is_trained(directories, family, method, more, new, checkpointing):
    train = {"activation_checkpointing": checkpointing}
    engines = [engine_of(directories(family), method, update, new, train=train, **more) for update in ("accumulate", "layerwise")]
    for engine in engines:
        loud(engine)
    model, batch = engines[0].model, batch_of(0)
    model.train()
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = torch.autograd.grad(model(inputs, targets, float(batch.target_count())), list(trained.values()))
    expected = dict(zip(trained, whole, strict=True))
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    norm = global_norm(whole).item()
    for engine in engines:
        found = applied_gradients(engine)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            allowed = ROUNDINGS * (gradient.abs().max().item() + largest / 100)
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")
    assert engines[1].step(batch, 0.0).grad_norm == pytest.approx(norm, rel=ROUNDINGS)
    assert engines[0].step(batch, 0.0).grad_norm == pytest.approx(norm, rel=ROUNDINGS)


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
@pytest.mark.parametrize("family, method, more, new", CASES)
def test_a_run_goes_on_from_what_is_trained_to_the_bit(directories, tmp_path, family, method, more, new, update):
    frozen: dict[str, torch.Tensor] = {}

    def fresh() -> LocalEngine:
        return engine_of(directories(family), method, update, new, {"state_bits": 8, "clip": 0.5}, **more)

    whole = fresh()
    frozen = {name: p.detach().clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    started = {name: tensor.detach().clone() for name, tensor in whole.model.saved_tensors().items()}
    losses = [whole.step(batch_of(step), 1e-2).loss for step in range(4)]
    assert losses[-1] == losses[-1]
    first = fresh()
    for step in range(2):
        first.step(batch_of(step), 1e-2)
    state = first.save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in held.items()} == {name: value.shape for name, value in started.items()}
    assert sum(value.numel() for value in held.values()) == whole.model.num_trained_parameters() < whole.model.num_parameters()
    second = fresh()
    second.load(tmp_path, state)
    again = [second.step(batch_of(step), 1e-2).loss for step in range(2, 4)]
    assert again == losses[2:]
    for name, tensor in whole.model.saved_tensors().items():
        assert torch.equal(tensor, second.model.saved_tensors()[name])
        assert not torch.equal(tensor, started[name]), name
    for name, parameter in whole.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])
    counted = whole.memory_components()
    assert counted["optimizer_states"] < 12 * whole.model.num_trained_parameters()
    assert counted["gradients"] <= 4 * whole.model.num_trained_parameters()


@pytest.mark.parametrize("method, more, again, last", [
    ("lora", {"target_modules": ["layers.1.mlp.up_proj"]}, [1], 1), ("last_k", {}, [1], 1), ("head", {}, [], 2), ("lora", {}, [0, 1], 0),
])  # fmt: skip
def test_a_layerwise_step_goes_no_further_down_than_what_is_trained(directories, monkeypatch, method, more, again, last):
    """Blocks below are computed once, without a graph; boundaries below are not kept."""
    engine = engine_of(directories("llama"), method, "layerwise", **more)
    assert isinstance(engine, LayerwiseEngine)
    differentiated, kept = [], set()
    usual = engine._differentiate
    monkeypatch.setattr(engine, "_differentiate", lambda index, *args: differentiated.append(index) or usual(index, *args))
    usual_forward = engine._forward

    def forward(tokens: torch.Tensor, segments: Any, boundaries: Any) -> Any:
        graphs = usual_forward(tokens, segments, boundaries)
        kept.update(boundaries._kept)
        return graphs

    monkeypatch.setattr(engine, "_forward", forward)
    monkeypatch.setattr(engine, "_embedding", lambda *args: pytest.fail("the embedding is frozen"))
    engine.step(batch_of(0), 1e-2)
    assert sorted(differentiated) == again
    assert kept == set(range(last, 3))


def test_the_gradient_of_a_frozen_head_is_not_made(directories, monkeypatch):
    from lowmem.nn import loss

    monkeypatch.setattr(loss, "_add_weight_gradient", lambda *args, **more: pytest.fail("the head is frozen"))
    monkeypatch.setattr(loss.CrossEntropyByRows, "gradients", lambda self: pytest.fail("the head is frozen"))
    for update in ("accumulate", "layerwise"):
        assert engine_of(directories("llama"), "lora", update).step(batch_of(0), 1e-2).loss > 0


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_adapters_have_32_bits_beside_a_16_bit_base(directories, update, weights):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    engine = engine_of(directories("llama"), "lora", update, train={"precision": "bf16", "weight_dtype": weights})
    assert engine.autocast_dtype is None
    loud(engine)
    gradients = applied_gradients(engine)
    trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    assert {p.dtype for p in trained.values()} == {torch.float32} == {gradient.dtype for gradient in gradients.values()}
    exact = engine_of(directories("llama"), "lora", "accumulate", train={"weight_dtype": "nf4" if weights == "nf4" else "fp32"})
    loud(exact)
    for name, gradient in applied_gradients(exact).items():  # roundings of 2**-8 through two blocks, and of a code here and there
        assert (gradients[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_fp32_weights_compute_under_autocast(directories):
    engine = engine_of(directories("llama"), "lora", "accumulate", train={"precision": "bf16"})
    assert engine.autocast_dtype == torch.bfloat16
    assert engine.step(batch_of(0), 1e-2).loss > 0

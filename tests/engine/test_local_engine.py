"""The local engine: the micro-batch never changes the result, bad steps leave no trace, and a resumed run is the same to the bit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.config.schema import ModelConfig, OptimConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors
from lowmem.models.registry import build_model
from lowmem.system.devices import Precision

VOCAB, SEQ_LEN, GLOBAL_BATCH, LR = 67, 16, 8, 1e-2
KINDS = [("adamw", 32), ("lion", 32), ("adamw", 8), ("lion", 8)]


def make_engine(*, precision: Precision = "fp32", micro: int = GLOBAL_BATCH, dim: int = 32, **optim) -> LocalEngine:
    """A two-layer decoder; always the same initial weights."""
    if optim.get("state_bits") == 8 and optim.get("backend") == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    elif optim.get("name") == "lion":
        pytest.importorskip("lion_pytorch")
    model = build_model(ModelConfig(dim=dim, num_layers=2, num_heads=2), vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    config = OptimConfig(**{"lr": LR, **optim})
    return LocalEngine(model, config, device=torch.device("cpu"), precision=precision, micro_batch_size=micro)


def make_batch(seed: int) -> Batch:
    """Rows with different numbers of predicted tokens, so that a mean of means would differ from the mean."""
    windows = np.random.default_rng(seed).integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1))
    batch = Batch.from_windows(windows)
    targets = batch.targets.copy()
    for row in range(GLOBAL_BATCH):
        targets[row, : 2 * row % SEQ_LEN] = IGNORE_INDEX
    return Batch(batch.inputs, targets)


def bits(engine: LocalEngine) -> dict[str, bytes | float | int]:
    """Weights and optimizer states as they lie in memory."""
    tensors, scalars = optimizer_tensors(engine.model, engine.optimizer)
    tensors |= {f"weights of {name}": parameter for name, parameter in engine.model.named_parameters()}
    raw = {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return raw | {f"{name}.{key}": value for name, values in scalars.items() for key, value in values.items()}


def poison(engine: LocalEngine, value: float) -> torch.utils.hooks.RemovableHandle:
    """Make the gradient of one weight `value`; the loss stays what it is."""
    return engine.model.blocks[1].mlp.down.weight.register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_loss_gradients_and_update_do_not_depend_on_the_micro_batch(micro: int):
    whole, parts = make_engine(eps=1.0), make_engine(eps=1.0, micro=micro)
    batch = make_batch(0)
    one, other = whole.step(batch, LR), parts.step(batch, LR)
    # The same 72 terms (rows predict 16, 14, ... 2 tokens) in another order: 72 * 2^-24 = 4.3e-6 relative to their absolute sum.
    assert batch.target_count() == 72
    assert other.loss == pytest.approx(one.loss, rel=4.3e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    # With eps = 1 the first AdamW update is lr * g / (|g| + 1), a smooth function of the gradient: weights differ by lr times the
    # gradients' difference (|g| <= the norm, below 4), plus the rounding of weights below 2: 2^-24 each.
    assert one.grad_norm < 4
    for (name, left), right in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=LR * 4 * 4.3e-6 + 2**-22, msg=name)
    assert any(not torch.equal(p, q) for p, q in zip(whole.model.parameters(), make_engine().model.parameters(), strict=True))


def test_the_loss_is_the_mean_over_the_predicted_tokens_of_the_whole_batch():
    engine, batch = make_engine(micro=2), make_batch(1)
    with torch.no_grad():
        logits = engine.model(torch.from_numpy(batch.inputs)).double()
    targets = torch.from_numpy(batch.targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX).item()
    # logits in fp32 err by a few 2^-24 of their size (< 1), losses of 4.2 by 72 * 2^-24 relative
    assert engine.evaluate([batch]) == pytest.approx(expected, rel=5e-6)
    assert engine.step(batch, LR).loss == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("kind", ["loss", "nan", "inf"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_is_skipped_and_leaves_no_trace(precision: Precision, kind: str):
    straight, disturbed = make_engine(precision=precision), make_engine(precision=precision)
    for engine in (straight, disturbed):
        engine.step(make_batch(0), LR)
    before = bits(disturbed)
    if kind == "loss":
        weight = disturbed.model.norm.weight
        saved = weight.detach().clone()
        weight.data[0] = math.nan
        result = disturbed.step(make_batch(1), LR)
        weight.data.copy_(saved)
        assert math.isnan(result.loss)
    else:
        handle = poison(disturbed, float(kind))
        result = disturbed.step(make_batch(1), LR)
        handle.remove()
        assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert result.skipped == "nonfinite"
    assert bits(disturbed) == before
    assert all(parameter.grad is None for parameter in disturbed.model.parameters())
    assert disturbed.step(make_batch(2), LR) == straight.step(make_batch(2), LR)
    assert bits(disturbed) == bits(straight)


def test_fp16_overflow_halves_the_scale_until_the_gradients_fit():
    engine = make_engine(precision="fp16")
    # a scale no fp16 gradient survives: 2^40 times anything above 2^-24 is beyond 65504
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 2.0**40})
    before, scale = bits(engine), 2.0**40
    for _ in range(40):
        result = engine.step(make_batch(0), LR)
        assert math.isfinite(result.loss)
        if not result.skipped:
            break
        scale /= 2
        assert result.skipped == "loss_scale"
        assert not math.isfinite(result.grad_norm)
        assert engine.scaler.get_scale() == scale
        assert bits(engine) == before
    assert scale <= 2.0**30  # ten halvings or more
    assert result.skipped == ""
    assert engine.scaler.get_scale() == scale  # a good step does not lower it
    assert bits(engine) != before
    # unscaled: fp16 keeps 11 bits of each factor of a gradient, some 20 of them in a row: 20 * 2^-11 = 1 %
    assert result.grad_norm == pytest.approx(make_engine().step(make_batch(0), LR).grad_norm, rel=1e-2)


def test_fp16_at_the_lowest_scale_or_with_a_bad_loss_is_a_bad_step():
    engine = make_engine(precision="fp16")
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 2.0})
    poison(engine, math.inf)
    assert engine.step(make_batch(0), LR).skipped == "nonfinite"  # the scale is 1 now: lowering it further is no remedy
    engine = make_engine(precision="fp16")
    engine.model.norm.weight.data[0] = math.nan
    assert engine.step(make_batch(0), LR).skipped == "nonfinite"


def test_evaluation_changes_nothing_and_needs_no_particular_mode():
    engine, batches = make_engine(micro=4), [make_batch(5), make_batch(6).rows(0, 3)]
    engine.step(make_batch(0), LR)
    before, random = bits(engine), torch.get_rng_state()
    first = engine.evaluate(batches)
    assert engine.evaluate(iter(batches)) == first
    assert bits(engine) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    modes = []
    engine.model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training))
    engine.evaluate(batches)
    assert not any(modes)
    modes.clear()
    engine.step(make_batch(1), LR)
    assert all(modes)  # a step after an evaluation trains again
    assert modes
    other = make_engine(micro=4)
    other.step(make_batch(0), LR)
    other.step(make_batch(1), LR)
    assert bits(engine) == bits(other)


@pytest.mark.parametrize(
    "precision, name, state_bits", [*(("fp32", *kind) for kind in KINDS), *((p, "adamw", 32) for p in ("bf16", "fp16"))]
)
def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path: Path, precision: Precision, name: str, state_bits: int):
    # dim 96: the matrices have more than the 4,096 numbers from which bitsandbytes keeps 8-bit states
    settings = {"precision": precision, "name": name, "state_bits": state_bits, "dim": 96, "micro": 4}
    straight = make_engine(**settings)
    for seed in range(3):
        straight.step(make_batch(seed), LR)
    torch.manual_seed(11)
    state = json.loads(json.dumps(straight.save(tmp_path)))
    expected_random = torch.rand(3)
    resumed = make_engine(**settings)
    resumed.step(make_batch(99), LR)  # states that loading has to replace
    resumed.load(tmp_path, state)
    assert torch.equal(torch.rand(3), expected_random)
    assert bits(resumed) == bits(straight)
    for file in tmp_path.iterdir():
        file.unlink()
    for seed in range(3, 6):
        assert resumed.step(make_batch(seed), LR) == straight.step(make_batch(seed), LR)
    assert bits(resumed) == bits(straight)
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()
    assert resumed.memory_components() == straight.memory_components()

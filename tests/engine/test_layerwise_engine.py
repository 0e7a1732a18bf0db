"""The layerwise update: the gradients of plain accumulation, any micro-batch, out-of-memory inside a block, exact resume."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors
from lowmem.models.base import LossOptions
from lowmem.models.registry import build_model
from lowmem.nn import loss
from lowmem.system.errors import MemoryBudgetError

VOCAB, SEQ_LEN, GLOBAL_BATCH, LR = 67, 16, 8, 1e-2
CPU = torch.device("cpu")
MODELS = {
    "decoder": ModelConfig(dim=32, num_layers=3, num_heads=2),
    "tied": ModelConfig(dim=32, num_layers=2, num_heads=2, tie_embeddings=True, positions="alibi"),
    "tied, learned": ModelConfig(dim=32, num_layers=2, num_heads=2, tie_embeddings=True, positions="learned"),
    "lorpt": ModelConfig(
        dim=32, num_layers=2, num_heads=2, positions="learned", lorpt=LorptConfig(rank=4, targets=["attention", "mlp", "head"])
    ),
    "i3": ModelConfig(name="i3", dim=32, num_layers=2, num_heads=1, attention_rank=4, lorpt=LorptConfig(rank=4)),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(name: str, mode: str, dtype: str):
    model = build_model(MODELS[name], vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=DTYPES[dtype])
    model.activation_checkpointing = mode
    return model


def layerwise(name="decoder", *, mode="block", micro=GLOBAL_BATCH, precision="fp32", stored="fp32", boundary_dtype="same", **optim):
    train = TrainConfig(update="layerwise", boundary_dtype=boundary_dtype, seed=5)
    config = OptimConfig(**{"lr": LR, "clip": 0.0, **optim})
    model = make_model(name, mode, stored)
    return LayerwiseEngine(model, config, train, device=CPU, precision=precision, micro_batch_size=micro)


def accumulate(name="decoder", **optim) -> LocalEngine:
    config = OptimConfig(**{"lr": LR, "clip": 0.0, **optim})
    return LocalEngine(make_model(name, "none", "fp32"), config, device=CPU, precision="fp32", micro_batch_size=GLOBAL_BATCH)


def make_batch(seed: int) -> Batch:
    """Rows with different numbers of predicted tokens, so that a mean of means would differ from the mean."""
    batch = Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1)))
    targets = batch.targets.copy()
    for row in range(GLOBAL_BATCH):
        targets[row, : 2 * row % SEQ_LEN] = IGNORE_INDEX
    return Batch(batch.inputs, targets)


def applied_gradients(engine: LayerwiseEngine, batch: Batch) -> dict[str, torch.Tensor]:
    """Every gradient the optimizer is given during one step, by the name of its parameter; each exactly once."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    apply = engine.optimizer.apply

    def record(parameter, window, grad, **more):
        assert names[id(parameter)] not in found
        found[names[id(parameter)]] = grad.view(parameter.shape).clone()
        apply(parameter, window, grad, **more)

    engine.optimizer.apply = record
    engine.step(batch, LR)
    return found


def bits(engine: LocalEngine) -> dict[str, bytes]:
    """Weights and optimizer states as they lie in memory."""
    tensors, _ = optimizer_tensors(engine.model, engine.optimizer)
    tensors |= {f"weights of {name}": parameter for name, parameter in engine.model.named_parameters()}
    return {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("micro", [1, 3, GLOBAL_BATCH])
@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_accumulation(name, mode, micro):
    reference = accumulate(name)
    reference._accumulate(make_batch(0))
    expected = {key: parameter.grad for key, parameter in reference.model.named_parameters()}
    found = applied_gradients(layerwise(name, mode=mode, micro=micro), make_batch(0))
    assert found.keys() == expected.keys()
    whole = sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5
    for key, gradient in found.items():
        # fp32 sums of the same terms in another order: the norm of the difference stays near 2^-24 = 6e-8 of the norm. The gradient of a
        # key bias is zero but for rounding (softmax does not see it): there 1e-9 of the whole gradient is the measure.
        assert (gradient - expected[key]).norm() <= 1e-6 * max(expected[key].norm(), 1e-3 * whole), key


def make_rows(engine: LocalEngine) -> LocalEngine:
    """Have the loss work on 32 tokens at a time: a layerwise engine then updates its head in rows."""
    engine.model.loss_options = LossOptions(chunk_tokens=32)
    return engine


def test_a_head_in_rows_gets_the_same_gradients(monkeypatch):
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", 16)  # 16 rows of 32 numbers are four blocks of states
    reference, engine = make_rows(accumulate()), make_rows(layerwise(micro=3))
    reference._accumulate(make_batch(0))
    expected = reference.model.head.weight.grad
    found, apply = [], engine.optimizer.apply

    def record(parameter, window, grad, **more):
        if parameter is engine.model.head.weight:
            found.append((more["start"], grad.clone() * more["grad_scale"]))
        elif parameter is engine.model.norm.weight:
            assert (grad - reference.model.norm.weight.grad).norm() <= 1e-6 * grad.norm()
        apply(parameter, window, grad, **more)

    engine.optimizer.apply = record
    result = engine.step(make_batch(0), LR)
    assert [start for start, _ in found] == [0, 512, 1024, 1536, 2048]  # 67 rows
    gradient = torch.cat([rows for _, rows in found]).view_as(expected)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    plain = make_rows(accumulate()).step(make_batch(0), LR)
    assert result.loss == pytest.approx(plain.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_head_in_rows_learns_what_a_whole_one_learns(precision):
    whole, rows = (layerwise(precision=precision, eps=1.0, clip=1.0) for _ in range(2))
    make_rows(rows)
    # products of 8 or 11 bits are added up in another order: 12 smooth steps keep losses within some of their last bits
    tolerance = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11}[precision]
    for seed in range(12):
        one, other = whole.step(make_batch(seed), LR), rows.step(make_batch(seed), LR)
        assert other.loss == pytest.approx(one.loss, rel=tolerance)
        assert one.skipped == other.skipped


def test_a_bad_loss_changes_nothing_in_rows_either():
    engine = make_rows(layerwise(state_bits=8))
    engine.step(make_batch(0), LR)
    before = bits(engine)
    poisoned = engine.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
    assert engine.step(make_batch(1), LR).skipped == "nonfinite"
    poisoned.remove()
    assert bits(engine) == before


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_curve_does_not_depend_on_the_micro_batch(micro):
    # With eps = 1 the update is smooth in the gradient; 12 steps of lr * 1e-6 relative error move no loss by more than 1e-5.
    whole, parts, plain = layerwise(eps=1.0), layerwise(eps=1.0, micro=micro), accumulate(eps=1.0)
    for seed in range(12):
        one, other, third = (engine.step(make_batch(seed), LR) for engine in (whole, parts, plain))
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert third.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(third.grad_norm, rel=1e-5)
        assert not one.skipped


def test_bf16_micro_batches_are_summed_in_fp32():
    found = applied_gradients(layerwise(micro=2, precision="bf16", stored="bf16"), make_batch(0))
    assert {gradient.dtype for name, gradient in found.items() if name.startswith("blocks.")} == {torch.float32}
    alone = applied_gradients(layerwise(precision="bf16", stored="bf16"), make_batch(0))
    assert {gradient.dtype for name, gradient in alone.items() if name.startswith("blocks.")} == {torch.bfloat16}


@pytest.mark.parametrize("stored, precision, state_bits, name", [
    ("fp32", "fp32", 32, "adamw"), ("fp32", "bf16", 8, "adamw"), ("bf16", "bf16", 4, "adamw"), ("bf16", "bf16", 8, "lion"),
    ("fp16", "fp16", 8, "adamw"),
])  # fmt: skip
def test_training_lowers_the_loss_and_a_loaded_engine_goes_on_bit_for_bit(tmp_path: Path, stored, precision, state_bits, name):
    lr = LR / 5 if name == "lion" else LR
    settings = {"stored": stored, "precision": precision, "state_bits": state_bits, "name": "decoder", "clip": 0.5, "micro": 4}
    make = lambda: layerwise(**{**settings, "betas": (0.9, 0.95)}) if name == "adamw" else make_lion(settings)  # noqa: E731
    straight = make()
    losses = [straight.step(make_batch(0), lr).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    torch.manual_seed(11)
    state = json.loads(json.dumps(straight.save(tmp_path)))
    resumed = make()
    resumed.step(make_batch(9), lr)  # states that loading has to replace
    resumed.load(tmp_path, state)
    assert bits(resumed) == bits(straight)
    for seed in range(3):
        assert resumed.step(make_batch(seed), lr) == straight.step(make_batch(seed), lr)
    assert bits(resumed) == bits(straight)
    assert resumed.memory_components() == straight.memory_components()


def make_lion(settings: dict) -> LayerwiseEngine:
    config = OptimConfig(name="lion", lr=LR, state_bits=settings["state_bits"], clip=settings["clip"])
    model = make_model("decoder", "block", settings["stored"])
    train = TrainConfig(update="layerwise")
    return LayerwiseEngine(model, config, train, device=CPU, precision=settings["precision"], micro_batch_size=settings["micro"])


def run_out_of_memory(engine: LayerwiseEngine, index: int, largest: int) -> list[int]:
    """Have block `index` run out of memory when it is differentiated with more than `largest` sequences; the sizes tried."""
    block, tried = engine.model.blocks[index], []
    forward = block.forward

    def limited(hidden, cache=None):
        if torch.is_grad_enabled():
            tried.append(len(hidden))
            if len(hidden) > largest:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
                )
        return forward(hidden, cache)

    block.forward = limited
    return tried


def test_memory_running_out_in_a_block_halves_that_blocks_micro_batch_and_loses_nothing(tmp_path: Path):
    engine, other = layerwise(eps=1.0), layerwise(eps=1.0)
    tried = run_out_of_memory(engine, 1, largest=2)
    results = [engine.step(make_batch(seed), LR) for seed in range(3)]
    assert tried == [8, 4, *[2] * 4, *[2] * 4, *[2] * 4]  # the failed sizes are remembered
    assert engine.block_micro_batches == [8, 2, 8]
    other.block_micro_batches = [8, 2, 8]
    assert results == [other.step(make_batch(seed), LR) for seed in range(3)]  # the losses of a run that began so
    assert bits(engine) == bits(other)
    resumed = layerwise(eps=1.0)
    resumed.load(tmp_path, engine.save(tmp_path))
    assert resumed.block_micro_batches == [8, 2, 8]


def test_memory_running_out_with_kept_graphs_computes_the_block_again():
    engine, other = layerwise(eps=1.0, mode="none", micro=4), layerwise(eps=1.0, mode="none", micro=4)
    original, failed = engine._differentiate, []

    def fail_once(index, boundaries, graphs, *rest):
        if index == 1 and not failed:
            failed.append(len(graphs))
            graphs.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(index, boundaries, graphs, *rest)

    engine._differentiate = fail_once
    one, two = engine.step(make_batch(0), LR), other.step(make_batch(0), LR)
    assert failed == [2]
    assert engine.block_micro_batches == [4, 2, 4]
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-6)


def test_memory_running_out_with_one_sequence_is_the_users_problem():
    engine = layerwise()
    run_out_of_memory(engine, 2, largest=0)
    with pytest.raises(MemoryBudgetError, match=r"block 2 with one sequence at a time.*last checkpoint.*a shorter data.seq_len"):
        engine.step(make_batch(0), LR)


def test_another_error_in_a_block_is_not_taken_for_memory():
    engine = layerwise()
    engine.model.blocks[0].mlp.down.forward = lambda x: x @ x
    with pytest.raises(RuntimeError, match="shape|size"):
        engine.step(make_batch(0), LR)
    assert engine.block_micro_batches == [8, 8, 8]


def test_a_bad_loss_changes_nothing():
    engine = layerwise(state_bits=8)
    engine.step(make_batch(0), LR)
    weight = engine.model.norm.weight
    saved, before = weight.detach().clone(), bits(engine)
    weight.data[0] = math.nan
    result = engine.step(make_batch(1), LR)
    weight.data.copy_(saved)
    assert result.skipped == "nonfinite"
    assert math.isnan(result.loss)
    assert bits(engine) == before


def test_a_bad_gradient_stops_the_step_at_its_block():
    engine = layerwise(clip=1.0)
    engine.step(make_batch(0), LR)
    before, clipping = bits(engine), engine.clipping.state()
    engine.model.blocks[1].mlp.down.weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    result = engine.step(make_batch(1), LR)
    assert (result.skipped, math.isfinite(result.loss), math.isfinite(result.grad_norm)) == ("nonfinite", True, False)
    changed = {name.removeprefix("weights of ") for name, value in bits(engine).items() if value != before[name] and "weights" in name}
    assert {name.split(".")[0] if not name.startswith("blocks") else name[:8] for name in changed} == {"norm", "head", "blocks.2"}
    assert engine.clipping.state() == clipping


def test_block_clipping_keeps_the_global_norm_below_the_limit():
    engine = layerwise(clip=0.05, clip_by="block")
    squares = []
    apply = engine.optimizer.apply
    engine.optimizer.apply = lambda p, window, g, start, grad_scale: (
        squares.append((g.double() * grad_scale).square().sum().item()),
        apply(p, window, g, start=start, grad_scale=grad_scale),
    )
    result = engine.step(make_batch(0), LR)
    assert result.grad_norm > 0.05
    assert math.sqrt(sum(squares)) <= 0.05 * (1 + 1e-6)  # sums of 1e4 squares in fp64, factors rounded to fp32
    engine = layerwise(clip=0.0, clip_by="block")
    assert engine.clipping.factor([torch.full((4,), 100.0)], 1.0) == 1.0


def test_clipping_by_an_estimate_of_the_global_norm():
    """Where each part keeps its share of the norm the estimate is the norm: clipping is that of whole gradients."""
    engine = layerwise(clip=0.05)
    squares, apply = [], engine.optimizer.apply
    engine.optimizer.apply = lambda p, window, g, start, grad_scale: (
        squares.append((g.double() * grad_scale).square().sum().item()),
        apply(p, window, g, start=start, grad_scale=grad_scale),
    )
    for step in range(4):
        squares.clear()
        result = engine.step(make_batch(0), 0.0)  # the same gradients each time
        applied = math.sqrt(sum(squares))
        if step == 0:  # no shares are known: the bound of the first step
            assert 0.05 < applied <= 0.05 * math.sqrt(1 + math.log((result.grad_norm / 0.05) ** 2))
        else:
            assert applied == pytest.approx(0.05, rel=1e-6)  # factors are rounded to fp32


def test_boundaries_in_bf16_change_the_result_by_their_rounding_only():
    exact, rounded = layerwise(), layerwise(boundary_dtype="bf16")
    one, other = exact.step(make_batch(0), LR), rounded.step(make_batch(0), LR)
    # 4 boundaries, each rounded by 2^-9 relative, under a loss of slope below 4 in a residual stream of size 0.02 to 1
    assert other.loss == pytest.approx(one.loss, abs=4 * 2**-9 * 4)
    assert other.loss != one.loss


def test_fp16_overflow_lowers_the_scale_and_a_later_step_is_applied():
    engine = layerwise(precision="fp16", stored="fp16", clip=1.0)
    engine.scaler.load_state_dict({"scale": 2.0**24, "good_steps": 0})
    results = [engine.step(make_batch(0), LR) for _ in range(20)]
    kinds = [result.skipped for result in results]
    assert kinds[0] == "loss_scale"
    assert kinds[-1] == ""
    applied = next(result for result in results if not result.skipped)
    assert applied.grad_norm < 100  # unscaled
    engine.scaler.load_state_dict({"scale": 1.0, "good_steps": 0})
    engine.model.blocks[0].mlp.down.weight.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    assert engine.step(make_batch(0), LR).skipped == "nonfinite"  # a lower scale is no remedy
    assert engine.scaler.get_scale() == 1.0


def test_evaluation_is_that_of_the_local_engine():
    one, other = layerwise(micro=3), accumulate()
    assert one.evaluate([make_batch(3)]) == pytest.approx(other.evaluate([make_batch(3)]), rel=1e-6)

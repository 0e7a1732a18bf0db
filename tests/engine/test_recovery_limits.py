"""Where recovery ends, what it remembers, and rehearsals."""

import json
from pathlib import Path

import pytest
import torch

from lowmem.engine import layerwise_head, local
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.recovery import smaller_micro_batch
from lowmem.nn import loss
from lowmem.system.errors import MemoryBudgetError
from tests.engine.out_of_memory import MESSAGE, MemoryRunsOut, NothingLargerThan, bits
from tests.engine.recovery_cases import CASES, GLOBAL_BATCH, LR, MICRO, make_batch, make_engine


def test_smaller_micro_batches_divide_what_the_larger_ones_divide():
    assert [smaller_micro_batch(size) for size in (1, 2, 3, 7, 8, 9, 12, 15, 35)] == [0, 1, 1, 1, 4, 3, 6, 5, 7]


def fail_once(function, error: BaseException | None = None, call: int = 1):
    """`function`, out of memory at its `call`-th call."""
    calls = []

    def wrapped(*arguments, **more):
        calls.append(1)
        if len(calls) == call:
            raise error or RuntimeError(MESSAGE)
        return function(*arguments, **more)

    return wrapped


def fail_always(*arguments, **more):
    raise RuntimeError(MESSAGE)


@pytest.mark.parametrize("case", ["dense", "dense, layerwise"])
def test_one_sequence_that_does_not_fit_is_the_users_problem_and_changes_nothing(case):
    engine = make_engine(case, micro=2)
    engine.step(make_batch(0), LR)
    before, random = bits(engine), torch.get_rng_state()
    engine.model.embed = fail_always
    with pytest.raises(MemoryBudgetError) as caught:
        engine.step(make_batch(1), LR)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.startswith("memory ran out with micro-batches of 1 sequence ([enforce fail at alloc_cpu.cpp]")
    assert all(remedy in message for remedy in ("train.activation_checkpointing=block", "optim.state_bits=4", "data.seq_len", "budget"))
    assert ("train.update=layerwise" in message) == (case == "dense")
    assert engine.messages == ["memory ran out with micro-batches of 2; going on with 1"]
    assert bits(engine) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_remedies_in_force_are_not_named():
    engine = make_engine("lorpt, layerwise", micro=1)  # block checkpointing, 4 bits
    engine.model.embed = fail_always
    with pytest.raises(MemoryBudgetError) as caught:
        engine.step(make_batch(0), LR)
    remedies = str(caught.value).split("; ")[-1]
    assert remedies == "use a smaller train.global_batch_size, a shorter data.seq_len or a larger budget"


@pytest.mark.parametrize("case", ["dense", "dense, layerwise"])
def test_an_evaluation_is_repeated_too_and_takes_each_batch_once(case):
    engine, other = make_engine(case), make_engine(case)
    engine.model.embed = fail_once(engine.model.embed, call=4)  # in the second batch
    drawn = []
    assert engine.evaluate(drawn.append(seed) or make_batch(seed) for seed in range(3)) == expected_evaluation(other)
    assert drawn == [0, 1, 2]
    assert (engine.micro_batch_size, engine.failed_micro_batch_size) == (MICRO // 2, MICRO)
    if isinstance(engine, LayerwiseEngine):
        assert engine.block_micro_batches == [MICRO // 2] * 2


def expected_evaluation(engine: LocalEngine) -> float:
    """Micro-batches of 6 for the first batch and of 3 for the others, added in that order."""
    total, count = 0.0, 0
    engine.model.eval()
    with torch.no_grad():
        for seed in range(3):
            engine.micro_batch_size = MICRO if seed == 0 else MICRO // 2
            for loss in engine._losses(make_batch(seed)):
                total += loss
            count += make_batch(seed).target_count()
    return total / count


def test_other_errors_are_not_taken_for_memory():
    engine = make_engine("dense")
    engine.model.embed = fail_once(engine.model.embed, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.step(make_batch(0), LR)
    assert (engine.micro_batch_size, engine.messages) == (MICRO, [])


@pytest.mark.parametrize("case", ["dense", "dense, layerwise"])
def test_random_numbers_of_a_repeated_step_are_drawn_again(case):
    engine, drawn = make_engine(case), []
    engine.model.blocks[0].register_forward_pre_hook(lambda module, inputs: drawn.append(torch.rand(()).item()))
    torch.manual_seed(1)
    # after both micro-batches of 6: the local engine computes a loss for each, the layerwise one for all
    engine.model.head_loss = fail_once(engine.model.head_loss, MemoryError(), call=2 if case == "dense" else 1)
    engine.step(make_batch(0), LR)
    assert len(drawn) == 2 + 4
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 4


def test_fp16_gradients_that_were_unscaled_already_are_dropped_with_their_mark(monkeypatch):
    engine, other = (make_fp16(micro) for micro in (MICRO, MICRO // 2))
    engine.scaler.load_state_dict({**engine.scaler.state_dict(), "scale": 2.0**10})
    other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 2.0**10})
    monkeypatch.setattr(local, "global_norm", fail_once(local.global_norm))
    results = [engine.step(make_batch(seed), LR) for seed in range(2)]
    assert engine.micro_batch_size == MICRO // 2
    assert results == [other.step(make_batch(seed), LR) for seed in range(2)]
    assert not any(result.skipped for result in results)
    assert engine.scaler.state_dict() == other.scaler.state_dict()


def make_fp16(micro: int) -> LocalEngine:
    engine = make_engine("dense")
    optim = local.OptimConfig(lr=LR, clip=0.5)
    return LocalEngine(engine.model, optim, device=torch.device("cpu"), precision="fp16", micro_batch_size=micro)


def test_an_update_that_fails_half_way_is_not_repeated():
    pytest.importorskip("lion_pytorch")
    engine = make_engine("dense", name="lion", lr=1e-3)
    step = engine.optimizer.step

    def short_of_memory(*arguments):
        with MemoryRunsOut(5):  # lion-pytorch allocates two tensors for each that it updates
            step(*arguments)

    engine.optimizer.step = short_of_memory
    with pytest.raises(MemoryBudgetError, match=r"some have changed, some have not; .* last checkpoint; use .*layerwise"):
        engine.step(make_batch(0), LR)


@pytest.mark.parametrize("case", CASES)
def test_updates_allocate_nothing(case):
    engine, modes = make_engine(case), []
    name = "update" if isinstance(engine, LayerwiseEngine) else "step"
    update = getattr(engine.optimizer, name)

    def watched(*arguments, **more):
        with MemoryRunsOut() as mode:
            update(*arguments, **more)
        modes.append(mode)

    setattr(engine.optimizer, name, watched)
    engine.step(make_batch(0), LR)
    assert modes
    assert {mode.count for mode in modes} == {0}


@pytest.mark.parametrize("where", ["embedding", "clipping"])
def test_what_fails_twice_after_the_first_update_ends_the_run(where):
    engine = make_engine("dense, layerwise")
    if where == "clipping":
        engine.clipping.factor = fail_once(fail_once(engine.clipping.factor, call=2), call=3)  # not the head's
    else:
        embed = engine.model.embed
        engine.model.embed = lambda tokens, **more: fail_always() if torch.is_grad_enabled() else embed(tokens, **more)
    message = r"\[enforce fail .*\) while weights were updated: .*last checkpoint; use train.micro_batch_size=3, "
    with pytest.raises(MemoryBudgetError, match=message):
        engine.step(make_batch(0), LR)


def test_the_gradient_of_the_norm_is_computed_again(monkeypatch):
    engine, other = (make_engine("dense in rows, layerwise") for _ in range(2))
    expected, grad = other.step(make_batch(0), LR), torch.autograd.grad
    fails = iter([True, False])

    def run_out_at_the_end(*arguments, **more):
        result = grad(*arguments, **more)
        if any(wanted is engine.model.norm.weight for wanted in arguments[1]) and next(fails, False):
            raise RuntimeError(MESSAGE)
        return result

    monkeypatch.setattr(torch.autograd, "grad", run_out_at_the_end)
    assert engine.step(make_batch(0), LR) == expected
    assert next(fails, "both used") == "both used"
    assert bits(engine) == bits(other)


@pytest.mark.parametrize("fitting, message", [(0, "nothing smaller exists"), (6, "last checkpoint")])
def test_a_token_of_the_head_that_does_not_fit_ends_the_run(fitting, message, monkeypatch):
    """In the first pass, which has six cells of 32 tokens, or in the second."""
    engine, left = make_engine("dense in rows, layerwise"), [fitting]

    def fits(work, device) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            work()
        return left[0] >= 0

    monkeypatch.setattr(layerwise_head, "fits", fits)
    with pytest.raises(MemoryBudgetError, match=f"one token and 67 rows of the head do not fit.*({message})"):
        engine.step(make_batch(0), LR)


@pytest.mark.parametrize("case", ["dense", "dense in rows, layerwise"])
def test_sizes_that_failed_are_remembered(case, tmp_path: Path):
    engine = make_engine(case)
    engine.model.embed = fail_once(engine.model.embed)
    engine.step(make_batch(0), LR)
    if isinstance(engine, LayerwiseEngine):
        engine.head.block_tokens, engine.block_micro_batches[1] = 16, 1
    state = json.loads(json.dumps(engine.save(tmp_path)))
    assert state["micro_batch"] == {"size": MICRO // 2, "failed": MICRO}
    for configured, expected in ((GLOBAL_BATCH, MICRO // 2), (MICRO, MICRO // 2), (4, 4), (1, 1)):
        resumed = make_engine(case, micro=configured)
        resumed.load(tmp_path, state)
        assert (resumed.micro_batch_size, resumed.failed_micro_batch_size) == (expected, MICRO)
        if isinstance(resumed, LayerwiseEngine):
            assert resumed.block_micro_batches == [min(expected, MICRO // 2), 1]
            assert resumed.head.block_tokens == 16
    straight, resumed = engine, make_engine(case)
    resumed.load(tmp_path, state)
    assert resumed.step(make_batch(1), LR) == straight.step(make_batch(1), LR)
    assert bits(resumed) == bits(straight)


@pytest.mark.parametrize("case", ["dense", "dense in rows, layerwise"])
def test_checkpoints_from_before_there_was_recovery_load(case, tmp_path: Path):
    engine = make_engine(case)
    state = engine.save(tmp_path)
    del state["micro_batch"]
    if isinstance(engine, LayerwiseEngine):
        del state["layerwise"]["head_block_tokens"]
    resumed = make_engine(case, micro=4)
    resumed.load(tmp_path, state)
    assert (resumed.micro_batch_size, resumed.failed_micro_batch_size) == (4, 0)


def everything(engine: LocalEngine) -> dict:
    more = {"scaler": engine.scaler.state_dict(), "random": torch.get_rng_state().tolist(), "training": engine.model.training}
    if isinstance(engine, LayerwiseEngine):
        more["clipping"] = engine.clipping.state()
    return bits(engine) | more


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_leaves_no_trace(case):
    engine, other = make_engine(case), make_engine(case)
    for one in (engine, other):
        one.step(make_batch(0), LR)
    before = everything(engine)
    engine.rehearse(make_batch(1))
    assert everything(engine) == before
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert engine.messages == []
    assert [engine.step(make_batch(seed), LR) for seed in (2, 3)] == [other.step(make_batch(seed), LR) for seed in (2, 3)]
    assert bits(engine) == bits(other)


@pytest.mark.parametrize("case", ["dense", "dense in rows, layerwise"])
def test_a_rehearsal_finds_the_micro_batch_that_steps_then_use(case, monkeypatch):
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", 32)
    engine, other = make_engine(case), make_engine(case, micro=MICRO // 2)
    # The MLP's activation has 128 numbers for each of 16 tokens, 49,152 bytes for 6 sequences and half for 3; the gradient of its
    # largest matrix has 32,768 bytes.
    with NothingLargerThan(40_000):
        engine.rehearse(make_batch(0))
        assert engine.micro_batch_size == MICRO // 2
        assert engine.messages == [f"memory ran out with micro-batches of {MICRO}; going on with {MICRO // 2}"]
        assert [engine.step(make_batch(seed), LR) for seed in range(2)] == [other.step(make_batch(seed), LR) for seed in range(2)]
        engine.evaluate([make_batch(3)])
    assert len(engine.messages) == 1
    assert bits(engine) == bits(other)


def test_a_rehearsal_finds_the_micro_batch_of_a_block():
    engine = make_engine("dense, layerwise")
    before = bits(engine)
    engine._differentiate = fail_once(engine._differentiate)
    engine.rehearse(make_batch(0))
    assert engine.block_micro_batches == [MICRO, MICRO // 2]
    assert engine.messages == [f"memory ran out in block 1 with micro-batches of {MICRO}; this block goes on with {MICRO // 2}"]
    assert bits(engine) == before

"""Memory that runs out anywhere in a step costs a smaller micro-batch and nothing else: not a batch, not a bit."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from lowmem.engine import layerwise, layerwise_head
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.nn import loss
from lowmem.nn.gradients import gradients_of
from tests.engine.out_of_memory import MESSAGE, MemoryRunsOut, bits
from tests.engine.recovery_cases import CASES, LR, MICRO, STEPS, make_batch, make_engine

POINTS_PER_CASE = 5
FITS = layerwise_head.fits


@pytest.fixture(autouse=True)
def _small_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", 32)  # three blocks of rows


Place = tuple[int, int]  # a block, and how many sequences of it were done


def run_with_failure(case: str, step: int, at: int, monkeypatch) -> tuple[LocalEngine, list[Any], MemoryRunsOut, list[bool], list[Place]]:
    """An engine after its steps, during one of which memory ran out; the results, whether each cell of the head's gradient fit, and where
    in which block it happened."""
    engine, results, cells, places, found = make_engine(case), [], [], [], MemoryRunsOut()
    watch_blocks(engine, places.append)

    def recording(work, device):
        cells.append(FITS(work, device))
        return cells[-1]

    monkeypatch.setattr(layerwise_head, "fits", recording)
    for number in range(STEPS):
        failure = MemoryRunsOut(at)
        with failure if number == step else nullcontext():
            results.append(engine.step(make_batch(number), LR))
        found = failure if number == step else found
    return engine, results, found, cells, places


def watch_blocks(engine: LocalEngine, failed: Callable[[Place], None]) -> None:
    """Have `failed` told where in a block memory ran out."""
    if not isinstance(engine, LayerwiseEngine):
        return
    differentiate = engine._differentiate

    def watched(index, *arguments):
        try:
            differentiate(index, *arguments)
        except RuntimeError:
            failed((index, arguments[-1].sequences))
            raise

    engine._differentiate = watched


def run_as_if(
    like: LocalEngine, case: str, step: int, cells: list[bool], places: list[Place], monkeypatch
) -> tuple[LocalEngine, list[Any]]:
    """An engine in which memory runs out nowhere but before the gradients of a micro-batch are there, which leaves nothing half done; in
    `step` it takes over the sizes of `like`, each where a failure changes it."""
    engine, results, script = make_engine(case), [], iter(cells)

    def scripted(work, device):
        fit = next(script, True)  # an evaluation, afterwards, finds room
        if fit:
            work()
        return fit

    monkeypatch.setattr(layerwise_head, "fits", scripted)
    for number in range(STEPS):
        if number == step and engine.micro_batch_size != like.micro_batch_size:
            engine.set_micro_batch_size(like.micro_batch_size)
        if number == step and places:
            fail_between_micro_batches(engine, places.pop(), monkeypatch)
        results.append(engine.step(make_batch(number), LR))
    return engine, results


def fail_between_micro_batches(engine: LayerwiseEngine, place: Place, monkeypatch) -> None:
    differentiate, here, left = engine._differentiate, [], [place]

    def noted(index, *arguments):
        here[:] = [index, arguments[-1]]
        differentiate(index, *arguments)

    def gradients(*arguments, **more):
        if here and left == [(here[0], here[1].sequences)]:
            left.clear()
            raise RuntimeError(MESSAGE)
        return gradients_of(*arguments, **more)

    engine._differentiate = noted
    monkeypatch.setattr(layerwise, "gradients_of", gradients)


def operations(case: str) -> list[int]:
    """How many operations of each step return new memory."""
    engine, counts = make_engine(case), []
    for number in range(STEPS):
        with MemoryRunsOut() as mode:
            engine.step(make_batch(number), LR)
        counts.append(mode.count)
    return counts


def check_point(case: str, step: int, at: int, monkeypatch) -> str:
    """Everything is equal to the run that meant to; what the recovery was."""
    engine, results, failure, cells, places = run_with_failure(case, step, at, monkeypatch)
    assert failure.failed
    other, expected = run_as_if(engine, case, step, cells, places, monkeypatch)
    assert other.micro_batch_state()["size"] == engine.micro_batch_state()["size"]
    where = f"step {step}, operation {at}: {failure.failed}; {engine.messages}"
    assert results == expected, where
    assert bits(engine) == bits(other), where
    assert engine.evaluate([make_batch(99)]) == other.evaluate([make_batch(99)])
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert not any(result.skipped for result in results)
    if engine.micro_batch_size != MICRO:
        assert engine.messages == [f"memory ran out with micro-batches of {MICRO}; going on with {MICRO // 2}"]
        assert engine.failed_micro_batch_size == MICRO
        return "micro-batch"
    assert engine.failed_micro_batch_size == 0
    return engine.messages[0].split(" with")[0].split(";")[0].rstrip("0123456789 ") if engine.messages else "once more"


@pytest.mark.parametrize("case", CASES)
def test_memory_running_out_anywhere_changes_the_micro_batch_and_nothing_else(case, monkeypatch):
    counts, rng = operations(case), random.Random(case)
    for _ in range(POINTS_PER_CASE):
        step = rng.randrange(STEPS)
        check_point(case, step, rng.randint(1, counts[step]), monkeypatch)


def test_every_kind_of_recovery_is_among_them(monkeypatch):
    case = "dense in rows, layerwise"
    count = operations(case)[1]
    kinds = [check_point(case, 1, count * (2 * part + 1) // 24, monkeypatch) for part in range(12)]
    assert set(kinds) == {"micro-batch", "memory ran out in block", "memory ran out in the head", "once more"}

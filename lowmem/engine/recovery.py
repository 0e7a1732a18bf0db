"""What an engine does when memory runs out: give memory back, lower the micro-batch, and do the same work again."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from lowmem.engine.base import MicroBatches
from lowmem.engine.state import random_state, restore_random_state
from lowmem.memory.allocator import release_host_memory
from lowmem.memory.limits import is_out_of_memory
from lowmem.system.errors import MemoryBudgetError

HALF_APPLIED = "while weights were updated: some have changed, some have not; run the same command again to go on from the last checkpoint"
T = TypeVar("T")


def smaller_micro_batch(size: int) -> int:
    """The largest proper divisor of `size`, at most half of it, so that it divides all that `size` divides; 0 for 1."""
    return max((divisor for divisor in range(1, size // 2 + 1) if size % divisor == 0), default=0)


def repeat_with_smaller_micro_batches(engine: MicroBatches, work: Callable[[], T], discard: Callable[[], None]) -> T:
    """`work()`, done again from its beginning with a smaller micro-batch each time it runs out of memory.

    Args:
        work: changes nothing that `discard` does not undo, random numbers aside.
        discard: drops what a failed `work` left behind.
    Raises:
        MemoryBudgetError: memory ran out with one sequence at a time.
    """
    random = random_state(engine.device)
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        # Outside of the except clause: the error holds the frames, and these the tensors, of what failed.
        discard()
        release_memory(engine.device)
        restore_random_state(random, engine.device)
        lower_micro_batch(engine, failure)


def lower_micro_batch(engine: MicroBatches, failure: str) -> None:
    """Go on with a smaller micro-batch, remember the one that failed, and say so.

    Args:
        failure: what ran out, for the message.
    Raises:
        MemoryBudgetError: there is no smaller one.
    """
    size, smaller = engine.micro_batch_size, smaller_micro_batch(engine.micro_batch_size)
    if not smaller:
        raise MemoryBudgetError(f"memory ran out with micro-batches of 1 sequence ({failure}), nothing smaller exists; {remedies(engine)}")
    engine.failed_micro_batch_size = min(size, engine.failed_micro_batch_size or size)
    engine.set_micro_batch_size(smaller)
    engine.messages.append(f"memory ran out with micro-batches of {size}; going on with {smaller}")


def once_more(work: Callable[[], T], device: torch.device) -> T:
    """`work()`; if memory runs out, a second time after memory was given back.

    Args:
        work: changes nothing before it succeeds.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)
    return work()


def fits(work: Callable[[], None], device: torch.device) -> bool:
    """Whether `work()` came to its end; False if memory ran out, which was given back then."""
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)
    return False


@contextmanager
def cannot_be_repeated(engine: MicroBatches, state: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that a user can act on.

    Args:
        state: what is lost, and what to do about that.
    Raises:
        MemoryBudgetError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(f"memory ran out ({first_line(error)}) {state}; {remedies(engine)}") from error


def remedies(engine: MicroBatches) -> str:
    """What would take less memory and is not in force yet."""
    smaller = smaller_micro_batch(engine.micro_batch_size)
    micro_batch, seq_len = engine.size_keys
    first = [f"{micro_batch}={smaller}"] if smaller else []
    return f"use {', '.join([*first, *engine.memory_remedies(), f'a shorter {seq_len}'])} or a larger budget"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def release_memory(device: torch.device) -> None:
    """Give freed memory back to the system, from which a differently shaped allocation can take it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    release_host_memory()

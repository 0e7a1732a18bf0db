"""What changes while a run goes on: its phase, with data and learning rate, and the rank of its model."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from lowmem.config.schema import LorptConfig
from lowmem.data.batch import Batch
from lowmem.data.stream import EndOfData
from lowmem.optim.from_config import learning_rate
from lowmem.system.units import format_count
from lowmem.train.run import Run, TrainState

MIN_IMPROVEMENT = 1e-3  # of the best loss: less is a plateau


def count_evaluation(state: TrainState, loss: float) -> None:
    """Note an evaluation, before `state.best_val_loss` takes it in: was it a thousandth better than the best?"""
    best = state.best_val_loss
    improved = math.isfinite(loss) and (best is None or loss < best * (1 - MIN_IMPROVEMENT))
    state.flat_evaluations = 0 if improved else state.flat_evaluations + 1


def next_rank(lorpt: LorptConfig, state: TrainState, current: int) -> int:
    """The rank to change to before the coming step; 0 to leave it.

    Args:
        current: the rank that the following layers have now; the largest, should they differ.
    """
    due = [step for step in lorpt.schedule if step <= state.step]
    if due:
        rank = lorpt.schedule[max(due)]
        return 0 if rank == state.rank else rank
    if lorpt.grow_to > current and state.flat_evaluations >= lorpt.grow_patience:
        return min(2 * current, lorpt.grow_to)
    return 0


def follow_rank_schedule(run: Run) -> None:
    """Change the rank before the coming step, if it is time."""
    lorpt, state = run.config.model.lorpt, run.state
    if not lorpt.largest_rank():
        return
    current = state.rank or run.engine.lorpt_rank(lorpt.ranks)
    rank = next_rank(lorpt, state, current)
    if not rank:
        return
    before = run.engine.model.num_parameters()
    run.engine.set_rank(rank, lorpt.ranks, seed=run.config.train.seed, step=state.step)
    state.rank, state.flat_evaluations = rank, 0
    after = run.engine.model.num_parameters()
    run.display.message(f"rank {current} -> {rank} after step {state.step}; parameters {before:,} -> {after:,}")


def next_batch(run: Run) -> Batch | None:
    """The next global batch of the present phase; None if its data has come to an end."""
    config = run.config
    length = config.seq_len_at(run.state.step) if run.phase.kind == "text" else config.data.seq_len
    try:
        return run.data.train.batch(config.train.global_batch_size, seq_len=length, step=run.phase_step)
    except EndOfData:
        return None


def count_speed(run: Run, seq_len: int, tokens_per_s: float) -> None:
    """Note the speed of a step; where the length changes, say what it was before."""
    before = next(reversed(run.speeds), seq_len)
    if seq_len != before:
        run.display.message(f"{describe_speed(run, before)}; from step {run.state.step} on they have {seq_len}")
        run.speeds.pop(seq_len, None)  # the present length is the last one
    run.speeds.setdefault(seq_len, []).append(tokens_per_s)


def describe_speed(run: Run, seq_len: int) -> str:
    """One line for people."""
    speeds = run.speeds[seq_len]
    return f"sequences of {seq_len} tokens: {format_count(median(speeds))} tokens/s (median of {len(speeds)} steps)"


def phase_learning_rate(run: Run) -> float:
    """Of the coming step: warm-up and decay run over the steps of the phase."""
    optim, phase = run.config.optim, run.phase
    warmup = optim.warmup_steps if phase.warmup_steps < 0 else phase.warmup_steps
    return learning_rate(replace(optim, lr=phase.lr or optim.lr, warmup_steps=warmup), run.phase_step + 1, phase.steps)


def enter_next_phase(run: Run) -> None:
    """After the last step of a phase: the next one has other data, and a best loss of its own. Nothing changes after the last phase."""
    state = run.state
    if state.phase == len(run.phase_data) - 1:
        return
    done, state.phase, state.phase_start = run.phase.name, state.phase + 1, state.step
    state.phase_ends.append(state.step)
    state.best_val_loss, state.best_step, state.flat_evaluations = None, 0, 0
    run.display.message(f"phase {done} is complete at step {state.step}; {run.phase.name} begins")


def end_of_data(run: Run, *, evaluate: Callable[[Run], bool], save: Callable[[Run], None]) -> None:
    """The phase ends before its time, because of `data.exhausted`."""
    state, phase = run.state, run.phase
    run.display.message(
        f"phase {phase.name} ends at step {state.step}, after {run.phase_step} of {phase.steps} steps: its data is exhausted "
        f"(data.exhausted={run.config.data.exhausted})"
    )
    if run.config.train.eval_every and run.phase_step:
        evaluate(run)
    state.data_ended = state.phase == len(run.phase_data) - 1
    enter_next_phase(run)
    save(run)

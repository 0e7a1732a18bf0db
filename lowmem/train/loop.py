"""The training loop: batches into an engine, metrics and checkpoints out. Knows nothing of devices, budgets or DeepSpeed."""

import math
import time
from typing import Any

from lowmem.data.batch import Batch
from lowmem.engine.base import StepResult
from lowmem.system.errors import EXIT_INTERRUPTED, DivergedError, StoppedBySignal
from lowmem.system.process import StopRequest
from lowmem.train.run import Run
from lowmem.train.stages import (
    count_evaluation,
    count_speed,
    describe_speed,
    end_of_data,
    enter_next_phase,
    follow_rank_schedule,
    next_batch,
    phase_learning_rate,
)


def train(run: Run) -> None:
    """Train from `run.state` to the end of the run.

    Raises:
        StoppedBySignal: after saving a checkpoint.
        DivergedError: `train.max_bad_steps` non-finite steps in a row, or weights or a held-out loss that are not finite at the end of a
            phase; checkpoints on disk are intact.
        StorageError: a checkpoint or the metrics could not be written.
    """
    config, state, engine = run.config, run.state, run.engine
    total = config.total_steps()
    if run.is_complete():
        run.display.message(f"the run is complete at step {state.step}; raise train.steps to go on, or start over with --fresh")
        return
    _show_messages(run)
    run.display.start(total, state.step)
    part = "first_step"  # of this process: it is the one that makes room for gradients and optimizer states
    with StopRequest() as stop:
        while not run.is_complete():
            started = time.perf_counter()
            follow_rank_schedule(run)
            with run.peaks(part):
                batch = next_batch(run)
                if batch is None:
                    end_of_data(run, evaluate=_evaluate, save=_save_end)
                    continue
                lr = phase_learning_rate(run)
                result = engine.step(batch, lr)
            part = "steady_steps"
            _show_messages(run)
            _count(run, batch, result)
            _report_step(run, batch, result, lr, time.perf_counter() - started)
            _check_divergence(run, result)
            ended = run.phase_step >= run.phase.steps
            improved = _due(config.train.eval_every, state.step, ended) and _evaluate(run)
            _show_messages(run)
            stopping = engine.any_rank(bool(stop.exit_code))
            # within a bad streak the weights may be broken already: they must not push out the last good checkpoint
            due = _due(config.train.save_every, state.step, ended) and not state.bad_steps
            if ended:
                _check_end(run)
                enter_next_phase(run)
            if stopping or improved or due or ended:
                save(run)
            if stopping and not run.is_complete():
                raise StoppedBySignal(
                    f"stopped at step {state.step} of {total}, checkpoint saved; run the same command again to go on",
                    stop.exit_code or EXIT_INTERRUPTED,
                )
    if len(run.speeds) > 1:
        run.display.message(describe_speed(run, next(reversed(run.speeds))))
    how = "--chat" if config.all_phases()[-1].kind == "chat" else "--interactive"
    how += "" if config.train.weights_at == "device" else f" --weights_at={config.train.weights_at}"
    run.display.message(f"done; to let it write: lowmem generate --run {config.run_dir} {how}")


def _show_messages(run: Run) -> None:
    """What the engine has to say: memory that ran out, and what it does instead."""
    while run.engine.messages:
        run.display.message(run.engine.messages.pop(0))


def save(run: Run) -> None:
    """Write a checkpoint of the current state; every rank calls it."""
    run.state.data = run.data.train.state_dict()
    state = run.state
    with run.peaks("save"):
        run.checkpoints.save(state.step, run.engine, state.to_json(), best_step=state.best_step, keep=state.phase_ends)


def _due(every: int, step: int, ended: bool) -> bool:
    return bool(every) and (step % every == 0 or ended)


def _count(run: Run, batch: Batch, result: StepResult) -> None:
    state = run.state
    state.step += 1
    state.tokens += batch.inputs.size
    if result.skipped == "nonfinite":
        state.bad_steps += 1
        state.skipped_steps += 1
    elif not result.skipped:
        state.bad_steps = 0


def _check_divergence(run: Run, result: StepResult) -> None:
    state = run.state
    if state.bad_steps >= run.config.train.max_bad_steps:
        raise _diverged(
            run,
            f"loss or gradients were not finite for {state.bad_steps} steps in a row up to step {state.step} "
            f"(loss {result.loss}, gradient norm {result.grad_norm}; train.max_bad_steps is {run.config.train.max_bad_steps})",
        )


def _diverged(run: Run, found: str) -> DivergedError:
    steps, optim = run.checkpoints.steps(), run.config.optim
    remedy = f"the last checkpoint is step {steps[-1]}" if steps else "no checkpoint was saved yet"
    return DivergedError(
        f"{found}; {remedy}; lower optim.lr ({optim.lr}), lengthen optim.warmup_steps or set optim.clip, with --fresh or in another run_dir"
    )


def _check_end(run: Run) -> None:
    """Before the last state of a phase is saved: a model that computes nothing is no result.

    Steps that were skipped at the very end are none of its business if the held-out loss is a number afterwards.
    """
    state, evaluated = run.state, run.last_evaluation
    if run.engine.any_rank(not run.engine.weights_are_finite()):
        raise _diverged(run, f"weights are not finite after step {state.step}")
    if evaluated is not None and evaluated[0] == state.step:
        if not math.isfinite(evaluated[1]):
            raise _diverged(run, f"the held-out loss is {evaluated[1]} after step {state.step}")
    elif state.bad_steps:
        what = "the last step was" if state.bad_steps == 1 else f"the last {state.bad_steps} steps were"
        raise _diverged(run, f"loss or gradients of {what} not finite, up to step {state.step}, the end")


def _save_end(run: Run) -> None:
    """Save the state at the end of a phase whose data is exhausted."""
    _check_end(run)
    save(run)


def _report_step(run: Run, batch: Batch, result: StepResult, lr: float, seconds: float) -> None:
    count_speed(run, batch.inputs.shape[1], batch.inputs.size / seconds)
    if run.run_dir is None:
        return
    record: dict[str, Any] = {
        "step": run.state.step,
        "tokens": run.state.tokens,
        "loss": _json_number(result.loss),
        "lr": lr,
        "grad_norm": _json_number(result.grad_norm),
        "seq_len": batch.inputs.shape[1],
        "micro_batch_size": run.engine.micro_batch_size,
        "step_time_s": round(seconds, 6),
        "tokens_per_s": round(batch.inputs.size / seconds, 2),
        **run.peaks.now(),
        **run.engine.traffic(),
    }
    if run.config.phases:
        record["phase"] = run.phase.name
    if batch.segments is not None:
        record["target_tokens"] = batch.target_count()
    if result.skipped:
        record["skipped"] = result.skipped
    run.run_dir.append_metrics(record)
    run.display.on_step(record)
    for logger in run.loggers:
        logger.log(run.state.step, record)


def _evaluate(run: Run) -> bool:
    """Loss on the held-out text; True if it is the lowest so far."""
    validation = run.data.validation
    if validation is None:
        return False
    with run.peaks("evaluation"):
        loss = run.engine.evaluate(validation.batches(run.config.train.eval_sequences))
    state = run.state
    run.last_evaluation = (state.step, loss)
    if run.run_dir is not None:
        record = {"step": state.step, "val_loss": _json_number(loss)}
        run.run_dir.append_metrics(record)
        run.display.on_eval(state.step, loss)
        for logger in run.loggers:
            logger.log(state.step, record)
    count_evaluation(state, loss)
    if not math.isfinite(loss) or (state.best_val_loss is not None and loss >= state.best_val_loss):
        return False
    state.best_val_loss, state.best_step = loss, state.step
    return True


def _json_number(value: float) -> float | None:
    """JSON has no NaN or infinity: they become null."""
    return value if math.isfinite(value) else None

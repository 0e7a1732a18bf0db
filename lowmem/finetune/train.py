"""A fine-tuning run from its configuration to its adapter: resumable, inside its budget."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem.config.finetune import FinetuneConfig
from lowmem.engine.recovery import release_memory
from lowmem.engine.state import load_optimizer_tensors, optimizer_tensors, random_state, restore_random_state
from lowmem.finetune.base_model import DTYPES, base_directory, compute_device, enable_checkpointing, load_base, reported_as_damage
from lowmem.finetune.data import ChatData, chat_data, copy_tokenizer, tokenizer_folder
from lowmem.finetune.methods import WITHOUT_ADAPTER, apply_method, can_checkpoint, one_per_row, parameter_groups
from lowmem.finetune.probe import check_loss
from lowmem.finetune.save import merged_model, save_adapter, save_merged
from lowmem.finetune.settle import (
    base_sha256,
    check_base,
    check_content,
    choose_micro_batch,
    earlier_micro_batch,
    enforce_budget,
    within_container,
)  # fmt: skip
from lowmem.finetune.step import Stepper
from lowmem.memory.limits import check_host_limit
from lowmem.memory.measure import PeakRecorder
from lowmem.optim.schedule import learning_rate
from lowmem.system.errors import EXIT_INTERRUPTED, DivergedError, StoppedBySignal
from lowmem.system.files import written_whole
from lowmem.system.process import StopRequest
from lowmem.system.tensors import load_into, read_tensors, write_tensors
from lowmem.train.display import ProgressDisplay
from lowmem.train.run import are_finite
from lowmem.train.run_dir import CheckpointStore, RunDir

MAX_BAD_STEPS = 5


@dataclass
class Finetuned:
    """The end of a run.

    Attributes:
        model: with its adapter.
        losses: of the held-out conversations by step; empty if nothing is held out.
        peaks: of memory, by phase: load, steady_steps, save.
        total: numbers of base and adapter; those of a 4-bit base count one by one.
        predicted, predicted_vram: bytes by component, of RAM and of a GPU.
    """

    model: Any
    directory: Path
    losses: dict[int, float]
    trainable: int
    total: int
    peaks: dict[str, dict[str, int]]
    predicted: dict[str, int]
    predicted_vram: dict[str, int]


def finetune(
    config: FinetuneConfig, display: ProgressDisplay, *, fresh: bool = False, resume: Literal["auto", "last_valid"] = "auto"
) -> Finetuned:
    """Train, or go on where the folder's last checkpoint is, then write adapter/ and merged/.

    Args:
        fresh: move what the folder holds aside and start over.
        resume: last_valid passes over damaged checkpoints.
    Raises:
        LowmemError: every failure that a user can cause; see `lowmem.system.errors`.
    """
    out = Path(config.out)
    run_dir = RunDir(out, "out")
    try:
        if fresh and (old := run_dir.start_over()):
            display.message(f"the run that was there is kept as {old}")
        config, said = within_container(config)
        if said:
            display.message(said)
        earlier = earlier_micro_batch(config, out)
        directory = base_directory(config.base, out)
        for note in check_base(config, directory):
            display.message(note)
        config, predicted = choose_micro_batch(config, directory, at_most=earlier)
        display.message(f"{predicted.line()}; micro-batches of {config.micro_batch_size}")
        enforce_budget(config, predicted)
        phases, dtype = PeakRecorder(), DTYPES[config.base_dtype]
        with phases("load"):
            model = load_base(directory, nf4=config.method == "qlora", double_quant=config.adapter.double_quant, dtype=dtype)
            with reported_as_damage(directory):  # the first forward pass meets what no shape shows
                check_loss(model, compute_device(), packed=not one_per_row(model, config))
        folder, new_ids = tokenizer_folder(config, directory, model)
        data = chat_data(config, folder, one_per_row=one_per_row(model, config), progress=display)
        if data.notes:
            display.message(f"{config.data}: {data.notes}")
        content = {"base": base_sha256(directory), **data.content}
        check_content(out, content)
        adapted = apply_method(model, config, new_ids)
        if config.gradient_checkpointing and can_checkpoint(config):
            enable_checkpointing(model)
        check_host_limit()
        run = _Run(config, adapted, data, run_dir, display)
        run_dir.write_json("finetune.json", {**asdict(config), "content": content})
        with phases("steady_steps"):
            losses = run.train(skip_damaged=resume == "last_valid")
        release_memory(run.device)
        with phases("save"):
            _write(config, adapted, directory, folder, data)
        display.message(f"done; adapter and merged model are in {out}")
        ends = (run.trainable, predicted.total, phases.as_dict(), predicted.components, predicted.vram)
        return Finetuned(adapted, directory, losses, *ends)
    finally:
        run_dir.close()


def _write(config: FinetuneConfig, model: Any, directory: Path, folder: Path, data: ChatData) -> None:
    out = Path(config.out)
    if config.method not in WITHOUT_ADAPTER:
        with written_whole(out / "adapter") as target:
            save_adapter(model, directory, target)
            copy_tokenizer(folder, target, data.template)
    merged = merged_model(model, config)
    if merged is not None:
        with written_whole(out / "merged") as target:
            save_merged(merged, directory, target)
            copy_tokenizer(folder, target, data.template)


class _Run:
    """Steps, evaluations, checkpoints. Has what `CheckpointStore` asks of an engine."""

    rank = 0

    def __init__(self, config: FinetuneConfig, model: Any, data: ChatData, run_dir: RunDir, display: ProgressDisplay):
        self.config, self.model, self.data, self.run_dir, self.display = config, model, data, run_dir, display
        self.device = next(model.parameters()).device
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.trainable = sum(parameter.numel() for parameter in self.trained.values())
        self.stepper = Stepper(model, parameter_groups(model, config), config, self.device)
        self.store = CheckpointStore(run_dir.path, keep_last=2)
        self.done, self.losses = 0, {}  # type: ignore[var-annotated]

    def barrier(self) -> None:
        """One process waits for nobody."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Trained numbers and optimizer states; the rest as JSON."""
        tensors, scalars = optimizer_tensors(self.model, self.stepper.optimizer)
        write_tensors(directory / "trained.safetensors", self.trained)
        write_tensors(directory / "optimizer.safetensors", tensors)
        random = random_state(self.device)
        own = {"clipping": self.stepper.clipping.state(), "micro_batch": self.stepper.micro_batch_state()}
        return {"optimizer_scalars": scalars, "random": random, **own}

    def train(self, *, skip_damaged: bool) -> dict[int, float]:
        """From the last checkpoint, or the beginning, to the last step; losses of the evaluations by step."""
        config = self.config
        self._resume(skip_damaged)
        self.display.start(config.steps, self.done)
        if not self.done:
            self._evaluate()
        bad = 0
        with StopRequest() as stop:
            while self.done < config.steps:
                started = time.perf_counter()
                batch = self.data.train.batch(config.batch_size, seq_len=config.seq_len, step=self.done)
                lr = learning_rate(config.optim, self.done + 1, config.steps)
                loss, norm = self.stepper.step(batch, lr)
                self._tell()
                self.done += 1
                finite = math.isfinite(loss) and math.isfinite(norm)
                bad = 0 if finite else bad + 1
                seconds = time.perf_counter() - started
                record = {"step": self.done, "loss": loss if finite else None, "lr": lr, "grad_norm": norm if finite else None}
                record |= {"step_time_s": round(seconds, 6), "target_tokens": batch.target_count()}
                self.run_dir.append_metrics(record)
                self.display.on_step(record)
                if bad >= MAX_BAD_STEPS:
                    raise self._diverged(f"loss or gradients were not finite for {bad} steps in a row")
                last = self.done == config.steps
                if config.eval_every and (self.done % config.eval_every == 0 or last):
                    self._evaluate()
                if last:
                    self._check_end(bad)
                if stop.exit_code or last or (config.save_every and self.done % config.save_every == 0):
                    state = {"step": self.done, "data": self.data.train.state_dict(), "losses": self.losses}
                    self.store.save(self.done, self, state, best_step=0)  # type: ignore[arg-type]
                if stop.exit_code and not last:
                    raise StoppedBySignal(
                        f"stopped at step {self.done} of {config.steps}, checkpoint saved; run the same command again to go on",
                        stop.exit_code or EXIT_INTERRUPTED,
                    )
        return self.losses

    def _evaluate(self) -> None:
        if self.data.validation is None or not self.config.eval_every:
            return
        loss = self.stepper.evaluate(self.data.validation.batches())
        self._tell()
        self.losses[self.done] = loss
        self.run_dir.append_metrics({"step": self.done, "val_loss": loss})
        self.display.on_eval(self.done, loss)

    def _check_end(self, bad: int) -> None:
        """Before the last state is saved: a model that computes nothing is no result."""
        if not are_finite(self.trained):
            raise self._diverged(f"weights are not finite after step {self.done}")
        if self.done in self.losses:
            if not math.isfinite(self.losses[self.done]):
                raise self._diverged(f"the held-out loss is {self.losses[self.done]} after step {self.done}")
        elif bad:
            raise self._diverged(f"loss or gradients of the last {bad} steps were not finite")

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(f"{found}; lower optim.lr ({self.config.optim.lr}), lengthen optim.warmup_steps or set optim.clip")

    def _tell(self) -> None:
        while self.stepper.messages:
            self.display.message(self.stepper.messages.pop(0))

    def _resume(self, skip_damaged: bool) -> None:
        found = self.store.newest_valid(skip_damaged=skip_damaged)
        if found is None:
            return
        path, state = found
        load_into(path / "trained.safetensors", {name: parameter.data for name, parameter in self.trained.items()})
        engine = state["engine"]
        tensors = dict(read_tensors(path / "optimizer.safetensors"))
        load_optimizer_tensors(self.model, self.stepper.optimizer, tensors, engine["optimizer_scalars"])
        restore_random_state(engine["random"], self.device)
        self.stepper.clipping.load(engine.get("clipping", {}))
        self.stepper.restore_micro_batch(engine)
        self.data.train.load_state_dict(state["data"])
        self.done, self.losses = state["step"], {int(step): loss for step, loss in state["losses"].items()}
        for name in self.store.set_aside_after(self.done):
            self.display.message(f"damaged checkpoint kept as {name}")
        self.store.repair(self.done, 0)
        self.run_dir.truncate_metrics(self.done)
        self.display.message(f"resumed from {path}")

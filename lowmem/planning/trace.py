"""One run of the engine without memory: what building, steps and an evaluation allocate and compute, in order."""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import RunConfig, resolve_micro_batch_size
from lowmem.data.batch import longest_batch
from lowmem.engine.from_config import build_configured_model, build_local_engine, open_storage
from lowmem.engine.local import LocalEngine
from lowmem.engine.teacher import teacher_config
from lowmem.models.base import LanguageModel
from lowmem.nn.quantized import CodedWeight, stored_tensors
from lowmem.planning.disk_space import EVALUATION_BATCH, assumed_new_tokens, checkpoint_bytes
from lowmem.planning.traffic import Elsewhere, elsewhere, transferred
from lowmem.system.dry_run import listen, pretend_device, repeats
from lowmem.system.errors import ConfigError

_aten = torch.ops.aten
_ITEM = _aten._local_scalar_dense.default
_VIEWS = {
    "view",
    "slice",
    "transpose",
    "t",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "split_with_sizes",
    "as_strided",
}


@dataclass
class Storage:
    """One piece of memory.

    Attributes:
        size_bytes: of the storage, whatever tensors look at it.
        shape: of the tensor it was made for.
        backward: made while autograd was going back.
        category: set once known; "" meanwhile.
    """

    size_bytes: int
    shape: tuple[int, ...]
    backward: bool
    category: str = ""


@dataclass
class Costs:
    """Work of a phase, by what bounds it.

    Attributes:
        matmul_flops: by dtype name.
        moved_bytes: read and written by everything else.
        calls: operators, each of which costs its launch.
        storage_read_bytes, storage_written_bytes: brought here and taken away, by where to: "disk", or "host" for a GPU.
    """

    matmul_flops: Counter = field(default_factory=Counter)
    moved_bytes: int = 0
    calls: int = 0
    storage_read_bytes: Counter = field(default_factory=Counter)
    storage_written_bytes: Counter = field(default_factory=Counter)


class Trace(TorchDispatchMode):
    """Allocations, releases and work, in order, while active.

    Attributes:
        storages: every storage ever made, by number.
        events: number of the storage made, or ~number of the one released.
        phases: name and position in `events` where each phase begins.
        costs: by phase.
        elsewhere: backings of the run.
        checkpoint_bytes: of the tensors in one checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[Elsewhere] = []
        self.checkpoint_bytes = 0
        self.storages: list[Storage] = []
        self.events: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self.costs: dict[str, Costs] = {}
        self._numbers: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._closed = False
        self._cost = Costs()

    def scratch_bytes(self) -> int:
        """Of files for what is elsewhere."""
        return sum(part.backing.size for part in self.elsewhere if part.place == "disk")

    def name_storages(self, vocab_size: int) -> None:
        """Say of every storage that is not marked what it holds, by its shape and by when it was made."""
        for storage in self.storages:
            if not storage.category:
                is_logits = len(storage.shape) == 2 and storage.shape[-1] == vocab_size
                storage.category = "logits" if is_logits else "workspace" if storage.backward else "activations"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what follows to `name`."""
        self.phases.append((name, len(self.events)))
        self._cost = self.costs.setdefault(name, Costs())
        before = transferred(self.elsewhere)
        yield
        read, written = transferred(self.elsewhere)
        self._cost.storage_read_bytes += read - before[0]
        self._cost.storage_written_bytes += written - before[1]
        self._cost = Costs()

    def mark(self, tensors: Any, category: str) -> None:
        """Say what the storages of `tensors` hold."""
        for tensor in (part for whole in tensors for part in stored_tensors({"": whole}).values()):
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.storages[number].category = category

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(issubclass(kind, CodedWeight) for kind in types):
            return NotImplemented  # comes back as operations on its codes
        if func is _ITEM:
            return True if args[0].dtype == torch.bool else 1.0  # a finite loss, a norm, "all targets are predicted"
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else (out,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self._count(func, args, kwargs or {}, outputs)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        number = len(self.storages)
        backward = torch._C._current_graph_task_id() != -1
        self.storages.append(Storage(storage.nbytes(), tuple(tensor.shape), backward))
        self.events.append(number)
        self._numbers[address] = number
        self._references[number] = weakref.ref(storage, lambda _: self._release(address, number))

    def __exit__(self, *exception: Any) -> None:
        self._closed = True  # what is released from now on is the run's end
        super().__exit__(*exception)

    def _release(self, address: int, number: int) -> None:
        if self._closed:
            return
        if self._numbers.get(address) == number:
            del self._numbers[address]
        self._references.pop(number, None)
        self.events.append(~number)

    def _count(self, func, args, kwargs, outputs) -> None:  # type: ignore[no-untyped-def]
        name = func._overloadpacket.__name__
        if name in _VIEWS:
            return
        times, cost = repeats(), self._cost
        cost.calls += times
        matrices = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"):
            a, b = matrices[-2:]
            cost.matmul_flops[str(a.dtype).removeprefix("torch.")] += 2 * a.numel() * b.shape[-1] * times
        elif name.startswith("_scaled_dot_product"):
            query, key = [m for m in matrices if m.dim() == 4][:2]
            products = 5 if name.endswith("backward") else 2
            flops = products * query.numel() * key.shape[-2]  # causal: half of the square
            cost.matmul_flops[str(query.dtype).removeprefix("torch.")] += flops * times
        tensors = matrices + [x for x in outputs if isinstance(x, torch.Tensor)]
        cost.moved_bytes += times * sum(t.numel() * t.element_size() for t in tensors)


def trace_run(config: RunConfig, world_size: int = 1) -> tuple[Trace, LanguageModel]:
    """Drive the engine that `config` asks for through everything a run does, on tensors without storage.

    Args:
        config: resolved, for one process: under DeepSpeed the engine that computes the same model without partitions.
        world_size: ranks that share the global batch.
    Returns:
        The trace, with phases load, first_step, steady_steps and evaluation; the model, on the meta device.
    Raises:
        ConfigError: the global batch does not split evenly.
    Memory: none for the model.
    """
    try:
        resolve_micro_batch_size(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = _for_one_rank(config, world_size)
    trace, meta = Trace(), torch.device("meta")
    micro_batch_size = resolve_micro_batch_size(config, 1)
    precision = config.train.precision
    assert precision != "auto"
    if precision == "fp8":
        precision = "bf16"  # what it keeps in memory; fp8 copies are smaller and live as long as one product
    with meta, trace, pretend_device(config.device), listen(trace.mark):
        with trace.phase("load"):
            storage = open_storage(config, meta)
            model = build_configured_model(config, assumed_new_tokens(config), storage)
            teacher = _teacher(config)
            engine = build_local_engine(config, model, meta, precision, micro_batch_size, teacher, storage)
            trace.elsewhere = elsewhere(config, storage, engine)
        trace.mark(model.parameters(), "weights")
        if teacher is not None:
            trace.mark(teacher.parameters(), "teacher")
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda parameter: trace.mark([parameter.grad], "gradients"))
        trace.mark(_optimizer_tensors(engine), "optimizer_states")
        kinds = sorted({phase.kind for phase in config.all_phases()}, reverse=True)
        mask, sequences = config.data.document_mask is True, config.train.global_batch_size
        batches = [longest_batch(sequences, config.data.seq_len, packed=mask or kind == "chat") for kind in kinds]
        for phase in ("first_step", "steady_steps"):
            with trace.phase(phase):
                for batch in batches:
                    engine.step(batch, config.optim.lr)
        if config.train.eval_every:
            with trace.phase("evaluation"):
                sequences = min(EVALUATION_BATCH, config.train.eval_sequences or EVALUATION_BATCH)
                engine.evaluate([longest_batch(sequences, config.data.seq_len, packed=mask)])
        with trace.phase("save"):  # tensors are written from where they are
            del batch, batches
        trace.checkpoint_bytes = checkpoint_bytes(model, engine)
    trace.name_storages(model.vocab_size)
    return trace, model


def _for_one_rank(config: RunConfig, world_size: int) -> RunConfig:
    config = copy.deepcopy(config)
    config.train.global_batch_size //= world_size
    if config.train.boundary_offload == "cpu":
        config.train.boundary_offload = "none"  # no streams here; whose memory they are is for the caller to say
    if config.optim.backend == "bitsandbytes":
        config.optim.backend = "lowmem"  # states of the same size, and bitsandbytes has no kernels without numbers
    return config


def _teacher(config: RunConfig) -> LanguageModel | None:
    distill = config.train.distill
    if not distill.teacher:
        return None
    return build_configured_model(teacher_config(distill, vocab_size=config.model.vocab_size, seq_len=config.data.seq_len))


def _optimizer_tensors(engine: LocalEngine) -> Iterable[torch.Tensor]:
    return (value for state in engine.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))

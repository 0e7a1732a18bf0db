"""From a configuration to a run that is ready to train: device, limits, data, model, engine, resume."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from lowmem.config.schema import RunConfig, resolve_micro_batch_size
from lowmem.data.batch import longest_batch
from lowmem.data.chat_template import save_chat_template
from lowmem.data.prepare import PreparedData, prepare_phases
from lowmem.data.tokenizers import check_vocab
from lowmem.engine.base import Engine
from lowmem.engine.deepspeed import processes
from lowmem.engine.from_config import build_configured_model, build_local_engine, open_storage
from lowmem.engine.huggingface_files import base_sha256, resolve_model_path
from lowmem.engine.recovery import release_memory
from lowmem.engine.resolve import chosen_device, keeps_documents_apart, keeps_segments_apart, resolve, settled_model
from lowmem.engine.run_model import load_initial_weights
from lowmem.engine.storage.blocks import Storage
from lowmem.engine.teacher import check_teacher_tokenizer, load_teacher
from lowmem.memory.allocator import release_host_memory, set_up_host_memory
from lowmem.memory.host import granted_memory
from lowmem.memory.limits import check_host_limit, limit_cuda_memory, limit_host_memory
from lowmem.memory.measure import shared_bytes
from lowmem.models.base import LanguageModel
from lowmem.nn.lorptize import check_rank, following_layers
from lowmem.system.devices import resolve_precision, usable_cores
from lowmem.system.errors import ConfigError
from lowmem.system.files import compiled_root, json_sha256
from lowmem.system.units import parse_bytes
from lowmem.train.display import ProgressDisplay
from lowmem.train.loggers import open_loggers
from lowmem.train.run import Run, TrainState
from lowmem.train.run_dir import CheckpointStore, RunDir


def set_up(config: RunConfig, display: ProgressDisplay, *, fresh: bool = False, resume: Literal["auto", "last_valid"] = "auto") -> Run:
    """Everything a run needs, resumed if the run directory holds a checkpoint.

    Args:
        config: checked; not changed.
        fresh: move what the run directory holds aside and start over.
        resume: last_valid passes over damaged checkpoints.
    Raises:
        ConfigError, DataError, CheckpointError, StorageError, MemoryBudgetError: see `lowmem.system.errors`.
    """
    config = settled_model(config)
    device = _rank_device(config)
    _set_threads(config.train.threads)
    problem = set_up_host_memory(compiled_root())
    if problem and device.type == "cpu":
        display.message(problem)
    _enforce_budget(config, device, display)
    if config.engine.name == "deepspeed":
        processes.init_process_group(device)
    run_dir = RunDir(Path(config.run_dir)) if processes.rank() == 0 else None
    try:
        return _assemble(config, device, display, run_dir, fresh, skip_damaged=resume == "last_valid")
    except BaseException:
        if run_dir is not None:
            run_dir.close()
        raise


def _assemble(
    config: RunConfig, device: torch.device, display: ProgressDisplay, run_dir: RunDir | None, fresh: bool, skip_damaged: bool
) -> Run:
    if run_dir is not None:
        _check_run_dir(run_dir, config, fresh, display)
    torch.manual_seed(config.train.seed + processes.rank())
    config = replace(config, data=replace(config.data, document_mask=keeps_documents_apart(config, device)))
    phase_data = prepare_phases(config, display, keeps_segments_apart=keeps_segments_apart(config))
    data = phase_data[0]
    release_host_memory()  # a tokenizer that was trained here leaves much behind
    config = resolve(config, device, vocab_size=data.tokenizer.vocab_size)
    check_vocab(data.tokenizer, config.model.vocab_size)
    added = config.data.add_tokens
    storage = open_storage(config, device)
    model = build_configured_model(config, data.tokenizer.token_ids(added) if added else (), storage)  # type: ignore[attr-defined]
    if config.train.init_from and (fresh or not CheckpointStore(Path(config.run_dir), 1).steps()):
        load_initial_weights(config.train.init_from, model, data.tokenizer, storage)
    check_teacher_tokenizer(config, data.tokenizer)
    engine = _build_engine(config, model, device, storage)
    lorpt = config.model.lorpt
    for rank in [*lorpt.schedule.values(), *([lorpt.grow_to] if lorpt.grow_to else [])]:
        check_rank(list(following_layers(model, lorpt.ranks)), rank)
    checkpoints = CheckpointStore(Path(config.run_dir), config.train.keep_last)
    state = TrainState(
        data_fingerprint=_fingerprint(phase_data), tokenizer_sha256=data.tokenizer.sha256(), base_sha256=_base_sha256(config)
    )
    run = Run(config, engine, phase_data, state, checkpoints, display, run_dir, loggers=[])
    run.resume(skip_damaged=skip_damaged)
    release_memory(device)  # weights are initialised in fp32, whatever they are kept in
    if config.budget.ram or config.budget.vram or device.type == "cuda":
        check_host_limit()
        _try_worst_case(run)
        check_host_limit()
    if run_dir is not None:
        run_dir.write_config(config)
        data.tokenizer.save(run_dir.path / "tokenizer.json")
        for template in [part.template for part in phase_data if part.template is not None][-1:]:
            save_chat_template(template, run_dir.path)
        run.loggers = open_loggers(config.loggers, run_dir.path, config, resume_step=run.state.step)
        display.message(run.describe())
    return run


def _base_sha256(config: RunConfig) -> str:
    """Of the weights of `model.path` that stay as they are, for a checkpoint does not hold them; "" where all are trained."""
    if not config.model.path or config.adapter.method == "none":
        return ""
    return base_sha256(resolve_model_path(config.model.path, config.model.revision))


def _fingerprint(phase_data: list[PreparedData]) -> str:
    prints = [data.fingerprint for data in phase_data]
    return prints[0] if len(prints) == 1 else json_sha256(prints)


def _build_engine(config: RunConfig, model: LanguageModel, device: torch.device, storage: Storage) -> Engine:
    try:
        micro_batch_size = resolve_micro_batch_size(config, processes.world_size() if config.engine.name == "deepspeed" else 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.engine.name == "deepspeed":
        from lowmem.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device=device, micro_batch_size=micro_batch_size)
    teacher = load_teacher(config, device)
    return build_local_engine(config, model, device, resolve_precision(config.train.precision, device), micro_batch_size, teacher, storage)


def _try_worst_case(run: Run) -> None:
    """Meet a lack of memory before the first step rather than after hours: the longest sequences, an evaluation."""
    if run.is_complete():
        return
    kinds = {phase.kind for phase in run.config.all_phases()[run.state.phase :]}
    data, sequences = run.config.data, run.config.train.global_batch_size
    for kind in sorted(kinds, reverse=True):
        run.engine.rehearse(longest_batch(sequences, data.seq_len, packed=data.document_mask is True or kind == "chat"))


def _check_run_dir(run_dir: RunDir, config: RunConfig, fresh: bool, display: ProgressDisplay) -> None:
    """Before any long work: move the old run aside, or see that this one may go on from it."""
    if fresh:
        old = run_dir.start_over()
        if old:
            display.message(f"the run that was there is kept as {old}")
    elif CheckpointStore(run_dir.path, 1).steps():
        run_dir.check_compatible(config, resolved=False)


def _rank_device(config: RunConfig) -> torch.device:
    device = processes.rank_device(chosen_device(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _set_threads(threads: int) -> None:
    """Share this machine's usable cores among its ranks, unless told otherwise."""
    torch.set_num_threads(threads or max(1, usable_cores() // processes.local_world_size()))


def _enforce_budget(config: RunConfig, device: torch.device, display: ProgressDisplay) -> None:
    ranks, vram = processes.local_world_size(), parse_bytes(config.budget.vram or "0")
    ram, said = granted_memory(parse_bytes(config.budget.ram or "0"), ranks)
    if said:
        display.message(said)
    try:
        if ram:
            limit_host_memory(ram // ranks + (shared_bytes() if ranks > 1 else 0))  # of what ranks share each has its share alone
        if vram and device.type == "cuda":
            limit_cuda_memory(vram, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error

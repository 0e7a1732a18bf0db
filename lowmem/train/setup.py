"""From a configuration to a run that is ready to train: device, limits, data, model, engine, resume."""

import copy
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from lowmem.config import RunConfig, resolve_micro_batch_size
from lowmem.data.batch import longest_batch
from lowmem.data.chat_template import save_chat_template
from lowmem.data.phases import check_sources, prepare_phases
from lowmem.data.prepare import PreparedData
from lowmem.data.storage import compiled_root, json_sha256
from lowmem.data.tokenizer_build import known_tokenizer
from lowmem.data.tokenizers import Tokenizer, check_vocab
from lowmem.devices import resolve_precision, usable_cores
from lowmem.engine import distributed
from lowmem.engine.base import Engine
from lowmem.engine.build import build_configured_model, build_local_engine, chosen_device, keeps_documents_apart
from lowmem.engine.deepspeed_config import check_deepspeed_file
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.manifest import verify_weights
from lowmem.engine.recovery import release_memory
from lowmem.engine.teacher import teacher_config
from lowmem.engine.tensor_file import WEIGHT_DTYPES, meta_tensors, read_tensors
from lowmem.errors import CheckpointError, ConfigError, DataError
from lowmem.memory.block_cache import release_host_memory, set_up_host_memory
from lowmem.memory.budget import check_host_limit, limit_cuda_memory, limit_host_memory
from lowmem.memory.host import granted_memory
from lowmem.memory.measure import shared_bytes
from lowmem.models.base import LanguageModel
from lowmem.nn.quantized import assign, dequantized
from lowmem.nn.rank_change import check_rank, following_layers
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.run_model import checkpoint_path, load_run_model, load_run_tokenizer
from lowmem.train.checkpoint import CheckpointStore, reading_state
from lowmem.train.loggers import open_loggers
from lowmem.train.progress import ProgressDisplay
from lowmem.train.run import Run
from lowmem.train.run_dir import RunDir, check_compatible, check_place
from lowmem.train.state import TrainState
from lowmem.units import format_bytes, format_count, parse_bytes


def check_beforehand(config: RunConfig, *, fresh: bool) -> None:
    """Refuse, before any work, what would end the run later, as far as it shows without reading text or building the model.

    The `pretrain` command asks it first, for a run and for a dry run.

    Raises:
        ConfigError, DataError, CheckpointError: see `lowmem.errors`.
    """
    chosen_device(config)
    _check_packages(config)
    check_deepspeed_file(config)
    path = Path(config.run_dir)
    check_place(path)
    resumes = not fresh and bool(CheckpointStore(path, 1).steps())
    if resumes:
        check_compatible(path, config, resolved=False)
    check_sources(config)
    tokenizer, rows = known_tokenizer(config.data), config.model.vocab_size
    if tokenizer is not None:
        check_vocab(tokenizer, rows)
    elif config.data.tokenizer in ("bpe", "chunk") and 0 < rows < config.data.tokenizer_vocab_size:
        raise DataError(
            f"the {config.data.tokenizer} tokenizer is trained to {config.data.tokenizer_vocab_size} tokens, model.vocab_size allows "
            f"{rows}; set data.tokenizer_vocab_size to at most {rows}, or model.vocab_size to 0 for as many as there are tokens"
        )
    if config.train.init_from and not resumes:
        _initial_weights(config.train.init_from)
    rows = rows or (tokenizer.vocab_size if tokenizer else 0)
    if config.train.distill.teacher and rows:
        teacher_config(config.train.distill, vocab_size=rows, seq_len=config.data.seq_len)


def _check_packages(config: RunConfig) -> None:
    """Every package that a setting asks for is installed."""
    wanted: list[tuple[str, str, str, str]] = [("loggers", name, name, name) for name in config.loggers]
    wanted += [("engine.name", "deepspeed", "deepspeed", "deepspeed")] if config.engine.name == "deepspeed" else []
    wanted += [("optim.backend", "bitsandbytes", "bitsandbytes", "bnb")] if config.optim.backend == "bitsandbytes" else []
    for key, value, package, extra in wanted:
        if package not in sys.modules and find_spec(package) is None:
            raise ConfigError(f"{key} has {value}, which is not installed; run: pip install 'lowmem[{extra}]', or choose another {key}")


def set_up(config: RunConfig, display: ProgressDisplay, *, fresh: bool = False, resume: Literal["auto", "last_valid"] = "auto") -> Run:
    """Everything a run needs, resumed if the run directory holds a checkpoint.

    Args:
        config: checked; not changed.
        fresh: move what the run directory holds aside and start over.
        resume: last_valid passes over damaged checkpoints.
    Raises:
        ConfigError, DataError, CheckpointError, StorageError, MemoryBudgetError: see `lowmem.errors`.
    """
    device = _rank_device(config)
    _set_threads(config.train.threads)
    problem = set_up_host_memory(compiled_root())
    if problem and device.type == "cpu":
        display.message(problem)
    _enforce_budget(config, device, display)
    if config.engine.name == "deepspeed":
        distributed.init_process_group(device)
    run_dir = RunDir(Path(config.run_dir)) if distributed.rank() == 0 else None
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
    torch.manual_seed(config.train.seed + distributed.rank())
    config = replace(config, data=replace(config.data, document_mask=keeps_documents_apart(config, device)))
    phase_data = prepare_phases(config, display)
    data = phase_data[0]
    release_host_memory()  # a tokenizer that was trained here leaves much behind
    config = resolve(config, data, device)
    model = build_configured_model(config)
    if config.train.init_from and (fresh or not CheckpointStore(Path(config.run_dir), 1).steps()):
        load_initial_weights(config.train.init_from, model, data.tokenizer)
    _check_teacher(config, data)
    engine = _build_engine(config, model, device)
    lorpt = config.model.lorpt
    for rank in [*lorpt.schedule.values(), *([lorpt.grow_to] if lorpt.grow_to else [])]:
        check_rank(list(following_layers(model, lorpt.ranks)), rank)
    checkpoints = CheckpointStore(Path(config.run_dir), config.train.keep_last)
    state = TrainState(data_fingerprint=_fingerprint(phase_data), tokenizer_sha256=data.tokenizer.sha256())
    run = Run(config, engine, phase_data, state, checkpoints, display, run_dir, loggers=[])
    _resume(run, skip_damaged)
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
        display.message(_description(run))
    return run


def load_initial_weights(source: str, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Copy the newest weights of another run into `model`, in the form in which that keeps them.

    Raises:
        ConfigError: another shape or another tokenizer; the message says which tensor differs.
        CheckpointError: its weights are missing or damaged, or its tokenizer is not theirs.
    Memory: one tensor.
    """
    path, weights = _initial_weights(source)
    if load_run_tokenizer(path.parent, weights.parent).sha256() != tokenizer.sha256():
        raise ConfigError(f"train.init_from is {source}, which has another tokenizer than this run; set data.tokenizer={path}")
    verify_weights(weights.parent)
    targets = model.state_dict()
    wanted = {name: target.shape for name, target in targets.items()}
    stored = dict(dequantized(meta_tensors(weights), wanted))
    found = {name: tensor.shape for name, tensor in stored.items()}
    if coded := [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if name in wanted and tensor.dtype not in WEIGHT_DTYPES]:
        raise CheckpointError(
            f"{weights} does not hold the weights of a run: {coded[0]}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}"
        )
    if found != wanted:
        name = next(name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"train.init_from is {source}, a model of another shape: {name} is {_sizes(found.get(name))} there, "
            f"{_sizes(wanted.get(name))} here; take model.* from {source}/config.yaml"
        )
    with torch.no_grad():
        for name, tensor in dequantized(read_tensors(weights), wanted):
            assign(targets[name], tensor)


def _initial_weights(source: str) -> tuple[Path, Path]:
    """The files of the tokenizer and of the newest weights of a run.

    Raises:
        ConfigError, CheckpointError: it is no run directory, or has no checkpoint.
    """
    path = Path(source) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"train.init_from is {source}, which is no run directory: it has no tokenizer.json")
    return path, checkpoint_path(Path(source), "latest") / "model.safetensors"


def _sizes(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _fingerprint(phase_data: list[PreparedData]) -> str:
    prints = [data.fingerprint for data in phase_data]
    return prints[0] if len(prints) == 1 else json_sha256(prints)


def _check_teacher(config: RunConfig, data: PreparedData) -> None:
    """Equal sizes of vocabulary do not make equal tokens."""
    teacher = config.train.distill.teacher
    path = Path(teacher) / "tokenizer.json"
    if not teacher or not path.is_file():
        return
    if load_run_tokenizer(path.parent, checkpoint_path(path.parent, "latest")).sha256() != data.tokenizer.sha256():
        raise ConfigError(f"{path} is another tokenizer than this run's; give the student data.tokenizer={path}")


def resolve(config: RunConfig, data: PreparedData, device: torch.device) -> RunConfig:
    """A copy in which everything "auto" or 0 is settled, as config.yaml records it.

    Raises:
        ConfigError: the device cannot compute in the precision asked for.
        DataError: the tokenizer is larger than the model's vocabulary.
    """
    config = copy.deepcopy(config)
    config.model.vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    check_vocab(data.tokenizer, config.model.vocab_size)
    config.model.max_seq_len = config.max_seq_len()
    config.train.precision = resolve_precision(config.train.precision, device)
    stored = config.train.weight_dtype
    if stored in ("bf16", "fp16") and config.train.precision != stored and (stored, config.train.precision) != ("bf16", "fp8"):
        raise ConfigError(
            f"train.weight_dtype={stored} needs a device that computes in {stored}, {device.type} here resolves to "
            f"{config.train.precision}; use train.weight_dtype=fp32, or train.precision={stored} to accept slow emulation"
        )
    if config.train.boundary_offload == "cpu" and device.type == "cpu":
        raise ConfigError("train.boundary_offload is cpu, but the run computes on a CPU, where they are in host memory already; use none")
    config.device = device.type  # type: ignore[assignment]
    return config


def _build_engine(config: RunConfig, model: LanguageModel, device: torch.device) -> Engine:
    try:
        micro_batch_size = resolve_micro_batch_size(config, distributed.world_size() if config.engine.name == "deepspeed" else 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.engine.name == "deepspeed":
        from lowmem.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device=device, micro_batch_size=micro_batch_size)
    teacher = load_teacher(config, device)
    return build_local_engine(config, model, device, resolve_precision(config.train.precision, device), micro_batch_size, teacher)


def load_teacher(config: RunConfig, device: torch.device) -> LanguageModel | None:
    """The model that `train.distill` names; None if it names none.

    Raises:
        ConfigError: it is no run, has another tokenizer than this one's data, positions that end too early, or cannot keep documents
            apart that `data.document_mask` does.
        CheckpointError: its weights are missing or damaged.
    """
    distill = config.train.distill
    if not distill.teacher:
        return None
    teacher_config(distill, vocab_size=config.model.vocab_size, seq_len=config.data.seq_len)
    model = load_run_model(distill.teacher, device=device).model
    if config.data.document_mask is True and not model.keeps_segments_apart:
        raise ConfigError(
            f"train.distill.teacher is {distill.teacher}, a recurrent model that cannot keep documents apart; set data.document_mask=false"
        )
    return model


def _try_worst_case(run: Run) -> None:
    """Meet a lack of memory before the first step rather than after hours: the longest sequences, an evaluation."""
    if run.is_complete():
        return
    kinds = {phase.kind for phase in run.config.all_phases()[run.state.phase :]}
    data, sequences = run.config.data, run.config.train.global_batch_size
    for kind in sorted(kinds, reverse=True):
        run.engine.rehearse(longest_batch(sequences, data.seq_len, packed=data.document_mask is True or kind == "chat"))


def _resume(run: Run, skip_damaged: bool) -> None:
    run.engine.barrier()  # rank 0 may have moved an old run aside
    found = run.checkpoints.newest_valid(skip_damaged=skip_damaged)
    if found is not None:
        path, values = found
        state = TrainState.from_json(values)
        if run.run_dir is not None:
            run.run_dir.check_compatible(run.config, resolved=True)
        if state.data_fingerprint != run.state.data_fingerprint:
            raise ConfigError(
                f"{path} was trained on other text or another tokenizer ({state.data_fingerprint[:12]}, now "
                f"{run.state.data_fingerprint[:12]}); "
                "restore the files it was trained on, choose another run_dir, or start over with --fresh"
            )
        with reading_state(path):
            run.engine.load(path, state.engine)
            state.tokenizer_sha256 = run.state.tokenizer_sha256  # the fingerprint has it in it; earlier versions recorded that alone
            run.state, run.resumed = state, True
            run.data.train.load_state_dict(state.data)
    run.engine.barrier()  # everyone has read before rank 0 tidies up
    if run.run_dir is not None:
        for name in run.checkpoints.set_aside_after(run.state.step):
            run.display.message(f"damaged checkpoint kept as {name}")
        run.checkpoints.repair(run.state.step, run.state.best_step)
        run.run_dir.truncate_metrics(run.state.step)
        if found is not None:
            run.display.message(f"resumed from {found[0]}")


def _check_run_dir(run_dir: RunDir, config: RunConfig, fresh: bool, display: ProgressDisplay) -> None:
    """Before any long work: move the old run aside, or see that this one may go on from it."""
    if fresh:
        old = run_dir.start_over()
        if old:
            display.message(f"the run that was there is kept as {old}")
    elif CheckpointStore(run_dir.path, 1).steps():
        run_dir.check_compatible(config, resolved=False)


def _rank_device(config: RunConfig) -> torch.device:
    device = distributed.rank_device(chosen_device(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _set_threads(threads: int) -> None:
    """Share this machine's usable cores among its ranks, unless told otherwise."""
    torch.set_num_threads(threads or max(1, usable_cores() // distributed.local_world_size()))


def _enforce_budget(config: RunConfig, device: torch.device, display: ProgressDisplay) -> None:
    ranks, vram = distributed.local_world_size(), parse_bytes(config.budget.vram or "0")
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


def _description(run: Run) -> str:
    config = run.config
    components = run.engine.memory_components()
    return (
        f"{config.model.name} with {format_count(run.engine.model.num_parameters())} parameters ({format_bytes(components['weights'])}), "
        f"{run.engine.device.type}, {config.train.precision}, {run.engine.world_size} x {torch.get_num_threads()} threads; "
        f"global batch {config.train.global_batch_size} x {config.data.seq_len} tokens in micro-batches of {run.engine.micro_batch_size}"
        f"{_update_description(run)}"
    )


def _update_description(run: Run) -> str:
    """What a user would otherwise not see: which states are narrow, and by which norm a layerwise step clips."""
    engine, parts = run.engine, []
    if isinstance(engine, LocalEngine) and isinstance(engine.optimizer, LowBitOptimizer):
        parts.append(engine.optimizer.describe())
    if isinstance(engine, LayerwiseEngine) and run.config.optim.clip:
        which = "its own norm" if engine.clipping.mode == "block" else "the global norm as estimated by then"
        parts.append(f"layerwise: each block is clipped by {which}")
    return "".join(f"; {part}" for part in parts)

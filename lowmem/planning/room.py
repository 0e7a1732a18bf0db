"""That disks have room for what a run will write, before it begins."""

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowmem.config.schema import RunConfig
from lowmem.engine.from_config import build_configured_model, build_local_engine, open_storage
from lowmem.engine.storage.disk_file import aligned_size
from lowmem.planning.disk_space import EVALUATION_BATCH, assumed_new_tokens, checkpoint_bytes, checkpoints_at_once
from lowmem.planning.predict import as_computed, resolve_without_data, run_checkpoint_bytes
from lowmem.planning.traffic import elsewhere
from lowmem.system.dry_run import pretend_device
from lowmem.system.errors import CheckpointError, ConfigError, StorageError
from lowmem.system.files import existing_folder
from lowmem.system.units import format_bytes

_FEW_ROWS = 256  # of a vocabulary that only the text tells; characters of any language have more, and the rest of the model matters


def check_room(config: RunConfig, *, fresh: bool = False) -> None:
    """See that the disks have room for the scratch file of a run and its checkpoints; token shards are the data's own business.

    Args:
        config: checked; not changed.
        fresh: checkpoints that are there stay beside those of the new run.
    Raises:
        StorageError: one has not; the message has both figures and what would help.
    Memory: none for the model.
    """
    try:
        resolved = resolve_without_data(config)
    except ConfigError:
        resolved = resolve_without_data(replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or _FEW_ROWS)))
    try:
        checkpoint, scratch = sizes_without_a_step(resolved)
    except (ConfigError, CheckpointError):
        return  # what cannot be built is told by what builds it
    folder = Path(config.run_dir) / "checkpoints"
    existing = 0 if fresh else sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())
    uses = [_Use(Path(config.run_dir), max(0, checkpoint * checkpoints_at_once(config) - existing), "checkpoints", _FOR_CHECKPOINTS)]
    if scratch:
        uses.insert(0, _Use(Path(config.train.storage_dir or config.run_dir), scratch, "scratch file", _FOR_SCRATCH))
    for here in _by_disk(uses):
        _check_disk(here)


_FOR_CHECKPOINTS = ("lower train.keep_last", "raise train.save_every", "name a larger disk with run_dir")
_FOR_SCRATCH = ("name a larger disk with train.storage_dir",)


@dataclass(frozen=True)
class _Use:
    """What will be written to a folder, and how it can be less or elsewhere."""

    folder: Path
    size: int
    what: str
    remedies: tuple[str, ...]


def _check_disk(uses: list[_Use]) -> None:
    need, free = sum(use.size for use in uses), shutil.disk_usage(existing_folder(uses[0].folder)).free
    if need <= free:
        return
    parts = " and ".join(f"{use.what} {format_bytes(use.size)} in {use.folder}" for use in uses)
    *remedies, last = ["free space there", *(remedy for use in uses for remedy in use.remedies)]
    raise StorageError(
        f"the run will take {format_bytes(need)} of a disk ({parts}), which has {format_bytes(free)} free; {', '.join(remedies)}, or {last}"
    )


def _by_disk(uses: list[_Use]) -> list[list[_Use]]:
    """Uses of the same file system together."""
    found: dict[int, list[_Use]] = {}
    for use in uses:
        found.setdefault(existing_folder(use.folder).stat().st_dev, []).append(use)
    return list(found.values())


def sizes_without_a_step(config: RunConfig) -> tuple[int, int]:
    """Bytes of one checkpoint and of the scratch files, from the model alone; a prediction takes them from its dry run.

    Args:
        config: resolved.
    Memory: none for the model.
    """
    run, config, meta = config, copy.deepcopy(as_computed(config)), torch.device("meta")
    boundaries = config.train.boundary_offload == "disk"
    config.train.boundary_offload = "none"
    if config.optim.backend == "bitsandbytes":
        config.optim.backend = "lowmem"
    precision = "bf16" if config.train.precision == "fp8" else config.train.precision
    assert precision != "auto"
    with meta, pretend_device(config.device):
        storage = open_storage(config, meta)
        model = build_configured_model(config, assumed_new_tokens(config), storage)
        engine = build_local_engine(config, model, meta, precision, 1, None, storage)
        scratch = sum(part.backing.size for part in elsewhere(config, storage, engine) if part.place == "disk")
        if boundaries:
            with torch.no_grad():
                hidden = model.embed(torch.zeros(1, config.data.seq_len, dtype=torch.long))
            narrow = 2 if config.train.boundary_dtype == "bf16" else hidden.element_size()
            rows = config.train.global_batch_size * aligned_size(hidden.numel() * narrow)
            scratch += (len(model.blocks) + 1) * max(rows, _evaluated_at_once(config) * aligned_size(hidden.nbytes))
    return run_checkpoint_bytes(run, checkpoint_bytes(model, engine), model), scratch


def _evaluated_at_once(config: RunConfig) -> int:
    """Sequences whose boundaries an evaluation keeps: it computes block by block where those are elsewhere."""
    if not config.train.eval_every or config.train.weights_at == "device":
        return 0
    return min(EVALUATION_BATCH, config.train.eval_sequences or EVALUATION_BATCH)

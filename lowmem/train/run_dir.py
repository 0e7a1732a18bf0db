"""The run directory: one writer at a time, its configuration, its metrics, and what may change when a run goes on."""

import fcntl
import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig
from lowmem.config_dump import dump_config
from lowmem.config_load import load_run_config
from lowmem.config_values import shown
from lowmem.data.storage import json_text, replace_file
from lowmem.errors import CheckpointError, ConfigError
from lowmem.train.checkpoint import storage_error

# Keys that may differ when a run is resumed, and why; every other key that differs is refused.
_ELSEWHERE, _MEMORY, _SAVING, _LENGTH = "where things are", "memory and speed", "what is kept and measured, not what is learned", "length"
_GROWTH = "for the rest of the run, as the rank may be changed"
FREE_KEYS = {
    "run_dir": _ELSEWHERE, "device": "what is computed in is recorded and compared", "loggers": _SAVING, "data.cache_dir": _ELSEWHERE,
    "budget.ram": _MEMORY, "budget.vram": _MEMORY, "train.micro_batch_size": _MEMORY, "train.activation_checkpointing": _MEMORY,
    "train.loss_chunk_tokens": _MEMORY, "train.threads": _MEMORY,
    "train.steps": _LENGTH, "train.tokens": _LENGTH,
    "train.save_every": _SAVING, "train.keep_last": _SAVING, "train.eval_every": _SAVING, "train.eval_sequences": _SAVING,
    "train.max_bad_steps": "when to give up",
    "model.lorpt.schedule": _GROWTH, "model.lorpt.grow_to": _GROWTH, "model.lorpt.grow_patience": _GROWTH,
}  # fmt: skip
# Keys that setup fills in: compared once both sides are resolved.
RESOLVED_KEYS = {"data.document_mask", "model.vocab_size", "model.max_seq_len", "model.hidden_dim", "train.precision"}


_MAPS = ("ranks", "schedule", "seq_len_schedule")  # values that are maps, no sections


def check_place(path: Path, option: str = "run_dir") -> None:
    """See that `path` is a folder, or could be made one.

    Args:
        option: that names it.
    Raises:
        ConfigError: it is a file, lies below one, or is no name that the system takes.
    """
    for place in (path, *path.parents):
        try:
            found = place.stat()
        except FileNotFoundError:
            continue
        except PermissionError:
            return  # making it tells more
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            name = shown(str(path), quotes=False, most=300)
            raise ConfigError(f"{option} is {name}, which is no place for a folder: {why}; name another") from error
        if not stat.S_ISDIR(found.st_mode):
            what = "a file" if place == path else f"below the file {place}"
            raise ConfigError(f"{option} is {path}, which is {what}; name a folder")
        return


def check_compatible(path: Path, config: RunConfig, *, resolved: bool) -> None:
    """Refuse to go on with settings that would silently alter the result.

    Args:
        resolved: `config` is resolved like the saved one, so the keys that setup fills in are compared as well.
    Raises:
        ConfigError: names every such key with both values.
        CheckpointError: the saved settings cannot be read.
    """
    saved_path = path / "config.yaml"
    if not saved_path.exists():
        raise ConfigError(f"{path} has checkpoints but no config.yaml, so it cannot be resumed safely; put it back, or use --fresh")
    try:
        saved_config = load_run_config(saved_path, check=False)
    except ConfigError as error:
        raise CheckpointError(f"the settings of the run are damaged: {error}; restore the file, or start over with --fresh") from error
    if resolved and saved_config.data.document_mask == "auto":  # the run began before there was such a setting
        saved_config.data.document_mask = False
    saved, wanted = _flat(asdict(saved_config)), _flat(asdict(config))
    for values in (saved, wanted):  # the run may become longer
        values["phases"] = [*values["phases"][:-1], *({**last, "steps": 0, "tokens": 0} for last in values["phases"][-1:])]
    free = {*FREE_KEYS} if resolved else {*FREE_KEYS, *RESOLVED_KEYS}
    changed = [key for key in wanted if key not in free and wanted[key] != saved.get(key)]
    if changed:
        pairs = "; ".join(f"{key} was {shown(saved.get(key))}, now {shown(wanted[key])}" for key in changed)
        raise ConfigError(
            f"{path} holds a run with other settings: {pairs}. Keep the old values, choose another run_dir, or start over with --fresh"
        )


class RunDir:
    """Files of one run. Only rank 0 opens it.

    Args:
        path: created if absent.
        option: that names it, for messages.
    Raises:
        ConfigError: another process is training in it, or it is no place for a folder.
        StorageError: it cannot be created or written.
    """

    def __init__(self, path: Path, option: str = "run_dir"):
        self.path = path
        check_place(path, option)
        self._lock = self._acquire()
        for entry in sorted(path.iterdir()):
            if entry.exists() and not (entry.is_file() or entry.is_dir()):  # opening a pipe or a device may never end
                self.close()
                raise CheckpointError(f"{entry} is a pipe or a device, where a run has a file; remove it")

    def start_over(self) -> Path | None:
        """Move what is there to PATH.old-N and begin an empty directory; the new name, None if there was nothing."""
        if not any((self.path / name).exists() for name in ("config.yaml", "finetune.json", "checkpoints", "metrics.jsonl")):
            return None
        here, number = self.path.resolve(), 1
        while (old := here.with_name(f"{here.name}.old-{number}")).exists():
            number += 1
        try:
            here.rename(old)
        except OSError as error:
            raise storage_error(error, old) from error
        self.close()
        self._lock = self._acquire()
        return old

    def check_compatible(self, config: RunConfig, *, resolved: bool) -> None:
        """See the function of this name."""
        check_compatible(self.path, config, resolved=resolved)

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml, resolved and commented."""
        self._replace("config.yaml", dump_config(config, comments=True))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self._replace(name, json_text(value, indent=1) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json_text(record) + "\n")
        except OSError as error:
            raise storage_error(error, self.path / "metrics.jsonl") from error

    def truncate_metrics(self, step: int) -> None:
        """Drop lines after `step`, and a last line that was cut short: the run goes on from there."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        end = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    keep = line.endswith(b"\n") and json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    keep = False
                if not keep:
                    break
                end += len(line)
        os.truncate(path, end)

    def close(self) -> None:
        """Let another process train here."""
        os.close(self._lock)

    def _acquire(self) -> int:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(error, self.path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(f"another process is training in {self.path}; wait for it, stop it, or choose another run_dir") from error
        return descriptor

    def _replace(self, name: str, text: str) -> None:
        try:
            replace_file(self.path / name, text)
        except OSError as error:
            raise storage_error(error, self.path / name) from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in _MAPS:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

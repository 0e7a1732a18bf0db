"""The run directory: one writer at a time, its configuration, metrics and checkpoints, and what may change when a run goes on.

A checkpoint is whole or absent (D8): written beside, flushed, hashed, renamed; verified before it is read.
"""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.config.dump import dump_config
from lowmem.config.keys import shown
from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.engine.base import Engine
from lowmem.engine.manifest import MANIFEST_NAME, checkpoint_name, checkpoint_steps, damage, file_hashes
from lowmem.memory.allocator import release_host_memory
from lowmem.system.errors import CheckpointError, ConfigError, StorageError
from lowmem.system.files import WRITE_ERRNOS, json_text, replace_file


class CheckpointStore:
    """The checkpoints of one run directory.

    Args:
        run_dir: `checkpoints/step-00000100/` folders go below it, beside `checkpoints/latest` and `checkpoints/best`,
            two text files that hold a folder's name.
        keep_last: newest checkpoints kept; the best one is kept besides.
    """

    def __init__(self, run_dir: Path, keep_last: int):
        self.root = run_dir / "checkpoints"
        self.keep_last = keep_last

    def save(self, step: int, engine: Engine, state: dict[str, Any], *, best_step: int, keep: Collection[int] = ()) -> None:
        """Write the checkpoint of `step`; every rank calls it, rank 0 publishes it.

        Args:
            state: JSON-ready; `engine` is added to it.
            best_step: the step whose checkpoint is kept besides the newest ones; 0 is none.
            keep: other steps whose checkpoints are kept.
        Raises:
            StorageError: the disk is full or not writable; older checkpoints are intact.
        """
        name = checkpoint_name(step)
        writing = self.root / f".writing-{name}"
        try:
            if engine.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir(parents=True)
            engine.barrier()
            release_host_memory()  # blocks kept for the next step are no use here: a save under ZeRO gathers others
            state = {**state, "engine": engine.save(writing)}
            engine.barrier()
            if engine.rank == 0:
                replace_file(writing / "state.json", json_text(state, indent=1))
                replace_file(writing / MANIFEST_NAME, json_text({"step": step, "files": file_hashes(writing)}, indent=1))
                self._publish(writing, name)
                self._point("latest", name)
                if best_step:
                    self._point("best", checkpoint_name(best_step))
                self._prune(keep)
            engine.barrier()
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise storage_error(error, writing) from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return checkpoint_steps(self.root)

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.root / checkpoint_name(step)

    def newest_valid(self, *, skip_damaged: bool) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest checkpoint, verified against its manifest; None if there is none.

        Args:
            skip_damaged: pass over damaged checkpoints to the newest valid one instead of refusing.
        Raises:
            CheckpointError: the newest is damaged and `skip_damaged` is false, or all are.
        """
        problems = []
        for step in reversed(self.steps()):
            path = self.path(step)
            problem = damage(path)
            if not problem:
                return path, json.loads((path / "state.json").read_text())
            problems.append(f"{path} is damaged: {problem}")
            if not skip_damaged:
                older = [s for s in self.steps() if s < step and not damage(self.path(s))]
                remedy = f"--resume=last_valid goes on from step {older[-1]}" if older else "no older one is valid; start over with --fresh"
                raise CheckpointError(f"{problems[0]}; {remedy}")
        if problems:
            raise CheckpointError(f"no checkpoint is valid ({'; '.join(problems)}); start over with --fresh")
        return None

    def set_aside_after(self, step: int) -> list[str]:
        """Rename checkpoints newer than `step` to NAME.damaged, so that the run can write those steps again."""
        renamed = []
        for newer in (s for s in self.steps() if s > step):
            target = self.path(newer).with_suffix(".damaged")
            shutil.rmtree(target, ignore_errors=True)
            self.path(newer).rename(target)
            renamed.append(target.name)
        return renamed

    def repair(self, step: int, best_step: int) -> None:
        """Before going on from `step` (0: from the start): delete what a killed save left, point `latest` and `best` to what is there."""
        if not self.root.is_dir():
            return
        for path in self.root.glob(".*ing-*"):
            shutil.rmtree(path, ignore_errors=True)
        for pointer, wanted in (("latest", step), ("best", best_step)):
            if self.path(wanted).is_dir():
                self._point(pointer, self.path(wanted).name)
            else:
                (self.root / pointer).unlink(missing_ok=True)

    def _publish(self, writing: Path, name: str) -> None:
        """Rename to the final name; a checkpoint of the same step steps aside first and is deleted after."""
        _sync_directory(writing)
        final, replaced = self.root / name, self.root / f".replacing-{name}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        writing.rename(final)
        _sync_directory(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _point(self, pointer: str, name: str) -> None:
        replace_file(self.root / pointer, name + "\n")
        _sync_directory(self.root)

    def _prune(self, keep: Collection[int]) -> None:
        best = self.root / "best"
        kept = {best.read_text().strip()} if best.exists() else set()
        kept |= {self.path(step).name for step in keep}
        for step in self.steps()[: -self.keep_last]:
            if self.path(step).name not in kept:
                # renamed first: a half-deleted folder must not look like a damaged checkpoint
                doomed = self.root / f".removing-{self.path(step).name}"
                self.path(step).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def reading_state(path: Path) -> Iterator[None]:
    """Report a state.json that is JSON, and not what a run writes.

    Raises:
        CheckpointError: instead of what its values make of the code that reads them.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} is malformed ({error}); restore it, or use --fresh") from error


def storage_error(error: OSError, path: Path) -> Exception:
    """A StorageError for a full or read-only disk; any other OSError as it is."""
    if error.errno not in WRITE_ERRNOS:
        return error
    return StorageError(
        f"{path} cannot be written: {error.strerror}; checkpoints written before are intact; "
        "free space or make the folder writable, then run the same command again"
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Keys that may differ when a run is resumed, and why; every other key that differs is refused.
_ELSEWHERE, _MEMORY, _SAVING, _LENGTH = "where things are", "memory and speed", "what is kept and measured, not what is learned", "length"
_GROWTH = "for the rest of the run, as the rank may be changed"
FREE_KEYS = {
    "run_dir": _ELSEWHERE, "device": "what is computed in is recorded and compared", "loggers": _SAVING, "data.cache_dir": _ELSEWHERE,
    "budget.ram": _MEMORY, "budget.vram": _MEMORY, "budget.disk": _MEMORY, "train.micro_batch_size": _MEMORY,
    "train.activation_checkpointing": _MEMORY, "train.loss_chunk_tokens": _MEMORY,
    "train.weights_at": _MEMORY, "train.boundary_offload": _MEMORY, "train.storage_dir": _ELSEWHERE, "train.threads": _MEMORY,
    "train.steps": _LENGTH, "train.tokens": _LENGTH,
    "train.save_every": _SAVING, "train.keep_last": _SAVING, "train.eval_every": _SAVING, "train.eval_sequences": _SAVING,
    "train.max_bad_steps": "when to give up", "adapter.merge": _SAVING,
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
        if not any((self.path / name).exists() for name in ("config.yaml", "checkpoints", "metrics.jsonl")):
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

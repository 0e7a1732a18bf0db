"""Checkpoints that are whole or absent (D8): written beside, flushed, hashed, renamed; verified before they are read."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem.data.storage import WRITE_ERRNOS, json_text
from lowmem.engine.base import Engine
from lowmem.engine.manifest import MANIFEST_NAME, damage, file_hashes
from lowmem.errors import CheckpointError, StorageError
from lowmem.memory.block_cache import release_host_memory

_STEP_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")  # eight digits, more where a step has more


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
        name = f"step-{step:08d}"
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
                _write_json(writing / "state.json", state)
                _write_json(writing / MANIFEST_NAME, {"step": step, "files": file_hashes(writing)})
                self._publish(writing, name)
                self._point("latest", name)
                if best_step:
                    self._point("best", f"step-{best_step:08d}")
                self._prune(keep)
            engine.barrier()
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise storage_error(error, writing) from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(match[1]) for path in self.root.iterdir() if (match := _STEP_NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.root / f"step-{step:08d}"

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
        temporary = self.root / f".{pointer}.tmp"
        with open(temporary, "w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.root / pointer)
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


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        file.write(json_text(value, indent=1))
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

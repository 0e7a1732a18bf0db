"""The manifest of a checkpoint: the size and the SHA-256 of every file, by which damage is found before anything is read."""

import json
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lowmem.system.errors import CheckpointError
from lowmem.system.files import file_sha256

MANIFEST_NAME = "manifest.json"
TOKENIZER_KEY = "tokenizer_sha256"  # of state.json; of the manifest where there is no state
_LARGEST_JSON = 1 << 28  # bytes; far above what any state is, below what would exhaust memory
_DATA = (".safetensors", ".json")

_STEP_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")  # eight digits, more where a step has more


def checkpoint_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """The step that a folder's name tells; None if it is no checkpoint's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints below `root`, oldest first."""
    steps = [checkpoint_step(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(step for step in steps if step is not None)


def file_hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a folder, by name.

    Memory: one block.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}


def damage(path: Path, only: Collection[str] = ()) -> str:
    """What is wrong with a checkpoint folder: "" if every file of its manifest has the size and hash written there.

    Args:
        only: names of files that are looked at, and must be in the manifest; none is all of them, state.json and what else is there.
    """
    try:
        files = _manifest_files(path)
        if only:
            files = {name: expected for name, expected in files.items() if name in only}
        wanted = set(only or {"state.json", *(file.name for file in path.iterdir() if file.suffix in _DATA)}) - {MANIFEST_NAME}
        if absent := sorted(wanted - set(files)):
            return f"its manifest does not have {absent[0]}"
        for name, expected in files.items():
            if problem := _file_damage(path / name, name, expected):
                return problem
        if not only:
            return _state_damage(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest or state cannot be read ({' '.join(str(error).split())[:200]})"
    return ""


def recorded_tokenizer(path: Path) -> str:
    """The hash of the tokenizer that a checkpoint's weights were trained with; "" if none was recorded, as in earlier versions.

    Raises:
        CheckpointError: what it is recorded in is damaged.
    """
    name = "state.json" if (path / "state.json").exists() else MANIFEST_NAME
    if not (path / name).exists():
        return ""
    if problem := damage(path, only=(name,)) if name == "state.json" and (path / MANIFEST_NAME).exists() else "":
        raise CheckpointError(f"{path} is damaged: {problem}; restore it, or give another checkpoint or run")
    try:
        recorded = _read_json(path / name).get(TOKENIZER_KEY, "")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / name} cannot be read ({' '.join(str(error).split())[:200]}); restore it") from error
    if not isinstance(recorded, str):
        raise CheckpointError(f"{path / name} has {TOKENIZER_KEY} {recorded!r:.60}, expected a hash; restore it")
    return recorded


def verify_weights(path: Path) -> None:
    """Refuse a checkpoint whose model.safetensors is not what was written.

    Args:
        path: its folder; one without manifest is taken as it is if it has no state either: imports of earlier versions wrote none.
    Raises:
        CheckpointError: it is not, or the manifest is damaged.
    Memory: one block.
    """
    if not (path / MANIFEST_NAME).exists() and not (path / "state.json").exists():
        return
    if problem := damage(path, only=("model.safetensors",)):
        raise CheckpointError(f"{path} is damaged: {problem}; restore it, or give another checkpoint or run")


def _state_damage(path: Path) -> str:
    """What is wrong with the state of a checkpoint: it is of the step that manifest and folder are named by."""
    state = _read_json(path / "state.json")
    if not isinstance(state, dict):
        return "state.json holds no object"
    step, wanted = state.get("step"), _read_json(path / MANIFEST_NAME)["step"]
    if type(step) is not int or step != wanted or path.name != checkpoint_name(step):
        return f"state.json has step {step!r:.60}, its manifest {wanted!r:.60}, and its folder is {path.name}"
    return ""


def _manifest_files(path: Path) -> dict[str, Any]:
    files = _read_json(path / MANIFEST_NAME)["files"]
    if not isinstance(files, dict):
        raise TypeError("its files are no object")
    return files


def _read_json(path: Path) -> Any:
    if problem := _irregular(path):
        raise ValueError(f"{path.name} {problem}")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _file_damage(path: Path, name: str, expected: Any) -> str:
    if not name or Path(name).name != name or "\0" in name:
        return f"its manifest names {name[:80]!r}, which is no file of the folder"
    if problem := _irregular(path):
        return f"{name} {problem}"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, its manifest says {expected['bytes']}"
    return "" if file_sha256(path) == expected["sha256"] else f"{name} does not match its SHA-256"


def _irregular(path: Path) -> str:
    """Devices and pipes are never opened: they may not end."""
    return "" if stat.S_ISREG(path.stat().st_mode) else "is no regular file"

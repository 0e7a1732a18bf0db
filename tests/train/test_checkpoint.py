"""Checkpoints: whole or absent, verified, pruned, and honest about a full disk."""

import errno
import json
import os
import subprocess
import sys

import pytest

from lowmem.engine.base import Engine
from lowmem.system.errors import CheckpointError, StorageError
from lowmem.train.run import TrainState
from lowmem.train.run_dir import CheckpointStore, damage


class FileEngine(Engine):
    """Writes one file whose content is its `value`."""

    def __init__(self, value: str = "x"):
        self.value = value

    def save(self, directory):
        (directory / "model.safetensors").write_text(self.value)
        return {"value": self.value}

    def load(self, directory, state):
        self.value = state["value"]

    def step(self, batch, lr): ...
    def evaluate(self, batches): ...
    def rehearse(self, batch): ...
    def load_weights(self, directory): ...
    def memory_components(self): ...


def save(store: CheckpointStore, step: int, best: int = 0, engine: Engine | None = None) -> None:
    store.save(step, engine or FileEngine(), TrainState(step=step).to_json(), best_step=best)


def test_saved_state_comes_back(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.newest_valid(skip_damaged=False) is None
    save(store, 5)
    path, values = store.newest_valid(skip_damaged=False)
    state = TrainState.from_json(values)
    assert path.name == "step-00000005"
    assert state.step == 5
    assert state.engine == {"value": "x"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    save(store, 2, best=2)
    for step in (3, 4, 5):
        save(store, step, best=2)
    assert store.steps() == [2, 4, 5]
    assert (store.root / "best").read_text() == "step-00000002\n"
    assert sorted(p.name for p in store.root.iterdir()) == ["best", "latest", "step-00000002", "step-00000004", "step-00000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    save(store, 1, engine=FileEngine("new"))
    assert store.newest_valid(skip_damaged=False)[1]["engine"] == {"value": "new"}
    assert [p.name for p in store.root.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda p: (p / "model.safetensors").write_text("y"), "does not match its SHA-256"),
        (lambda p: (p / "model.safetensors").write_text("xx"), "has 2 bytes, its manifest says 1"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_skipped_only_when_told(tmp_path, harm, expected):
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 1)
    save(store, 2)
    harm(store.path(2))
    with pytest.raises(CheckpointError, match="step-00000002 is damaged.*--resume=last_valid goes on from step 1") as caught:
        store.newest_valid(skip_damaged=False)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 5
    path, _ = store.newest_valid(skip_damaged=True)
    assert path.name == "step-00000001"
    assert store.set_aside_after(1) == ["step-00000002.damaged"]
    assert store.steps() == [1]
    harm_all = store.path(1) / "model.safetensors"
    harm_all.unlink()
    with pytest.raises(CheckpointError, match="start over with --fresh"):
        store.newest_valid(skip_damaged=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("failing", ["model.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch, code, failing):
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    real_open = open

    def full(path, *args, **kwargs):
        if f"/{failing}" in str(path) and "step-00000002" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, *args, **kwargs)

    class OpeningEngine(FileEngine):
        def save(self, directory):
            full(directory / "model.safetensors")
            return {}

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(StorageError, match="checkpoints written before are intact") as caught:
        save(store, 2, engine=OpeningEngine() if failing == "model.safetensors" else None)
    monkeypatch.undo()
    assert caught.value.exit_code == 7
    assert store.steps() == [1]
    assert damage(store.path(1)) == ""
    assert not list(store.root.glob(".writing-*"))


def test_state_of_another_version_is_refused():
    values = TrainState(step=3).to_json()
    with pytest.raises(CheckpointError, match="format 99"):
        TrainState.from_json({**values, "format_version": 99})
    with pytest.raises(CheckpointError, match="this lowmem reads format 1"):
        TrainState.from_json({"format_version": 1})


def test_state_is_plain_json():
    state = TrainState(step=3, data={"position": 5}, best_val_loss=1.25)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_loading_imports_nothing_that_unpickles():
    """The modules that read checkpoints never call pickle or torch.load."""
    code = "import inspect, lowmem.train.run_dir as a, lowmem.system.tensors as b, lowmem.engine.state as c\n"
    code += "print(any(word in inspect.getsource(m) for m in (a, b, c) for word in ('pickle', 'torch.load', 'eval(', 'exec(')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"

import math
import subprocess
import sys
import types

import pytest

from lowmem.config.schema import RunConfig
from lowmem.system.errors import ConfigError, StorageError
from lowmem.train.loggers import TensorBoardLogger, open_loggers

METRICS = {"step": 3, "loss": 2.5, "lr": None, "grad_norm": math.inf, "host_peak_bytes": 2**33, "skipped": "nonfinite", "flag": True}
NUMBERS = {"loss": 2.5, "host_peak_bytes": 2**33}


def read_events(directory):
    """(tag, step, value) of every scalar as TensorBoard itself loads a folder: what a restart purged is gone."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory), purge_orphaned_data=True)
    events.Reload()
    return [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    (logger,) = open_loggers(["tensorboard"], tmp_path, RunConfig())
    logger.log(3, METRICS)
    logger.log(3, {"step": 3, "val_loss": 2.25})
    logger.log(4, {"step": 4, "loss": None})
    logger.close()
    logger.close()
    found = read_events(tmp_path / "tensorboard")
    assert sorted(found) == [("memory/host_peak_bytes", 3, 2.0**33), ("train/loss", 3, 2.5), ("val/val_loss", 3, 2.25)]


def test_tensorboard_forgets_steps_that_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
    first.close()
    second = TensorBoardLogger(tmp_path, resume_step=3)
    for step in (4, 5, 6):
        second.log(step, {"loss": 10.0 * step})
    second.close()
    assert [(step, value) for _, step, value in read_events(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_tensorboard_never_imports_tensorflow(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        "import sys; from pathlib import Path; from lowmem.train.loggers import TensorBoardLogger\n"
        f"logger = TensorBoardLogger(Path({str(tmp_path / 'log')!r})); logger.log(1, {{'loss': 1.0}}); logger.close()\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_tensorboard_names_a_folder_that_cannot_be_written(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in the way")
    with pytest.raises(StorageError, match="tensorboard cannot be written"):
        open_loggers(["tensorboard"], tmp_path, RunConfig())


class FakeRun:
    """Takes exactly what the documented `log` and `finish` take."""

    def __init__(self, calls, run_id):
        self._calls, self.id = calls, run_id

    def log(self, data, step=None):
        assert all(isinstance(value, int | float) for value in data.values())
        self._calls.append(("log", data, step))

    def finish(self):
        print("run finished")
        self._calls.append(("finish",))


@pytest.fixture
def fake_wandb(monkeypatch):
    """wandb.init as documented in W&B's Python reference: keyword parameters, `id` None makes a new one."""
    calls = []

    def init(*, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, resume=None, mode=None):
        calls.append(("init", project, dir, id, name, resume, config["train"]["seed"]))
        return FakeRun(calls, id or "abc123")

    module = types.ModuleType("wandb")
    module.init, module.Error = init, type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return types.SimpleNamespace(calls=calls, module=module)


def test_wandb_continues_the_run_of_the_run_directory(fake_wandb, tmp_path):
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    for _ in range(2):
        (logger,) = open_loggers(["wandb"], run_dir, RunConfig(), project="mine")
        logger.log(3, METRICS)
        logger.close()
    assert (run_dir / "wandb_id.txt").read_text() == "abc123\n"
    once = [("log", NUMBERS, 3), ("finish",)]
    first = ("init", "mine", str(run_dir), None, "demo", "allow", 0)
    second = ("init", "mine", str(run_dir), "abc123", "demo", "allow", 0)
    assert fake_wandb.calls == [first, *once, second, *once]


def test_a_refusal_by_wandb_closes_the_loggers_opened_before(fake_wandb, tmp_path):
    pytest.importorskip("tensorboard")

    def refuse(**parameters):
        raise fake_wandb.module.Error("no API key")

    fake_wandb.module.init = refuse
    with pytest.raises(ConfigError, match="refused the run: no API key; log in with `wandb login`"):
        open_loggers(["tensorboard", "wandb"], tmp_path, RunConfig())


@pytest.fixture
def fake_trackio(monkeypatch):
    """trackio.init as in trackio's API reference; like the real one it prints."""
    calls = []

    def init(project, name=None, group=None, space_id=None, dataset_id=None, config=None, resume="never", settings=None, private=None):
        print("* Trackio project initialized")
        calls.append(("init", project, name, resume, config["train"]["seed"]))
        return FakeRun(calls, None)

    module = types.ModuleType("trackio")
    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


def test_trackio_continues_by_name_and_leaves_stdout_alone(fake_trackio, tmp_path, capsys):
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    for _ in range(2):
        (logger,) = open_loggers(["trackio"], run_dir, RunConfig())
        logger.log(3, METRICS)
        logger.close()
        logger.close()
    name = (run_dir / "trackio_name.txt").read_text().strip()
    assert name.startswith("demo-")
    assert fake_trackio == 2 * [("init", "lowmem", name, "allow", 0), ("log", NUMBERS, 3), ("finish",)]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("initialized") == output.err.count("finished") == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    with pytest.raises(ConfigError, match=rf"loggers has {name}, which is not installed .* pip install 'lowmem\[{name}\]'"):
        open_loggers([name], tmp_path, RunConfig())


def test_unknown_loggers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="loggers has mlflow; allowed: tensorboard, wandb, trackio"):
        open_loggers(["mlflow"], tmp_path, RunConfig())

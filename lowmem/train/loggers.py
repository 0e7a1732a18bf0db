"""Optional places for metrics beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each continues its run when a run directory is resumed: TensorBoard drops what came after the checkpoint; Weights & Biases
and trackio find theirs by an id and a name kept in the run directory, so that a fresh start is a new run there too.
"""

import importlib
import math
import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from lowmem.config.schema import RunConfig
from lowmem.system.errors import ConfigError, StorageError
from lowmem.system.files import replace_file, storage_errors

LOGGER_NAMES = ("tensorboard", "wandb", "trackio")
_WANDB_ID_FILE = "wandb_id.txt"
_TRACKIO_NAME_FILE = "trackio_name.txt"
_NOT_METRICS = ("step", "skipped")


class MetricsLogger(ABC):
    """One place that metrics go to."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the numbers of a line of metrics.jsonl; text and null values are left out.

        Args:
            step: optimizer steps done; may repeat (a step and its evaluation), never falls within one process.
        """

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered and end; may be called more than once."""


def open_loggers(
    names: Sequence[str], run_dir: Path, config: RunConfig, project: str = "lowmem", resume_step: int = 0
) -> list[MetricsLogger]:
    """The loggers called `names`, in that order.

    Args:
        run_dir: exists; TensorBoard and Weights & Biases keep their files below it.
        config: recorded with the run.
        project: groups runs in Weights & Biases and trackio.
        resume_step: steps that are already logged and stay; TensorBoard drops later ones.
    Raises:
        ConfigError: an unknown name, a package is not installed, or the service refuses.
        StorageError: TensorBoard's files cannot be written.
    """
    unknown = [name for name in names if name not in LOGGER_NAMES]
    if unknown:
        raise ConfigError(f"loggers has {', '.join(unknown)}; allowed: {', '.join(LOGGER_NAMES)}")
    loggers: list[MetricsLogger] = []
    try:
        for name in names:
            if name == "tensorboard":
                loggers.append(TensorBoardLogger(run_dir / "tensorboard", resume_step))
            elif name == "wandb":
                loggers.append(WandbLogger(run_dir, asdict(config), project))
            else:
                loggers.append(TrackioLogger(run_dir, asdict(config), project))
    except BaseException:
        for logger in loggers:
            logger.close()
        raise
    return loggers


class TensorBoardLogger(MetricsLogger):
    """Scalars in a TensorBoard event file.

    Written with tensorboard's record writer rather than torch's SummaryWriter, which would import TensorFlow where it is
    installed, with its start-up time, memory and warnings.

    Args:
        directory: created if absent; every process writes a new file there.
        resume_step: TensorBoard is told to ignore what older files hold after this step.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        _require("tensorboard")
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_type, self._summary_type = Event, Summary
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            resumes = any(directory.glob("events.out.tfevents.*"))
            # "ab": a second logger of this process in the same second must not truncate the first one's file.
            self._file: BinaryIO = open(directory / name, "ab")  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise StorageError(f"{directory} cannot be written: {error.strerror}; free space or choose another run_dir") from error
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumes:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = [self._summary_type.Value(tag=_group(name), simple_value=value) for name, value in _numbers(metrics).items()]
        if values:
            self._write(self._event_type(wall_time=time.time(), step=step, summary=self._summary_type(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._file.name} cannot be written: {error.strerror}; free space, then run the same command again"
            ) from error


class WandbLogger(MetricsLogger):
    """A run in Weights & Biases; settings such as WANDB_MODE=offline and the API key come from its own environment variables.

    Args:
        run_dir: holds its files and the run's id.
        config: recorded with the run.
        project: where the run appears.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], project: str):
        wandb = _require("wandb")
        id_file = run_dir / _WANDB_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            self._run = wandb.init(project=project, name=run_dir.resolve().name, dir=str(run_dir), config=config, id=run_id, resume="allow")
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"Weights & Biases refused the run: {error}; log in with `wandb login`, or set WANDB_MODE=offline") from error
        with storage_errors(id_file):
            replace_file(id_file, f"{self._run.id}\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioLogger(MetricsLogger):
    """A run in trackio, named after the run directory and the moment it began.

    Args:
        run_dir: holds the run's name.
        config: recorded with the run.
        project: where the run appears.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], project: str):
        trackio = _require("trackio")
        self._open = True
        name_file = run_dir / _TRACKIO_NAME_FILE
        name = name_file.read_text(encoding="utf-8").strip() if name_file.exists() else f"{run_dir.resolve().name}-{time.time():.0f}"
        with redirect_stdout(sys.stderr):  # it prints where to look, and stdout is for results
            self._run = trackio.init(project=project, name=name, config=config, resume="allow")
        with storage_errors(name_file):
            replace_file(name_file, f"{name}\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        if self._open:
            self._open = False
            with redirect_stdout(sys.stderr):
                self._run.finish()


def _require(package: str) -> Any:
    """The module `package`, which is also the name of the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"loggers has {package}, which is not installed ({error}); "
            f"install it with: pip install 'lowmem[{package}]', or remove it from loggers"
        ) from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """The finite numbers among `metrics`, without the step."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _group(name: str) -> str:
    """TensorBoard groups tags by what precedes the slash."""
    return f"memory/{name}" if name.endswith("_bytes") else f"train/{name}" if not name.startswith("val_") else f"val/{name}"

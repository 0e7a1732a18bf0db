"""The `profile` command: the memory of any command, or of configurations, predicted against measured."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem.cli.options import OptionParser
from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.memory.measure import read_memory
from lowmem.memory.watch import INTERVAL_S
from lowmem.memory.watched import WatchedRun, run_watched
from lowmem.reporting.figures import require_matplotlib, slug
from lowmem.reporting.page import command_facts, table, write_command, write_configs
from lowmem.reporting.results import MetricsTail, describe, last_words, peak_rows, prediction, without_folders
from lowmem.system.errors import ConfigError, StoppedBySignal, StorageError
from lowmem.system.process import with_parent
from lowmem.system.units import parse_bytes

_OVERRIDE = re.compile(r"--(\w+(?:\.\w+)+|run_dir|device)(=.*)?", re.DOTALL)
_OURS = {"train.steps": "--steps", "train.tokens": "--steps", "train.eval_every": "", "train.save_every": "", "run_dir": "--out"}
_NVIDIA = Path("/proc/driver/nvidia/version")


def profile_main(argv: Sequence[str]) -> int:
    """Run `lowmem profile`.

    Args:
        argv: without the program's name.
    Returns:
        The exit code of the command; for configurations 0, or 1 if one of them failed.
    Raises:
        ConfigError: bad usage, or a library is missing.
        StoppedBySignal, StorageError: see `lowmem.system.errors`.
    """
    words, command = list(argv), None
    if "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    flags, overrides = _parse(words)
    if not hasattr(os, "wait4"):
        raise ConfigError("lowmem profile watches processes as Linux and macOS tell of them; this system does not")
    if command is not None:
        return _profile_command(command, flags, overrides)
    return _profile_configs(flags, overrides)


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    rest, overrides = [], []
    while words:
        word = words.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if not match:
            rest.append(word)
        elif match[2] is None and words and not words[0].startswith("--"):
            overrides.append(f"{word[2:]}={words.pop(0)}")
        else:
            overrides.append(word[2:])
    parser = OptionParser(
        "lowmem profile",
        "Measure the memory of a command (lowmem profile -- COMMAND ...), or of configurations against what is predicted for them "
        "(lowmem profile CONFIG... --steps N --out DIR); any key of the configuration can be given as --section.key=value.",
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML files; each is run in a fresh process")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each configuration (default 10, at least 2)")
    parser.add_argument("--out", type=Path, help="folder of the report (default for configurations: runs/profile)")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help=f"seconds between two samples (default {INTERVAL_S})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(rest)
    if not 0.001 <= flags.interval <= 60:
        raise ConfigError(f"--interval is {flags.interval}; expected 0.001 to 60 seconds")
    return flags, overrides


def _profile_command(command: list[str], flags: argparse.Namespace, overrides: list[str]) -> int:
    if flags.configs or overrides or flags.steps is not None:
        extra = [*flags.configs, *(f"--{override}" for override in overrides), *(["--steps"] if flags.steps is not None else [])]
        raise ConfigError(f"found {' '.join(extra)} before --; give either configurations, or a command after --")
    if not command:
        raise ConfigError("nothing after --; expected a command, such as: lowmem profile -- python train.py")
    if flags.out:
        require_matplotlib()
    try:
        run = run_watched(command, interval_s=flags.interval, nvml=_NVIDIA.exists(), stdout=2 if flags.json else None)
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]!r}: {error.strerror}; check the name, or give its whole path") from error
    result: dict[str, Any] = {
        "name": Path(command[0]).name,
        "command": without_folders(shlex.join(command)),
        "exit_code": run.exit_code,
        "duration_s": round(run.duration_s, 3),
        "samples": len(run.timeline),
        "host_peak_bytes": run.host_peak_bytes,
        **_device_peak(run),
    }
    if flags.json:
        print(json.dumps(result))
    else:
        print("lowmem profile: " + ", ".join(f"{name} {value}" for name, value in list(command_facts(result).items())[1:]), file=sys.stderr)
    if flags.out:
        write_command(flags.out, {**result, "timeline": run.timeline}, describe())
    return run.exit_code


def _device_peak(run: WatchedRun) -> dict[str, int]:
    sizes = [sample["nvml_bytes"] for sample in run.timeline if "nvml_bytes" in sample]
    return {"nvml_peak_bytes": max(sizes)} if sizes else {}


def _profile_configs(flags: argparse.Namespace, overrides: list[str]) -> int:
    steps, out = 10 if flags.steps is None else flags.steps, flags.out or Path("runs/profile")
    configs = _checked(flags.configs, steps, overrides)
    require_matplotlib()
    results = []
    for name, (path, config) in configs.items():
        print(f"profile: {name}, {steps} steps", file=sys.stderr, flush=True)
        results.append(_profile_config(name, path, config, steps, out, overrides, flags.interval))
    machine = describe()
    write_configs(out, results, machine)
    if flags.json:
        short = [{key: value for key, value in result.items() if key != "timeline"} for result in results]
        print(json.dumps({"configs": short, "machine": machine}))
    else:
        print(table(peak_rows(results)), end="")
    print(f"profile: written to {out / 'profile.html'}", file=sys.stderr)
    return 1 if any(result["exit_code"] for result in results) else 0


def _checked(paths: list[str], steps: int, overrides: list[str]) -> dict[str, tuple[str, RunConfig]]:
    """Configurations by a name of their own, each of them loaded, before the first one runs."""
    if not paths:
        raise ConfigError("no configuration; expected: lowmem profile CONFIG... --steps N --out DIR, or lowmem profile -- COMMAND ...")
    if steps < 2:
        raise ConfigError(f"--steps is {steps}; expected at least 2: the first step allocates, the ones after it show the speed")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _OURS:
            remedy = f"use {_OURS[key]}" if _OURS[key] else "leave it out"
            raise ConfigError(f"found --{override}; lowmem profile sets {key} itself, {remedy}")
    found: dict[str, tuple[str, RunConfig]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"no such file: {path}; expected a YAML configuration, such as configs/cpu/demo.yaml")
        stem, number = slug(Path(path).stem), 2
        name = stem
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found[name] = path, load_run_config(path, [*overrides, f"train.steps={steps}", "train.tokens=0"])
    return found


def _profile_config(
    name: str, path: str, config: RunConfig, steps: int, out: Path, overrides: list[str], interval_s: float
) -> dict[str, Any]:
    """One configuration in a fresh process; a failure is part of the result."""
    command = [sys.executable, "-m", "lowmem", "pretrain", "--config", path, *(f"--{override}" for override in overrides)]
    command += [f"--train.steps={steps}", "--train.tokens=0"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; choose another --out") from error
    try:
        run_dir, stderr = folder / "run", folder / "stderr.txt"
        extra = [f"--train.eval_every={steps}", f"--train.save_every={steps}", f"--run_dir={run_dir}", "--fresh", "--quiet", "--force"]
        # before the run, which is then not to be checked under the watcher's eyes
        predicted = prediction(_dry_run([*command, f"--run_dir={run_dir}"]))
        tail = MetricsTail(run_dir / "metrics.jsonl")
        nvml = config.device != "cpu" and _NVIDIA.exists()
        with open(stderr, "wb") as errors:
            whole = with_parent([*command, *extra])
            run = run_watched(whole, interval_s=interval_s, nvml=nvml, on_poll=tail.poll, stdout=subprocess.DEVNULL, stderr=errors)
        if run.forwarded:
            raise StoppedBySignal("stopped; the report was not written", 128 + run.forwarded)
        memory, message = read_memory(run_dir), last_words(stderr.read_text(encoding="utf-8", errors="replace"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured = memory.get("measured") or {}
    return {
        "name": name,
        "config": Path(path).name,
        "overrides": [without_folders(override) for override in overrides],
        "steps": steps,
        "exit_code": run.exit_code,
        "message": without_folders(message) if run.exit_code else "",
        "duration_s": round(run.duration_s, 3),
        "budget": {"ram_bytes": parse_bytes(config.budget.ram or 0) or None, "vram_bytes": parse_bytes(config.budget.vram or 0) or None},
        "predicted": predicted,
        "measured": {key: value for key, value in measured.items() if key != "phases"} or None,
        "tokens_per_s": tail.tokens_per_s(),
        "phases": measured.get("phases") or memory.get("phases") or {},
        "watched": {"host_peak_bytes": run.host_peak_bytes, "samples": len(run.timeline), **_device_peak(run)},
        "spans": tail.spans(run.duration_s),
        "steps_at_s": [round(end, 3) for _, end in tail.step_times()],
        "timeline": run.timeline,
    }


def _dry_run(command: list[str]) -> dict[str, Any] | None:
    """What `lowmem pretrain --dry_run --json` predicts; None if it cannot."""
    answer = subprocess.run([*with_parent(command), "--dry_run", "--json"], capture_output=True, text=True, check=False)
    try:
        return json.loads(answer.stdout).get("predicted")
    except ValueError:
        return None

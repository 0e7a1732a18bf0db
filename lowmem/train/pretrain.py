"""The `pretrain` command: flags, set-up, training, and what is written at the end."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.config import RunConfig
from lowmem.config_dump import dump_run_config
from lowmem.config_load import load_run_config
from lowmem.config_schema import field_docs
from lowmem.engine import distributed
from lowmem.errors import ConfigError, MemoryBudgetError, StoppedBySignal, StorageError

if TYPE_CHECKING:
    from lowmem.memory.measure import PeakMemory
    from lowmem.train.loop import Run


def pretrain_main(argv: Sequence[str]) -> int:
    """Run `lowmem pretrain`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    flags, overrides = _parse(argv)
    if flags.local_rank is not None or distributed.launched_by_deepspeed():
        overrides.append("engine.name=deepspeed")
    config = load_run_config(flags.config, overrides, check=not flags.print_config)
    if flags.print_config:
        sys.stdout.write(dump_run_config(config, comments=True))
        return 0
    if flags.dry_run:
        return _dry_run(config, as_json=flags.json)
    return _train(config, flags)


def _train(config: RunConfig, flags: argparse.Namespace) -> int:
    from lowmem.memory.budget import is_out_of_memory
    from lowmem.memory.measure import measure_peak
    from lowmem.train.loop import train
    from lowmem.train.progress import make_display
    from lowmem.train.setup import set_up

    display = make_display(quiet=flags.quiet or distributed.rank() != 0)
    run = None
    together = True  # whether all ranks end here, for the same reason
    try:
        with measure_peak() as peak:
            run = set_up(config, display, fresh=flags.fresh, resume=flags.resume)
            train(run)
    except (MemoryError, RuntimeError) as error:
        together = False
        if distributed.is_peer_failure(error):
            distributed.wait_for_launcher()
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"memory ran out (budget.ram={config.budget.ram or 'none'}, budget.vram={config.budget.vram or 'none'}): {_first_line(error)}; "
            "use a smaller train.micro_batch_size, train.activation_checkpointing=block, or a larger budget"
        ) from error
    except StoppedBySignal:
        raise
    except BaseException:
        together = False
        raise
    finally:
        display.close()
        if run is not None:
            _finish(run, peak, disconnect=together or run.engine.world_size == 1)
    return 0


def _finish(run: "Run", peak: "PeakMemory", disconnect: bool) -> None:
    """Write memory.json, close loggers and ranks; also after a stop or a failure.

    Args:
        disconnect: part from the other ranks; false after a failure, which the others may not share.
    """
    for logger in run.loggers:
        logger.close()
    if run.run_dir is not None:
        try:
            run.run_dir.write_json("memory.json", memory_report(run, peak))
        except StorageError as error:  # the run's own outcome matters more
            run.display.message(str(error))
        run.run_dir.close()
    if disconnect:
        run.engine.close()


def memory_report(run: "Run", peak: "PeakMemory") -> dict[str, Any]:
    """The content of memory.json: budget, what is known beforehand, what was measured; peaks over all legs of a resumed run."""
    measured: dict[str, Any] = peak.as_dict()
    path = Path(run.config.run_dir) / "memory.json"
    if path.exists() and run.resumed:
        before = json.loads(path.read_text())["measured"]
        measured = {name: max(value, before.get(name, 0)) for name, value in measured.items()}
    measured["components"] = run.engine.memory_components()
    return {"budget": asdict(run.config.budget), "predicted": None, "measured": measured}


def _dry_run(config: RunConfig, *, as_json: bool) -> int:
    from lowmem.train.dry_run import dry_run

    report = dry_run(config)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        sys.stdout.write(dump_run_config(config, comments=True))
        print(f"# parameters: {report['parameters']:,}")
        for name, count in report["predicted"]["components"].items():
            print(f"#   {name}: {count:,} bytes")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="lowmem pretrain",
        description="Pretrain a language model. Any key of the configuration can be given as --section.key=value.",
        epilog="configuration keys:\n" + "\n".join(f"  --{key}  {doc}" for key, doc in field_docs().items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file; overrides come after it")
    parser.add_argument("--print_config", action="store_true", help="print the configuration, commented, and stop")
    parser.add_argument("--dry_run", action="store_true", help="print the configuration and what it needs, train nothing")
    parser.add_argument("--json", action="store_true", help="with --dry_run: one JSON object on standard output")
    parser.add_argument("--fresh", action="store_true", help="start over; the run that is there is kept beside the new one")
    parser.add_argument("--resume", choices=["auto", "last_valid"], default="auto", help="last_valid passes over damaged checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, default=None, help="set by DeepSpeed's launcher")
    try:
        flags, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"lowmem pretrain: {error}") from error
    return flags, _overrides(rest)


def _overrides(rest: list[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` as "a.b=c"."""
    overrides, index = [], 0
    while index < len(rest):
        word = rest[index]
        if not word.startswith("--"):
            raise ConfigError(f"found {word!r}; expected --section.key=value or one of the options of lowmem pretrain --help")
        word = word[2:]
        if "=" not in word and index + 1 < len(rest) and not rest[index + 1].startswith("--"):
            index += 1
            word = f"{word}={rest[index]}"
        overrides.append(word)
        index += 1
    return overrides


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

"""The `finetune` command: flags, and what is written at the end."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.options import OptionParser, dotted_overrides
from lowmem.config.dump import dump_config
from lowmem.config.finetune import FinetuneConfig, finetune_problems, memory_remedies
from lowmem.config.keys import field_docs
from lowmem.config.load import load_config
from lowmem.system.errors import MemoryBudgetError


def finetune_main(argv: Sequence[str]) -> int:
    """Run `lowmem finetune`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    flags, overrides = _parse(argv)
    find_problems = (lambda config: []) if flags.print_config else finetune_problems
    config = load_config(FinetuneConfig, flags.config, overrides, find_problems)
    if flags.print_config:
        sys.stdout.write(dump_config(config, comments=True))
        return 0
    from lowmem.engine.recovery import first_line
    from lowmem.finetune.train import finetune
    from lowmem.memory.allocator import set_up_host_memory
    from lowmem.memory.limits import is_out_of_memory, lift_host_limit
    from lowmem.memory.measure import measure_peak
    from lowmem.system.files import compiled_root, json_text, replace_file, storage_errors
    from lowmem.train.display import make_display
    from lowmem.train.run_dir import check_place

    check_place(Path(config.out), "out")
    if flags.dry_run:
        return _dry_run(config)
    display = make_display(quiet=flags.quiet)
    set_up_host_memory(compiled_root())
    try:
        with measure_peak() as peak:
            done = finetune(config, display, fresh=flags.fresh, resume=flags.resume)
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        lift_host_limit()
        if isinstance(error, MemoryBudgetError) or not out_of_memory:
            raise
        remedies = ", ".join([*memory_remedies(config), "a smaller seq_len"])
        raise MemoryBudgetError(
            f"memory ran out (budget.ram={config.budget.ram or 'none'}): {first_line(error)}; use {remedies} or a larger budget"
        ) from error
    finally:
        lift_host_limit()
        display.close()
    training = max(done.peaks[phase]["host_peak_bytes"] for phase in ("load", "steady_steps"))
    report = {"trainable": done.trainable, "total": done.total, "losses": done.losses, "host_peak_bytes": peak.host_peak_bytes}
    report |= {"training_peak_bytes": training, "peaks": done.peaks, "predicted": done.predicted}
    report["predicted_vram"] = done.predicted_vram
    with storage_errors(Path(config.out)):
        replace_file(Path(config.out) / "result.json", json_text(report, indent=1))
    return 0


def _dry_run(config: FinetuneConfig) -> int:
    from lowmem.finetune.base_model import base_directory
    from lowmem.finetune.data import check_chat
    from lowmem.finetune.settle import check_base, choose_micro_batch

    directory = base_directory(config.base, Path(config.out))
    check_chat(config, directory)
    for note in check_base(config, directory):
        print(note, file=sys.stderr)
    settled, memory = choose_micro_batch(config, directory)
    print(f"{memory.line()}; micro-batches of {settled.micro_batch_size}")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        "lowmem finetune",
        "Fine-tune a model on conversations. Any key of the configuration can be given as --key=value.",
        field_docs(FinetuneConfig),
    )
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file; overrides come after it")
    parser.add_argument("--print_config", action="store_true", help="print the configuration, commented, and stop")
    parser.add_argument("--dry_run", action="store_true", help="print the predicted peak of memory, train nothing")
    parser.add_argument("--fresh", action="store_true", help="start over; the run that is there is kept beside the new one")
    parser.add_argument("--resume", choices=["auto", "last_valid"], default="auto", help="last_valid passes over damaged checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    flags, rest = parser.parse_known_args(list(argv))
    return flags, dotted_overrides(rest, "lowmem finetune")

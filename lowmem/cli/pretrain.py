"""The `pretrain` command: flags, set-up, training, and what is written at the end."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cli.options import OptionParser, dotted_overrides
from lowmem.config.dump import dump_config
from lowmem.config.keys import field_docs
from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.engine.deepspeed import processes
from lowmem.memory.measure import combine_peaks, read_memory, shared_bytes
from lowmem.system.errors import ConfigError, MemoryBudgetError, StoppedBySignal, StorageError
from lowmem.system.units import parse_bytes

if TYPE_CHECKING:
    from lowmem.memory.measure import PeakMemory
    from lowmem.train.loop import Run


_PURPOSES = {
    "pretrain": "Train a language model, from scratch or from a model of transformers (--model.path).",
    "finetune": "Fine-tune a model of transformers on conversations: `pretrain` with data.kind=chat and adapter.method=lora.",
}


def pretrain_main(argv: Sequence[str], command: str = "pretrain", defaults: Sequence[str] = ()) -> int:
    """Run `lowmem pretrain`, or another command that is the same program with other defaults.

    Args:
        argv: without the program's name.
        command: its name.
        defaults: overrides of the defaults of the configuration, below the file.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    flags, overrides = _parse(argv, command)
    if flags.local_rank is not None or processes.launched_by_deepspeed():
        overrides.append("engine.name=deepspeed")
    config = load_run_config(flags.config, overrides, check=not flags.print_config, defaults=defaults)
    if flags.print_config:
        sys.stdout.write(dump_config(config, comments=True))
        return 0
    from lowmem.train.preflight import check_beforehand

    check_beforehand(config, fresh=flags.fresh)
    if flags.dry_run:
        return _dry_run(config, as_json=flags.json)
    answer = _predicted(config, flags)
    if not (processes.rank() or flags.force):
        from lowmem.planning.room import check_room

        check_room(config, fresh=flags.fresh)
    if answer is None:
        return _train(config, flags, None)
    micro_batch_size = answer["micro_batch_size"]
    return _train(replace(config, train=replace(config.train, micro_batch_size=micro_batch_size)), flags, answer["predicted"])


def _predicted(config: RunConfig, flags: argparse.Namespace) -> dict[str, Any] | None:
    """What `check_run` answers for a run with a budget, on rank 0; None where there is nothing to check, or no way to know.

    Raises:
        MemoryBudgetError: they exceed the budget.
    """
    if processes.rank() or flags.force or not (config.budget.ram or config.budget.vram or config.budget.disk):
        return None
    from lowmem.memory.host import granted_memory
    from lowmem.planning.check import check_run

    granted, said = granted_memory(parse_bytes(config.budget.ram or "0"), processes.local_world_size())
    if said and config.budget.ram:
        config = replace(config, budget=replace(config.budget, ram=f"{granted}B"))
    try:
        answer = check_run(config, processes.world_size(), processes.local_world_size())
    except ConfigError as error:  # such as a vocabulary that only the text tells: the limits are enforced all the same
        print(f"lowmem: {error}", file=sys.stderr)
        return None
    if answer["refusal"]:
        command = f"lowmem plan{f' --config {flags.config}' if flags.config else ''}"
        raise MemoryBudgetError(f"{answer['refusal']}{command.removeprefix('lowmem plan')}; --force starts it all the same")
    if not flags.quiet:
        print(answer["summary"], file=sys.stderr)
    return answer


def _train(config: RunConfig, flags: argparse.Namespace, predicted: dict[str, Any] | None) -> int:
    from lowmem.engine.recovery import first_line
    from lowmem.memory.allocator import block_cache_library
    from lowmem.memory.limits import is_out_of_memory, lift_host_limit
    from lowmem.memory.measure import PeakRecorder, measure_peak
    from lowmem.system.files import compiled_root
    from lowmem.train.display import make_display
    from lowmem.train.loop import train
    from lowmem.train.setup import set_up

    display = make_display(quiet=flags.quiet or processes.rank() != 0)
    run = None
    block_cache_library(compiled_root())  # a compiler's memory is no part of the run's
    together = True  # whether all ranks end here, for the same reason
    try:
        with measure_peak() as peak:
            peaks = PeakRecorder()
            with peaks("load"):
                run = set_up(config, display, fresh=flags.fresh, resume=flags.resume)
            run.peaks = peaks
            train(run)
            _write_model(run)
    except StoppedBySignal:
        raise
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        lift_host_limit()
        together = False
        if isinstance(error, RuntimeError) and processes.is_peer_failure(error):
            processes.wait_for_launcher()
        if isinstance(error, MemoryBudgetError) or not out_of_memory:
            raise
        raise MemoryBudgetError(
            f"memory ran out (budget.ram={config.budget.ram or 'none'}, budget.vram={config.budget.vram or 'none'}): {first_line(error)}; "
            "use a smaller train.micro_batch_size, train.activation_checkpointing=block, or a larger budget"
        ) from error
    except BaseException:
        together = False
        raise
    finally:
        lift_host_limit()
        display.close()
        if run is not None:
            _finish(run, peak, predicted, together=together or run.engine.world_size == 1)
    return 0


def _write_model(run: "Run") -> None:
    """At the end of a run on model.path: run_dir/adapter, which PEFT loads, and run_dir/merged, which transformers loads.

    Memory: one tensor in fp32.
    """
    config = run.config
    if not config.model.path or run.run_dir is None or not run.is_complete():
        return
    from lowmem.engine.huggingface_files import resolve_model_path
    from lowmem.export.adapters import adapter_note, has_adapter, merge_problem, save_adapter, save_merged
    from lowmem.system.files import written_whole

    if config.engine.name == "deepspeed":  # its weights are DeepSpeed's, in part or in another dtype
        run.display.message(f"for a directory that transformers loads: lowmem export --run {config.run_dir} --out DIR")
        return
    base, model = resolve_model_path(config.model.path, config.model.revision), run.engine.model
    beside: Any = {"tokenizer": run.data.tokenizer, "template": run.data.template}
    with run.peaks("save"):
        if has_adapter(model):
            with written_whole(run.run_dir.path / "adapter") as target:
                save_adapter(model, base, target, **beside)
            if note := adapter_note(model):
                run.display.message(note)
        if config.adapter.merge and (problem := merge_problem(model)):
            run.display.message(f"{problem}: adapter/ is written, and no merged/; adapter.merge=false asks for none")
        elif config.adapter.merge:
            with written_whole(run.run_dir.path / "merged") as target:
                save_merged(model, base, target, **beside, storage=getattr(run.engine, "storage", None))


def _finish(run: "Run", peak: "PeakMemory", predicted: dict[str, Any] | None, together: bool) -> None:
    """Write memory.json, close loggers and ranks; also after a stop or a failure.

    Args:
        together: all ranks are here; false after a failure, which the others may not share.
    """
    for logger in run.loggers:
        logger.close()
    total = _host_peak_of_all_ranks(run, peak) if together else peak.host_peak_bytes
    if run.run_dir is not None:
        try:
            run.run_dir.write_json("memory.json", memory_report(run, peak, total, predicted))
        except StorageError as error:  # the run's own outcome matters more
            run.display.message(str(error))
        run.run_dir.close()
    if together:
        run.engine.close()


def _host_peak_of_all_ranks(run: "Run", peak: "PeakMemory") -> int:
    """The sum of the peaks of the ranks of a machine, pages that they share counted once; an upper bound, as if all came at once."""
    if run.engine.world_size == 1:
        return peak.host_peak_bytes
    everywhere = run.engine.sum_over_ranks(float(peak.host_peak_bytes - shared_bytes()))
    return round(everywhere * processes.local_world_size() / run.engine.world_size)


def memory_report(run: "Run", peak: "PeakMemory", host_peak_bytes: int, predicted: dict[str, Any] | None) -> dict[str, Any]:
    """The content of memory.json: budget, predicted and measured peaks; the latter over all legs of a resumed run.

    Args:
        host_peak_bytes: of all ranks.
        predicted: None if there is no budget to check it against, or --force was given.
    """
    measured: dict[str, Any] = peak.as_dict() | {"host_peak_bytes": host_peak_bytes}
    earlier: dict[str, dict[str, int]] = {}
    if run.resumed:
        before, earlier = _earlier_peaks(Path(run.config.run_dir))
        measured = combine_peaks(measured, before)
    measured["components"] = run.engine.memory_components()
    measured["phases"] = phases = run.peaks.as_dict()
    for name, peaks in earlier.items():
        phases[name] = combine_peaks(phases.get(name, {}), peaks)
    return {"budget": asdict(run.config.budget), "predicted": predicted, "measured": measured}


def _earlier_peaks(run_dir: Path) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Peaks of the legs before, in all and by phase; what of memory.json is damaged is left out."""

    def counts(values: Any) -> dict[str, int]:
        return {name: value for name, value in values.items() if isinstance(value, int)} if isinstance(values, dict) else {}

    measured = read_memory(run_dir).get("measured") or {}
    phases = measured.get("phases")
    return counts(measured), {name: counts(peaks) for name, peaks in phases.items()} if isinstance(phases, dict) else {}


def _dry_run(config: RunConfig, *, as_json: bool) -> int:
    from lowmem.planning.levers import predict_fitting, refusal

    prediction = predict_fitting(config, processes.local_world_size())
    if as_json:
        print(json.dumps(prediction.report(), indent=1))
    else:
        sys.stdout.write(dump_config(prediction.config, comments=True))
        print("\n".join(f"# {line}" for line in prediction.lines()))
    problem = refusal(prediction, processes.local_world_size())
    if problem:
        raise MemoryBudgetError(problem)
    return 0


def _parse(argv: Sequence[str], command: str) -> tuple[argparse.Namespace, list[str]]:
    purpose = _PURPOSES[command]
    parser = OptionParser(f"lowmem {command}", f"{purpose} Any key of the configuration can be given as --section.key=value.", field_docs())
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file; overrides come after it")
    parser.add_argument("--print_config", action="store_true", help="print the configuration, commented, and stop")
    parser.add_argument("--dry_run", action="store_true", help="print the configuration and its predicted peaks, train nothing")
    parser.add_argument("--force", action="store_true", help="start even if the prediction exceeds the budget or a disk")
    parser.add_argument("--json", action="store_true", help="with --dry_run: one JSON object on standard output")
    parser.add_argument("--fresh", action="store_true", help="start over; the run that is there is kept beside the new one")
    parser.add_argument("--resume", choices=["auto", "last_valid"], default="auto", help="last_valid passes over damaged checkpoints")
    parser.add_argument("--grow_plan", default="", metavar="LENGTHS", help='train.seq_len_schedule, such as "256,512,768"')
    parser.add_argument("--grow_every_steps", type=int, default=0, metavar="N", help="with --grow_plan: steps at each length but the last")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--local_rank", type=int, default=None, help="set by DeepSpeed's launcher")
    flags, rest = parser.parse_known_args(list(argv))
    return flags, [*_grow_overrides(flags), *dotted_overrides(rest, f"lowmem {command}")]


def _grow_overrides(flags: argparse.Namespace) -> list[str]:
    """--grow_plan and --grow_every_steps as train.seq_len_schedule; the longest length is data.seq_len."""
    if not flags.grow_plan and not flags.grow_every_steps:
        return []
    try:
        lengths = [int(length) for length in flags.grow_plan.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or flags.grow_every_steps < 1:
        raise ConfigError(
            f"--grow_plan is {flags.grow_plan!r} and --grow_every_steps is {flags.grow_every_steps}; give both: lengths such as "
            '"256,512,768", and the steps at each of them but the last'
        )
    schedule = {number * flags.grow_every_steps: length for number, length in enumerate(lengths)}
    return [f"data.seq_len={max(lengths)}", f"train.seq_len_schedule={json.dumps(schedule).replace(chr(34), '')}"]

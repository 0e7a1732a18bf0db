"""The `lowmem` command: finds the subcommand, and turns every failure a user can cause into one message and an exit code."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from lowmem.system.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    ConfigError,
    LowmemError,
    MemoryBudgetError,
    StoppedBySignal,
    StorageError,
)
from lowmem.system.light_imports import keep_imports_light
from lowmem.system.process import STOPPED, OutputLost, answered_signals, discard_output, standard_streams

# Libraries that log, on being imported, what they lack or what another library will change; `doctor` says what is missing.
TALKATIVE = ("torch.utils._pytree", "torchao", "bitsandbytes")
_IMPOSSIBLE_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST)

USAGE = """usage: lowmem COMMAND [options]

  pretrain   train a model from scratch, or go on with a run     lowmem pretrain --config configs/cpu/demo.yaml
  plan       the fastest settings that fit memory and disk       lowmem plan --budget.ram=4GiB --budget.vram=6GiB
  profile    measured against predicted memory, as a report      lowmem profile configs/cpu/demo.yaml --steps 10 --out report
  generate   write text with a trained model                     lowmem generate --run runs/demo --prompt "def "
  finetune   adapt a model to conversations, by LoRA and kin      lowmem finetune --model.path=SmolLM2-135M --data=chat.jsonl
  export     a directory that transformers loads                 lowmem export --run runs/demo --format hf --out demo-hf
  import     a Llama or GPT-2 directory as a run                 lowmem import gpt2-small --out runs/gpt2
  doctor     what this machine can do, and what will be slow     lowmem doctor

`lowmem COMMAND --help` lists the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `lowmem` script; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(_dispatch, words, last=argv is None)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        from lowmem import __version__

        print(__version__)
        return 0
    commands = _commands()
    if argv[0] not in commands:
        print(f"lowmem: error: unknown command {argv[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    return commands[argv[0]](argv[1:])


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None, *, last: bool = False) -> int:
    """Run a command's main function as `lowmem` and the scripts in `launch/` do.

    Args:
        command: takes the arguments, returns the exit code, raises `LowmemError`.
        argv: default: the process's own.
        last: the process ends with this command, as it does where `argv` is its own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for library in TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    last = last or argv is None
    if last:
        keep_imports_light()
    with standard_streams(), answered_signals(last=last) as asked:
        try:
            code = _exit_code(command, words)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # `| head` has read enough
            discard_output()
            return EXIT_BROKEN_PIPE
        except BaseException as error:
            # After a signal it does not matter what became of it on its way here.
            interrupted = isinstance(error, KeyboardInterrupt) or (asked.number and not isinstance(error, StoppedBySignal))
            failure = StoppedBySignal(STOPPED, EXIT_INTERRUPTED) if interrupted else _failure(error)
            if failure is None or ("--debug" in words and not interrupted):
                raise
            stopped = failure.exit_code > 128
            print(f"lowmem: {'' if stopped else 'error: '}{failure}", file=sys.stderr)
            if isinstance(failure, OutputLost):
                discard_output()
            return 128 + asked.number if asked.number else failure.exit_code


def _exit_code(command: Callable[[Sequence[str]], int], argv: list[str]) -> int:
    try:
        if any("\0" in word for word in argv):
            raise ConfigError("an argument has a NUL character, which no file name has; remove it")
        return command(argv)
    except SystemExit as stop:  # argparse, after --help
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise


def _failure(error: BaseException) -> LowmemError | None:
    """An error as the one that a user can act on; None for a fault of lowmem's own."""
    if isinstance(error, LowmemError):
        return error
    from lowmem.system.files import write_failure

    reason = write_failure(error)
    if reason:
        name = getattr(error, "filename", None) or "a file"
        return StorageError(f"{name} cannot be written: {reason}; free space there, or choose another folder")
    if isinstance(error, OSError) and error.errno is not None:  # of a file that no code below expects to fail
        where = os.fsdecode(error.filename)[:300] if isinstance(error.filename, (str, bytes)) else "a file or a folder"
        if error.errno in _IMPOSSIBLE_PATHS:
            return ConfigError(f"{where} cannot be used: {error.strerror}; name another path")
        return StorageError(f"{where} cannot be read or written: {error.strerror}; check the path and its permissions")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return ConfigError("this user has no home folder, which ~ in a path stands for; write the whole path, or set HOME")
    if not isinstance(error, MemoryError):
        if "torch" not in sys.modules:
            return None
        from lowmem.memory.limits import is_out_of_memory

        if not is_out_of_memory(error):
            return None
    return MemoryBudgetError(
        f"memory ran out: {(str(error) or type(error).__name__).splitlines()[0][:200]}; free memory, or use a smaller model"
    )


def _commands() -> dict[str, Callable[[Sequence[str]], int]]:
    def pretrain(argv: Sequence[str]) -> int:
        from lowmem.cli.pretrain import pretrain_main

        return pretrain_main(argv)

    def generate(argv: Sequence[str]) -> int:
        from lowmem.cli.generate import generate_main

        return generate_main(argv)

    def plan(argv: Sequence[str]) -> int:
        from lowmem.cli.plan import plan_main

        return plan_main(argv)

    def profile(argv: Sequence[str]) -> int:
        from lowmem.cli.profile import profile_main

        return profile_main(argv)

    def doctor(argv: Sequence[str]) -> int:
        from lowmem.cli.doctor import doctor_main

        return doctor_main(argv)

    def finetune(argv: Sequence[str]) -> int:
        from lowmem.cli.finetune import finetune_main

        return finetune_main(argv)

    def export(argv: Sequence[str]) -> int:
        from lowmem.cli.export import export_main

        return export_main(argv)

    def import_(argv: Sequence[str]) -> int:
        from lowmem.cli.import_model import import_main

        return import_main(argv)

    return {
        "pretrain": pretrain, "plan": plan, "profile": profile, "generate": generate, "finetune": finetune, "export": export,
        "import": import_, "doctor": doctor,
    }  # fmt: skip

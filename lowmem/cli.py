"""The `lowmem` command: finds the subcommand, and turns every failure a user can cause into one message and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from lowmem.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, LowmemError

USAGE = """usage: lowmem COMMAND [options]

  pretrain   train a model from scratch, or go on with a run     lowmem pretrain --config configs/cpu/demo.yaml
  plan       the fastest settings that fit a memory budget       lowmem plan --budget.ram=4GiB --budget.vram=6GiB
  profile    measured against predicted memory, as a report      lowmem profile configs/cpu/demo.yaml --steps 10 --out report
  generate   write text with a trained model                     lowmem generate --run runs/demo --prompt "def "
  finetune   adapt a model to conversations, by LoRA and kin      lowmem finetune --base runs/demo --data chat.jsonl --method lora
  export     a directory that transformers loads                 lowmem export --run runs/demo --format hf --out demo-hf
  import     a Llama or GPT-2 directory as a run                 lowmem import gpt2-small --out runs/gpt2
  doctor     what this machine can do, and what will be slow     lowmem doctor

`lowmem COMMAND --help` lists the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `lowmem` script; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
    return run_command(commands[argv[0]], argv[1:])


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's main function as `lowmem` and the scripts in `launch/` do.

    Args:
        command: takes the arguments, returns the exit code, raises `LowmemError`.
        argv: default: the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return command(argv)
    except LowmemError as error:
        if "--debug" in argv:
            raise
        stopped = error.exit_code > 128
        print(f"lowmem: {'' if stopped else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lowmem: stopped before a checkpoint was due; finished work on disk is kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; Python's own flush at exit must not complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _commands() -> dict[str, Callable[[Sequence[str]], int]]:
    def pretrain(argv: Sequence[str]) -> int:
        from lowmem.train.pretrain import pretrain_main

        return pretrain_main(argv)

    def generate(argv: Sequence[str]) -> int:
        from lowmem.generate import generate_main

        return generate_main(argv)

    def plan(argv: Sequence[str]) -> int:
        from lowmem.plan import plan_main

        return plan_main(argv)

    def profile(argv: Sequence[str]) -> int:
        from lowmem.profile import profile_main

        return profile_main(argv)

    def doctor(argv: Sequence[str]) -> int:
        from lowmem.doctor import doctor_main

        return doctor_main(argv)

    def finetune(argv: Sequence[str]) -> int:
        from lowmem.finetune.command import finetune_main

        return finetune_main(argv)

    def export(argv: Sequence[str]) -> int:
        from lowmem.export.command import export_main

        return export_main(argv)

    def import_(argv: Sequence[str]) -> int:
        from lowmem.export.import_command import import_main

        return import_main(argv)

    return {
        "pretrain": pretrain, "plan": plan, "profile": profile, "generate": generate, "finetune": finetune, "export": export,
        "import": import_, "doctor": doctor,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

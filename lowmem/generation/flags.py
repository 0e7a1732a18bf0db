"""The options of `lowmem generate`."""

import argparse
from collections.abc import Sequence

from lowmem.arguments import OptionParser
from lowmem.config_values import shown
from lowmem.errors import ConfigError
from lowmem.generation.batch import BATCH_SIZE
from lowmem.generation.settings import DEFAULTS, HELP, SETTINGS
from lowmem.sampling import PRESETS

MOST_DIGITS = 18  # of a step: below 64 bits


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Options by name; settings that were not given are None.

    Raises:
        ConfigError: unknown options, or ones that exclude each other.
    """
    parser = OptionParser("lowmem generate", "Write text with a model that lowmem trained.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory of the model")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help='text to continue; "" starts a new document, - reads it from standard input; given several times: several texts',
    )  # fmt: skip
    parser.add_argument("--prompts_file", metavar="FILE", help='prompts, one a line; of a .jsonl file the "prompt" of each object')
    parser.add_argument("--batch_size", type=int, metavar="N", help=f"most texts written at once (default {BATCH_SIZE})")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts until the input ends")
    parser.add_argument("--chat", action="store_true", help="a conversation; each --prompt is a turn of it, without one it asks for them")
    parser.add_argument("--system", default="", metavar="TEXT", help="with --chat: said to the model before the conversation")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text, and is not shown; may be repeated")
    parser.add_argument("--json", action="store_true", help="one JSON object a text, instead of text")
    parser.add_argument("--dry_run", action="store_true", help="print the memory it will take, write nothing")
    parser.add_argument("--force", action="store_true", help="start even if memory seems too small")
    parser.add_argument("--checkpoint", type=_checkpoint, default="latest", metavar="WHICH", help="latest (default), best, or a step")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--preset", choices=list(PRESETS), default="", help=f"values for several of the following: {_presets()}")
    for name, kind in SETTINGS.items():
        shown = "" if DEFAULTS[name] is None else f" (default {DEFAULTS[name]})"
        parser.add_argument(f"--{name}", type=kind, metavar="X", help=HELP[name] + shown)
    flags = parser.parse_args(list(argv))
    problem = _contradiction(flags)
    if problem:
        raise ConfigError(problem)
    return flags


def _contradiction(flags: argparse.Namespace) -> str:
    given = flags.prompt is not None or flags.prompts_file is not None
    several = len(flags.prompt or ()) > 1 or flags.prompts_file is not None
    if flags.interactive and flags.json:
        return "--interactive and --json exclude each other; drop one of them"
    if flags.interactive and flags.chat:
        return "--interactive and --chat exclude each other: --chat remembers what was said; drop one of them"
    if flags.interactive and several:
        return "--interactive takes one --prompt; drop the others"
    if flags.interactive and flags.prompt == ["-"]:
        return "--interactive reads prompts from standard input, so --prompt cannot be -; drop one of them"
    if (flags.prompt or []).count("-") > 1:
        return "--prompt - is given twice, standard input can be read once; drop one of them"
    if flags.chat and flags.json and not given:
        return "--chat with --json needs --prompt; add it, or drop --json"
    if flags.system and not flags.chat:
        return "--system is for --chat; add it, or put the text into the prompt"
    if flags.batch_size is not None and flags.batch_size < 1:
        return f"batch_size is {flags.batch_size}; allowed: 1 or more"
    if "" in flags.stop:
        return 'a stop string is ""; give at least one character, or leave --stop out'
    if not (given or flags.interactive or flags.chat or flags.dry_run):
        return '--prompt is missing; give --prompt TEXT ("" starts a new document), --prompt -, --prompts_file, --interactive or --chat'
    return ""


def _presets() -> str:
    return "; ".join(f"{name} ({', '.join(f'{key} {value}' for key, value in values.items())})" for name, values in PRESETS.items())


def _checkpoint(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if text.isdecimal() and len(text) <= MOST_DIGITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"found {shown(text)}; allowed: latest, best, or a step")

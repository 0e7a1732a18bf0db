"""The `generate` command: texts from a trained model, streamed, as JSON, or in a conversation."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowmem.cli.options import OptionParser
from lowmem.config.keys import shown
from lowmem.data.chat_template import ChatTemplate, has_chat_template, load_chat_template
from lowmem.engine.from_config import temporary_storage
from lowmem.engine.huggingface_files import sampling_values
from lowmem.engine.run_model import RunModel, load_run_model
from lowmem.generation import GenerationResult, generate, generate_batch
from lowmem.generation.chat import Chat, ChatWriter, converse, prompt_room
from lowmem.generation.context import PREFILL_TOKENS, beyond_training, chat_context, position_window
from lowmem.generation.sampling import PRESETS
from lowmem.generation.settings import DEFAULTS, HELP, SETTINGS, Settings, read_prompts
from lowmem.generation.texts import BATCH_SIZE
from lowmem.memory.allocator import fix_malloc_thresholds
from lowmem.planning.generation_memory import generation_memory, generation_refusal
from lowmem.planning.hardware import this_hardware
from lowmem.system.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, DataError, MemoryBudgetError, StoppedBySignal

MOST_DIGITS = 18  # of a step: below 64 bits


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Options by name; settings that were not given are None.

    Raises:
        ConfigError: unknown options, or ones that exclude each other.
    """
    parser = OptionParser("lowmem generate", "Write text with a model: of a lowmem run, of transformers, or with an adapter.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory, directory of transformers, or adapter of PEFT")
    parser.add_argument("--adapter", default="", metavar="DIR", help="an adapter of PEFT, in place of the one that --run has")
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
    parser.add_argument(
        "--weights_at", choices=("device", "host", "disk"), default="device",
        help="where the blocks' weights are; elsewhere they are fetched for each token (default device)",
    )  # fmt: skip
    parser.add_argument("--storage_dir", default="", metavar="DIR", help="with --weights_at=disk: of the scratch file (default --run)")
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
    if flags.storage_dir and flags.weights_at != "disk":
        return "--storage_dir is for --weights_at=disk; add it, or leave --storage_dir out"
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


__all__ = ["GenerationResult", "generate", "generate_main", "load_run_model"]


def generate_main(argv: Sequence[str]) -> int:
    """Run `lowmem generate`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        MemoryBudgetError: the texts will not fit the memory that is free.
        LowmemError: every other failure that a user can cause; the caller prints it and exits with its code.
    """
    flags = parse_flags(argv)
    from lowmem.system.devices import resolve_device

    settings = Settings(flags.preset, {name: getattr(flags, name) for name in SETTINGS})
    device = resolve_device(flags.device)
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in flags.prompt or ()]
    prompts += read_prompts(flags.prompts_file) if flags.prompts_file is not None else []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    if flags.weights_at == "host" and device.type == "cpu":
        raise ConfigError("--weights_at is host, but a CPU writes, whose weights are in host memory already; use disk")
    which = (flags.run, flags.checkpoint, device)
    adapter = {"adapter": flags.adapter} if flags.adapter else {}
    outline = load_run_model(*which, outline=True, **adapter)
    settings = _own_settings(outline, flags)
    fix_malloc_thresholds()  # the prediction is of a process that keeps what it uses
    _check_memory(outline, flags, prompts, settings.max_new_tokens, device.type)
    warn = _length_warning(outline)
    if not flags.chat:
        warn(max((len(outline.tokenizer.encode_prompt(prompt)) for prompt in prompts), default=0) + settings.max_new_tokens)
    if flags.dry_run:
        return 0
    template = _template(outline, flags.run) if flags.chat else None
    with temporary_storage(flags.weights_at, Path(flags.storage_dir or flags.run), device) as storage:
        elsewhere: dict[str, Any] = {**adapter, **({"storage": storage} if storage.streams else {})}
        run = load_run_model(flags.run, flags.checkpoint, device, **elsewhere)
        try:
            _write(run, flags, settings, prompts, template, warn)
        except KeyboardInterrupt as error:
            sys.stdout.write("\n")
            raise StoppedBySignal("generation stopped", EXIT_INTERRUPTED) from error
    return 0


def _own_settings(run: RunModel, flags: argparse.Namespace) -> Settings:
    """What was asked for; else what the model's generation_config.json says, as transformers does; else lowmem's defaults.

    Raises:
        CheckpointError: the file has values that cannot be.
    """
    own = {name: _number(value, name) for name, value in sampling_values(run.generation or {}).items()}
    try:
        Settings("", {}, own)
    except ConfigError as error:
        raise CheckpointError(f"the generation_config.json of {flags.run} cannot be used: {error}; mend it, or give --preset") from error
    return Settings(flags.preset, {name: getattr(flags, name) for name in SETTINGS}, own)


def _number(value: Any, name: str) -> Any:
    """A setting as it is read from text; what is no number is refused with its name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and SETTINGS[name](value) == value:
        return SETTINGS[name](value)
    raise CheckpointError(f"generation_config.json has {name} {value!r:.60}, expected a number; mend it")


def _template(run: RunModel, directory: str) -> ChatTemplate:
    folder = next((folder for folder in run.folders if has_chat_template(folder)), directory)
    return load_chat_template(folder, run.tokenizer)


def _length_warning(run: RunModel) -> Callable[[int], None]:
    """Takes the tokens of prompt and continuation; warns the first time that they are more than the run was trained on."""
    told = False

    def warn(tokens: int) -> None:
        nonlocal told
        if not told and (warning := beyond_training(run, tokens)):
            print(warning, file=sys.stderr)
            told = True

    return warn


def _write(
    run: RunModel,
    flags: argparse.Namespace,
    settings: Settings,
    prompts: list[str],
    template: ChatTemplate | None,
    warn: Callable[[int], None],
) -> None:
    if template is not None:
        _chat(run, flags, settings, prompts, template, warn)
    elif flags.interactive:

        def reply(line: str) -> None:
            warn(len(run.tokenizer.encode_prompt(line)) + settings.max_new_tokens)
            _stream(run, settings, line, flags.stop)

        what = "type a prompt, each is continued by itself"
        converse(settings, what, reply, {}, prompts[0] if prompts else None)
    elif len(prompts) == 1 and not flags.json:
        _show(prompts[0])
        _stream(run, settings, prompts[0], flags.stop)
    else:
        _batch(run, flags, settings, prompts)


def _batch(run: RunModel, flags: argparse.Namespace, settings: Settings, prompts: list[str]) -> None:
    """Texts of several prompts, shown in the order of the prompts as soon as those before are finished."""
    finished: dict[int, GenerationResult] = {}
    shown = 0

    def on_result(index: int, result: GenerationResult) -> None:
        nonlocal shown
        finished[index] = result
        while shown in finished:
            result = finished.pop(shown)
            if flags.json:
                _show(json.dumps(_as_json(run, settings, prompts[shown], result)) + "\n")
            else:
                _show(("\n" if shown else "") + prompts[shown] + result.text + "\n")
                _show_figures(run, result, f"text {shown + 1} of {len(prompts)}, ")
            shown += 1

    generate_batch(
        run.model, run.tokenizer, prompts, settings.options, settings.max_new_tokens,
        batch_size=flags.batch_size or BATCH_SIZE, on_result=on_result, stop=flags.stop, end_ids=run.end_ids,
    )  # fmt: skip


def _chat(
    run: RunModel,
    flags: argparse.Namespace,
    settings: Settings,
    messages: list[str],
    template: ChatTemplate,
    warn: Callable[[int], None],
) -> None:
    """A conversation: the turns that were given, or those of standard input."""
    room = chat_context(run.model)
    chat = Chat(template, run.tokenizer, prompt_room(room, settings.max_new_tokens), flags.system)
    writer = ChatWriter(run.model, run.tokenizer, room + settings.max_new_tokens, run.end_ids)
    told = False

    def reply(message: str) -> None:
        nonlocal told
        ids = chat.prompt(message)
        warn(len(ids) + settings.max_new_tokens)
        if chat.forgotten and not told:
            print(f"the context of {room} tokens is full: the oldest turns are forgotten", file=sys.stderr)
            told = True
        on_text = None if flags.json else _without_leading_space(_show)
        result = writer.answer(ids, settings.options, settings.max_new_tokens, [*chat.stop, *flags.stop], on_text)
        if flags.json:
            _show(json.dumps(_as_json(run, settings, message, result)) + "\n")
        else:
            _show("\n")
            _show_figures(run, result)
        chat.add(message, result.text)

    def reset() -> str:
        chat.reset()
        return "the conversation begins anew"

    if messages:
        for message in messages:
            reply(message)
    else:
        converse(settings, "say something", reply, {"/reset": reset})


def _stream(run: RunModel, settings: Settings, prompt: str, stop: Sequence[str]) -> None:
    """Text on stdout as it is written, one line of figures on stderr."""
    result = generate(
        run.model, run.tokenizer, prompt, settings.options, settings.max_new_tokens, on_text=_show, stop=stop, end_ids=run.end_ids
    )
    _show("\n")
    _show_figures(run, result)


def _without_leading_space(write: Callable[[str], None]) -> Callable[[str], None]:
    started = False

    def write_on(text: str) -> None:
        nonlocal started
        text = text if started else text.lstrip()
        started = started or bool(text)
        write(text)

    return write_on


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_figures(run: RunModel, result: GenerationResult, which: str = "") -> None:
    slides = f", window slid {result.window_slides} times" if result.window_slides else ""
    print(
        f"[{which}step {run.step}, {len(result.token_ids)} tokens, {_speed(result):.1f} tok/s, stopped by {result.stop_reason}, "
        f"seed {result.seed}{slides}]",
        file=sys.stderr,
    )


def _as_json(run: RunModel, settings: Settings, prompt: str, result: GenerationResult) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": result.text,
        "stop_reason": result.stop_reason,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "window_slides": result.window_slides,
        "seconds": round(result.seconds, 6),
        "tokens_per_s": round(_speed(result), 2),
        "step": run.step,
        "checkpoint": str(run.path),
        "device": str(next(run.model.parameters()).device),
        "max_new_tokens": settings.max_new_tokens,
        "sampling": asdict(replace(settings.options, seed=result.seed)),
    }


def _speed(result: GenerationResult) -> float:
    return len(result.token_ids) / result.seconds if result.seconds else 0.0


def _read_stdin() -> str:
    """The whole of stdin as a prompt, less one final newline, as a shell's $(...) does it.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _check_memory(run: RunModel, flags: argparse.Namespace, prompts: Sequence[str], max_new_tokens: int, device: str) -> None:
    """Refuse what will not fit, before the weights are read; with --dry_run print what it will take.

    Args:
        run: an outline.
        flags: dry_run, json, force, chat and batch_size of `lowmem generate`.
        prompts: none are texts as long as those of training, `batch_size` of them.
        device: "cpu" or "cuda".
    Raises:
        MemoryBudgetError: it will not fit; the message has the remedy. Never with --force, unless it is a dry run.
    """
    context = max((len(run.tokenizer.encode_prompt(prompt)) for prompt in prompts), default=chat_context(run.model)) + max_new_tokens
    if flags.chat:
        context = chat_context(run.model) + max_new_tokens
    window = position_window(run.model)
    context = min(context, window) if window else context
    alone = flags.chat or flags.interactive
    batch_size = 1 if alone else min(flags.batch_size or BATCH_SIZE, len(prompts)) if prompts else flags.batch_size or 1
    memory = generation_memory(run.model, batch_size, context, PREFILL_TOKENS, device, flags.weights_at)
    free = this_hardware()
    problem = "" if flags.force and not flags.dry_run else generation_refusal(run.model, memory, free, PREFILL_TOKENS)
    if flags.dry_run:
        available = {"ram_bytes": free.ram_bytes, "vram_bytes": free.vram_bytes}
        print(json.dumps({"predicted": memory.as_dict(), "free": available, "fits": not problem}) if flags.json else memory)
    if problem:
        raise MemoryBudgetError(problem)

"""The `generate` command: text from a trained model, streamed, as JSON, or in a conversation with prompts."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from lowmem.arguments import OptionParser
from lowmem.errors import EXIT_INTERRUPTED, ConfigError, StoppedBySignal
from lowmem.generation import GenerationResult, generate
from lowmem.run_model import RunModel, load_run_model
from lowmem.sampling import SamplingOptions

__all__ = ["GenerationResult", "generate", "generate_main", "load_run_model"]

_SETTINGS: dict[str, type] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "seed": int, "max_new_tokens": int,
}  # fmt: skip
_HELP = {
    "temperature": "logits are divided by it; 0 always takes the most likely token",
    "top_k": "keep only the k most likely tokens; 0 keeps all",
    "top_p": "keep the most likely tokens that together reach this probability; 1 keeps all",
    "min_p": "drop tokens less likely than this share of the most likely one; 0 keeps all",
    "repetition_penalty": "above 1 makes tokens that occurred less likely",
    "seed": "of the random draws; default: a fresh one, which is reported",
    "max_new_tokens": "most tokens to write",
}
_MAX_NEW_TOKENS = 200
_INTERACTIVE_HELP = "type a prompt; /set NAME VALUE changes one of {names}; /show tells them; Ctrl-C stops a text, Ctrl-D ends"


def generate_main(argv: Sequence[str]) -> int:
    """Run `lowmem generate`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    flags = _parse(argv)
    from lowmem.devices import resolve_device

    settings = {name: getattr(flags, name) for name in _SETTINGS}
    max_new_tokens, options = _split(settings)
    prompt = _read_stdin() if flags.prompt == "-" else flags.prompt
    run = load_run_model(flags.run, flags.checkpoint, resolve_device(flags.device))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    try:
        if flags.interactive:
            _converse(run, settings, prompt)
        elif flags.json:
            result = generate(run.model, run.tokenizer, prompt, options, max_new_tokens)
            print(json.dumps(_as_json(run, prompt, options, max_new_tokens, result)))
        else:
            _print_text(run, prompt, options, max_new_tokens, echo=True)
    except KeyboardInterrupt as error:
        sys.stdout.write("\n")
        raise StoppedBySignal("generation stopped", EXIT_INTERRUPTED) from error
    return 0


def _print_text(run: RunModel, prompt: str, options: SamplingOptions, max_new_tokens: int, *, echo: bool) -> None:
    """Text on stdout as it is written, one line of figures on stderr."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if echo:
        write(prompt)
    result = generate(run.model, run.tokenizer, prompt, options, max_new_tokens, on_text=write)
    write("\n")
    slides = f", window slid {result.window_slides} times" if result.window_slides else ""
    print(
        f"[step {run.step}, {len(result.token_ids)} tokens, {_speed(result):.1f} tok/s, stopped by {result.stop_reason}, "
        f"seed {result.seed}{slides}]",
        file=sys.stderr,
    )


def _converse(run: RunModel, settings: dict[str, Any], prompt: str | None) -> None:
    """Prompts until the input ends; each is continued on its own, without the ones before."""
    print(_INTERACTIVE_HELP.format(names=", ".join(_SETTINGS)), file=sys.stderr)
    while True:
        if prompt is None:
            sys.stderr.write("> ")
            sys.stderr.flush()
            try:
                prompt = input()
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:  # at the prompt it only clears the line
                sys.stderr.write("\n")
                continue
        try:
            if prompt.startswith("/"):
                print(_command(prompt, settings), file=sys.stderr)
            else:
                max_new_tokens, options = _split(settings)
                _print_text(run, prompt, options, max_new_tokens, echo=False)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except ConfigError as error:
            print(error, file=sys.stderr)
        prompt = None


def _command(line: str, settings: dict[str, Any]) -> str:
    """Carry out a line that starts with a slash; returns the answer.

    Raises:
        ConfigError: an unknown command, setting or value; the settings stay as they were.
    """
    words = line.split()
    if words == ["/show"]:
        return "  ".join(f"{name}={value}" for name, value in settings.items())
    if len(words) != 3 or words[0] != "/set" or words[1] not in _SETTINGS:
        raise ConfigError(_INTERACTIVE_HELP.format(names=", ".join(_SETTINGS)))
    name, text = words[1:]
    try:
        value = _SETTINGS[name](text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; expected a {'number' if _SETTINGS[name] is float else 'whole number'}") from error
    _split({**settings, name: value})
    settings[name] = value
    return f"{name}={value}"


def _split(settings: dict[str, Any]) -> tuple[int, SamplingOptions]:
    """Checked settings."""
    if settings["max_new_tokens"] < 1:
        raise ConfigError(f"max_new_tokens is {settings['max_new_tokens']}; allowed: 1 or more")
    return settings["max_new_tokens"], SamplingOptions(**{item.name: settings[item.name] for item in fields(SamplingOptions)})


def _as_json(run: RunModel, prompt: str, options: SamplingOptions, max_new_tokens: int, result: GenerationResult) -> dict[str, Any]:
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
        "max_new_tokens": max_new_tokens,
        "sampling": asdict(replace(options, seed=result.seed)),
    }


def _speed(result: GenerationResult) -> float:
    return len(result.token_ids) / result.seconds if result.seconds else 0.0


def _read_stdin() -> str:
    """The whole of stdin as a prompt, less one final newline, as a shell's $(...) does it."""
    return sys.stdin.read().removesuffix("\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser("lowmem generate", "Write text with a model that lowmem trained.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory of the model")
    parser.add_argument("--prompt", metavar="TEXT", help='text to continue; "" starts a new document, - reads it from standard input')
    parser.add_argument("--interactive", action="store_true", help="ask for prompts until the input ends")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--checkpoint", type=_checkpoint, default="latest", metavar="WHICH", help="latest (default), best, or a step")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    defaults = {**asdict(SamplingOptions()), "max_new_tokens": _MAX_NEW_TOKENS}
    for name, kind in _SETTINGS.items():
        shown = "" if defaults[name] is None else f" (default {defaults[name]})"
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], metavar="X", help=_HELP[name] + shown)
    flags = parser.parse_args(list(argv))
    if flags.interactive and flags.json:
        raise ConfigError("--interactive and --json exclude each other; drop one of them")
    if flags.interactive and flags.prompt == "-":
        raise ConfigError("--interactive reads prompts from standard input, so --prompt cannot be -; drop one of them")
    if flags.prompt is None and not flags.interactive:
        raise ConfigError('--prompt is missing; give --prompt TEXT ("" starts a new document), --prompt - or --interactive')
    return flags


def _checkpoint(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"found {text!r}; allowed: latest, best, or a step")

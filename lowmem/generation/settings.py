"""What a person can set about the texts, and the prompts that a file has."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lowmem.generation.sampling import PRESETS, SamplingOptions
from lowmem.system.errors import ConfigError, DataError
from lowmem.system.files import distinct_keys
from lowmem.system.units import format_bytes

SETTINGS: dict[str, type] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "seed": int, "max_new_tokens": int,
}  # fmt: skip
"""Every setting and how its text is read."""
HELP = {
    "temperature": "logits are divided by it; 0 always takes the most likely token",
    "top_k": "keep only the k most likely tokens; 0 keeps all",
    "top_p": "keep the most likely tokens that together reach this probability; 1 keeps all",
    "min_p": "drop tokens less likely than this share of the most likely one; 0 keeps all",
    "repetition_penalty": "above 1 makes tokens that occurred, also in the prompt, less likely",
    "presence_penalty": "above 0 makes tokens that were written less likely, -2 to 2",
    "frequency_penalty": "above 0 makes tokens less likely each time they are written, -2 to 2",
    "seed": "of the random draws; default: a fresh one, which is reported",
    "max_new_tokens": "most tokens to write",
}
MOST_NEW_TOKENS = 2**31 - 1  # far beyond what fits anywhere, so that its memory can still be computed and refused
DEFAULTS: dict[str, Any] = {**asdict(SamplingOptions()), "max_new_tokens": 200}


class Settings:
    """Checked values of all of `SETTINGS`.

    Args:
        preset: a name in `PRESETS`; "" for the defaults.
        given: what was asked for explicitly; it wins over the preset, and None is "not asked for".
        own: what the model's authors recommend, in place of the defaults where no preset is asked for.
    Raises:
        ConfigError: values that cannot be; the message lists them.
    """

    def __init__(self, preset: str = "", given: Mapping[str, Any] | None = None, own: Mapping[str, Any] | None = None):
        explicit = {name: value for name, value in (given or {}).items() if value is not None}
        self._values = _checked({**DEFAULTS, **(PRESETS[preset] if preset else own or {}), **explicit})

    @property
    def options(self) -> SamplingOptions:
        """How tokens are drawn."""
        return SamplingOptions(**{item.name: self._values[item.name] for item in fields(SamplingOptions)})

    @property
    def max_new_tokens(self) -> int:
        """Most tokens to write."""
        return self._values["max_new_tokens"]

    def change(self, name: str, text: str) -> str:
        """Set one value from text; returns it as "name=value".

        Raises:
            ConfigError: an unknown name or a value that cannot be; the settings stay as they were.
        """
        if name not in SETTINGS:
            raise ConfigError(f"{name!r} is no setting; known: {', '.join(SETTINGS)}")
        try:
            value = SETTINGS[name](text)
        except ValueError as error:
            raise ConfigError(f"{name} is {text!r}; expected a {'number' if SETTINGS[name] is float else 'whole number'}") from error
        self._values = _checked({**self._values, name: value})
        return f"{name}={value}"

    def __str__(self) -> str:
        return "  ".join(f"{name}={self._values[name]}" for name in SETTINGS)


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    if not 1 <= values["max_new_tokens"] <= MOST_NEW_TOKENS:
        raise ConfigError(f"max_new_tokens is {values['max_new_tokens']}; allowed: 1 to {MOST_NEW_TOKENS}")
    SamplingOptions(**{item.name: values[item.name] for item in fields(SamplingOptions)})
    return values


LARGEST_FILE = 1 << 28  # bytes; it is read whole


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl file, whose objects have a "prompt"; empty lines do not count.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line is no such object.
    """
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise DataError(f"--prompts_file={path} has {format_bytes(size)}, allowed: {format_bytes(LARGEST_FILE)}; divide it")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # \u2028 and the like end no line
    except OSError as error:
        raise DataError(f"--prompts_file={path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts_file={path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    read = _from_json if path.endswith(".jsonl") else lambda line, _: line.rstrip("\r")
    prompts = [read(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"--prompts_file={path} holds no prompt; write one a line")
    return prompts


def _from_json(line: str, place: str) -> str:
    try:
        value = json.loads(line, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: no JSON ({error}); a .jsonl file has one object a line") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f'{place}: no object with a text as "prompt"; write {{"prompt": "..."}}')
    return prompt

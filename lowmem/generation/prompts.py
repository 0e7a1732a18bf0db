"""Prompts from a file: a line each, or JSON lines."""

import json
from pathlib import Path

from lowmem.data.json_lines import distinct_keys
from lowmem.errors import DataError
from lowmem.units import format_bytes

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

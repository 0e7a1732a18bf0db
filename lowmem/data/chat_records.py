"""Conversations from chat records in the usual shapes.

    {"messages": [{"role": "user", "content": "..."}, ...]}         also under "conversations", also with "from" and "value"
    {"prompt": "...", "response": "..."}                            or "completion"
    {"instruction": "...", "input": "...", "output": "..."}         "input" may be empty or missing
    {"text": "[INST] question [/INST] answer [INST] ..."}           or such text as it is, one conversation a line

A system text may stand in "system" of the middle two, or within <<SYS>> and <</SYS>> of the first [INST].
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.compression import COMPRESSIONS, open_compressed, strip_compression
from lowmem.data.text_files import file_format
from lowmem.data.utf8 import Utf8Reader
from lowmem.errors import DataError

Message = dict[str, str]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
SHAPES = "messages, prompt and response, instruction and output, or text with [INST]"
_ANSWERS = ("response", "completion", "output", "answer")
_QUESTIONS = ("prompt", "instruction", "question")
_SYSTEM = re.compile(r"^\s*<<SYS>>(.*?)<</SYS>>\s*", re.DOTALL)
_END = re.compile(r"</?s>")
_FORMATS = (".json", ".jsonl", ".txt", ".parquet")


def read_conversations(path: str | Path) -> Iterator[list[Message]]:
    """The conversations of a file, in its order; blank lines are passed over.

    Args:
        path: .json (a list of records), .jsonl (one a line), .txt (one [INST] text a line) or .parquet; the first three also compressed.
    Raises:
        DataError: the file cannot be read, or a record has none of the shapes; the message names file and record.
    Memory: one record; a .json file is read as a whole.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise DataError(f"no file {path}; check the path, which is relative to the working directory")
    for number, record in _records(place):
        yield parse_record(record, f"{path}:{number}")


def chat_format(path: Path) -> str:
    """.json, .jsonl, .txt or .parquet, whatever the compression; "" for anything else."""
    suffix = Path(strip_compression(path)[0]).suffix.lower()
    return ".json" if suffix == ".json" else file_format(path)


def parse_record(record: Any, place: str) -> list[Message]:
    """The messages of one record.

    Args:
        place: file and number, for the message.
    Returns:
        Messages with "role" (system, user, assistant) and "content"; at least one is the assistant's.
    Raises:
        DataError: it has none of the shapes, or nothing is said by the assistant.
    """
    if isinstance(record, str):
        messages = _inst_messages(record, place)
    elif isinstance(record, dict):
        messages = _object_messages(record, place)
    else:
        raise DataError(f"{place}: found {type(record).__name__}, expected an object with {SHAPES}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}: the assistant says nothing, so there is nothing to learn; remove the record, or add its answer")
    return messages


def _object_messages(record: dict, place: str) -> list[Message]:
    turns = record.get("messages") or record.get("conversations") or record.get("conversation")
    if turns:
        return _listed_messages(turns, place)
    question, answer = (next((name for name in names if name in record), "") for names in (_QUESTIONS, _ANSWERS))
    if question and answer:
        asked = _text(record, question, place)
        if record.get("input"):
            asked += "\n\n" + _text(record, "input", place)
        system = [{"role": "system", "content": _text(record, "system", place)}] if record.get("system") else []
        return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": _text(record, answer, place)}]
    if "text" in record:
        return _inst_messages(_text(record, "text", place), place)
    found = ", ".join(map(repr, record)) or "no fields"
    raise DataError(f"{place}: found the fields {found}, expected {SHAPES}")


def _listed_messages(turns: Any, place: str) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{place}: messages is {type(turns).__name__}, expected a list of objects with role and content")
    messages = []
    for number, turn in enumerate(turns):
        role, key = (
            (turn.get("role", turn.get("from")), "content" if "content" in turn else "value") if isinstance(turn, dict) else ("", "")
        )
        if role not in ROLES:
            raise DataError(f"{place}: message {number} has the role {role!r}, allowed: {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _text(turn, key, f"{place}: message {number}")})
    return messages


def _inst_messages(text: str, place: str) -> list[Message]:
    """[INST] user [/INST] assistant, again and again; <s> and </s> are passed over."""
    before, *turns = _END.sub("", text).split("[INST]")
    if before.strip() or not turns:
        raise DataError(f"{place}: the text begins with {text[:40]!r}, expected [INST] question [/INST] answer")
    messages: list[Message] = []
    for turn in turns:
        asked, end, answered = turn.partition("[/INST]")
        if not end:
            raise DataError(f"{place}: an [INST] without its [/INST]: {turn[:40]!r}; add it")
        system = _SYSTEM.match(asked)
        if system and not messages:
            messages.append({"role": "system", "content": system[1].strip()})
            asked = asked[system.end() :]
        messages.append({"role": "user", "content": asked.strip()})
        if answered.strip():
            messages.append({"role": "assistant", "content": answered.strip()})
    return messages


def _text(record: dict, name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} is {type(value).__name__}, expected text")
    return value


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    kind = chat_format(path)
    if kind == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif kind == ".json":
        yield from enumerate(_json_list(path), start=1)
    elif kind in (".jsonl", ".txt"):
        with open_compressed(path) as (stream, _):
            for number, line in enumerate(stream, start=1):
                text = _decode(line, path, number).strip().removeprefix("\ufeff")
                if text:
                    yield number, text if kind == ".txt" else _parse(text, f"{path}:{number}", "one JSON object a line")
    else:
        raise DataError(
            f"{path} has a format that holds no chat records; allowed: {' '.join(_FORMATS)}, also with {' '.join(COMPRESSIONS)}"
        )


def _json_list(path: Path) -> list:
    with open_compressed(path) as (stream, _):
        records = _parse(_decode(stream.read(), path, 1), str(path), "a list of records; one record a line is .jsonl")
    if not isinstance(records, list):
        raise DataError(f"{path} holds {type(records).__name__}, expected a list of records; one record a line is .jsonl")
    return records


def _parquet_rows(path: Path) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow; pip install 'lowmem[hub]'") from error
    try:
        with ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=256):
                yield from rows.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); restore the file") from error


def _decode(data: bytes, path: Path, number: int) -> str:
    return Utf8Reader(str(path), "fail", first_line=number).decode(data, final=True)


def _parse(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: malformed JSON ({error}); expected {expected}") from error

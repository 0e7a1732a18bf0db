"""Conversations from chat records in the usual shapes.

    {"messages": [{"role": "user", "content": "..."}, ...]}         also under "conversations", also with "from" and "value"
    {"prompt": "...", "response": "..."}                            or "completion"; each a text or, as in TRL, a list of messages
    {"instruction": "...", "input": "...", "output": "..."}         "input" (or "context") may be empty or missing
    {"text": "[INST] question [/INST] answer [INST] ..."}           or such text as it is, one conversation a line

Beside them may stand "system" (a text may have it within <<SYS>> and <</SYS>> of the first [INST]), "history" (messages, or pairs of
earlier questions and answers, beside a question and an answer), "tools" and "documents" (given to the template), and "weight" or
"train". A message may have the last two, "reasoning_content" (or "reasoning", "thinking"), "tool_calls", and whatever else its template
writes. A weight is 1 or 0, "train" true or false: an answer with 0 is read and not learned, and so is one in a prompt of messages unless
it has 1. Nulls are as missing. What may be content, and is neither used nor said by what is used, is refused; so are preferences, which
are not learned.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lowmem.data.decoding import COMPRESSIONS, DecodeErrors, Utf8Reader, check_encoding, open_compressed, strip_compression, without_marks
from lowmem.data.records import MAX_LINE_BYTES, value_kind
from lowmem.data.text import file_format
from lowmem.system.errors import DataError
from lowmem.system.files import distinct_keys
from lowmem.system.units import format_bytes

Message = dict[str, Any]
_Turns = tuple[list[Message], list[float | None], list[str]]  # messages, their weights, and what the template has to write
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool",
}  # fmt: skip
SHAPES = "messages, prompt and response, instruction and output, or text with [INST]"
REASONING = ("reasoning_content", "reasoning", "thinking")
CONVERT = "convert it to UTF-8, as by iconv -t UTF-8"
_LISTS = ("messages", "conversations", "conversation")
_ANSWERS = ("response", "completion", "output", "answer")
_QUESTIONS = ("prompt", "instruction", "question")
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "instruction_system")
_HISTORIES = (
    "history", "chat_history", "conversation_history", "dialog_history", "dialogue_history", "message_history", "past", "past_messages",
    "previous_messages",
)  # fmt: skip
_FOR_TEMPLATE = ("tools", "documents")
_WEIGHTS = ("weight", "train")
_OTHER_WEIGHTS = ("loss", "loss_mask", "loss_scale", "loss_weight", "mask", "masked", "trainable", "training")
_THOUGHTS = ("chain_of_thought", "cot", "rationale", "reasoning_trace", "thought", "thoughts")
# fields that are content where they hold more than a number, and for which there is no use here
_OTHER_CONTENT = (
    "background", "chat", "contexts", "dialog", "dialogs", "dialogue", "dialogues", "knowledge", "passage", "passages", "turns",
    "utterances", *_THOUGHTS,
)  # fmt: skip
_ASIDES = (*_LISTS, *_QUESTIONS, *_ANSWERS, *_INPUTS, *_HISTORIES, *REASONING, "text", *_OTHER_CONTENT)
_LABEL = "label"  # true or false: whether an answer is wanted; a number is a class
_PREFERENCES = ("rejected", "chosen", "rejected_response", "chosen_response")
# fields of a record that are content, and for which there is no use here
_UNSUPPORTED = ("functions", "images", "image", "videos", "video", "audio", "audios")
# fields of a message that name it, not what is said; a template may write them
_LABELS = frozenset({
    "author", "avatar", "category", "created", "created_at", "create_time", "date", "emoji", "end_turn", "finish_reason", "hash", "id",
    "index", "lang", "language", "message_id", "meta", "metadata", "model", "model_name", "name", "parent", "parent_id", "quality", "rank",
    "source", "status", "time", "timestamp", "token_ids", "tool_call_id", "turn", "turn_id", "type", "update_time", "url", "user_id",
    "uuid",
})  # fmt: skip
_SYSTEM = re.compile(r"^\s*<<SYS>>(.*?)<</SYS>>\s*", re.DOTALL)
_PART = '{"type": "text", "text": "..."}'
_END = re.compile(r"</?s>")
# whatever is looked at in a record; a table may have other columns, which need not be read
FIELDS = frozenset({
    *_ASIDES, *_SYSTEMS, *_FOR_TEMPLATE, *_WEIGHTS, *_OTHER_WEIGHTS, *_UNSUPPORTED, *_PREFERENCES, _LABEL,
})  # fmt: skip
CHAT_FORMATS = f".json .jsonl .txt .parquet, also with {' '.join(COMPRESSIONS)}"
# lone surrogates, and the noncharacters that mark places in a rendered conversation
_NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")
_MAX_DIGITS = 4300
_SPACE = re.compile("[ \t\r\n\ufeff]*")
_BLOCK_BYTES = 64 * 1024
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Conversation:
    """What one record says.

    Attributes:
        messages: with "role" (system, user, assistant, tool), "content", and what else the record gives for the template.
        place: file and record, for messages to people.
        untrained: positions of answers that are read but not learned.
        extras: tools and documents, where the record has them.
        needed: fields of messages, and of `extras`, that the template has to write, or content is lost.
    """

    messages: list[Message]
    place: str = ""
    untrained: frozenset[int] = frozenset()
    extras: Mapping[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()


def read_conversations(path: str | Path, decode_errors: DecodeErrors = "fail", remedy: str = CONVERT) -> Iterator[Conversation]:
    """The conversations of a file, in its order; blank lines are passed over.

    Args:
        path: .json (a list of records), .jsonl (one a line), .txt (one [INST] text a line) or .parquet; the first three also compressed.
        decode_errors: what becomes of bytes that are not UTF-8 and of lone surrogates.
        remedy: for them, told where they are refused.
    Raises:
        DataError: the file cannot be read, or a record has none of the shapes; the message names file and record.
    Memory: one record, at most 64 MiB of it; of parquet 256 rows.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise DataError(f"no file {path}; check the path, which is relative to the working directory")
    for number, record in _records(place, decode_errors, remedy):
        yield parse_record(record, f"{path}:{number}", decode_errors, remedy)


def chat_format(path: Path) -> str:
    """.json, .jsonl, .txt or .parquet, whatever the compression; "" for anything else."""
    suffix = Path(strip_compression(path)[0]).suffix.lower()
    return ".json" if suffix == ".json" else file_format(path)


def parse_record(record: Any, place: str, decode_errors: DecodeErrors = "fail", remedy: str = CONVERT) -> Conversation:
    """The conversation of one record.

    Args:
        place: file and number, for the message.
    Returns:
        At least one of its messages is the assistant's.
    Raises:
        DataError: it has none of the shapes, says something that would be lost, or nothing is said by the assistant.
    """
    try:
        record = _clean(record, place, decode_errors, remedy)
        if isinstance(record, str):
            conversation = Conversation(_inst_messages(record, place), place)
        elif isinstance(record, dict):
            conversation = _object_conversation({key: value for key, value in record.items() if value is not None}, place)
        else:
            raise DataError(f"{place}: found {value_kind(record)}, expected an object with {SHAPES}")
    except RecursionError as error:
        raise DataError(f"{place}: the record is nested too deeply; remove what is no conversation") from error
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise DataError(f"{place}: the assistant says nothing, so there is nothing to learn; remove the record, or add its answer")
    return conversation


def without_nulls(value: Any) -> Any:
    """The value less the nulls of its objects: a table has them wherever another row has something."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _object_conversation(record: dict[str, Any], place: str) -> Conversation:
    _refuse_unusable(record, place)
    weights: list[float | None] = []
    needed: list[str] = []
    if listed := next((name for name in _LISTS if record.get(name)), None):
        if others := [name for name in _LISTS if _holds(record, name) and record[name] != record[listed]]:
            raise DataError(f"{place}: the record has both {listed!r} and {others[0]!r}; keep one of them")
        used = [listed]
        messages, weights, needed = _listed_messages(record[listed], place)
    elif (question := _only(record, _QUESTIONS, place, empty=True)) and (answer := _only(record, _ANSWERS, place, empty=True)):
        (messages, weights, needed), used = _question_and_answer(record, question, answer, place)
    elif "text" in record:
        used = ["text"]
        messages = _inst_messages(_text(record["text"], "'text'", place), place)
    else:
        raise _no_shape(record, place)
    _refuse_lost(record, used, messages, place)
    if system := _only(record, _SYSTEMS, place):
        messages, weights = _with_system(messages, weights, _text(record[system], repr(system), place), system, place)
    extras = {name: items for name in _FOR_TEMPLATE if _holds(record, name) and (items := _for_template(record[name], name, place))}
    whole = _weight(record, place, None)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    untrained = answers if whole == 0 else [index for index in answers if weights and weights[index] == 0]
    return Conversation(messages, place, frozenset(untrained), extras, (*needed, *extras))


def _no_shape(record: dict[str, Any], place: str) -> DataError:
    empty = [name for name in _LISTS if name in record]
    if empty:
        return DataError(f"{place}: {empty[0]!r} holds no message; remove the record, or add what was said")
    return DataError(f"{place}: found the fields {', '.join(map(repr, record)) or 'none'}, expected {SHAPES}")


def _refuse_unusable(record: dict[str, Any], place: str) -> None:
    """Refuse fields that are of no use here whatever stands beside them."""
    if found := next((name for name in _PREFERENCES if _holds(record, name)), None):
        raise DataError(
            f"{place}: the record has {found!r}, and preferences are not learned; give the chosen conversation as messages, and remove "
            "'chosen' and 'rejected'"
        )
    unusable = [name for name in _UNSUPPORTED if _holds(record, name)]
    if unusable := [*unusable, *(name for name in (*_OTHER_WEIGHTS, _LABEL) if isinstance(record.get(name), bool))]:
        raise DataError(f"{place}: the record has {unusable[0]!r}, which cannot be used; {_remedy(unusable[0])}")


def _refuse_lost(record: dict[str, Any], used: Sequence[str], messages: Sequence[Message], place: str) -> None:
    """Refuse fields that say what no message says: many data sets have the same conversation in several shapes.

    Args:
        used: fields that the messages were made of.
    """
    given = [text for name in used for text in _leaves(record[name]) if text is not None]
    said = {*given, *(message["content"].strip() for message in messages)}
    for name in _ASIDES:
        value = record.get(name)
        if name in used or not _holds(record, name) or (name in _OTHER_CONTENT and isinstance(value, int | float)):
            continue
        # a text may be the whole conversation as a template wrote it
        if said.issuperset(_leaves(value)) or (name == "text" and isinstance(value, str) and all(text in value for text in given)):
            continue
        remedy = "name it 'reasoning_content', or remove it" if name in _THOUGHTS else "make it a message, or remove it"
        raise DataError(f"{place}: the record has {name!r} beside {used[0]!r}, which would be lost; {remedy}")


def _leaves(value: Any) -> Iterator[str | None]:
    """The texts of a field, of its messages and of its lists; None for anything else."""
    if (text := _joined(value)) is not None:
        yield text.strip()
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict) and (held := [value[name] for name in ("content", "value", *REASONING) if _holds(value, name)]):
        yield from _leaves(held)
    else:
        yield None


def _question_and_answer(record: dict[str, Any], question: str, answer: str, place: str) -> tuple[_Turns, list[str]]:
    """What is said, and the fields that it was made of."""
    used = [question, answer]
    asked, asked_weights, needed = _side(record, question, "user", place)
    # as in TRL: of a prompt nothing is learned unless it says so
    asked_weights = [0.0 if weight is None else weight for weight in asked_weights]
    if (given := _only(record, _INPUTS, place)) and not _is_turns(record[question]):
        asked[0]["content"] += "\n\n" + _text(record[given], repr(given), place)
        used.append(given)
    answered, answered_weights, more = _side(record, answer, "assistant", place)
    if not any(message["role"] == "assistant" for message in answered):
        raise DataError(f"{place}: {answer!r} has no message of the assistant's; remove the record, or add its answer")
    if (reasoning := _only(record, REASONING, place)) and not _is_turns(record[answer]):
        answered[0]["reasoning_content"] = _text(record[reasoning], repr(reasoning), place)
        more = ["reasoning_content"]
        used.append(reasoning)
    before: _Turns = ([], [], [])
    if history := _only(record, _HISTORIES, place):
        before = _history(record[history], history, place)
        used.append(history)
    messages = [*before[0], *asked, *answered]
    return (messages, [*before[1], *asked_weights, *answered_weights], list(dict.fromkeys([*before[2], *needed, *more]))), used


def _is_turns(value: Any) -> bool:
    """Whether a field is a list of messages, not a text or its parts."""
    return isinstance(value, list) and any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _side(record: dict[str, Any], name: str, role: str, place: str) -> _Turns:
    """What a field says: a text of `role`'s, or messages."""
    if _is_turns(record[name]):
        return _listed_messages(record[name], f"{place}: {name!r}")
    return [{"role": role, "content": _text(record[name], repr(name), place)}], [None], []


def _history(turns: Any, name: str, place: str) -> _Turns:
    if _is_turns(turns):
        return _listed_messages(turns, f"{place}: {name!r}")
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError(f"{place}: {name!r} is no list of pairs [question, answer] or of messages; write it so, or use messages")
    messages = [
        {"role": role, "content": _text(text, f"{name!r} {number}", place)}
        for number, turn in enumerate(turns)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return messages, [None] * len(messages), []


def _with_system(
    messages: list[Message], weights: list[float | None], system: str, name: str, place: str
) -> tuple[list[Message], list[float | None]]:
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise DataError(f"{place}: the record's {name!r} is not that of its first message; keep one of them")
        return messages, weights
    return [{"role": "system", "content": system}, *messages], [None, *weights] if weights else weights


def _listed_messages(turns: Any, place: str) -> _Turns:
    if not isinstance(turns, list):
        raise DataError(f"{place}: messages is {value_kind(turns)}, expected a list of objects with role and content")
    messages: list[Message] = []
    weights: list[float | None] = []
    needed: dict[str, None] = {}
    for number, given in enumerate(turns):
        where = f"{place}: message {number}"
        if not isinstance(given, dict):
            raise DataError(f"{where} is {value_kind(given)}, expected an object with role and content")
        turn = {key: value for key, value in given.items() if value is not None}
        messages.append(_message(turn, where))
        weights.append(_weight(turn, where, messages[-1]["role"]))
        needed |= dict.fromkeys(_needed(messages[-1], where))
    return messages, weights, list(needed)


def _message(turn: dict[str, Any], where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise DataError(f"{where} has no role, allowed: {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} has the role {_shown(role)}, allowed: {', '.join(ROLES)}")
    if "content" in turn and "value" in turn and _joined(turn["content"]) != _joined(turn["value"]):
        raise DataError(f"{where} has both 'content' and 'value'; keep one of them")
    key = "value" if "value" in turn and "content" not in turn else "content"
    calls = turn.get("tool_calls")
    content = "" if key not in turn and calls else _text(turn.get(key), repr(key), where)
    rest = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value", *_WEIGHTS)}
    reasoning = next((rest[name] for name in REASONING if rest.get(name) not in (None, "")), None)
    if reasoning is not None:
        rest |= {"reasoning_content": reasoning} | ({} if "thinking" in rest else {"thinking": reasoning})
    return {"role": ROLES[role], "content": content, **rest}


def _needed(message: Message, where: str) -> Iterator[str]:
    """Fields of a message that hold content."""
    for name, value in message.items():
        if name in _OTHER_WEIGHTS and not isinstance(value, str):
            raise DataError(f"{where} has {name!r}, which cannot be used; {_remedy(name)}")
        if name in REASONING:
            if value != "" and not isinstance(value, str):
                raise DataError(f"{where}: {name!r} is {value_kind(value)}, expected text")
            if value != "":
                yield "reasoning_content"
        elif name not in ("role", "content") and name not in _LABELS and isinstance(value, str | list | dict) and value:
            yield name


def _weight(record: dict[str, Any], place: str, role: str | None) -> float | None:
    """0 or 1; None where nothing is said.

    Args:
        role: of the message; None for a whole record.
    """
    found = {name: record[name] for name in _WEIGHTS if name in record}
    for name, value in found.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{place} has {name!r}: {_shown(value)}; allowed: 0 (false) for what is not learned and 1 (true) for what is")
        if value == 1 and role not in (None, "assistant"):
            raise DataError(f"{place} is the {role}'s and has {name!r}: {_shown(value)}; only the assistant's are learned, remove it")
    if len(set(map(float, found.values()))) > 1:
        raise DataError(f"{place}: 'weight' and 'train' contradict each other; keep one of them")
    return next(iter(map(float, found.values())), None)


def _for_template(value: Any, name: str, place: str) -> list[Any]:
    """tools and documents: a list of objects, also written as JSON."""
    if isinstance(value, str):
        text = value.strip()
        value, end = _decoded(text, 0, f"{place}: {name!r}", "a list of objects")
        if end < len(text):
            raise DataError(f"{place}: {name!r} goes on after its list with {_shown(text[end:].strip())}; write one list of objects")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{place}: {name!r} is no list of objects, as the template takes it; write it so, or remove it")
    return value


def _only(record: dict[str, Any], names: Sequence[str], place: str, *, empty: bool = False) -> str | None:
    """The one of some fields that mean the same, None where there is none.

    Args:
        empty: one without a text will do.
    """
    found = [name for name in names if _holds(record, name)]
    if any(record[name] != record[found[0]] for name in found[1:]):
        raise DataError(f"{place}: the record has both {found[0]!r} and {found[1]!r}; keep one of them")
    return next(iter(found), next((name for name in names if empty and name in record), None))


def _holds(record: dict[str, Any], name: str) -> bool:
    return record.get(name) not in (None, "", [], {})


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


def _text(value: Any, name: str, place: str) -> str:
    """Text, also in parts as {"type": "text", "text": ...}."""
    text = _joined(value)
    if text is None:
        if isinstance(value, list) and (other := next((part for part in value if _joined([part]) is None), None)) is not None:
            raise DataError(f"{place}: {name} has {_part(other)}")
        raise DataError(f"{place}: {name} is {'missing or null' if value is None else value_kind(value)}, expected text")
    return text


def _part(part: Any) -> str:
    """What a part of a content is that is no text, and what to do about it."""
    if isinstance(part, str):
        return f"a part that is text by itself; write {_PART}, or join the parts"
    if not isinstance(part, dict):
        return f"a part that is {value_kind(part)}; only text can be learned, remove it"
    kind = "text" if part.get("type") is None else part["type"]
    if kind != "text":
        return f"a part of type {_shown(kind)}; only text can be learned, remove it"
    if part.get("text") is None:
        return f"a part without 'text'; write {_PART}, or remove it"
    return f"a part whose 'text' is {value_kind(part['text'])}, expected text; mend or remove it"


def _joined(value: Any) -> str | None:
    """The text of a content; None where it is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in (None, "text") else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _clean(value: Any, place: str, decode_errors: DecodeErrors, remedy: str) -> Any:
    """The record without what is no text."""
    if isinstance(value, str):
        if value.isascii() or not (found := _NO_TEXT.search(value)):
            return value
        what = "lone surrogate" if found[0] < "\ue000" else "noncharacter"
        if decode_errors == "fail":
            raise DataError(f"{place}: the record holds the {what} U+{ord(found[0]):04X}, which is no character; {remedy}")
        return _NO_TEXT.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_clean(str(key), place, decode_errors, remedy): _clean(item, place, decode_errors, remedy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, place, decode_errors, remedy) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _records(path: Path, decode_errors: DecodeErrors, remedy: str) -> Iterator[tuple[int, Any]]:
    kind = chat_format(path)
    if kind == ".parquet":
        yield from enumerate(_parquet_rows(path, remedy), start=1)
    elif kind == ".json":
        yield from enumerate(_JsonList(path, decode_errors, remedy), start=1)
    elif kind in (".jsonl", ".txt"):
        for number, data in _lines(path):
            reader = Utf8Reader(str(path), decode_errors, first_line=number, remedy=remedy)
            text = without_marks(reader.decode(data, final=True)).strip()
            if text:
                yield from ((number, record) for record in ([text] if kind == ".txt" else _objects(text, f"{path}:{number}")))
    else:
        raise DataError(f"{path} has a format that holds no chat records; allowed: {CHAT_FORMATS}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_compressed(path) as (stream, _):
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                check_encoding(str(path), line)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: the line is longer than {format_bytes(MAX_LINE_BYTES)}; divide the record")
            yield number, line


def _objects(line: str, place: str) -> Iterator[Any]:
    """The records of a line: one, or several where joined files left them so."""
    position = 0
    while position < len(line):
        value, position = _decoded(line, position, place, "one JSON object a line")
        yield value
        position = _SPACE.match(line, position).end()  # type: ignore[union-attr]


class _JsonList:
    """The records of a .json file, one after the other.

    Memory: one record, at most 64 MiB of it.
    """

    def __init__(self, path: Path, decode_errors: DecodeErrors, remedy: str):
        self._path, self._reader = path, Utf8Reader(str(path), decode_errors, remedy=remedy)
        self._text, self._position, self._ended, self._number = "", 0, False, 1

    def __iter__(self) -> Iterator[Any]:
        with open_compressed(self._path) as (stream, _):
            check_encoding(str(self._path), head := stream.read(_BLOCK_BYTES))
            self._text, self._ended = without_marks(self._reader.decode(head)), not head
            if (first := self._next(stream)) != "[":
                kinds = {"": "nothing", "{": "an object", '"': "text"}
                raise DataError(
                    f"{self._path} holds {kinds.get(first, 'no JSON list')}, expected a list of records; one record a line is .jsonl"
                )
            self._position += 1
            found = self._next(stream)
            self._position += found == "]"
            while found != "]":
                yield self._value(stream)
                self._number += 1
                found = self._next(stream)
                if found not in (",", "]"):
                    raise self._malformed(f"found {found!r} after a record, expected a comma or ]")
                self._position += 1
                self._next(stream)
            if found := self._next(stream):
                raise self._malformed(f"found {found!r} after the list")

    def _next(self, stream: BinaryIO) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._fill(stream)

    def _value(self, stream: BinaryIO) -> Any:
        while True:
            try:
                value, end = _decoded(self._text, self._position, f"{self._path}:{self._number}", "a list of records")
            except _UnfinishedError:
                if self._ended:
                    raise
                if len(self._text) - self._position > MAX_LINE_BYTES:
                    raise DataError(
                        f"{self._path}:{self._number}: malformed JSON, or a record longer than {format_bytes(MAX_LINE_BYTES)}; mend it"
                    ) from None
            else:
                if end < len(self._text) or self._ended:
                    self._position = end
                    return value
            self._fill(stream)

    def _fill(self, stream: BinaryIO) -> None:
        """As much more as there is, so that a long record is parsed anew a few times only."""
        rest = self._text[self._position :]
        data = stream.read(max(_BLOCK_BYTES, len(rest)))
        self._ended = not data
        self._text, self._position = rest + self._reader.decode(data, final=self._ended), 0

    def _malformed(self, what: str) -> DataError:
        return DataError(f"{self._path}:{self._number}: malformed JSON ({what}); expected a list of records")


def _parquet_rows(path: Path, remedy: str) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow; pip install 'lowmem[hub]'") from error
    done = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if doubled := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path} has two columns {doubled!r}; rename or remove one")
            if not FIELDS.intersection(names):
                raise _no_shape(dict.fromkeys(names, ""), str(path))
            # of the others the names are enough: messages tell what was found
            unread = dict.fromkeys((name for name in names if name not in FIELDS), "")
            for rows in file.iter_batches(batch_size=_BATCH_ROWS, columns=[name for name in names if name in FIELDS]):
                for number in range(rows.num_rows):
                    yield unread | without_nulls(rows.slice(number, 1).to_pylist()[0])
                    done += 1
    except (DataError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{done + 1}: a text is not UTF-8 ({error.reason}); {remedy}") from error
    except Exception as error:  # for dates beyond those of Python, time zones that it lacks and the like pyarrow passes on what it is told
        reason = " ".join(str(error).split()) or "for no reason that pyarrow gives"
        raise DataError(f"{path}:{done + 1}: cannot be read ({reason}); restore the file, or convert its columns") from error


class _UnfinishedError(DataError):
    """JSON that is malformed, or goes on beyond what was read."""


def _decoded(text: str, position: int, place: str, expected: str) -> tuple[Any, int]:
    """The JSON value at a position, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise DataError(f"{place}: the JSON is nested too deeply; expected {expected}") from error
    except json.JSONDecodeError as error:
        raise _UnfinishedError(f"{place}: malformed JSON ({error.msg}); expected {expected}") from error
    except ValueError as error:
        raise DataError(f"{place}: malformed JSON ({error}); expected {expected}") from error


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, allowed: {_MAX_DIGITS}")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=distinct_keys, parse_int=_integer)


def _remedy(name: str) -> str:
    if name in (*_OTHER_WEIGHTS, _LABEL):
        return "write 'weight': 0 or 'train': false for what is not to be learned"
    return "write 'tools'" if name == "functions" else "only text can be learned, remove it"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

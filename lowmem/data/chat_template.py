"""Chat templates: Jinja, in the form that transformers keeps in tokenizer_config.json, run in a child with limits.

What the assistant says is found in one of two ways. A template may mark it with {% generation %} ... {% endgeneration %}. Otherwise
the conversation is rendered up to each of the assistant's messages, with and without it, and what the message adds is the assistant's.

The tokens are those of the whole rendered conversation, encoded once, for many tokenizers write a text otherwise where it stands alone. A
token is learned where a character that it covers is the assistant's, so also one that begins before an answer and reaches into it, as the
one for a space of the template and the word after it. Names of special tokens are special tokens where the template writes them, and plain
text where a record does.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.chat_records import REASONING, Conversation, Message
from lowmem.data.decoding import open_regular
from lowmem.data.hf_tokenizer import name_pattern, read_tokenizer_config, split_names
from lowmem.data.template_worker import CLOSE, OPEN, WORKER, TemplateFailure
from lowmem.data.tokenizers import END_OF_TEXT, Tokenizer
from lowmem.system.errors import DataError
from lowmem.system.files import storage_errors, write_json

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
_BREAK = "\ufdd2"  # within a name of a special token that a record spells; a noncharacter of Unicode, which no record may hold
_ESCAPED = "\\ufdd2"  # as tojson(ensure_ascii=True) writes it
_MARKS = re.compile(f"[{OPEN}{CLOSE}{_BREAK}]")
MAX_TEMPLATE_BYTES = 2**20
_PROBE = "x"  # an answer, of which only the beginning matters
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Messages to text, and to tokens of which some are the assistant's.

    Args:
        source: Jinja. It may use messages, tools, documents, add_generation_prompt, bos_token, eos_token, other names of special tokens,
            raise_exception(text) and strftime_now(format).
        bos_token, eos_token: what the template writes for them.
        place: where the template is from, for messages.
        names: of further special tokens, such as unk_token.
    Raises:
        DataError: it is no Jinja template, or Jinja is not installed.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = END_OF_TEXT,
        place: str = "the chat template",
        names: Mapping[str, str] | None = None,
    ):
        self.source, self.bos_token, self.eos_token, self.place = source, bos_token, eos_token, place
        self.names = {**(names or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._ask({})

    def render(self, conversation: Conversation | Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text; with `add_generation_prompt` up to where the assistant is to go on.

        Raises:
            DataError: the template fails on these messages, exceeds a limit (see `template_worker`), or writes nothing.
        """
        conversation = _conversation(conversation)
        text = _MARKS.sub("", self._rendered(conversation, add_generation_prompt)[0])
        if not text.strip():
            raise self._nothing(conversation)
        return text

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation | Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a conversation, and which of them the assistant says, the end of its turn included.

        With `add_generation_prompt` they are those that such a conversation begins with in training, up to the first of the next answer.

        Returns:
            (tokens,) int64 and (tokens,) bool.
        Raises:
            DataError: the template fails, exceeds a limit, writes nothing, does not write what the record has, or what precedes a message
                of the assistant's changes with it.
        """
        conversation = _conversation(conversation)
        special = {**tokenizer.special_tokens(), **({self.eos_token: tokenizer.eos_id} if self.eos_token else {})}
        guarded = _guarded(conversation, special)
        marked, answers, end = self._prompt(guarded) if add_generation_prompt else self._answers(guarded)
        if guarded.needed:
            self._check_used(guarded, self._rendered(guarded, False)[0] if add_generation_prompt else marked)
        marked = marked.replace(_ESCAPED, _BREAK * len(_ESCAPED))
        parts = [(_MARKS.sub("", part), token) for part, token in split_names(marked, special)]
        ids, covered = tokenizer.encode_parts([part for part in parts if part[0]])
        *spans, (stop, _) = _unmarked(marked, [*answers, (end, end)])
        count = len(ids)
        if add_generation_prompt:
            beyond = (covered[:, 1] > stop) | (covered[:, 0] >= stop)
            count = int(np.argmax(beyond)) if beyond.any() else count
        return np.array(ids[:count], dtype=np.int64), _overlaps(covered[:count], spans)

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn of the assistant's: what the template writes after it."""
        probe: list[Message] = [{"role": "user", "content": "\ufdd4"}, {"role": "assistant", "content": "\ufdd5"}]
        for messages in (probe, [*probe, *probe]):  # the second for templates that write nothing until the user speaks again
            try:
                text = _MARKS.sub("", self._rendered(Conversation(messages), False)[0])
                after = text.split("\ufdd5")[1].split("\ufdd4")[0].strip()
            except (DataError, IndexError):
                break
            if after:
                return (self.eos_token if self.eos_token and after.startswith(self.eos_token) else after,)
        return (self.eos_token,) if self.eos_token else ()

    def _answers(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]], int]:
        """The text with marks, where in it are the answers that are learned, and its length."""
        messages = conversation.messages
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [prefix for index in said for prefix in ((index, True), (index + 1, False))]
        whole, found = self._rendered(conversation, False, asked)
        if not _MARKS.sub("", whole).strip():
            raise self._nothing(conversation)
        if OPEN in whole:
            spans = self._marked_spans(conversation, whole, len(said))
        else:
            spans = [self._added(conversation, index, *found[2 * number : 2 * number + 2]) for number, index in enumerate(said)]
        if any(start < done for (start, _), (_, done) in zip(spans[1:], spans, strict=False)):
            raise self._mingled(conversation, said[-1], "")
        if spans and not any(end > start for start, end in spans) and any(messages[index]["content"].strip() for index in said):
            raise DataError(f"{_where(conversation)}{self.place} writes nothing of what the assistant says; mend the template")
        if len(spans) == len(said):
            spans = [span for index, span in zip(said, spans, strict=True) if index not in conversation.untrained]
        return whole, spans, len(whole)

    def _marked_spans(self, conversation: Conversation, whole: str, answers: int) -> list[tuple[int, int]]:
        """What {% generation %} marks."""
        places = [(match.start(), match[0]) for match in re.finditer(f"[{OPEN}{CLOSE}]", whole)]
        if [mark for _, mark in places] != [OPEN, CLOSE] * (len(places) // 2):
            raise DataError(
                f"{_where(conversation)}{self.place} nests {{% generation %}} blocks, or cuts one; end one, then begin the next"
            )
        spans = [(start + 1, end) for (start, _), (end, _) in zip(places[::2], places[1::2], strict=True)]
        if conversation.untrained and len(spans) != answers:
            raise DataError(
                f"{_where(conversation)}{self.place} has {len(spans)} {{% generation %}} blocks for {answers} messages of the assistant's, "
                "so that it is not known which of them has the weight 0; write one block for each message"
            )
        return spans

    def _added(self, conversation: Conversation, index: int, start: int | str, end: int | str) -> tuple[int, int]:
        """What message `index` adds to the text."""
        if isinstance(start, str) or isinstance(end, str):
            raise self._mingled(conversation, index, f" ({start if isinstance(start, str) else end})")
        if not 0 <= start <= end:
            raise self._mingled(conversation, index, "")
        return start, end

    def _mingled(self, conversation: Conversation, index: int, reason: str) -> DataError:
        return DataError(
            f"{_where(conversation)}{self.place} writes what precedes message {index} of a conversation differently once that message is "
            f"there{reason}, so its words cannot be told apart; mark them with {{% generation %}} and {{% endgeneration %}} in the template"
        )

    def _nothing(self, conversation: Conversation) -> DataError:
        return DataError(f"{_where(conversation)}{self.place} writes nothing for a conversation; mend the template")

    def _prompt(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]], int]:
        """The text with an answer begun, the answers before it, and where the prompt ends."""
        prompt, messages = self._rendered(conversation, True)[0], list(conversation.messages)
        if not _MARKS.sub("", prompt).strip():
            raise self._nothing(conversation)
        probe: Message = {"role": "assistant", "content": _PROBE}
        try:
            text, answers, _ = self._answers(Conversation([*messages, probe], conversation.place, extras=conversation.extras))
        except DataError:  # answers cannot be told apart, or the template will not have one here
            return prompt + _PROBE, [], len(prompt)
        if text.startswith(prompt):
            return text, [span for span in answers if span[1] <= len(prompt)], len(prompt)
        return prompt + _PROBE, [], len(prompt)

    def _check_used(self, conversation: Conversation, written: str) -> None:
        """Refuse what a record has and the template does not write.

        That it names a field says little: it may do so in a comment, or where a condition never holds.

        Args:
            written: the conversation as the template writes it.
        """
        messages = conversation.messages
        for name in conversation.needed:
            if self._writes(conversation, name, written):
                continue
            # many templates write the reasoning of the last answer alone
            ends = [number for number, message in enumerate(messages, 1) if name in REASONING and message.get(name)]
            if not any(self._writes(replace(conversation, messages=messages[:end]), name) for end in ends):
                raise DataError(
                    f"{_where(conversation)}{self.place} does not write {name!r}, which the record has; take a template that does, or "
                    "remove it from the records"
                )

    def _writes(self, conversation: Conversation, name: str, written: str | None = None) -> bool:
        """Whether a conversation is written otherwise without a field.

        Args:
            written: the conversation as the template writes it, where that is known.
        """
        names = REASONING if name in REASONING else (name,)
        messages = [{key: value for key, value in message.items() if key not in names} for message in conversation.messages]
        extras = {key: value for key, value in conversation.extras.items() if key != name}
        try:
            written = self._rendered(conversation, False)[0] if written is None else written
        except DataError:  # it takes no such part of a conversation
            return False
        try:
            return written != self._rendered(replace(conversation, messages=messages, extras=extras), False)[0]
        except DataError:  # it asks for the field
            return True

    def _rendered(
        self, conversation: Conversation, add_generation_prompt: bool, prefixes: Sequence[tuple[int, bool]] = ()
    ) -> tuple[str, list[int | str]]:
        """The text with marks around what is marked as the assistant's, and what the worker finds of prefixes."""
        variables = {"tools": None, "documents": None, **self.names, **conversation.extras, "messages": conversation.messages}
        answer = self._ask({"variables": variables, "prompt": add_generation_prompt, "prefixes": prefixes}, _where(conversation))
        return answer["text"], answer["prefixes"]

    def _ask(self, request: dict[str, Any], where: str = "") -> dict[str, Any]:
        try:
            return WORKER.ask({"source": self.source, **request})
        except TemplateFailure as error:
            if error.missing:
                raise DataError("chat templates need Jinja; pip install 'lowmem[chat]'") from error
            if not error.compiled:
                raise DataError(f"{self.place} is no Jinja template ({error}); mend it") from error
            raise DataError(f"{where}{self.place} refuses a conversation ({error}); mend the record, or the template") from error


def load_chat_template(directory: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The template in chat_template.jinja, else in tokenizer_config.json, of a folder.

    Args:
        tokenizer: gives the end token its name where the folder does not.
    Raises:
        DataError: there is none, or it is damaged.
    """
    folder = Path(directory)
    path, config_path = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
    config = read_tokenizer_config(config_path)
    if path.is_file():
        source, place = _read_template(path, str(path)), str(path)
    else:
        source, place = _configured_template(config, config_path), str(config_path)
    if not source:
        raise DataError(f"{folder} has no chat template; put one into {TEMPLATE_FILE}, or train a phase with kind: chat")
    name = "" if tokenizer is None else tokenizer.decode([tokenizer.eos_id])
    return _named(source, config, name or END_OF_TEXT, place)


def _configured_template(config: Mapping[str, Any], path: Path) -> str:
    """The template in a tokenizer_config.json, of several the one named default; "" if there is none.

    Raises:
        DataError: what is there is no template.
    """
    found = config.get("chat_template")
    if found is None:
        return ""
    several = found if isinstance(found, list) and all(isinstance(item, dict) for item in found) else []
    source = next((item.get("template") for item in several if item.get("name") == "default"), None) if several else found
    if not isinstance(source, str):
        raise DataError(
            f"{path} has chat_template {found!r:.60}, expected text, or a list with one whose name is default; mend it, or put a template "
            f"into {TEMPLATE_FILE}"
        )
    return source


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a template.

    Raises:
        DataError: its tokenizer_config.json is damaged.
    """
    path = folder / "tokenizer_config.json"
    return (folder / TEMPLATE_FILE).exists() or bool(_configured_template(read_tokenizer_config(path), path))


def choose_chat_template(file: str, folder: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate:
    """The template in `file` if it is named, else the one in `folder` if it has one, else lowmem's.

    Args:
        tokenizer: gives the end token its name, if it is known by now.
    Raises:
        DataError: it cannot be read, or is no template.
    """
    eos = END_OF_TEXT if tokenizer is None else tokenizer.decode([tokenizer.eos_id])
    if file:
        config = {} if folder is None else read_tokenizer_config(folder / "tokenizer_config.json")
        return _named(_read_template(Path(file).expanduser(), file), {**config, "eos_token": eos}, eos, file)
    if folder is not None and has_chat_template(folder):
        return load_chat_template(folder, tokenizer)
    if tokenizer is not None and tokenizer.begin_ids:
        begin = tokenizer.decode(tokenizer.begin_ids)
        return ChatTemplate("{{ bos_token }}" + DEFAULT_TEMPLATE, begin, eos, "lowmem's template")
    return ChatTemplate(DEFAULT_TEMPLATE, eos_token=eos, place="lowmem's template")


def save_chat_template(template: ChatTemplate, directory: Path) -> None:
    """Write chat_template.jinja, and the names of special tokens that it needs into tokenizer_config.json.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    with storage_errors(directory):
        (directory / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    missing = {name: token for name, token in template.names.items() if token and name != "eos_token"}
    if missing:
        write_json(path, {**read_tokenizer_config(path), **missing, "eos_token": template.eos_token})


def _read_template(path: Path, place: str) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        source = data.decode().removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the template {place} ({error}); give a Jinja file in UTF-8") from error
    if len(data) > MAX_TEMPLATE_BYTES:
        raise DataError(f"the template {place} is longer than {MAX_TEMPLATE_BYTES >> 20} MiB; give a Jinja file")
    return source


def _named(source: str, config: Mapping[str, Any], eos: str, place: str) -> ChatTemplate:
    """A template with the names of special tokens that a tokenizer_config.json gives."""
    names = {name: text for name in _NAMES if (text := _name(config.get(name)))}
    return ChatTemplate(source, names.get("bos_token", ""), names.get("eos_token") or eos, place, names)


def _name(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _conversation(given: Conversation | Sequence[Message]) -> Conversation:
    return given if isinstance(given, Conversation) else Conversation(list(given))


def _where(conversation: Conversation) -> str:
    return f"{conversation.place}: " if conversation.place else ""


def _guarded(conversation: Conversation, special: Mapping[str, int]) -> Conversation:
    """The conversation with a mark in every name of a special token that it spells, also where a name may be completed by what follows."""
    names = [name for name in special if len(name) > 1]
    if not names:
        return conversation
    pattern = name_pattern(tuple(names))
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    longest = max(map(len, names)) - 1

    def guard(value: Any) -> Any:
        if isinstance(value, dict):
            return {guard(key): guard(item) for key, item in value.items()}
        if isinstance(value, list):
            return [guard(item) for item in value]
        if not isinstance(value, str):
            return value
        while pattern.search(value):
            value = pattern.sub(lambda match: f"{match[0][0]}{_BREAK}{match[0][1:]}", value)
        text = value.rstrip()
        if any(text[-length:] in beginnings for length in range(1, min(longest, len(text)) + 1)):
            return text + _BREAK + value[len(text) :]
        return value

    messages = [{key: item if key == "role" else guard(item) for key, item in message.items()} for message in conversation.messages]
    extras = {key: guard(item) for key, item in conversation.extras.items()}
    return replace(conversation, messages=messages, extras=extras)


def _unmarked(marked: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places in the text without marks."""
    marks = [match.start() for match in _MARKS.finditer(marked)]
    return [(start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in spans]


def _overlaps(covered: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens cover a character of the spans, or none and lie within one.

    Args:
        covered: (tokens, 2).
    """
    found = np.zeros(len(covered), dtype=bool)
    for start, end in spans:
        found |= (covered[:, 0] < end) & (np.maximum(covered[:, 1], covered[:, 0] + 1) > start)
    return found

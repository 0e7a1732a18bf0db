"""Chat templates: Jinja, in the form that transformers keeps in tokenizer_config.json, run in Jinja's sandbox.

What the assistant says is found in one of two ways. A template may mark it with {% generation %} ... {% endgeneration %}. Otherwise
the conversation is rendered up to each of the assistant's messages, with and without it, and what the message adds is the assistant's.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.chat_records import Message
from lowmem.data.storage import storage_errors, write_json
from lowmem.data.tokenizers import END_OF_TEXT, Tokenizer
from lowmem.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# noncharacters of Unicode: no text holds them
_OPEN, _CLOSE, _BOS, _EOS = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"


class ChatTemplate:
    """Messages to text, and to tokens of which some are the assistant's.

    Args:
        source: Jinja. It may use messages, add_generation_prompt, bos_token, eos_token and raise_exception(text).
        bos_token, eos_token: what the template writes for them.
        place: where the template is from, for messages.
    Raises:
        DataError: it is no Jinja template, or Jinja is not installed.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = END_OF_TEXT, place: str = "the chat template"):
        self.source, self.bos_token, self.eos_token, self.place = source, bos_token, eos_token, place
        self._template = _compile(source, place)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text; with `add_generation_prompt` up to where the assistant is to go on.

        Raises:
            DataError: the template fails on these messages.
        """
        return _without_marks(self._rendered(messages, add_generation_prompt)).replace(_BOS, self.bos_token).replace(_EOS, self.eos_token)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a conversation, and which of them the assistant says, the end of its turn included.

        The assistant's parts are encoded by themselves, so that a prompt has the same tokens whatever follows it.

        Returns:
            (tokens,) int64 and (tokens,) bool.
        Raises:
            DataError: the template fails, or what precedes a message of the assistant's changes with it.
        """
        tokens: list[int] = []
        said: list[bool] = []
        for text, assistant in self._parts(messages, add_generation_prompt):
            part = self._encode_text(tokenizer, text)
            tokens += part
            said += [assistant] * len(part)
        return np.array(tokens, dtype=np.int64), np.array(said, dtype=bool)

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn of the assistant's: what the template writes after it."""
        probe: list[Message] = [{"role": "user", "content": "\ufdd4"}, {"role": "assistant", "content": "\ufdd5"}]
        for messages in (probe, [*probe, *probe]):  # the second for templates that write nothing until the user speaks again
            try:
                after = _without_marks(self._rendered(messages, False)).split("\ufdd5")[1].split("\ufdd4")[0].strip()
            except (DataError, IndexError):
                break
            if after:
                end = _EOS if after.startswith(_EOS) else after
                return (end.replace(_EOS, self.eos_token).replace(_BOS, self.bos_token),)
        return (self.eos_token,) if self.eos_token else ()

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[tuple[str, bool]]:
        """The text cut where the assistant begins and ends."""
        whole = self._rendered(messages, add_generation_prompt)
        if _OPEN in whole:
            before, *spans = whole.split(_OPEN)
            cut = [part for span in spans for part in zip(span.split(_CLOSE, 1), (True, False), strict=True)]
            return [(before, False), *cut]
        parts, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for text, assistant in ((self._rendered(messages[:index], True), False), (self._rendered(messages[: index + 1], False), True)):
                if not text.startswith(done) or not whole.startswith(text):
                    raise DataError(
                        f"{self.place} writes what precedes message {index} of a conversation differently once that message is there, so "
                        "its words cannot be told apart; mark them with {% generation %} and {% endgeneration %} in the template"
                    )
                parts.append((text[len(done) :], assistant))
                done = text
        return [*parts, (whole[len(done) :], False)]

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text with noncharacters for the special tokens and around what is marked as the assistant's."""
        import jinja2

        try:
            return self._template(
                messages=list(messages), add_generation_prompt=add_generation_prompt, bos_token=_BOS, eos_token=_EOS,
                raise_exception=_raise_exception, tools=None, documents=None,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise DataError(
                f"{self.place} refuses a conversation ({' '.join(str(error).split())}); mend the records, or the template"
            ) from error

    def _encode_text(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of a text; the end token is the tokenizer's own whatever its name, the begin token its id if it has one."""
        ids: list[int] = []
        for number, part in enumerate(text.replace(_BOS, self.bos_token).split(_EOS)):
            ids += [tokenizer.eos_id] * (number > 0)
            ids += tokenizer.encode(part) if part else []
        return ids


def load_chat_template(directory: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The template in chat_template.jinja, else in tokenizer_config.json, of a folder.

    Args:
        tokenizer: gives the end token its name where the folder does not.
    Raises:
        DataError: there is none, or it is damaged.
    """
    folder = Path(directory)
    path, config = folder / TEMPLATE_FILE, _tokenizer_config(folder / "tokenizer_config.json")
    source: Any = config.get("chat_template")
    place = str(folder / "tokenizer_config.json")
    if path.is_file():
        source, place = path.read_text(encoding="utf-8"), str(path)
    if isinstance(source, list):  # several by name
        source = next((item.get("template") for item in source if isinstance(item, dict) and item.get("name") == "default"), None)
    if not isinstance(source, str):
        raise DataError(f"{folder} has no chat template; put one into {TEMPLATE_FILE}, or train a phase with kind: chat")
    name = "" if tokenizer is None else tokenizer.decode([tokenizer.eos_id])
    return ChatTemplate(source, _name(config.get("bos_token")), _name(config.get("eos_token")) or name or END_OF_TEXT, place)


def choose_chat_template(file: str, folder: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate:
    """The template in `file` if it is named, else the one in `folder` if it has one, else lowmem's.

    Args:
        tokenizer: gives the end token its name, if it is known by now.
    Raises:
        DataError: it cannot be read, or is no template.
    """
    eos = END_OF_TEXT if tokenizer is None else tokenizer.decode([tokenizer.eos_id])
    if file:
        try:
            source = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the template {file} ({error}); give a Jinja file") from error
        return ChatTemplate(source, eos_token=eos, place=file)
    if folder is not None and (
        (folder / TEMPLATE_FILE).is_file() or _tokenizer_config(folder / "tokenizer_config.json").get("chat_template")
    ):
        return load_chat_template(folder, tokenizer)
    return ChatTemplate(DEFAULT_TEMPLATE, eos_token=eos, place="lowmem's template")


def save_chat_template(template: ChatTemplate, directory: Path) -> None:
    """Write chat_template.jinja, and the names of special tokens that it needs into tokenizer_config.json.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    with storage_errors(directory):
        (directory / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    if template.bos_token:
        path = directory / "tokenizer_config.json"
        write_json(path, {**_tokenizer_config(path), "bos_token": template.bos_token, "eos_token": template.eos_token})


def _tokenizer_config(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or remove it") from error
    return values if isinstance(values, dict) else {}


def _name(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _without_marks(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _compile(source: str, place: str) -> Callable[..., str]:
    """A function that renders; Jinja is imported here, for runs without chat do not need it."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import CallBlock
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DataError("chat templates need Jinja; pip install 'lowmem[chat]'") from error

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return _OPEN + caller() + _CLOSE

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(source).render
    except jinja2.TemplateError as error:
        raise DataError(f"{place} is no Jinja template ({error}); mend it") from error

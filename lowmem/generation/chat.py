"""A conversation with a model, by its template, at a terminal or from a program."""

import secrets
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from lowmem.data.chat_records import Message
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.tokenizers import Tokenizer
from lowmem.generation.context import BatchContext, position_window
from lowmem.generation.sampling import SamplingOptions
from lowmem.generation.settings import SETTINGS, Settings
from lowmem.generation.texts import GenerationResult, Row, writing
from lowmem.models.base import LanguageModel
from lowmem.system.errors import ConfigError, DataError


class Chat:
    """Turns, of a user's message and an answer each, as long as they fit the context.

    Args:
        template: writes the messages as the model saw them in training.
        context: tokens that the prompt may take; past them the oldest turns are forgotten, never the system message.
        system: said before the first turn; "" is nothing.
    Attributes:
        turns: those remembered.
        forgotten: how many are not.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, context: int, system: str = ""):
        self.turns: list[tuple[str, str]] = []
        self.forgotten = 0
        self._template, self._tokenizer, self._context, self._system = template, tokenizer, context, system

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return self._template.stop

    def prompt(self, message: str) -> list[int]:
        """Tokens of the conversation up to where the answer to `message` begins; turns that do not fit are forgotten.

        A message that does not fit by itself is returned whole.

        Raises:
            DataError: the template refuses the conversation.
        """
        while True:
            ids = self._encoded(message)
            if len(ids) <= self._context or not self.turns:
                return ids
            del self.turns[0]
            self.forgotten += 1

    def add(self, message: str, answer: str) -> None:
        """Remember a turn."""
        self.turns.append((message, answer.strip()))

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()
        self.forgotten = 0

    def _encoded(self, message: str) -> list[int]:
        messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        for said, answered in self.turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": message})
        return self._template.encode(self._tokenizer, messages, add_generation_prompt=True)[0].tolist()


class ChatWriter:
    """Writes the answers of a conversation with one cache.

    The cache is kept from answer to answer: where the next prompt begins with exactly the tokens it holds, only the rest is computed;
    otherwise (a turn was forgotten, the template or the tokenizer writes an answer with other tokens than the model chose) all of it.

    Args:
        capacity: tokens of the longest prompt and its answer; more are made room for when they come.
        end_ids: tokens that end an answer, beside the end-of-document token.
    Attributes:
        reused: tokens of the latest prompt that the cache held already.
    Memory: the model's cache for one text of `capacity` tokens, from the first answer on.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, capacity: int, end_ids: Collection[int] = ()):
        self.reused, self._end_ids = 0, end_ids
        self._model, self._tokenizer, self._capacity = model, tokenizer, capacity
        self._context: BatchContext | None = None

    def answer(
        self,
        ids: Sequence[int],
        options: SamplingOptions,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Continue a prompt as `lowmem.generation.generate` does.

        Raises:
            CheckpointError: the model's output is not finite.
        """
        seed = secrets.randbits(32) if options.seed is None else options.seed
        row = Row(self._tokenizer, ids, replace(options, seed=seed), max_new_tokens, stop, on_text, self._end_ids)
        # an answer that is interrupted or fails leaves a cache that nobody knows the contents of
        context, self._context = self._context, None
        with writing(self._model):
            needed = len(row.prompt_ids) + max_new_tokens
            if context is None or needed > self._capacity:
                self._capacity, context = max(needed, self._capacity), None  # the old cache is freed before the new one is made
                context = BatchContext(self._model, 1, self._capacity, position_window(self._model))
            row.start()
            held = context.ids[0] if context.ids else []
            self.reused = len(held) if len(held) < len(row.prompt_ids) and row.prompt_ids[: len(held)] == held else 0
            if not self.reused:
                context.keep([])
            slides = context.slides[0] if self.reused else 0
            row.take(context.extend(0, row.prompt_ids[self.reused :]) if self.reused else context.add(row.prompt_ids))
            while row.stop_reason is None:
                row.take(context.step([row.new_ids[-1]])[0])
        self._context = context
        return row.result(context.slides[0] - slides)


def prompt_room(context: int, max_new_tokens: int) -> int:
    """Tokens of `context` that a conversation may fill: an answer of `max_new_tokens`, but at most a quarter, is kept free."""
    return max(1, context - min(max_new_tokens, context // 4))


_HELP = "{what}; /set NAME VALUE changes one of {names}; /show tells them; {more}/exit or Ctrl-D ends, Ctrl-C stops a text"


def converse(
    settings: Settings, what: str, reply: Callable[[str], None], commands: Mapping[str, Callable[[], str]], first: str | None = None
) -> None:
    """Answer lines of standard input until it ends, or until /exit.

    Args:
        what: to be typed, for the first line on standard error.
        reply: answers a line that is no command. Ctrl-C in it ends the answer; its ConfigError and DataError are told.
        commands: by name, beside /set, /show and /exit; each returns what to tell.
        first: answered before anything is read.
    """
    more = "".join(f"{name}, " for name in commands)
    usage = _HELP.format(what=what, names=", ".join(SETTINGS), more=more)
    print(usage, file=sys.stderr)
    line = first
    while True:
        if line is None:
            sys.stderr.write("> ")
            sys.stderr.flush()
            try:
                line = input()
            except EOFError:
                sys.stderr.write("\n")
                return
            except UnicodeDecodeError as error:
                print(f"that is not UTF-8 ({error.reason})", file=sys.stderr)
                continue
            except KeyboardInterrupt:  # at the prompt it only clears the line
                sys.stderr.write("\n")
                continue
        try:
            if line.split() == ["/exit"]:
                return
            if line.startswith("/"):
                print(_command(line.split(), settings, commands, usage), file=sys.stderr)
            else:
                reply(line)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except (ConfigError, DataError) as error:
            print(error, file=sys.stderr)
        line = None


def _command(words: list[str], settings: Settings, commands: Mapping[str, Callable[[], str]], usage: str) -> str:
    """Carry out a command; returns the answer.

    Raises:
        ConfigError: there is no such command, or its setting or value is none.
    """
    if len(words) == 1 and words[0] in commands:
        return commands[words[0]]()
    if words == ["/show"]:
        return str(settings)
    if len(words) == 3 and words[0] == "/set":
        return settings.change(*words[1:])
    raise ConfigError(usage)

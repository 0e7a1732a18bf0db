"""A conversation with a model: what was said so far, as the tokens that the model continues."""

from lowmem.data.chat_records import Message
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.tokenizers import Tokenizer


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


def prompt_room(context: int, max_new_tokens: int) -> int:
    """Tokens of `context` that a conversation may fill: an answer of `max_new_tokens`, but at most a quarter, is kept free."""
    return max(1, context - min(max_new_tokens, context // 4))

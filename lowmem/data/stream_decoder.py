"""Token ids to text as they arrive, for printing while a model writes."""

from lowmem.data.tokenizers import Tokenizer

_LONGEST_WAIT = 8


class TokenStreamDecoder:
    """Gives the text of each id as soon as its characters are complete.

    What it has given, joined, equals `tokenizer.decode` of all the ids once `finish` was called (for bytes that form no
    character the two may differ in the number of U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """New text, or "" while a character is incomplete."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._waiting) < _LONGEST_WAIT:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The rest; an incomplete character becomes U+FFFD."""
        return self._give(self._new_text()) if self._waiting else ""

    def _new_text(self) -> str:
        # the ids before are decoded again because some tokenizers treat the first id of a text differently
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]

    def _give(self, text: str) -> str:
        self._context, self._waiting = self._waiting, []
        return text

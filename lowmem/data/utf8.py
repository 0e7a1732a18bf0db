"""UTF-8 in portions, with the line of the first bad byte or a count of the replaced ones."""

import codecs
from typing import Literal

from lowmem.errors import DataError

DecodeErrors = Literal["fail", "replace"]


class Utf8Reader:
    """Decodes one file in portions that may end inside a character.

    Args:
        name: the file, for the message.
        errors: fail, or replace by U+FFFD.
        first_line: line number of the first portion.

    Attributes:
        replacements: sequences of bytes replaced so far.
    """

    def __init__(self, name: str, errors: DecodeErrors, first_line: int = 1):
        self._name = name
        self._errors = errors
        self._line = first_line
        self._rest = b""
        self.replacements = 0

    def decode(self, data: bytes, final: bool = False) -> str:
        """Text of the bytes that are complete with `data`.

        Args:
            final: nothing follows, so an incomplete character is an error.
        Raises:
            DataError: bytes that are not UTF-8, with file and line; only with `errors="fail"`.
        """
        data = self._rest + data
        self._rest = b""
        parts = []
        start = 0
        while start < len(data):
            try:
                text, used = codecs.utf_8_decode(memoryview(data)[start:], "strict", final)
            except UnicodeDecodeError as error:
                bad_start, bad_stop = start + error.start, start + error.end
                if self._errors == "fail":
                    raise self._error(data, bad_start, error.reason) from error
                parts += [data[start:bad_start].decode(), "\ufffd"]
                self.replacements += 1
                start = bad_stop
                continue
            parts.append(text)
            start += used
            if not used or not final:
                break
        self._rest = data[start:]
        self._line += data.count(b"\n", 0, start)
        return "".join(parts)

    def _error(self, data: bytes, position: int, reason: str) -> DataError:
        line = self._line + data.count(b"\n", 0, position)
        return DataError(
            f"{self._name}:{line}: byte 0x{data[position]:02x} is not UTF-8 ({reason}); convert the file, or set data.decode_errors=replace"
        )


def replace_surrogates(text: str, name: str, line: int, errors: DecodeErrors) -> tuple[str, int]:
    """Text without lone surrogates, which JSON escapes can smuggle in and UTF-8 cannot express.

    Returns:
        The text and how many were replaced by U+FFFD.
    Raises:
        DataError: there is one, and `errors` is fail.
    """
    if text.isascii():
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "fail":
            raise DataError(
                f"{name}:{line}: the lone surrogate U+{ord(text[error.start]):04X} is no character; "
                "mend the text, or set data.decode_errors=replace"
            ) from error
        count = sum(0xD800 <= ord(character) <= 0xDFFF for character in text)
        return "".join("\ufffd" if 0xD800 <= ord(character) <= 0xDFFF else character for character in text), count
    return text, 0

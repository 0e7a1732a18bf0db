"""UTF-8 in portions, with the line of the first bad byte or a count of the replaced ones."""

import codecs
from typing import Literal

from lowmem.errors import DataError

DecodeErrors = Literal["fail", "replace"]
_MARK = "\ufeff"
_HEAD_BYTES = 4096
_OTHER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip


def check_encoding(name: str, head: bytes) -> None:
    """Refuse a file that is UTF-16 or UTF-32, of which much would pass as UTF-8 full of NUL characters.

    Args:
        name: the file, for the message.
        head: its beginning.
    Raises:
        DataError: it begins with the mark of another encoding, or every other byte is NUL.
    """
    head = head[:_HEAD_BYTES]
    found = next((encoding for mark, encoding in _OTHER_MARKS if head.startswith(mark)), "")
    even, odd = head[::2], head[1::2]
    nul_even, nul_odd = even.count(0), odd.count(0)
    # Latin letters in UTF-16 have NUL in one half of every pair and never in the other
    if not found and ((nul_even == 0 and 2 * nul_odd > len(odd)) or (nul_odd == 0 and 2 * nul_even > len(even) > 1)):
        found = "UTF-16"
    if found:
        raise DataError(f"{name} is {found}, expected UTF-8; convert it: iconv -f {found} -t UTF-8")


def without_marks(text: str, line_begins: bool = True) -> str:
    """Text without byte order marks at the beginning of its lines; elsewhere U+FEFF is a character like any other.

    Args:
        line_begins: the text begins a line.
    """
    if text.isascii() or _MARK not in text:
        return text
    if line_begins:
        text = text.removeprefix(_MARK)
    return text.replace(f"\n{_MARK}", "\n")


def decode_value(data: bytes, place: str, errors: DecodeErrors) -> tuple[str, int]:
    """The text of a value that is bytes, and how many sequences of bytes were replaced.

    Args:
        place: file and row, for the message.
    Raises:
        DataError: it is not UTF-8, and `errors` is fail.
    """
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if errors == "fail":
            raise DataError(
                f"{place}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); mend the row, or set data.decode_errors=replace"
            ) from error
    reader = Utf8Reader(place, errors)
    return reader.decode(data, final=True), reader.replacements


class Utf8Reader:
    """Decodes one file in portions that may end inside a character.

    Args:
        name: the file, for the message.
        errors: fail, or replace by U+FFFD.
        first_line: line number of the first portion.
        remedy: what the message advises.

    Attributes:
        replacements: sequences of bytes replaced so far.
    """

    def __init__(
        self, name: str, errors: DecodeErrors, first_line: int = 1, remedy: str = "convert the file, or set data.decode_errors=replace"
    ):
        self._name = name
        self._remedy = remedy
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
        return DataError(f"{self._name}:{line}: byte 0x{data[position]:02x} is not UTF-8 ({reason}); {self._remedy}")


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

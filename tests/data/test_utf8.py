"""Decoding in portions equals decoding at once; errors name the line."""

import random

import pytest

from lowmem.data.decoding import Utf8Reader, replace_surrogates
from lowmem.system.errors import DataError


def decode_in_portions(data: bytes, rng: random.Random, errors: str) -> tuple[str, int]:
    reader = Utf8Reader("f", errors)
    parts, position = [], 0
    while position < len(data):
        step = rng.randint(1, 5)
        parts.append(reader.decode(data[position : position + step]))
        position += step
    return "".join(parts) + reader.decode(b"", final=True), reader.replacements


def test_valid_text_survives_any_portions():
    text = "a\r\nbé日🙂\x00" * 20
    for seed in range(20):
        assert decode_in_portions(text.encode(), random.Random(seed), "fail") == (text, 0)


def test_random_bytes_are_replaced_as_python_does():
    for seed in range(200):
        rng = random.Random(seed)
        data = bytes(rng.choice([0x41, 0x0A, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xF0, 0x9F, 0xFF]) for _ in range(40))
        text, count = decode_in_portions(data, rng, "replace")
        assert text == data.decode(errors="replace")
        assert count == text.count("\ufffd")  # the alphabet above cannot spell a genuine U+FFFD (EF BF BD)


def test_a_genuine_replacement_character_is_not_counted():
    reader = Utf8Reader("f", "replace")
    assert reader.decode("\ufffd".encode() + b"\xff", final=True) == "\ufffd\ufffd"
    assert reader.replacements == 1


def test_the_error_names_file_line_and_byte():
    reader = Utf8Reader("corpus.txt", "fail")
    reader.decode(b"one\ntwo\nthr")
    with pytest.raises(DataError, match=r"^corpus\.txt:4: byte 0xe9 is not UTF-8 .*decode_errors=replace"):
        reader.decode(b"ee\nna\xefve".replace(b"\xef", b"\xe9"))


def test_a_file_that_ends_inside_a_character_is_an_error():
    reader = Utf8Reader("f", "fail")
    assert reader.decode("x\né".encode()[:-1]) == "x\n"
    with pytest.raises(DataError, match=r"^f:2: byte 0xc3"):
        reader.decode(b"", final=True)


def test_lone_surrogates():
    assert replace_surrogates("fine é", "f", 1, "fail") == ("fine é", 0)
    assert replace_surrogates("a\ud800b\udfff", "f", 1, "replace") == ("a\ufffdb\ufffd", 2)
    with pytest.raises(DataError, match=r"^f:7: the lone surrogate U\+D800"):
        replace_surrogates("a\ud800", "f", 7, "fail")

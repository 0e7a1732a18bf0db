"""Pieces join to the document, stay bounded, and do not depend on how the document was fed."""

import random

import pytest

from lowmem.data.text_source import PIECE_CHARS, Piece, PieceCutter, document_pieces, limit_bytes, utf8_size

TEXT = "some words, and\n\n\tan indented line; naïve 日本語 text 🙂 " * 2000  # about 50 000 characters: four pieces


def test_pieces_join_to_the_document_and_only_the_last_one_ends_it():
    pieces = list(document_pieces(TEXT))
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 1
    assert all(PIECE_CHARS / 2 < len(piece.text) <= PIECE_CHARS for piece in pieces[:-1])


def test_cuts_fall_before_whitespace_that_follows_a_word():
    for piece in list(document_pieces(TEXT))[1:]:
        position = TEXT.index(piece.text)
        assert piece.text[0].isspace()
        assert not TEXT[position - 1].isspace()


def test_cuts_do_not_depend_on_the_portions():
    rng = random.Random(0)
    expected = list(document_pieces(TEXT))
    for _ in range(5):
        cutter, pieces, position = PieceCutter(), [], 0
        while position < len(TEXT):
            step = rng.randint(1, 3 * PIECE_CHARS)
            pieces += cutter.feed(TEXT[position : position + step])
            position += step
        pieces += cutter.finish()
        assert pieces == expected


def test_text_without_spaces_is_cut_at_the_limit():
    pieces = list(document_pieces("x" * (PIECE_CHARS + 1)))
    assert [len(piece.text) for piece in pieces] == [PIECE_CHARS, 1]


def test_an_empty_document_has_no_piece():
    assert list(document_pieces("")) == []


@pytest.mark.parametrize("limit, expected", [(3, "abc"), (5, "abcé"), (6, "abcé"), (8, "abcé日"), (99, "abcé日x")])
def test_limit_counts_bytes_and_cuts_between_characters(limit, expected):
    # a b c are one byte each, é two, 日 three: after 3, 5 and 8 bytes a character ends; a limit of 6 falls inside 日
    pieces = list(limit_bytes([Piece("abc", False, True), Piece("é日x", True, False)], limit))
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].ends_document


def test_utf8_size():
    assert utf8_size("abc") == 3
    assert utf8_size("é日🙂") == 2 + 3 + 4

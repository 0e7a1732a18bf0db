"""The chunk tokenizer against its definition."""

import random
from collections import Counter

import pytest

from lowmem.data.tokenizers import TRIGRAMS, ChunkTokenizer, chunk_text
from lowmem.system.errors import DataError
from tests.reference import chunk_rule


def random_text(rng: random.Random, length: int) -> str:
    parts = []
    while sum(map(len, parts)) < length:
        parts.append(rng.choice(["the", "ing", "wit", "th", "a", "b", " ", "  ", "\n", "é", "ha", "ter", "TH"]))
    return "".join(parts)[:length]


def test_the_rule_by_hand():
    # "the" is a trigram; then " c": no rule gives three. "at " follows no space; before a space stands "t": "at" + " s" ...
    assert chunk_text("the cat") == ["the", " c", "at"]
    assert chunk_text("a bcd efgh") == ["a ", "bcd", " e", "fg", "h"]
    assert chunk_text("xyz w") == ["xyz", " w"]
    assert chunk_text("ab") == ["ab"]
    assert set(TRIGRAMS) == chunk_rule.TRIGRAMS
    assert len(TRIGRAMS) == 28


def test_the_regular_expression_is_the_rule():
    for seed in range(500):
        rng = random.Random(seed)
        text = random_text(rng, rng.randint(0, 60))
        assert chunk_text(text) == chunk_rule.chunks(text)


@pytest.mark.parametrize("lowercase", [True, False])
def test_encoding_with_unknown_chunks_is_the_rule(lowercase):
    for seed in range(300):
        rng = random.Random(seed)
        text = random_text(rng, 80)
        chunks = sorted({chunk for chunk in chunk_rule.chunks(random_text(rng, 60)) if rng.random() < 0.7} | {"t", "a"})
        tokenizer = ChunkTokenizer(chunks, lowercase=lowercase)
        expected = chunk_rule.encode(
            text.lower() if lowercase else text, {chunk: number for number, chunk in enumerate(chunks, start=1)}, unknown=0
        )
        assert tokenizer.encode(text) == expected


def test_ids_follow_frequency_then_the_alphabet():
    text = "the the the zz yy"
    tokenizer = ChunkTokenizer.train([text], lowercase=True)
    counts = Counter(chunk_rule.chunks(text))
    ordered = sorted(counts, key=lambda chunk: (-counts[chunk], chunk))
    assert [tokenizer.decode([number]) for number in range(len(ordered) + 1)] == ["<UNK>", *ordered]
    assert tokenizer.eos_id == len(ordered) + 1


def test_with_a_cap_no_known_character_becomes_unknown():
    rng = random.Random(0)
    text = random_text(rng, 4000)
    characters = set(text.lower()) | {"q"}
    tokenizer = ChunkTokenizer.train([text], lowercase=True, vocab_size=40, characters="q")
    assert tokenizer.vocab_size == 40
    for seed in range(50):
        other = "".join(random.Random(seed).choice(sorted(characters)) for _ in range(50))
        ids = tokenizer.encode(other)
        assert tokenizer.unknown_id not in ids
        assert tokenizer.decode(ids) == other


def test_the_cap_keeps_the_most_frequent_chunks():
    # chunks: "the" 50 times, "zz" once; characters t h e z take 4 of the 7 - 2 places, one place is left
    tokenizer = ChunkTokenizer.train(["the" * 50 + "zz"], lowercase=True, vocab_size=7)
    assert tokenizer.encode("the") == [1]
    assert len(tokenizer.encode("zz")) == 2


def test_lower_casing_is_as_published():
    tokenizer = ChunkTokenizer.train(["the cat"], lowercase=True)
    assert tokenizer.decode(tokenizer.encode("The CAT")) == "the cat"


def test_too_many_characters_for_the_cap():
    with pytest.raises(DataError, match=r"5 different characters, data\.tokenizer_vocab_size is 6; set it to at least 7"):
        ChunkTokenizer.train(["abcde"], lowercase=True, vocab_size=6)


def test_an_empty_corpus():
    with pytest.raises(DataError, match="no text to take chunks from"):
        ChunkTokenizer.train([], lowercase=True)

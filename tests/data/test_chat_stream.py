"""The stream of conversations: resumed exactly, each once an epoch, shares kept, held-out ones never trained on."""

import json

import numpy as np
import pytest

from lowmem.config.schema import SourceConfig
from lowmem.data.chat import ChatSource, ChatStream, ChatValidation, Conversations, build_chat_tokens
from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.stream import EndOfData
from lowmem.data.text_source import ignore_progress
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.system.errors import CheckpointError, DataError

SEQ_LEN = 48


def write(path, count: int, letter: str):
    records = [{"prompt": f"{letter}{number:03d}", "response": letter * (1 + number % 20)} for number in range(count)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def load(tmp_path, count: int, letter: str, val_fraction=0.1, truncation="cut", seq_len=SEQ_LEN) -> Conversations:
    source = ChatSource(SourceConfig(path=str(write(tmp_path / f"{letter}.jsonl", count, letter))), ChatTemplate(DEFAULT_TEMPLATE))
    tokens = build_chat_tokens(source, ByteTokenizer(), tmp_path / "cache", ignore_progress)
    return Conversations(tokens, seq_len=seq_len, truncation=truncation, val_fraction=val_fraction)


def names(batch) -> list[str]:
    """The conversations of a batch by the first word of their prompts."""
    text = "".join(chr(token) if token < 256 else "|" for token in batch.inputs.ravel())
    return [part[:4] for part in text.split("[INST] ")[1:]]


def next_or_none(stream: ChatStream):
    try:
        return stream.batch(4, seq_len=SEQ_LEN, step=0)
    except EndOfData:
        return None


def test_each_conversation_comes_once_an_epoch_and_never_a_held_out_one(tmp_path):
    conversations = load(tmp_path, 100, "a")
    stream = ChatStream([conversations], [1.0], seq_len=SEQ_LEN, seed=0, exhausted="stop")
    trained = []
    while (batch := next_or_none(stream)) is not None:
        trained += names(batch)
    validation = ChatValidation([conversations], seq_len=SEQ_LEN, one_per_row=False)
    held_out = [name for batch in validation.batches() for name in names(batch)]
    assert len(held_out) == 10
    assert sorted(trained + held_out) == [f"a{number:03d}" for number in range(100)]
    assert sum(len(batch) for batch in validation.batches(3)) == 3


def test_resuming_equals_going_on(tmp_path):
    def make() -> ChatStream:
        return ChatStream([load(tmp_path, 40, "a"), load(tmp_path, 60, "b")], [2.0, lambda step: step / 5], seq_len=SEQ_LEN, seed=3)

    whole = make()
    batches = [whole.batch(3, seq_len=SEQ_LEN, step=step) for step in range(20)]
    first, resumed = make(), make()
    for step in range(7):
        first.batch(3, seq_len=SEQ_LEN, step=step)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(7, 20):
        found = resumed.batch(3, seq_len=SEQ_LEN, step=step)
        assert all(np.array_equal(getattr(found, name), getattr(batches[step], name)) for name in ("inputs", "targets", "segments"))
    with pytest.raises(CheckpointError, match="conversations was"):
        ChatStream([load(tmp_path, 30, "a")], [1.0], seq_len=SEQ_LEN, seed=3).load_state_dict(first.state_dict())


def test_shares_of_conversations_match_the_weights(tmp_path):
    stream = ChatStream([load(tmp_path, 50, "a"), load(tmp_path, 80, "b")], [3.0, 1.0], seq_len=SEQ_LEN, seed=1)
    drawn = [name[0] for _ in range(150) for name in names(stream.batch(8, seq_len=SEQ_LEN, step=0))]
    # five standard deviations of a binomial; the seed is fixed
    assert abs(drawn.count("a") - 0.75 * len(drawn)) < 5 * (len(drawn) * 0.75 * 0.25) ** 0.5
    assert len(drawn) > 150 * 8  # packed: a row may hold several


def test_tokens_in_the_cache_are_those_of_the_template(tmp_path):
    conversations = load(tmp_path, 5, "a")
    template, tokenizer = ChatTemplate(DEFAULT_TEMPLATE), ByteTokenizer()
    talk = [{"role": "user", "content": "a003"}, {"role": "assistant", "content": "aaaa"}]
    for found, expected in zip(conversations.tokens[3], template.encode(tokenizer, talk), strict=True):
        assert np.array_equal(found, expected)


def test_too_few_conversations_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"0 conversations to learn from and 0 held out \(of 5 conversations 5 were left out because no word"
    ):
        load(tmp_path, 5, "a", seq_len=10)

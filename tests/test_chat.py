"""Conversations: the template's tokens, what is remembered, and what is forgotten when the context is full."""

from dataclasses import replace

import pytest

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.generation import generate
from lowmem.generation.chat import Chat, ChatWriter, prompt_room
from lowmem.generation.sampling import SamplingOptions
from lowmem.models.registry import build_model

TEMPLATE = ChatTemplate(DEFAULT_TEMPLATE, eos_token="<|endoftext|>")
EOS = ByteTokenizer().eos_id


def test_a_prompt_is_the_conversation_so_far():
    chat = Chat(TEMPLATE, ByteTokenizer(), 1000, "be kind")
    assert chat.prompt("hi") == list(b"be kind\n[INST] hi [/INST]")
    assert chat.prompt("hello") == list(b"be kind\n[INST] hello [/INST]")  # what got no answer is not remembered
    chat.add("hello", " good day\n")
    assert chat.prompt("and?") == [*b"be kind\n[INST] hello [/INST] good day", EOS, *b"[INST] and? [/INST]"]
    assert chat.forgotten == 0
    chat.reset()
    assert chat.prompt("hi") == list(b"be kind\n[INST] hi [/INST]")
    assert chat.stop == ("<|endoftext|>",)


def test_the_oldest_turns_go_first_and_the_system_message_stays():
    fits = len(b"S\n[INST] two [/INST] b") + 1 + len(b"[INST] three [/INST]")
    for context, kept in ((fits, b"S\n[INST] two [/INST] b"), (fits - 1, b"S\n")):
        chat = Chat(TEMPLATE, ByteTokenizer(), context, "S")
        chat.add("one", "a")
        chat.add("two", "b")
        ids = chat.prompt("three")
        assert ids == [*kept, *([EOS] if b"two" in kept else []), *b"[INST] three [/INST]"]
        assert (chat.forgotten, len(chat.turns)) == ((1, 1) if b"two" in kept else (2, 0))


def test_a_message_longer_than_the_context_is_given_whole():
    chat = Chat(TEMPLATE, ByteTokenizer(), 10)
    chat.add("one", "a")
    assert chat.prompt("long " * 9) == list(b"[INST] " + b"long " * 9 + b" [/INST]")


@pytest.mark.parametrize(("context", "new", "room"), [(256, 20, 236), (256, 200, 192), (1, 5, 1), (3, 1, 3), (4, 9, 3)])
def test_room_for_an_answer(context, new, room):
    assert prompt_room(context, new) == room


I3 = {"name": "i3", "attention_rank": 4, "num_heads": 1, "lorpt": LorptConfig(rank=4)}
DRAWN = SamplingOptions(temperature=1.0, seed=3)


def counted(model):
    """The model, and a list that gets the number of tokens of every pass."""
    passes, forward = [], model.forward
    model.forward = lambda tokens, **named: passes.append(tokens.shape[1]) or forward(tokens, **named)
    return model, passes


@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"positions": "learned"}, I3])
def test_answers_from_a_kept_cache_are_those_of_a_new_one(changes):
    config = ModelConfig(**{"dim": 32, "num_layers": 2, "num_heads": 2, **changes})
    model, passes = counted(build_model(config, vocab_size=257, max_seq_len=48, seed=0).eval())
    tokenizer, writer, ids = ByteTokenizer(), ChatWriter(model, ByteTokenizer(), 48), list(b"be brief")
    for turn, more in enumerate(([], [EOS, *b"go on"], [EOS, *b"and?"])):
        ids += more
        passes.clear()
        result = writer.answer(ids, replace(DRAWN, seed=turn), 6)
        assert len(result.token_ids) == 6
        # the cache holds all but the last token that was written before; that one and what was said since are read, then one for each token
        assert writer.reused == (len(ids) - len(more) - 1 if turn else 0)
        assert passes == [len(more) + 1 if turn else len(ids), 1, 1, 1, 1, 1]
        assert result.token_ids == generate(model, tokenizer, ids, replace(DRAWN, seed=turn), 6).token_ids
        ids += result.token_ids
    other = [*b"Be brief", *ids[8:]]  # another beginning: nothing of the cache holds
    assert writer.answer(other, DRAWN, 3).token_ids == generate(model, tokenizer, other, DRAWN, 3).token_ids
    assert writer.reused == 0


def test_a_window_that_slid_is_read_anew_and_more_room_is_made():
    config = ModelConfig(dim=32, num_layers=2, num_heads=2, positions="learned")
    model = build_model(config, vocab_size=257, max_seq_len=16, seed=0).eval()
    writer, ids = ChatWriter(model, ByteTokenizer(), 8), list(b"a long question")
    for _ in range(2):
        result, expected = writer.answer(ids, DRAWN, 9), generate(model, ByteTokenizer(), ids, DRAWN, 9)
        assert (result.token_ids, result.window_slides, writer.reused) == (expected.token_ids, expected.window_slides, 0)
        assert result.window_slides > 0
        ids += [*result.token_ids, *b"more"]


def test_an_interrupted_answer_leaves_nothing_in_the_cache():
    config = ModelConfig(dim=32, num_layers=2, num_heads=2)
    writer = ChatWriter(build_model(config, vocab_size=257, max_seq_len=16, seed=0).eval(), ByteTokenizer(), 40)

    def interrupt(text):
        raise KeyboardInterrupt

    first = writer.answer(list(b"hello"), DRAWN, 4)
    with pytest.raises(KeyboardInterrupt):
        writer.answer([*b"hello", *first.token_ids, *b"!"], DRAWN, 4, on_text=interrupt)
    assert writer.answer([*b"hello", *first.token_ids, *b"!"], DRAWN, 4).token_ids
    assert writer.reused == 0

"""Conversations: the template's tokens, what is remembered, and what is forgotten when the context is full."""

import pytest

from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.simple_tokenizers import ByteTokenizer
from lowmem.generation.chat import Chat, prompt_room

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

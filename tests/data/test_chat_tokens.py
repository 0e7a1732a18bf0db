"""Tokens of conversations: the ids and what of them is learned, for every kind of tokenizer, and the prompts that begin them."""

import numpy as np
import pytest

from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.tokenizers import ByteTokenizer, CharTokenizer, ChunkTokenizer
from lowmem.generation.chat import Chat
from tests.reference.conversations import CHATML, MARKED, TALK, VICUNA, check_ids_of_the_whole_conversation
from tests.reference.tiny_tokenizers import KINDS, TEXTS, tokenizer_of

LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [CHATML, LLAMA, VICUNA, MARKED])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_conversation(kind, source):
    check_ids_of_the_whole_conversation(kind, source)


OWN = {
    "bytes": ByteTokenizer(),
    "chars": CharTokenizer.train([*TEXTS, CHATML, "é😀ﬁ日本İ"]),
    "chunk": ChunkTokenizer.train([*TEXTS, "é😀ﬁ日本İ<|im_start|>"], lowercase=True),
}


@pytest.mark.parametrize("source", [CHATML, LLAMA, VICUNA, MARKED, DEFAULT_TEMPLATE])
@pytest.mark.parametrize("kind", [*KINDS, *(f"own {name}" for name in OWN)])
def test_a_prompt_is_what_the_conversation_begins_with_in_training(kind, source):
    tokenizer = OWN[kind[4:]] if kind.startswith("own") else tokenizer_of(kind)
    template = ChatTemplate(source, "<s>", "</s>" if not kind.startswith("own") else "<|endoftext|>")
    whole, said = template.encode(tokenizer, TALK)
    prompt, _ = template.encode(tokenizer, TALK[:3], add_generation_prompt=True)
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert said[len(prompt)]
    assert not said[len(prompt) - 1]
    chat = Chat(template, tokenizer, 10**6)
    chat.add(TALK[0]["content"], TALK[1]["content"])
    assert chat.prompt(TALK[2]["content"]) == prompt.tolist()


def test_spans_of_lowmems_own_tokenizers():
    text = "é😀 İstanbul, the fine日"
    for name, tokenizer in OWN.items():
        ids, spans = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        assert spans.shape == (len(ids), 2)
        assert spans[0, 0] == 0
        assert spans[-1, 1] == len(text)
        assert np.all(spans[1:, 0] <= spans[:-1, 1])
        if name == "bytes":
            assert [bytes(t for t, (a, _) in zip(ids, spans, strict=True) if a == n).decode() for n in range(len(text))] == list(text)

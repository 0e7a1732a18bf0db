"""Tokens of conversations: the ids and what of them is learned, for every kind of tokenizer, and the prompts that begin them."""

import numpy as np
import pytest

from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.chunk_tokenizer import ChunkTokenizer
from lowmem.data.simple_tokenizers import ByteTokenizer, CharTokenizer
from lowmem.generation.chat import Chat
from tests.reference.tiny_tokenizers import KINDS, TEXTS, library, tokenizer_of

TALK = [
    {"role": "user", "content": "hello, héllo 😀 ﬁne?"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "The  Fox\n"},
    {"role": "assistant", "content": "日本 is x."},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.parametrize("source", [CHATML, LLAMA, VICUNA, MARKED])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_conversation(kind, source):
    """And those that are learned spell the answers, with nothing lost and nothing of the questions."""
    plain, template = library(kind), ChatTemplate(source, "<s>", "</s>")
    ids, said = template.encode(tokenizer_of(kind), TALK)
    text = template.render(TALK)
    encoding = plain.encode(text, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    for answer in ("I am fine.", "日本 is x."):
        start = text.index(answer)
        covering = [bool(s) for s, (a, b) in zip(said, encoding.offsets, strict=True) if a < start + len(answer) and b > start]
        assert covering
        assert all(covering)
    for question in ("hello, héllo 😀 ﬁne?", "The  Fox"):
        start = text.index(question)
        assert not any(s for s, (a, b) in zip(said, encoding.offsets, strict=True) if a < start + len(question) and b > start)


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

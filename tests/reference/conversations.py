"""A conversation, templates to write it with, and what must be true of its tokens."""

from lowmem.data.chat_template import ChatTemplate
from tests.reference.tiny_tokenizers import library, tokenizer_of

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
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def check_ids_of_the_whole_conversation(kind: str, source: str) -> None:
    """The ids are those of the rendered text; those that are learned spell the answers, with nothing lost and nothing of the questions."""
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

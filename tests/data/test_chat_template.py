"""Templates against transformers' own renderer, what of a conversation the assistant says, and the sandbox."""

import json

import pytest

from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate, load_chat_template, save_chat_template
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.system.errors import DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi {{ 1 }}"},
    {"role": "assistant", "content": "héllo"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "bye"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{%- for m in messages %}\n  {%- if m.role == 'assistant' %}\n"
    "    {%- generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "  {%- else %}{{ bos_token if loop.first }}{{ m.role | upper }}: {{ m.content | tojson }} >{% endif %}\n{%- endfor %}"
)


def said(template: ChatTemplate, messages=TALK) -> str:
    """What the assistant's tokens spell, <|endoftext|> included."""
    tokenizer = ByteTokenizer()
    tokens, mask = template.encode(tokenizer, messages)
    assert len(tokens) == len(mask)
    return tokenizer.decode(tokens[mask].tolist())


@pytest.mark.parametrize("source", [DEFAULT_TEMPLATE, CHATML, MARKED])
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_equals_that_of_transformers(source, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = ChatTemplate(source, "<s>", "</s>").render(TALK[:4] if prompt else TALK, prompt)
    theirs, _ = render_jinja_template(
        conversations=[TALK[:4] if prompt else TALK], chat_template=source, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    assert ours == theirs[0]


def test_only_the_assistants_words_and_their_end_are_learned():
    assert said(ChatTemplate(DEFAULT_TEMPLATE)) == " héllo<|endoftext|> bye<|endoftext|>"
    assert said(ChatTemplate(CHATML)) == "héllo<|im_end|>\nbye<|im_end|>\n"
    assert said(ChatTemplate(MARKED, "<s>")) == "héllo<|endoftext|>bye<|endoftext|>"


@pytest.mark.parametrize("source", [DEFAULT_TEMPLATE, CHATML])
def test_a_prompt_is_the_beginning_of_the_conversation_that_continues_it(source):
    template, tokenizer = ChatTemplate(source), ByteTokenizer()
    whole, mask = template.encode(tokenizer, TALK)
    prompt, nobody = template.encode(tokenizer, TALK[:4], add_generation_prompt=True)
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert mask[len(prompt)]
    # earlier answers are the assistant's there, too
    assert nobody.tolist() == mask[: len(prompt)].tolist()


def test_an_end_token_in_the_text_of_a_user_stays_text():
    tokenizer = ByteTokenizer()
    talk = [{"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "a"}]
    tokens, _ = ChatTemplate(DEFAULT_TEMPLATE).encode(tokenizer, talk)
    assert tokens.tolist().count(tokenizer.eos_id) == 1


def test_what_ends_a_turn():
    assert ChatTemplate(DEFAULT_TEMPLATE).stop == ("<|endoftext|>",)
    assert ChatTemplate(CHATML).stop == ("<|im_end|>",)
    assert ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").stop == ("user:",)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for %}", "is no Jinja template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation .roles must alternate."),
        ("{{ messages.__class__.__mro__ }}", "refuses a conversation"),
        ("{{ messages[0].x.y }}", "refuses a conversation"),
        ("{% for m in messages %}{{ m.content / 2 }}{% endfor %}", "refuses a conversation .unsupported operand"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses a conversation .Range too big"),
        ("{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}", "cannot be told apart; mark them with"),
    ],
)
def test_bad_and_hostile_templates_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(source).encode(ByteTokenizer(), TALK)


def test_a_template_may_not_change_the_messages():
    with pytest.raises(DataError, match="refuses a conversation"):
        ChatTemplate("{{ messages.append(1) }}").render(TALK)


def test_loading_and_saving(tmp_path):
    with pytest.raises(DataError, match="has no chat template; put one into chat_template.jinja"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHATML, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    loaded = load_chat_template(tmp_path)
    assert (loaded.source, loaded.bos_token, loaded.eos_token) == (CHATML, "<s>", "</s>")
    save_chat_template(ChatTemplate(MARKED, "<b>", "</e>"), tmp_path)
    again = load_chat_template(tmp_path)
    assert again.render(TALK) == ChatTemplate(MARKED, "<b>", "</e>").render(TALK)

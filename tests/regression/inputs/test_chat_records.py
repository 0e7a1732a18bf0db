"""Chat records that were read wrongly without a word, or ended with a traceback or an advice that does not exist."""

import gzip
import json

import numpy as np
import pytest

from lowmem.config.schema import SourceConfig
from lowmem.data import chat_records
from lowmem.data.chat import ChatSource, Conversations, build_chat_tokens
from lowmem.data.chat_records import Conversation, parse_record, read_conversations
from lowmem.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lowmem.data.text_source import ignore_progress
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.system.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def parsed(record) -> Conversation:
    return parse_record(record, "f:1")


def said(template: str, record) -> str:
    """What of the text of a record is learned."""
    tokens, mask = ChatTemplate(template).encode(ByteTokenizer(), parsed(record))
    return ByteTokenizer().decode(tokens[mask].tolist())


@pytest.mark.parametrize(
    "record",
    [
        {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"system_prompt": "S", "messages": [USER, ASSISTANT]},
        {"system": "S", "text": "[INST] a [/INST] b"},
        {"system": "S", "messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]},
        {"system_message": "S", "messages": [USER, ASSISTANT]},
        {"instruction_system": "S", "prompt": "a", "response": "b"},
        {"prompt": [{"role": "system", "content": "S"}, USER], "completion": [ASSISTANT]},
        {"system": "S", "prompt": [USER], "completion": "b"},
    ],
)
def test_a_system_text_beside_the_messages_is_their_first(record):
    assert parsed(record).messages == [{"role": "system", "content": "S"}, USER, ASSISTANT]


def test_history_comes_before_the_question():
    record = {"instruction": "a", "output": "b", "history": [["q1", "a1"], ["q2", "a2"]]}
    earlier = [{"role": role, "content": text} for role, text in (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))]
    assert parsed(record).messages == [*earlier, USER, ASSISTANT]
    assert parsed({"instruction": "a", "context": "c", "response": "b"}).messages[0]["content"] == "a\n\nc"
    pairs = {"prompt": "a", "response": "b", "chat_history": [["q1", "a1"], ["q2", "a2"]]}
    assert parsed(pairs).messages == parsed(pairs | {"chat_history": earlier}).messages == [*earlier, USER, ASSISTANT]


def test_what_other_fields_repeat_is_not_lost():
    """As in Alpaca, UltraChat and others, which give the same in several shapes."""
    alpaca = {
        "instruction": "a",
        "input": "c",
        "output": "b",
        "text": "Below is a task.\n### Instruction:\na\n\n### Input:\nc\n### Response:\nb",
    }
    assert parsed(alpaca).messages == [USER | {"content": "a\n\nc"}, ASSISTANT]
    for beside in (
        {"prompt": "a"},
        {"text": "USER: a ASSISTANT: b</s>"},
        {"dialogue": [USER, ASSISTANT]},
        {"past": [["a", "b"]]},
        {"turns": 1},
    ):
        assert parsed({"messages": [USER, ASSISTANT], **beside}).messages == [USER, ASSISTANT]
    assert parsed({"text": "[INST] a [/INST] b", "prompt": "a", "answer": "b"}).messages == [USER, ASSISTANT]
    assert parsed({"prompt": "a", "response": "b", "tools": "[]"}).needed == ()


def test_a_prompt_and_a_completion_of_messages_are_a_conversation_of_which_the_completion_is_learned():
    again = {"role": "assistant", "content": "c"}
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [again]}
    assert parsed(record).messages == [USER, ASSISTANT, USER, again]
    assert said(DEFAULT_TEMPLATE, record) == " c<|endoftext|>"
    assert said(DEFAULT_TEMPLATE, record | {"prompt": [USER, ASSISTANT | {"weight": 1}, USER]}) == " b<|endoftext|> c<|endoftext|>"
    assert said(WRITER, {"prompt": "a", "completion": [ASSISTANT | {"reasoning_content": "c"}]}) == "assistant: cb|"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": None, "instruction": "a", "output": "b"},
        {"messages": None, "prompt": "a", "response": "b", "system": None, "weight": None},
        {"conversations": [{"role": None, "content": None, "from": "human", "value": "a"}, {"from": "gpt", "value": "b", "content": None}]},
        {"messages": [USER | {"tool_calls": None, "weight": None}, ASSISTANT | {"reasoning_content": None}]},
        {"messages": [USER | {"content": [{"type": "text", "text": "a", "image": None}]}, ASSISTANT | {"content": [{"text": "b"}]}]},
    ],
)
def test_nulls_are_as_missing_and_parts_of_text_are_joined(record):
    conversation = parsed(record)
    assert (conversation.messages, conversation.needed) == ([USER, ASSISTANT], ())


def test_an_answer_of_weight_0_is_read_and_not_learned():
    other = {"role": "assistant", "content": "good"}
    for flag in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": 0}):
        assert said(DEFAULT_TEMPLATE, {"messages": [USER, ASSISTANT | flag, USER, other | {"weight": 1}]}) == " good<|endoftext|>"
    marked = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"  # noqa: E501
    assert said(marked, {"messages": [USER, ASSISTANT | {"train": False}, USER, other]}) == "good"
    assert said(DEFAULT_TEMPLATE, {"messages": [USER, ASSISTANT], "weight": 0}) == ""
    once = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"^f:1: .* has 1 \{% generation %\} blocks for 2 messages"):
        said(once, {"messages": [USER, ASSISTANT | {"weight": 0}, USER, other]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "message 1 has 'weight': 0.5; allowed: 0"),
        ({"messages": [USER, ASSISTANT | {"weight": "0"}]}, "message 1 has 'weight': '0'; allowed: 0"),
        ({"messages": [USER, ASSISTANT | {"weight": 1, "train": False}]}, "contradict each other"),
        ({"messages": [USER | {"train": True}, ASSISTANT]}, "message 0 is the user's and has 'train': true; only the assistant's"),
        ({"messages": [USER, ASSISTANT | {"loss": False}]}, "message 1 has 'loss', which cannot be used; write 'weight': 0"),
        ({"prompt": "a", "response": "b", "weight": float("nan")}, "has 'weight': nan; allowed: 0"),
        ({"messages": [USER, ASSISTANT], "history": [["q", "a"]]}, "'history' beside 'messages', which would be lost"),
        ({"messages": [USER, ASSISTANT], "output": "c"}, "'output' beside 'messages', which would be lost"),
        ({"prompt": "a", "instruction": "c", "output": "b"}, "has both 'prompt' and 'instruction'; keep one"),
        ({"system": "S", "messages": [{"role": "system", "content": "T"}, USER, ASSISTANT]}, "'system' is not that of its first message"),
        ({"messages": [USER, ASSISTANT], "images": ["x.png"]}, "has 'images', which cannot be used; only text can be learned"),
        ({"messages": [USER | {"content": [{"type": "image"}]}, ASSISTANT]}, "message 0: 'content' has a part of type 'image'"),
        ({"messages": [USER | {"role": ["user"]}, ASSISTANT]}, r"message 0 has the role \['user'\], allowed: system"),
        ({"prompt": "a\ud800", "response": "b"}, r"the lone surrogate U\+D800, which is no character"),
        ({"prompt": "a\ufdd2", "response": "b"}, r"the noncharacter U\+FDD2"),
        ({"prompt": "a", "response": "b", "tools": "[1"}, "'tools': malformed JSON"),
        ({"prompt": "a", "response": "b", "tools": '[{"a":1}] {"b":2}'}, "'tools' goes on after its list with '{\"b\":2}'"),
        ({"prompt": "a", "response": "b", "documents": '[{"a":1}]]'}, "'documents' goes on after its list with ']'"),
        ({"messages": [USER, ASSISTANT], "text": "[INST]other[/INST]more"}, "'text' beside 'messages', which would be lost"),
        ({"messages": [USER, ASSISTANT], "chat_history": [["q", "a"]]}, "'chat_history' beside 'messages', which would be lost"),
        ({"messages": [USER, ASSISTANT], "past": [{"role": "user", "content": "q"}]}, "'past' beside 'messages'"),
        ({"prompt": "a", "response": "b", "dialogue": [USER, {"role": "user", "content": "c"}]}, "'dialogue' beside 'prompt'"),
        ({"prompt": "a", "response": "b", "text": "c"}, "'text' beside 'prompt'"),
        ({"prompt": "a", "response": "b", "rationale": "c"}, "'rationale' beside 'prompt', .*; name it 'reasoning_content'"),
        ({"prompt": "c", "text": "[INST] a [/INST] b"}, "'prompt' beside 'text'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": CALLS}], "input": [1]}, "'input' beside 'messages'"),
        ({"system_message": "S", "messages": [{"role": "system", "content": "T"}, USER, ASSISTANT]}, "'system_message' is not that of"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label', which cannot be used; write 'weight': 0"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "has 'rejected', and preferences are not learned; give the chosen"),
        ({"messages": [USER, ASSISTANT], "rejected": "c"}, "has 'rejected', and preferences are not learned"),
        ({"prompt": [USER], "completion": [ASSISTANT], "input": "c"}, "'input' beside 'prompt', which would be lost"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "'completion' has no message of the assistant's"),
        ({"prompt": [USER, {"content": "x"}], "completion": [ASSISTANT]}, "'prompt': message 1 has no role, allowed: system"),
        ({"messages": [USER | {"role": None}, ASSISTANT]}, "message 0 has no role, allowed: system"),
        ({"prompt": [{"txet": "a"}], "response": "b"}, "'prompt' has a part without 'text'; write"),
        ({"prompt": [{"type": "text", "text": ["a"]}], "response": "b"}, "'prompt' has a part whose 'text' is a list, expected text"),
        ({"prompt": ["a", None], "response": "b"}, "'prompt' has a part that is text by itself; write"),
    ],
)
def test_what_would_be_lost_or_misread_is_refused_with_its_place(record, message):
    with pytest.raises(DataError, match=f"^f:1.*{message}"):
        parsed(record)


WRITER = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }}){% endif %}|{% endfor %}"
)


def test_reasoning_calls_and_tools_reach_the_template_as_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    thought = {**ASSISTANT, "content": "", "reasoning_content": "hm ", "tool_calls": CALLS}
    messages = [USER, thought, {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}, ASSISTANT]
    expected, _ = render_jinja_template(conversations=[messages], tools=TOOLS, chat_template=WRITER)
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert ChatTemplate(WRITER).render(parsed({"messages": messages, "tools": tools})) == expected[0]
    without_content = {key: value for key, value in thought.items() if key != "content"} | {"content": None}
    assert parsed({"messages": [USER, without_content, ASSISTANT]}).messages[1]["content"] == ""
    assert said(WRITER, {"prompt": "a", "thinking": "c", "response": "b"}) == "assistant: cb|"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "c"}]}, "reasoning_content"),
        ({"messages": [USER, ASSISTANT | {"thinking": "c"}]}, "reasoning_content"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": CALLS}]}, "tool_calls"),
        ({"messages": [USER, ASSISTANT | {"function_call": {"name": "f"}}]}, "function_call"),
        ({"messages": [USER, ASSISTANT | {"refusal": "no"}]}, "refusal"),
        ({"messages": [USER, ASSISTANT], "tools": TOOLS}, "tools"),
    ],
)
def test_content_that_the_template_does_not_write_is_refused(record, field):
    with pytest.raises(DataError, match=f"^f:1: the chat template does not write '{field}', which the record has"):
        said(DEFAULT_TEMPLATE, record)
    every_field = "{{ tools }}{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
    assert said(every_field, record)
    labelled = {"messages": [{"id": "7", "name": "Ann", "timestamp": "now", **USER}, ASSISTANT]}
    assert said(DEFAULT_TEMPLATE, labelled) == " b<|endoftext|>"


def read(path, **options):
    return [conversation.messages for conversation in read_conversations(path, **options)]


def test_files_as_other_programs_leave_them(tmp_path):
    record = {"messages": [USER, ASSISTANT]}
    line = json.dumps(record)
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([record] * 3).encode())
    (tmp_path / "joined.jsonl").write_text(f"{line}{line}\n\n{line}")
    (tmp_path / "one.json.gz").write_bytes(gzip.compress(json.dumps([record, *[{"prompt": "x" * 9000, "response": "b"}] * 30]).encode()))
    assert read(tmp_path / "bom.json") == read(tmp_path / "joined.jsonl") == [[USER, ASSISTANT]] * 3
    assert len(read(tmp_path / "one.json.gz")) == 31


def test_nulls_that_parquet_makes_of_mixed_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [USER, ASSISTANT | {"tool_calls": CALLS}]}, {"messages": [USER, ASSISTANT]}, {"prompt": "a", "response": "b"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict.fromkeys(("messages", "prompt", "response")) | row for row in rows]), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet") == [[USER, ASSISTANT | {"tool_calls": CALLS}], [USER, ASSISTANT], [USER, ASSISTANT]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "prompt": "c", "response": "b"}', ":1: malformed JSON .'prompt' occurs twice"),
        ("a.jsonl", b'{"prompt": "a", "response": "b", "n": ' + b"9" * 10**6 + b"}", ":1: .*an integer of 1000000 digits"),
        ("a.jsonl", b"[" * 10**5, ":1: the JSON is nested too deeply"),
        ("a.jsonl", b'{"prompt": "a", "response": "b", "n": ' + b"[" * 900 + b"]" * 900 + b"}", ":1: .*nested too deeply"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16, expected UTF-8"),
        ("a.jsonl", b'{"prompt": "\xe9", "response": "b"}', r":1: byte 0xe9 is not UTF-8 .*; convert it to UTF-8, as by iconv"),
        ("a.json", b'[{"messages": []}]', ":1: 'messages' holds no message"),
        ("a.json", b'[{"prompt": "a", "response": "b"} {"prompt": "a", "response": "b"}]', ":2: malformed JSON .found '{' after a record"),
    ],
)
def test_damaged_files_are_refused_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_decode_errors_of_a_configuration_are_heeded(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xe9\\ud800", "response": "b"}')
    assert read(tmp_path / "a.jsonl", decode_errors="replace") == [[USER | {"content": "\ufffd\ufffd"}, ASSISTANT]]


def test_globs_reach_into_folders(tmp_path):
    for name in ("a/c.jsonl", "b/d/c.jsonl", "b/d/other.csv"):
        (tmp_path / "dir" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dir" / name).write_text(json.dumps({"prompt": name, "response": "b"}))
    for pattern, count in (("dir/*/c.jsonl", 1), ("dir/**/c.jsonl", 2), ("dir", 2)):
        source = ChatSource(SourceConfig(path=str(tmp_path / pattern)), ChatTemplate(DEFAULT_TEMPLATE))
        assert len(list(source.conversations())) == count


def conversations(tmp_path, records, template=DEFAULT_TEMPLATE, options="data.", **chosen) -> Conversations:
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = ChatSource(SourceConfig(path=str(tmp_path / "c.jsonl")), ChatTemplate(template))
    tokens = build_chat_tokens(source, ByteTokenizer(), tmp_path / "cache", ignore_progress)
    return Conversations(tokens, options=options, **{"seq_len": 64, "truncation": "cut", "val_fraction": 0.2, **chosen})


def test_what_is_held_out_depends_on_the_records_alone(tmp_path):
    """Continued with another length, policy, template, order or more records, a run never trains on what was held out."""
    records = [{"prompt": f"{n} " * (1 + n % 30), "response": "x" * (1 + n % 7)} for n in range(200)]
    short, long = conversations(tmp_path, records), conversations(tmp_path, records, seq_len=200)
    assert len(long.held_out) == 40
    assert set(short.held_out) < set(long.held_out)
    bare = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    others = [{"seq_len": 40}, {"seq_len": 100, "truncation": "drop"}, {"template": bare}]
    for other in [short, *(conversations(tmp_path, records, **chosen) for chosen in others)]:
        assert not set(other.train.tolist()) & set(long.held_out)
        assert set(other.held_out) <= set(long.held_out)
    backwards = conversations(tmp_path, records[::-1], seq_len=200)
    assert sorted(199 - number for number in backwards.held_out) == long.held_out


def test_advice_names_options_that_exist(tmp_path):
    records = [{"prompt": "x" * 90, "response": str(n)} for n in range(9)]
    with pytest.raises(DataError, match=r"0 conversations to learn from and 0 held out .*raise seq_len, or set val_fraction=0$"):
        conversations(tmp_path, records, options="")
    with pytest.raises(DataError, match=r"raise data.seq_len, or set data.val_fraction=0$"):
        conversations(tmp_path, records)
    assert np.all(np.array(conversations(tmp_path, records, seq_len=128).held_out) < 9)


def test_numbers_that_are_none_are_refused_where_text_is_expected():
    for record in ({"prompt": float("nan"), "response": "b"}, {"prompt": "a", "response": "b", "system": float("nan")}):
        with pytest.raises(DataError, match="^f:1: '(prompt|system)' is nan, expected text"):
            parsed(record)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
def test_a_record_without_end_is_refused_before_it_fills_the_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(chat_records, "MAX_LINE_BYTES", 2**17)
    data = b'[{"prompt": "' + b"x" * 2**20
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=f"{name}:1: .*longer than 128 KiB"):
        read(tmp_path / name)


def test_parquet_that_cannot_be_read_names_the_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"a", b"a", b"\xe9"], pyarrow.binary()).view(pyarrow.string())
    answers = pyarrow.array(["b"] * 3)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "response": answers}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:3: a text is not UTF-8 .*; convert it to UTF-8"):
        read(tmp_path / "a.parquet")
    doubled = pyarrow.Table.from_arrays([answers, answers], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(doubled, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has two columns 'prompt'; rename or remove one"):
        read(tmp_path / "b.parquet")


def test_parquet_columns_that_no_record_uses_may_hold_what_python_cannot(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["a"] * 3, "response": ["b"] * 3}
    far = [
        pyarrow.array([10**14] * 3, pyarrow.timestamp("s")), pyarrow.array([2**62] * 3, pyarrow.duration("s")),
        pyarrow.array([2**31 - 1] * 3, pyarrow.int32()).cast(pyarrow.date32()), pyarrow.array([0] * 3, pyarrow.timestamp("s", "No/Where")),
    ]  # fmt: skip
    for number, column in enumerate(far):
        pyarrow.parquet.write_table(pyarrow.table({"created": column, **columns}), tmp_path / f"{number}.parquet")
        assert read(tmp_path / f"{number}.parquet") == [[USER, ASSISTANT]] * 3
    used = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 3), pyarrow.array(["a"] * 3), far[0]], ["role", "content", "created"])
    lists = pyarrow.ListArray.from_arrays([0, 1, 2, 3], used)
    pyarrow.parquet.write_table(pyarrow.table({"messages": lists}), tmp_path / "used.parquet")
    with pytest.raises(DataError, match=r"used.parquet:1: cannot be read \(.+\); restore the file, or convert its columns"):
        read(tmp_path / "used.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"created": far[0], "reply": ["b"] * 3}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="none.parquet: found the fields 'created', 'reply', expected messages"):
        read(tmp_path / "none.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "reply": ["b"]}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match="half.parquet:1: found the fields 'reply', 'prompt', expected messages"):
        read(tmp_path / "half.parquet")


def test_hub_columns_that_no_record_uses_are_not_read(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    far = pyarrow.array([10**14], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"created": far, "prompt": ["a"], "response": ["b"]}), tmp_path / "data/train.parquet")
    source = ChatSource(SourceConfig(hub=str(tmp_path / "data")), ChatTemplate(DEFAULT_TEMPLATE))
    assert [conversation.messages for conversation in source.conversations()] == [[USER, ASSISTANT]]

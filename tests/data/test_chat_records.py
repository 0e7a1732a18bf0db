"""Chat records in every shape that is read, and what is said of others."""

import gzip
import json

import pytest

from lowmem.data.chat_records import parse_record, read_conversations
from lowmem.system.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"text": "[INST] hi [/INST] hello"},
        "<s>[INST] hi [/INST] hello </s>",
    ],
)
def test_every_shape_gives_the_same_messages(record):
    assert parse_record(record, "file:1").messages == [USER, ASSISTANT]


def test_input_system_and_several_turns():
    joined = parse_record({"instruction": "Add.", "input": "1, 2", "output": "3", "system": "be kind"}, "f").messages
    assert joined == [SYSTEM, {"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    turns = parse_record("[INST] <<SYS>>be kind<</SYS>> hi [/INST] hello [INST] hi [/INST] hello", "f").messages
    assert turns == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"question": "hi"}, "found the fields 'question', expected messages, prompt and response"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has the role 'robot', allowed: system, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' is a number, expected text"),
        ({"messages": [USER]}, "the assistant says nothing"),
        ({"text": "once upon a time"}, r"begins with 'once upon a time', expected \[INST\]"),
        ("[INST] hi", r"without its \[/INST\]"),
        (7, "found a number, expected an object"),
    ],
)
def test_other_shapes_are_refused_with_their_place(record, message):
    with pytest.raises(DataError, match=f"^file:1: .*{message}"):
        parse_record(record, "file:1")


def test_files(tmp_path):
    records = [{"prompt": str(n), "response": "é" * n} for n in range(1, 4)]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("\n".join(f"[INST] {n} [/INST] {'é' * n}" for n in range(1, 4)))
    found = [
        [conversation.messages for conversation in read_conversations(tmp_path / name)]
        for name in ("a.json", "a.jsonl", "a.jsonl.gz", "a.txt")
    ]
    assert all(each == found[0] for each in found)
    assert found[0][2] == [{"role": "user", "content": "3"}, {"role": "assistant", "content": "ééé"}]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [USER, ASSISTANT]}] * 3), tmp_path / "a.parquet")
    assert [conversation.messages for conversation in read_conversations(tmp_path / "a.parquet")] == [[USER, ASSISTANT]] * 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"', r"a.jsonl:2: malformed JSON .*; expected one JSON object a line"),
        ("a.json", '{"prompt": "a"}', "holds an object, expected a list of records"),
        ("a.csv", "x", "a format that holds no chat records; allowed: .json .jsonl .txt .parquet"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_conversations(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file .*check the path"):
        list(read_conversations(tmp_path / "none.json"))

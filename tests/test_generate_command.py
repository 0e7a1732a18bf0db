import io
import json
import sys
from pathlib import Path

import pytest
import torch

from lowmem import generate as command
from lowmem.config import LorptConfig, ModelConfig, RunConfig
from lowmem.data.simple_tokenizers import ByteTokenizer
from lowmem.errors import CheckpointError, ConfigError, StoppedBySignal
from lowmem.generation import generate, position_window
from lowmem.models.registry import build_model
from lowmem.run_model import RunModel
from lowmem.sampling import SamplingOptions


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only lose time to threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(**changes):
    shape = {"dim": 32, "hidden_dim": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 257, "max_seq_len": 16}
    config = ModelConfig(**{**shape, **changes})
    return build_model(config, vocab_size=257, max_seq_len=16, seed=0).eval()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Commands find this run whatever --run says."""
    run = RunModel(tiny_model(), ByteTokenizer(), RunConfig(), 10, tmp_path)
    asked = []
    monkeypatch.setattr(command, "load_run_model", lambda *arguments: asked.append(arguments) or run)
    return run, asked


I3 = {
    "name": "i3", "hidden_dim": 0, "num_layers": 11, "num_heads": 1, "attention_rank": 8, "lorpt": LorptConfig(rank=8),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "alibi"}, {"positions": "learned"}, {"attention_rank": 8}, {"tie_embeddings": True}, I3]
)
def test_real_models_write_the_same_with_and_without_a_cache(changes):
    model = tiny_model(**changes)
    window = position_window(model)
    assert window == (16 if changes.get("positions") == "learned" or "name" in changes else None)
    result = generate(model, ByteTokenizer(), "hello", SamplingOptions(temperature=0), 24)
    view, expected = list(b"hello"), []
    with torch.no_grad():
        while len(expected) < len(result.token_ids):
            if window and len(view) > window:
                view = view[-window // 2 :]
            expected.append(int(model(torch.tensor([view]))[0, -1].argmax()))
            view.append(expected[-1])
    assert result.token_ids == expected
    assert len(result.token_ids) == 24 or result.stop_reason == "eos"


def test_json_is_one_object_and_alone_on_stdout(run, capsys):
    arguments = ["--run", "r", "--prompt", "ab", "--max_new_tokens", "5", "--json", "--top_k", "9"]
    arguments += ["--checkpoint", "best", "--device", "cpu"]
    assert command.generate_main(arguments) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert (report["prompt"], report["prompt_tokens"], report["step"], report["max_new_tokens"]) == ("ab", 2, 10, 5)
    assert report["new_tokens"] == len(report["token_ids"]) <= 5
    assert report["sampling"]["top_k"] == 9
    assert run[1] == [("r", "best", torch.device("cpu"))]
    again = ["--run", "r", "--prompt", "ab", "--max_new_tokens", "5", "--json", "--top_k", "9", "--seed", str(report["sampling"]["seed"])]
    command.generate_main(again)
    assert json.loads(capsys.readouterr().out)["token_ids"] == report["token_ids"]


def test_text_is_streamed_after_the_prompt_and_figures_go_to_stderr(run, capsys):
    assert command.generate_main(["--run", "r", "--prompt", "ab", "--max_new_tokens", "3", "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("ab")
    assert output.out.endswith("\n")
    assert "[step 10, 3 tokens, " in output.err
    assert "stopped by length, seed " in output.err


def test_the_prompt_can_come_from_stdin(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    command.generate_main(["--run", "r", "--prompt", "-", "--max_new_tokens", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt"] == "two\nlines"


def answer(monkeypatch, *lines):
    """input() gives these lines (or raises these exceptions), then the end of the input."""
    given = iter(lines)

    def read():
        line = next(given, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_interactive_settings(run, capsys, monkeypatch):
    answer(
        monkeypatch, "/set temperature 0.5", "/set top_p 7", "/set top_k many", "/set colour red", "/set max_new_tokens 0", "/show",
        KeyboardInterrupt, "/set max_new_tokens 2", "hello",
    )  # fmt: skip
    assert command.generate_main(["--run", "r", "--interactive", "--seed", "4"]) == 0
    output = capsys.readouterr()
    for expected in ("temperature=0.5\n", "top_p is 7.0; allowed", "top_k is 'many'; expected a whole number", "/set NAME VALUE",
                     "max_new_tokens is 0; allowed", "temperature=0.5  top_k=0  top_p=1.0", "2 tokens", "seed 4]"):  # fmt: skip
        assert expected in output.err
    expected = generate(run[0].model, run[0].tokenizer, "hello", SamplingOptions(temperature=0.5, seed=4), 2)
    assert output.out == expected.text + "\n"


def test_ctrl_c_ends_one_text_in_a_conversation_and_the_command_otherwise(run, capsys, monkeypatch):
    calls = []

    def interrupted(model, tokenizer, prompt, *rest, **named):
        calls.append(prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", interrupted)
    answer(monkeypatch, "one", "two")
    assert command.generate_main(["--run", "r", "--interactive", "--prompt", "zero"]) == 0
    assert calls == ["zero", "one", "two"]
    with pytest.raises(StoppedBySignal) as error:
        command.generate_main(["--run", "r", "--prompt", "x"])
    assert error.value.exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "the following arguments are required: --run; see lowmem generate --help"),
        (["--run", "r"], "--prompt is missing; give --prompt TEXT"),
        (["--run", "r", "--prompt", "x", "--top_k", "1.5"], "argument --top_k: invalid int value: '1.5'"),
        (["--run", "r", "--prompt", "x", "--top_p", "0"], "top_p is 0.0; allowed"),
        (["--run", "r", "--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0; allowed: 1 or more"),
        (["--run", "r", "--prompt", "x", "--checkpoint", "first"], "found 'first'; allowed: latest, best, or a step"),
        (["--run", "r", "--prompt", "x", "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--run", "r", "--interactive", "--json"], "--interactive and --json exclude each other"),
        (["--run", "r", "--interactive", "--prompt", "-"], "--prompt cannot be -"),
        (["--run", "r", "--prompt", "x", "--device", "tpu"], "device is 'tpu'; allowed: auto, cpu, cuda"),
    ],
)
def test_bad_usage_is_refused(arguments, message, run):
    with pytest.raises(ConfigError, match=message):
        command.generate_main(arguments)
    assert run[1] == []  # before anything is loaded


def test_a_folder_without_a_run_is_reported(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no run directory"):
        command.generate_main(["--run", str(tmp_path), "--prompt", "x"])

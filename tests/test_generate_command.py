import copy
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem.cli import generate as command
from lowmem.cli.export import export_main
from lowmem.cli.main import run_command
from lowmem.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from lowmem.data.chat_template import DEFAULT_TEMPLATE
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.run_model import RunModel
from lowmem.generation import GenerationResult, generate
from lowmem.generation.sampling import SamplingOptions
from lowmem.models.registry import build_model
from lowmem.planning.generation_memory import generation_memory
from lowmem.planning.hardware import Hardware
from lowmem.system.errors import CheckpointError, ConfigError, DataError, StoppedBySignal
from tests.reference.tiny_adapters import save_adapted, save_base


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

    def load(*arguments, outline=False):
        if outline:
            return replace(run, model=copy.deepcopy(run.model).to("meta"))
        asked.append(arguments)
        return run

    monkeypatch.setattr(command, "load_run_model", load)
    return run, asked


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
        (["--run", "r", "--prompt", "x", "--top_k", "1.5"], "argument --top_k: '1.5' is no whole number"),
        (["--run", "r", "--prompt", "x", "--top_p", "0"], "top_p is 0.0; allowed"),
        (["--run", "r", "--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0; allowed: 1 to 2147483647"),
        (["--run", "r", "--prompt", "x", "--checkpoint", "first"], "found 'first'; allowed: latest, best, or a step"),
        (["--run", "r", "--prompt", "x", "--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--run", "r", "--interactive", "--json"], "--interactive and --json exclude each other"),
        (["--run", "r", "--interactive", "--prompt", "-"], "--prompt cannot be -"),
        (["--run", "r", "--prompt", "x", "--preset", "wild"], "argument --preset: invalid choice: 'wild'"),
        (["--run", "r", "--prompt", "x", "--stop", ""], 'a stop string is ""; give at least one character'),
        (["--run", "r", "--prompt", "x", "--batch_size", "0"], "batch_size is 0; allowed: 1 or more"),
        (["--run", "r", "--prompt", "x", "--presence_penalty", "3"], "presence_penalty is 3.0; allowed: -2 to 2"),
        (["--run", "r", "--prompt", "x", "--system", "s"], "--system is for --chat"),
        (["--run", "r", "--interactive", "--chat"], "--interactive and --chat exclude each other"),
        (["--run", "r", "--interactive", "--prompt", "x", "--prompt", "y"], "--interactive takes one --prompt"),
        (["--run", "r", "--prompt", "-", "--prompt", "-"], "--prompt - is given twice"),
        (["--run", "r", "--chat", "--json"], "--chat with --json needs --prompt"),
        (["--run", "r", "--prompt", "x", "--device", "tpu"], "device is 'tpu'; allowed: auto, cpu, cuda"),
        (["--run", "r", "--prompt", "x", "--storage_dir", "d"], "--storage_dir is for --weights_at=disk; add it"),
        (["--run", "r", "--prompt", "x", "--weights_at", "host", "--device", "cpu"], "in host memory already; use disk"),
    ],
)
def test_bad_usage_is_refused(arguments, message, run):
    with pytest.raises(ConfigError, match=message):
        command.generate_main(arguments)
    assert run[1] == []  # before anything is loaded


def test_several_prompts_are_one_json_object_each(run, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one\\u2028line"}\n\n{"prompt": ""}\n')
    arguments = ["--run", "r", "--prompt", "ab", "--prompts_file", str(tmp_path / "prompts.jsonl"), "--json", "--seed", "3"]
    assert command.generate_main([*arguments, "--max_new_tokens", "6", "--batch_size", "2", "--preset", "creative", "--top_k", "4"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [report["prompt"] for report in reports] == ["ab", "one\u2028line", ""]
    for report in reports:
        options = SamplingOptions(
            temperature=1.1, min_p=0.05, presence_penalty=0.3, frequency_penalty=0.3, top_k=4, seed=report["sampling"]["seed"]
        )
        assert report["sampling"] == options.__dict__
        assert generate(run[0].model, run[0].tokenizer, report["prompt"], options, 6).token_ids == report["token_ids"]
    assert len({report["sampling"]["seed"] for report in reports}) == 3


def test_several_prompts_as_text_stand_in_their_order(run, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("first\r\n\nsecond\nthird")
    command.generate_main(
        ["--run", "r", "--prompts_file", str(tmp_path / "prompts.txt"), "--max_new_tokens", "2", "--batch_size", "2", "--temperature", "0"]
    )
    output = capsys.readouterr()
    texts = [
        generate(run[0].model, run[0].tokenizer, prompt, SamplingOptions(temperature=0), 2).text for prompt in ("first", "second", "third")
    ]
    assert output.out == f"first{texts[0]}\n\nsecond{texts[1]}\n\nthird{texts[2]}\n"
    assert [line.split(",")[0] for line in output.err.splitlines()] == ["[text 1 of 3", "[text 2 of 3", "[text 3 of 3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt"), ("p.txt", b"\xff\n", "is not UTF-8"), ("p.txt", None, "cannot be read"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'p.jsonl:2: no object with a text as "prompt"'),
        ("p.jsonl", b"\nab\n", "p.jsonl:2: no JSON"),
    ],
)  # fmt: skip
def test_bad_files_of_prompts_are_refused(name, text, message, run, tmp_path):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=message):
        command.generate_main(["--run", "r", "--prompts_file", str(tmp_path / name)])
    assert run[1] == []


def test_a_conversation_remembers_until_it_is_reset(run, capsys, monkeypatch, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    asked = []

    def write(writer, ids, options, max_new_tokens, stop, on_text):
        asked.append((run[0].tokenizer.decode(ids), stop))
        for piece in (" ", " fine", "!"):
            on_text(piece)
        return GenerationResult("  fine!", [1, 2], len(ids), "eos", 0, 0, 1.0)

    monkeypatch.setattr(command.ChatWriter, "answer", write)
    run[0].model.max_seq_len = 70
    answer(monkeypatch, "hello", "again", "/reset", "new", "/set max_new_tokens 3", "x" * 60, "/wrong", "/exit", "never")
    arguments = ["--run", str(tmp_path), "--chat", "--system", "S", "--stop", "STOP", "--max_new_tokens", "4"]
    assert command.generate_main(arguments) == 0
    assert [text for text, _ in asked] == [
        "S\n[INST] hello [/INST]",
        "S\n[INST] hello [/INST] fine!<|endoftext|>[INST] again [/INST]",
        "S\n[INST] new [/INST]",
        f"S\n[INST] {'x' * 60} [/INST]",
    ]
    assert asked[0][1] == ["<|endoftext|>", "STOP"]
    output = capsys.readouterr()
    assert output.out == "fine!\n" * 4
    assert "the conversation begins anew" in output.err
    assert output.err.count("the oldest turns are forgotten") == 1
    assert output.err.count("say something; /set") == 2  # at the beginning, and for the command that is none


def test_turns_of_a_conversation_can_be_given(run, capsys, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    arguments = ["--run", str(tmp_path), "--chat", "--prompt", "hi", "--prompt", "yo", "--json", "--max_new_tokens", "3", "--seed", "1"]
    run[0].model.max_seq_len = 100
    command.generate_main(arguments)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("hi", "yo")
    assert first["prompt_tokens"] == len("[INST] hi [/INST]")
    assert second["prompt_tokens"] > first["prompt_tokens"] + len("[INST] yo [/INST]")


def test_a_run_without_a_template_cannot_chat(run, tmp_path):
    with pytest.raises(DataError, match="has no chat template"):
        command.generate_main(["--run", str(tmp_path), "--chat", "--prompt", "x"])
    assert run[1] == []


def test_a_dry_run_tells_the_memory_and_reads_no_weights(run, capsys):
    arguments = ["--run", "r", "--prompt", "abc", "--prompt", "a", "--max_new_tokens", "20", "--dry_run", "--device", "cpu"]
    command.generate_main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["predicted"]["batch_size"], report["predicted"]["context"], report["fits"]) == (2, 23, True)
    assert report["predicted"]["cache_bytes"] == run[0].model.new_cache(2, 23).nbytes()
    command.generate_main(arguments)
    assert capsys.readouterr().out.startswith("writing 2 texts of 23 tokens: ")
    command.generate_main(["--run", "r", "--dry_run", "--batch_size", "4", "--max_new_tokens", "20", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("writing 4 texts of 36 tokens: ")  # prompts as long as the model's sequences, 16
    assert run[1] == []


def test_what_does_not_fit_is_refused_in_one_line_before_weights_are_read(run, capsys, monkeypatch):
    need = generation_memory(copy.deepcopy(run[0].model).to("meta"), 4, 21, 256).ram_bytes
    monkeypatch.setattr(command, "this_hardware", lambda: Hardware(need, 0))
    arguments = ["--run", "r", *["--prompt", "a"] * 4, "--max_new_tokens", "20", "--device", "cpu", "--json"]
    assert command.generate_main(arguments) == 0
    capsys.readouterr()
    loaded = len(run[1])
    arguments += ["--prompt", "a"] * 60
    assert run_command(command.generate_main, [*arguments, "--batch_size", "64"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lowmem: error: writing 64 texts of 21 tokens: ")
    assert "set --batch_size 4\n" in error
    assert len(run[1]) == loaded
    assert run_command(command.generate_main, [*arguments, "--batch_size", "64", "--force"]) == 0


def test_a_folder_without_a_run_is_reported(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no run directory"):
        command.generate_main(["--run", str(tmp_path), "--prompt", "x"])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is no run directory"):
        command.generate_main(["--run", str(tmp_path / "file" / "run"), "--prompt", "x"])


@pytest.mark.parametrize(
    ("positions", "changes"),
    [("alibi", {}), ("learned", {}), ("rope", {"step": 0}), ("rope", {"seq_len": 17}), ("rope", {"init_from": "base"})],
)
def test_only_rotary_positions_past_their_training_are_warned_of(run, monkeypatch, capsys, positions, changes):
    config = RunConfig(data=DataConfig(seq_len=changes.get("seq_len", 8)), train=TrainConfig(init_from=changes.get("init_from", "")))
    model = build_model(replace(tiny_model().config, positions=positions), vocab_size=257, max_seq_len=32, seed=0).eval()
    changed = replace(run[0], model=model, config=config, step=changes.get("step", 10))
    monkeypatch.setattr(
        command, "load_run_model", lambda *_, outline=False: replace(changed, model=copy.deepcopy(model).to("meta")) if outline else changed
    )
    assert command.generate_main(["--run", "r", "--prompt", "abcdefghijkl", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--max_new_tokens", "9" * 21], 2, "allowed: 1 to 2147483647"),
        (["--seed", "9" * 5000], 2, "'9999999999"),
        (["--checkpoint", "9" * 5000], 2, "allowed: latest, best, or a step"),
        (["--temperature", "1e-320"], 0, ""),
    ],
    ids=["tokens", "seed", "checkpoint", "temperature"],
)
def test_numbers_beyond_reason_get_one_short_line_or_work(run, capsys, options, code, message):
    words = ["--run", "r", "--prompt", "ab", *options, *([] if "--max_new_tokens" in options else ["--max_new_tokens", "2"])]
    assert run_command(command.generate_main, words) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if code:
        assert error.count("\n") == 1
        assert len(error) < 300
        assert message in error


def test_a_text_as_long_as_can_be_asked_for_is_refused_by_its_memory(run, capsys):
    assert run_command(command.generate_main, ["--run", "r", "--prompt", "ab", "--max_new_tokens", str(2**31 - 1)]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_standard_input_that_is_no_text_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert run_command(command.generate_main, ["--run", "r", "--prompt", "-"]) == 4
    assert "standard input is not UTF-8 (invalid start byte at byte 0)" in capsys.readouterr().err


def test_a_file_of_prompts_that_would_fill_the_memory_is_refused(run, capsys, tmp_path):
    with open(tmp_path / "prompts.txt", "wb") as file:
        file.truncate(1 << 40)
    assert run_command(command.generate_main, ["--run", "r", "--prompts_file", str(tmp_path / "prompts.txt")]) == 4
    assert "has 1024.00 GiB, allowed: 256 MiB" in capsys.readouterr().err


def written(capsys, *arguments):
    """The objects that the command writes, of the most likely tokens unless something else is asked for."""
    capsys.readouterr()
    assert run_command(command.generate_main, [*arguments, "--json", "--max_new_tokens", "12", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def theirs(model, prompt_ids):
    """The continuation that transformers writes, without the token that ends it."""
    ends = model.generation_config.eos_token_id
    ids = model.generate(input_ids=torch.tensor([prompt_ids]), max_new_tokens=12, do_sample=False)[0, len(prompt_ids) :].tolist()
    return [token for token in ids if token not in (ends if isinstance(ends, list) else [ends])]


@pytest.mark.filterwarnings("ignore")
def test_directories_write_what_transformers_writes(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    plain = save_base(base)
    trained = save_adapted(base, adapter)
    assert run_command(export_main, ["--run", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    tokenizer = load_tokenizer(base)
    prompts = ["some words", "the other"]
    given = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    texts = {}
    for model, *run in (
        (plain, base), (trained, adapter), (trained, tmp_path / "merged"), (trained, base, "--adapter", adapter),
    ):  # fmt: skip
        reports = written(capsys, "--run", *map(str, run), *given, "--temperature", "0")
        texts[str(run)] = [report["token_ids"] for report in reports]
        assert texts[str(run)] == [theirs(model, tokenizer.encode_prompt(prompt)) for prompt in prompts]
        assert run_command(command.generate_main, ["--run", *map(str, run), "--dry_run", "--device", "cpu"]) == 0
    assert texts[str([base])] != texts[str([adapter])]


@pytest.mark.filterwarnings("ignore")
def test_every_end_of_the_generation_config_ends_a_text(tmp_path, capsys):
    """Also those that are a list, which chat models have."""
    model = save_base(tmp_path / "base")
    prompt = load_tokenizer(tmp_path / "base").encode_prompt("some words")
    ids = theirs(model, prompt)
    cut = next(index for index, token in enumerate(ids) if token not in ids[:index] and index > 2)
    config = {"eos_token_id": [0, ids[cut]]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(config))
    (report,) = written(capsys, "--run", str(tmp_path / "base"), "--prompt", "some words", "--temperature", "0")
    assert (report["token_ids"], report["stop_reason"]) == (ids[:cut], "eos")


def sampling_of(capsys, base, *more):
    (report,) = written(capsys, "--run", str(base), "--prompt", "some", *more)
    return {name: report["sampling"][name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")}


def test_the_authors_values_are_the_defaults(tmp_path, capsys):
    base = tmp_path / "base"
    save_base(base)
    lowmems = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05}
    for file, more, wanted in (
        (None, [], lowmems),
        (values, [], {name: value for name, value in values.items() if name != "do_sample"}),
        (values, ["--top_k", "3"], {**{name: value for name, value in values.items() if name != "do_sample"}, "top_k": 3}),
        (values, ["--preset", "deterministic"], {**lowmems, "temperature": 0.0}),
        ({**values, "do_sample": False}, [], {**lowmems, "repetition_penalty": 1.05}),
    ):
        path = base / "generation_config.json"
        path.unlink() if file is None else path.write_text(json.dumps(file))
        assert sampling_of(capsys, base, *more) == wanted


@pytest.mark.parametrize("values, message", [
    ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5; allowed: above 0, at most 1 (off); mend it, or give --preset"),
    ({"do_sample": True, "temperature": "hot"}, "generation_config.json has temperature 'hot', expected a number"),
    ({"do_sample": True, "top_k": 2.5}, "generation_config.json has top_k 2.5, expected a number"),
])  # fmt: skip
def test_values_that_cannot_be_are_one_line(tmp_path, capsys, values, message):
    save_base(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(values))
    capsys.readouterr()
    assert run_command(command.generate_main, ["--run", str(tmp_path / "base"), "--prompt", "x", "--device", "cpu"]) == 5
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_a_conversation_takes_the_template_of_the_directory(tmp_path, capsys):
    from transformers import AutoTokenizer

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = save_base(base)
    trained = save_adapted(base, adapter)
    jinja = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ 'words ' }}{% endif %}"
    values = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": jinja}))
    messages = [{"role": "user", "content": "other"}]
    prompt = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for run, each in ((base, model), (adapter, trained)):  # the adapter has no template of its own
        (report,) = written(capsys, "--run", str(run), "--chat", "--prompt", "other", "--temperature", "0")
        assert report["token_ids"] == theirs(each, prompt)[: len(report["token_ids"])]
        assert report["prompt_tokens"] == len(prompt)
    (base / "chat_template.jinja").write_text("{# nothing #}")
    capsys.readouterr()
    assert run_command(command.generate_main, ["--run", str(base), "--chat", "--prompt", "other", "--device", "cpu"]) == 4
    assert "chat_template.jinja writes nothing for a conversation; mend the template" in capsys.readouterr().err


def test_what_a_directory_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        (["--run", str(tmp_path / "empty")], 5, "a directory of transformers (config.json and safetensors), or an adapter of PEFT"),
        (["--run", str(tmp_path / "empty"), "--adapter", "x"], 5, "is no run directory"),
    ):
        assert run_command(command.generate_main, [*arguments, "--prompt", "x", "--device", "cpu"]) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


STREAMED = ["--weights_at=disk", "--storage_dir"]


@pytest.mark.parametrize(("family", "method"), [("llama", ""), ("gpt2", ""), ("llama", "lora"), ("llama", "dora"), ("gemma3_text", "")])
def test_blocks_on_a_disk_write_the_same_text(family, method, tmp_path, capsys):
    base = where = tmp_path / "base"
    save_base(base, family)
    if method:
        where = tmp_path / "adapter"
        save_adapted(base, where, method)
    arguments = ["--run", str(where), "--prompt", "some words", "--prompt", "a", "--temperature", "0"]
    wanted, found = written(capsys, *arguments), written(capsys, *arguments, *STREAMED, str(tmp_path / "scratch"))
    assert [report["token_ids"] for report in found] == [report["token_ids"] for report in wanted]
    assert not list((tmp_path / "scratch").iterdir())


def test_blocks_on_a_disk_count_two_at_a_time(tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    model = save_base(base, num_hidden_layers=6)
    asked = ["--run", str(base), "--prompt", "x", "--max_new_tokens", "4", "--device", "cpu"]
    predicted = []
    for more in ([], ["--weights_at=disk"]):
        capsys.readouterr()
        assert run_command(command.generate_main, [*asked, "--dry_run", "--json", *more]) == 0
        predicted.append(json.loads(capsys.readouterr().out)["predicted"])
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert predicted[0]["weights_bytes"] - predicted[1]["weights_bytes"] == 4 * block
    for name in ("cache_bytes", "logits_bytes", "activations_bytes"):
        assert predicted[0][name] == predicted[1][name]
    between = sum(entry["ram_bytes"] for entry in predicted) // 2
    monkeypatch.setattr(command, "this_hardware", lambda: Hardware(between, 0))
    assert run_command(command.generate_main, asked) == 3
    assert "the weights alone do not fit; set --weights_at=disk" in capsys.readouterr().err
    assert run_command(command.generate_main, [*asked, "--weights_at=disk"]) == 0
    assert not [path for path in base.iterdir() if path.name.startswith(".")]


def test_a_scratch_file_that_cannot_be_is_one_line(tmp_path, capsys):
    base = tmp_path / "base"
    save_base(base)
    (tmp_path / "file").write_text("")
    given = ["--run", str(base), "--prompt", "x", "--device", "cpu", *STREAMED, str(tmp_path / "file")]
    capsys.readouterr()
    assert run_command(command.generate_main, given) == 7
    error = capsys.readouterr().err
    assert "name another folder with --storage_dir, then run the same command again" in error
    assert "checkpoints" not in error

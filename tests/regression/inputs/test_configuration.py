"""Configurations that were misread, or read for ever: every value means what it says, or is refused in a line with exit code 2."""

import os
import time

import pytest

from lowmem.cli.finetune import DEFAULTS as FINETUNE_DEFAULTS
from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.system.errors import ConfigError

STEPS = "train.steps=3"


def refusal(tmp_path, text, *overrides):
    """The message for a file with this text, which comes within the time that a person waits."""
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, [STEPS, *overrides])
    assert time.process_time() - started < 10  # at most two on an idle machine; the faults took minutes
    assert len(str(caught.value)) < 3000
    return str(caught.value)


@pytest.mark.parametrize(
    "text, key, lines",
    [
        ("train: {steps: 5}\noptim: {lr: 1}\ntrain: {seed: 4}\n", "train", "line 3: train stands here again, first in line 1"),
        ("optim:\n  lr: 1\n  lr: 2\n", "lr", "line 3: lr stands here again, first in line 2"),
        ("model: {lorpt: {rank: 2, ranks: {'a': 3, 'a': 4}}}\n", "a", "line 1: a stands here again, first in line 1"),
        ("data:\n  sources:\n  - {path: a, path: b}\n", "path", "line 3: path stands here again, first in line 3"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key, lines):
    assert lines in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["runs/try #2", "a: b", "*.jsonl", "[v2].jsonl", "@x", "%x", "!x", "'q'", '"q"', "null", "a #", "- x", "[a]"]
)
def test_text_on_the_command_line_is_the_text_as_given(text):
    config = load_run_config("", [STEPS, f"run_dir={text}", f"data.tokenizer={text}"])
    assert (config.run_dir, config.data.tokenizer) == (text, text)
    tuning = load_run_config("", [f"model.path={text}", f"data={text}", f"data.template={text}"], defaults=FINETUNE_DEFAULTS)
    assert (tuning.model.path, tuning.data.sources[0].path, tuning.data.template) == (text, text, text)


@pytest.mark.parametrize(
    "override", ["train.seed=5 # five", "train.seed=010", "train.seed=0x10", "train.seed=1:30", "engine.zero_stage=1.0"]
)
def test_numbers_are_decimal_and_alone(override):
    """YAML 1.1 reads 010 as 8, 0x10 as 16, 1:30 as 90, and drops what follows #."""
    with pytest.raises(ConfigError, match="expected"):
        load_run_config("", [STEPS, "engine.name=deepspeed", override])


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["run_dir", "data.tokenizer", "data.val_source", "data.cache_dir", "train.init_from", "train.distill.teacher"]
    config = load_run_config("", [STEPS, *(f"{path}=~/x" for path in paths), "data.sources=[{path: ~/*.txt}]"])
    found = [config.run_dir, config.data.tokenizer, config.data.val_source, config.data.cache_dir, config.train.init_from]
    assert {*found, config.train.distill.teacher} == {f"{tmp_path}/x"}
    assert config.data.sources[0].path == f"{tmp_path}/*.txt"
    paths = ("model.path", "data", "run_dir", "data.template")
    tuning = load_run_config("", [f"{path}=~/y" for path in paths], defaults=FINETUNE_DEFAULTS)
    assert {tuning.model.path, tuning.data.sources[0].path, tuning.run_dir, tuning.data.template} == {f"{tmp_path}/y"}
    path = tmp_path / "x.yaml"
    path.write_text("data: ~/y\nmodel: {path: b}\n")
    assert load_run_config(path, defaults=FINETUNE_DEFAULTS).data.sources[0].path == f"{tmp_path}/y"


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    + "run_dir: *j\n",
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
    "itself": "&r\nmodel: *r\n",
    "phases": "phases: &p [{sources: *p}]\n",
    "lists": "run_dir: " + "[" * 20000 + "]" * 20000 + "\n",
    "maps": "".join(f"{' ' * n}a:\n" for n in range(2000)),
    "digits": f"train: {{seed: {'9' * 6000}}}\n",
    "sources": "data: {sources: [" + "{path: a, weight: x}, " * 5000 + "]}\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(tmp_path, name):
    message = refusal(tmp_path, BOMBS[name])
    assert "\n" not in message


def test_many_unknown_keys_are_listed_briefly(tmp_path):
    message = refusal(tmp_path, "".join(f"key_{number}: 1\n" for number in range(60000)))
    assert "60000 problems" in message
    assert "key_0 is not a known key" in message
    assert "and 59990 more" in message
    assert message.count("\n") == 11


def test_files_that_are_no_text_are_refused(tmp_path):
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    big = tmp_path / "big.yaml"
    with open(big, "wb") as file:
        file.truncate(1 << 30)
    for path, expected in ((fifo, "a pipe or a device"), ("/dev/zero", "a pipe or a device"), (big, "a configuration has at most")):
        with pytest.raises(ConfigError, match=expected):
            load_run_config(path, [STEPS])


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes("\ufefftrain: {steps: 7}\n".encode())
    assert load_run_config(path).train.steps == 7
    assert "is no UTF-8 text (byte 0 is 0xff)" in refusal(tmp_path, "train: {steps: 7}\n".encode("utf-16"))
    assert "holds nothing, expected sections" in refusal(tmp_path, "")


@pytest.mark.parametrize(
    "command", [["pretrain", "--train.steps=3"], ["finetune", "--model.path=b", "--data=d"], ["plan", "--budget.ram=4GiB"]]
)
def test_one_problem_is_one_line(command, capsys):
    assert main([*command, "--optim.betas=[0.9, 2]"]) == 2
    assert capsys.readouterr().err == "lowmem: error: optim.betas has 2.0, must be in [0, 1)\n"


def test_messages_name_no_class(tmp_path):
    message = refusal(tmp_path, "data: {sources: {path: a}}\noptim: {betas: 3}\nmodel: {lorpt: {ranks: [1]}}\n")
    assert "data.sources is {'path': 'a'}, expected a list of entries with keys such as path" in message
    assert "optim.betas is 3, expected a list of 2 numbers" in message
    assert "Config" not in message


def test_wsd_decays_in_a_share_of_all_steps():
    """It was a share of those after the warm-up: 9 steps of 50 after 5 for the 10 that a fifth of 50 are."""
    from lowmem.config.schema import OptimConfig
    from lowmem.optim.from_config import learning_rate

    optim = OptimConfig(schedule="wsd", lr=1.0, warmup_steps=5, decay_fraction=0.2, min_lr_ratio=0.0)
    assert [step for step in range(6, 51) if learning_rate(optim, step, 50) < 1] == list(range(41, 51))
    assert learning_rate(optim, 50, 50) == 0


def test_checkpoints_of_nine_digits_are_found(tmp_path):
    from lowmem.train.run_dir import CheckpointStore

    store = CheckpointStore(tmp_path, 2)
    for step in (99_999_999, 100_000_000, 2_000_000_000):
        store.path(step).mkdir(parents=True)
    (store.root / "step-000000005").mkdir()  # nine digits, but no name that a step has
    assert store.steps() == [99_999_999, 100_000_000, 2_000_000_000]


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
            "zero_optimization.offload_optimizer is 'cpu', must be an object",
        ),
        ('{"zero_optimization": {"stage": 1, "bogus": 3}}', "zero_optimization.bogus is not known to DeepSpeed; remove it"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_sise": 3}}', "the nearest key is reduce_bucket_size"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}', "reduce_bucket_size is '5e8', must be a whole number"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": [1]}}', "reduce_bucket_size is [1], must be a whole number"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage is 'auto', must be 0 | 1 | 2 | 3"),
        ('{"zero_optimization": {"stage": 1, "overlap_comm": 1}}', "overlap_comm is 1, must be true or false"),
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "'zero_optimization' occurs twice in one object"),
        ('{"gradient_clipping": NaN}', "it has NaN, which is no JSON"),
        ('{"fp16": {"loss_scale": "high"}}', "fp16.loss_scale is 'high', must be a number"),
        ("[" * 100000, "it is nested too deeply"),
        ("\ufeff{", "no readable JSON file"),
        ("[]", "holds no JSON object"),
    ],
)
def test_a_malformed_deepspeed_file_is_refused_before_any_work(tmp_path, capsys, text, expected):
    """The text to train on does not exist: data would be refused with 4 if it were looked at first."""
    path = tmp_path / "ds.json"
    path.write_text(text)
    arguments = [STEPS, "engine.name=deepspeed", f"engine.config={path}", f"data.sources=[{{path: {tmp_path}/none.txt}}]"]
    for more in ([], ["--dry_run"]):
        assert main(["pretrain", "--quiet", *(f"--{item}" for item in [*arguments, f"run_dir={tmp_path / 'run'}"]), *more]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert str(path) in error
        assert error.count("\n") == 1


def odd_paths(tmp_path):
    (tmp_path / "file").write_text("text")
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "300 characters": tmp_path / ("x" * 300), "NUL": "a\0b"}


@pytest.mark.parametrize("name", ["a file", "below a file", "300 characters", "NUL"])
@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_run_dir_that_cannot_be_is_refused(tmp_path, capsys, name, more):
    path = odd_paths(tmp_path)[name]
    arguments = ["pretrain", "--train.steps=1", "--data.tokenizer=bytes", f"--run_dir={path}", *more]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowmem: error: ")
    assert error.count("\n") == 1
    assert len(error) < 600


@pytest.mark.parametrize("key", ["data.tokenizer", "data.val_source", "data.cache_dir", "train.init_from"])
def test_paths_of_300_characters_are_refused(tmp_path, capsys, key):
    assert main(["pretrain", "--train.steps=1", f"--{key}={tmp_path / ('x' * 300)}", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert f"{key} is " in (error := capsys.readouterr().err)
    assert "longer than a path may be" in error


@pytest.mark.parametrize(
    "command, name",
    [
        ("generate", "300 characters"),
        ("profile", "300 characters"),
        ("export", "300 characters"),
        ("export", "NUL"),
        ("import", "300 characters"),
        ("import", "NUL"),
    ],
)
def test_odd_paths_of_other_commands_get_one_line(tmp_path, capsys, llama, imported, command, name):
    path = odd_paths(tmp_path)[name]
    words = {
        "generate": ["--prompt=a", f"--run={path}"],
        "profile": ["--out=x", str(path)],
        "export": [f"--run={imported}", f"--out={path}"],
        "import": [str(llama), f"--out={path}"],
    }
    assert main([command, *words[command]]) in (2, 4, 5, 7)
    error = capsys.readouterr().err
    assert error.startswith("lowmem: error: ")
    assert error.count("\n") == 1


def dry_run(tmp_path, *settings):
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from\n" * 400)
    own = ["train.steps=1", "device=cpu", "data.tokenizer=bytes", f"data.sources=[{{path: {text}}}]", f"run_dir={tmp_path / 'run'}"]
    return main(["pretrain", *(f"--{setting}" for setting in (*own, *settings)), "--dry_run"])


@pytest.mark.parametrize(
    "settings, code, expected",
    [
        (["model.vocab_size=100"], 4, "the bytes tokenizer has 257 tokens, model.vocab_size allows 100"),
        (["data.tokenizer=bpe", "model.vocab_size=100"], 4, "the bpe tokenizer is trained to 4096 tokens, model.vocab_size allows 100"),
        (["data.sources=[{path: none.txt}]"], 4, "none.txt"),
        (["data.val_source=none.txt"], 4, "none.txt"),
        (["train.init_from=none"], 2, "train.init_from is none, which is no run directory"),
        (["train.steps=0", "phases=[{kind: chat, steps: 1, sources: [{path: none.json}]}]"], 4, "none.json"),
        (["train.steps=0", "phases=[{kind: chat, steps: 1, sources: [{path: text.txt}], template: none.jinja}]"], 4, "none.jinja"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, monkeypatch, capsys, settings, code, expected):
    monkeypatch.chdir(tmp_path)
    assert dry_run(tmp_path, *settings) == code
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_dry_run_refuses_a_run_directory_of_other_settings(tmp_path, capsys):
    from lowmem.train.run_dir import RunDir

    run_dir = RunDir(tmp_path / "run")
    run_dir.write_config(load_run_config("", [STEPS]))
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    run_dir.close()
    assert dry_run(tmp_path) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("package, settings", [("deepspeed", ["engine.name=deepspeed"]), ("wandb", ["loggers=[wandb]"])])
def test_a_dry_run_names_packages_that_are_missing(tmp_path, monkeypatch, capsys, package, settings):
    import importlib.util
    import sys

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(
        "lowmem.train.preflight.find_spec", lambda name: None if name == package else importlib.util.find_spec(name), raising=False
    )
    assert dry_run(tmp_path, *settings) == 2
    assert f"has {package}, which is not installed; run: pip install 'lowmem[{package}]'" in capsys.readouterr().err


def test_a_dry_run_of_fine_tuning_looks_for_its_records(llama, chat, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["finetune", f"--model.path={llama}", f"--data={chat}", "--device=cpu"]
    for setting, code in ((f"--data={tmp_path}/none.jsonl", 4), (f"--run_dir={tmp_path}/file/x", 2)):
        assert main([*words, setting, "--dry_run"]) == code
        assert capsys.readouterr().err.count("\n") == 1


def test_every_key_that_fine_tuning_had_is_answered_with_the_one_it_has(capsys):
    from lowmem.config.keys import RENAMED, known_keys

    for old, new in RENAMED.items():
        assert main(["finetune", "--model.path=b", "--data=d", f"--{old}=1"]) == 2
        assert capsys.readouterr().err == f"lowmem: error: {old} is no key any more; use {new}\n"
        assert old not in known_keys()
        assert new.split()[0] in known_keys()

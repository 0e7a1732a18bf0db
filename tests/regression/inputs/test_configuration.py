"""Configurations that were misread, or read for ever: every value means what it says, or is refused in a line with exit code 2."""

import os
import time

import pytest

from lowmem.cli import main
from lowmem.config_finetune import FinetuneConfig, finetune_problems
from lowmem.config_load import load_config, load_run_config
from lowmem.errors import ConfigError

STEPS = "train.steps=3"


def refusal(tmp_path, text, *overrides):
    """The message for a file with this text, which comes within the time that a person waits."""
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, [STEPS, *overrides])
    assert time.perf_counter() - started < 20  # a second on an idle machine; the faults took minutes
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
    "text", ["runs/try #2", "a: b", "*.jsonl", "[v2].jsonl", "@x", "%x", "!x", "'q'", '"q"', "{a}", "null", "a #", "- x", "[a]"]
)
def test_text_on_the_command_line_is_the_text_as_given(text):
    config = load_run_config("", [STEPS, f"run_dir={text}", f"data.tokenizer={text}"])
    assert (config.run_dir, config.data.tokenizer) == (text, text)
    tuning = load_config(FinetuneConfig, "", ["base=b", f"data={text}", f"out={text}"], finetune_problems)
    assert (tuning.data, tuning.out) == (text, text)


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
    tuning = load_config(FinetuneConfig, "", [f"{key}=~/y" for key in ("base", "data", "out", "template")], finetune_problems)
    assert {tuning.base, tuning.data, tuning.out, tuning.template} == {f"{tmp_path}/y"}


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


@pytest.mark.parametrize("command", [["pretrain", "--train.steps=3"], ["finetune", "--base=b", "--data=d"], ["plan", "--budget.ram=4GiB"]])
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
    from lowmem.config import OptimConfig
    from lowmem.optim.schedule import learning_rate

    optim = OptimConfig(schedule="wsd", lr=1.0, warmup_steps=5, decay_fraction=0.2, min_lr_ratio=0.0)
    assert [step for step in range(6, 51) if learning_rate(optim, step, 50) < 1] == list(range(41, 51))
    assert learning_rate(optim, 50, 50) == 0


def test_checkpoints_of_nine_digits_are_found(tmp_path):
    from lowmem.train.checkpoint import CheckpointStore

    store = CheckpointStore(tmp_path, 2)
    for step in (99_999_999, 100_000_000, 2_000_000_000):
        store.path(step).mkdir(parents=True)
    (store.root / "step-000000005").mkdir()  # nine digits, but no name that a step has
    assert store.steps() == [99_999_999, 100_000_000, 2_000_000_000]

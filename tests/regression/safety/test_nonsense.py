"""Numbers that mean nothing are refused before any work, by one table of ranges."""

import json
import math
import types
import typing
from dataclasses import fields, is_dataclass

import pytest

from lowmem.cli.finetune import DEFAULTS as FINETUNE_DEFAULTS
from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.system.errors import ConfigError

UNIONS = (typing.Union, types.UnionType)


def refusal(override, defaults=()):
    own = [] if override.startswith("train.steps") else ["train.steps=3"]
    with pytest.raises(ConfigError) as caught:
        load_run_config("", [*own, override], defaults=defaults)
    return str(caught.value)


def with_every_number(cls, value, prefix=""):
    """A configuration in which every number is `value`, and the dotted keys of those numbers."""
    config, keys = cls(), []
    for item in fields(cls):
        kind = typing.get_type_hints(cls)[item.name]
        if is_dataclass(kind):
            section, inside = with_every_number(kind, value, f"{prefix}{item.name}.")
            setattr(config, item.name, section)
            keys += inside
        elif kind in (int, float) or (typing.get_origin(kind) in UNIONS and {int, float} & set(typing.get_args(kind))):
            setattr(config, item.name, value)
            keys.append(f"{prefix}{item.name}")
    return config, keys


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3, 10**40])
def test_no_number_is_nonsense(value):
    """Not a number, infinities, what is below every range, and what no machine or run has."""
    from lowmem.config.keys import value_problems

    config, keys = with_every_number(RunConfig, value)
    assert len(keys) > 45
    assert set(value_problems(config)) >= {key for key in keys if not key.endswith("tokens")}


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e400", "-1e400"])
def test_the_command_line_takes_no_nonsense(text):
    assert "must be at least 0, at most 1e+30" in refusal(f"optim.lr={text}")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("model.rope_theta=0", "model.rope_theta is 0.0, must be at least 1, at most 1e+12"),
        ("model.norm_eps=-1e-5", "model.norm_eps is -1e-05, must be 0, or at least 1e-12, at most 1"),
        ("model.num_layers=100000", "model.num_layers is 100000, must be at least 1, at most 4096"),
        ("optim.weight_decay=1e30", "optim.weight_decay is 1e+30, must be at least 0, at most 1000"),
        ("optim.min_lr_ratio=3", "optim.min_lr_ratio is 3.0, must be at least 0, at most 1"),
        ("optim.eps=0", "optim.eps is 0.0, must be at least 1e-30, at most 1"),
        ("train.z_loss=.nan", "train.z_loss is nan, must be at least 0, at most 1"),
        ("train.threads=1000000000", "train.threads is 1000000000, must be at least 0, at most 1024"),
        ("train.global_batch_size=2147483648", "train.global_batch_size is 2147483648, must be at least 1, at most 1048576"),
        ("train.seed=99999999999999999999999", "train.seed is 99999999999999999999999, must be at least 0, at most 9223372036854775807"),
        ("train.distill.temperature=.inf", "train.distill.temperature is inf, must be at least 0.001"),
        ("data.sources=[{path: a, weight: .inf}]", "data.sources[0].weight is inf, must be above 0, at most 1e+06"),
        ("data.sources=[{path: a, weight_schedule: {0: .nan}}]", "data.sources[0].weight_schedule has 0: nan; allowed: keys at least 0"),
        ("budget.ram=4", "budget.ram: found 4, which has no unit and would be bytes; write 4GiB, or 4B for bytes"),
        ("budget.ram=0", "budget.ram is 0, but nothing runs in no memory; leave it out for no limit"),
        ("budget.ram=99999999999TiB", "budget.ram: found 99999999999TiB, more than any machine has"),
        ("train.tokens=1e999", "train.tokens is inf, must be at least 0, at most 1000000000000000000"),
    ],
)
def test_the_message_has_the_range(override, expected):
    assert expected in refusal(override)


@pytest.mark.parametrize("override", ["optim.lr=-1", "adapter.lora_alpha=-1", "adapter.lora_dropout=1", "train.seed=-1", "budget.ram=4"])
def test_fine_tuning_refuses_by_the_same_table(override, capsys):
    assert override.partition("=")[0] in refusal(override, FINETUNE_DEFAULTS)
    assert main(["finetune", "--model.path=b", "--data=d", f"--{override}"]) == 2
    assert (error := capsys.readouterr().err).count("\n") == 1
    assert f"error: {override.partition('=')[0]}" in error


@pytest.mark.parametrize("text", ["a\0b", "x" * 300, "y/" * 2100, "\udcff"])
def test_no_key_is_a_text_that_no_file_has(text):
    assert "run_dir is " in (message := refusal(f"run_dir={text}"))
    assert len(message) < 250


TINY = (
    "device=cpu", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "data.tokenizer=bytes", "data.seq_len=32",
    "data.val_fraction=0.1", "train.global_batch_size=4", "train.precision=fp32", "train.steps=6", "train.threads=1",
)  # fmt: skip


def pretrain(folder, *settings):
    text = folder / "text.txt"
    text.write_text("".join(f"def function_{n % 37}(x): return x * {n % 11} + {n * n % 101}\n" for n in range(600)))
    own = [f"data.sources=[{{path: {text}}}]", f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"]
    return main(["pretrain", "--quiet", *(f"--{setting}" for setting in (*TINY, *own, *settings))])


def refuse_constant(name):
    raise AssertionError(f"JSON has no {name}")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ([], "the held-out loss is nan after step 6"),
        (["train.eval_every=0"], "loss or gradients of the last 5 steps were not finite, up to step 6, the end"),
        (["train.steps=1"], "the held-out loss is nan after step 1"),
    ],
)
def test_a_diverged_run_is_not_done(tmp_path, capsys, settings, expected):
    """Fewer steps than train.max_bad_steps: nothing stopped it before its end."""
    assert pretrain(tmp_path, "optim.lr=1e20", "optim.warmup_steps=0", *settings) == 6
    error = capsys.readouterr().err
    assert error.startswith(f"lowmem: error: {expected}; no checkpoint was saved yet; lower optim.lr")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse_constant)


def test_files_of_a_run_hold_no_nan(tmp_path):
    from lowmem.train.run_dir import RunDir

    run_dir = RunDir(tmp_path)
    run_dir.append_metrics({"step": 1, "val_loss": math.nan, "more": [math.inf, {"x": -math.inf}]})
    run_dir.write_json("result.json", {"losses": {3: math.nan}})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse_constant)["val_loss"] is None
    assert json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse_constant) == {"losses": {"3": None}}


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["plan", "--budget.ram=4"], 2, "budget.ram: found 4, which has no unit"),
        (["plan", "--budget.ram=1GiB", "--optim.lr=.nan"], 2, "optim.lr is nan"),
        (["plan", "--budget.ram=1GiB", "--write=none/x.yaml"], 7, "--write=none/x.yaml cannot be written (there is no folder none)"),
        (["profile", "x.yaml", "--steps=nan", "--out=y"], 2, "argument --steps: 'nan' is no whole number"),
        (["profile", "x.yaml", "--interval=x", "--out=y"], 2, "argument --interval: 'x' is no number"),
        (["pretrain", "--grow_every_steps=x", "--grow_plan=8"], 2, "argument --grow_every_steps: 'x' is no whole number"),
    ],
)
def test_nonsense_given_to_other_commands_is_refused_at_once(tmp_path, monkeypatch, capsys, arguments, code, expected):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("digits", [23, 120, 400, 5000])
def test_numbers_of_many_digits_are_refused(digits):
    for key in ("train.seed", "train.tokens", *(["optim.lr"] if digits > 30 else [])):
        message = refusal(f"{key}={'9' * digits}")
        assert message.startswith((f"{key} is ", f"{key}: found "))  # and no advice about Python
        assert len(message) < 250

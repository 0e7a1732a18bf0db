"""Predictions of memory: what a step imports, and what they count.

Every test here failed before the fault that it names was mended, parameters aside of which a comment says so.
"""

import json
import subprocess
import sys

import pytest

from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.memory.measure import read_memory
from lowmem.planning import base_cost, check, hardware
from lowmem.system.errors import MemoryBudgetError

STEP_WITH_BLOCK_RECOMPUTATION = """
import sys
import torch
from lowmem.config.schema import ModelConfig
from lowmem.models.registry import build_model
model = build_model(ModelConfig(dim=32, num_layers=2, num_heads=2), vocab_size=50, max_seq_len=8, seed=0)
model.activation_checkpointing = "block"
tokens = torch.zeros(1, 8, dtype=torch.int64)
hidden = model.embed(tokens)
for index in range(2):
    from lowmem.nn.recompute import run_block
    hidden = run_block(model.blocks[index], hidden, "block")
hidden.sum().backward()
assert all(parameter.grad is not None for parameter in model.blocks.parameters())
print(sorted({name.split(".")[1] for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))}))
"""


def test_recomputing_a_block_does_not_import_the_compiler():
    """It cost 140 MB during the first step, of which the prediction knew nothing."""
    result = subprocess.run([sys.executable, "-c", STEP_WITH_BLOCK_RECOMPUTATION], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def config_of(*settings):
    common = ["device=cpu", "data.tokenizer=bytes", "data.seq_len=32", "model.dim=64", "train.steps=3", "train.precision=fp32"]
    return load_run_config(overrides=[*common, *settings])


def test_rows_of_a_vocabulary_that_the_tokenizer_lacks_cost_no_memory_beside_the_model():
    """1.5 kB for each of them was predicted, as if the tokenizer had them too."""
    own = ["data.tokenizer=bpe", "data.tokenizer_vocab_size=2000"]
    sizes = [base_cost.data_bytes(config_of(*own, f"model.vocab_size={rows}")) for rows in (2000, 50_000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("settings", [["train.weight_dtype=int8"], ["data.tokenizer=bpe"]])
def test_what_changes_the_imports_is_part_of_the_kind_of_run(settings):
    """Quantised weights import sympy, 38 MB; a tokenizer of the library was measured as bytes are."""
    assert base_cost._kind(config_of("optim.state_bits=8", *settings)) != base_cost._kind(config_of("optim.state_bits=8"))


WRONG = ["NaN", '"300"', "-1", "[1]", "true", "1e400", "null"]
DAMAGED = ["", "{", "[]", "3", '"text"', "null", "{}", "\x00", "[" * 100_000, *(f'{{"base_bytes": {value}}}' for value in WRONG)]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_base_cost_is_measured_anew(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(base_cost, "_measure", lambda *_: 250_000_000)
    config = config_of(f"data.cache_dir={tmp_path}")
    base_cost.measured_base(config, 1, lambda *_: 0)
    (path,) = (tmp_path / "base").iterdir()
    path.write_text(damaged)
    assert base_cost.measured_base(config, 1, lambda *_: 0).size_bytes == 250_000_000
    assert json.loads(path.read_text())["base_bytes"] == 250_000_000


RATES = {"matmul": {"float32": 1e9}, "bytes_per_s": 1e9, "call_s": 1e-6, "updates": dict.fromkeys(("32", "8", "4", "bitsandbytes"), 1e6)}
NO_RATES = ["", "[]", "{}"] + [
    json.dumps({**RATES, key: value})
    for key, value in (("call_s", float("nan")), ("matmul", [1]), ("updates", {"8": 1e6}), ("bytes_per_s", 0), ("more", 1))
]


@pytest.mark.parametrize("damaged", NO_RATES, ids=range(len(NO_RATES)))
def test_damaged_rates_are_measured_anew(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(hardware, "measure_rates", lambda: hardware.Rates(**RATES))
    monkeypatch.setattr(hardware, "_is_busy", lambda: False)
    config = config_of(f"data.cache_dir={tmp_path}")
    hardware.rates_for(config)
    (path,) = (tmp_path / "rates").iterdir()
    path.write_text(damaged)
    assert hardware.rates_for(config) == hardware.Rates(**RATES)
    assert json.loads(path.read_text()) == RATES


@pytest.mark.parametrize("damaged", ["[]", "3", '{"measured": [1]}', '{"predicted": "none"}', "[" * 100_000], ids=range(5))
def test_a_damaged_record_of_a_run_is_as_good_as_none(tmp_path, damaged):
    (tmp_path / "memory.json").write_text(damaged)
    assert read_memory(tmp_path) == {}


def test_a_run_goes_on_where_the_record_of_its_first_leg_is_damaged(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words to train on\n" * 400)
    settings = {
        "data.sources": f"[{{path: {tmp_path / 'text.txt'}}}]", "data.tokenizer": "bytes", "data.seq_len": 16, "data.cache_dir": tmp_path,
        "model.dim": 16, "model.num_layers": 1, "model.num_heads": 1, "train.global_batch_size": 2, "run_dir": tmp_path / "run",
    }  # fmt: skip
    run = ["pretrain", "--quiet", *(f"--{key}={value}" for key, value in settings.items())]
    assert main([*run, "--train.steps=2"]) == 0
    record = tmp_path / "run" / "memory.json"
    whole = json.loads(record.read_text())
    for steps, damaged in enumerate(
        ["{", "[]", '{"predicted": null}', '{"measured": {"host_peak_bytes": "many", "phases": {"load": 3}}}'], 3
    ):
        record.write_text(damaged)
        assert main([*run, f"--train.steps={steps}"]) == 0, capsys.readouterr().err
        assert set(json.loads(record.read_text())["measured"]) == set(whole["measured"])


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base_cost, "_measure", lambda *_: 250_000_000)
    (tmp_path / "base").write_text("a file where the folder should be")
    assert base_cost.measured_base(config_of(f"data.cache_dir={tmp_path}"), 1, lambda *_: 0).size_bytes == 250_000_000
    assert "not kept for the next time" in capsys.readouterr().err


def test_a_prediction_that_the_system_kills_is_a_refusal(monkeypatch):
    """It was a warning, and the run went on to be killed in turn."""
    monkeypatch.setattr(check.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", ""))
    with pytest.raises(MemoryBudgetError, match="was killed"):
        check.check_run(config_of())
    assert MemoryBudgetError.exit_code == 3


MODULES = """
import json, sys
from lowmem.cli.main import main
code = main(["pretrain", "--quiet", *sys.argv[2:]])
open(sys.argv[1], "w").write(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""
# Each setting that could change what is imported, in several company: a sample of the pairs. The second and the fourth were right before.
RUNS = {
    "blocks again, 8 bits": ["optim.state_bits=8", "train.activation_checkpointing=block", "model.positions=learned"],
    "full precision, blocks again": ["train.activation_checkpointing=block", "model.norm=layernorm", "model.tie_embeddings=true"],
    "int4, layerwise, lion, bpe": ["train.weight_dtype=int4", "train.update=layerwise", "optim.name=lion", "optim.state_bits=8",
        "data.tokenizer=bpe", "data.tokenizer_vocab_size=300", "train.activation_checkpointing=none"],
    "spectron, factors": ["optim.name=spectron", "model.lorpt.rank=8", "train.activation_checkpointing=low_rank", "model.positions=alibi"],
}  # fmt: skip


def modules_of(path, overrides):
    arguments = [f"--{override}" for override in overrides]
    result = subprocess.run([sys.executable, "-c", MODULES, str(path), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {name for name in json.loads(path.read_text()) if not name.startswith("__")}


@pytest.mark.slow
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_imports_what_the_measured_one_of_its_kind_imports(tmp_path, settings):
    """Blocks computed again and quantised weights imported what no measured run did."""
    config = config_of("train.threads=1", *settings)
    (tmp_path / "trial").mkdir()
    trial = base_cost.trial_settings(base_cost._kind(config), tmp_path / "trial", world_size=1)
    text = [setting for setting in trial if setting.startswith(("data.sources", "data.val_fraction"))]
    run = ["device=cpu", "data.tokenizer=bytes", "data.seq_len=32", "model.dim=64", "model.num_layers=1", "model.num_heads=2", *text,
           "train.precision=fp32", "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_every=2",
           "train.eval_sequences=2", "train.save_every=2", "train.threads=1", f"data.cache_dir={tmp_path}/cache"]  # fmt: skip
    found = modules_of(tmp_path / "run.json", [*run, f"run_dir={tmp_path}/run", *settings])
    assert found == modules_of(tmp_path / "trial.json", trial)

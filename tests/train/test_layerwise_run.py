"""`lowmem pretrain` with layerwise updates and low-bit states: resumed bit for bit, and refused where it cannot work."""

import json
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.optim.kernels.formats import state_bytes
from tests.planning.small import stub_measurements
from tests.train.tiny_run import losses_of_equal_runs, tiny_arguments, write_text

NARROW = {
    "train.update": "layerwise", "train.weight_dtype": "bf16", "train.precision": "bf16", "train.activation_checkpointing": "block",
    "model.dim": 128, "train.steps": 12, "train.save_every": 4, "train.eval_every": 6,
}  # fmt: skip


def pretrain(folder: Path, name: str, *flags: str, **overrides) -> int:
    text = folder / "text.txt"
    return main(["pretrain", "--quiet", *tiny_arguments(folder / name, text if text.exists() else write_text(text), **overrides), *flags])


@pytest.mark.parametrize("state_bits", [4, 8, 32])
def test_a_run_in_two_parts_equals_one_in_one(tmp_path, state_bits):
    settings = {**NARROW, "optim.state_bits": state_bits, "optim.schedule": "constant"}
    assert pretrain(tmp_path, "whole", **settings) == 0
    assert pretrain(tmp_path, "parts", **{**settings, "train.steps": 8}) == 0
    assert pretrain(tmp_path, "parts", **settings) == 0
    losses = losses_of_equal_runs(tmp_path)
    assert losses[-1] < losses[0] - 0.5
    components = json.loads((tmp_path / "whole" / "memory.json").read_text())["measured"]["components"]
    assert components["gradients"] < components["weights"] / 2


def test_a_dry_run_counts_weights_and_states_as_the_run_does(tmp_path, capsys, monkeypatch):
    stub_measurements(monkeypatch)
    settings = {**NARROW, "optim.state_bits": 4}
    assert pretrain(tmp_path, "dry", "--dry_run", "--json", **settings) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]["components"]
    assert pretrain(tmp_path, "run", **settings) == 0
    counted = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["components"]
    assert {name: predicted[name] for name in ("weights", "optimizer_states")} == {
        name: counted[name] for name in ("weights", "optimizer_states")
    }
    assert 0 < predicted["gradients"] < predicted["weights"]
    assert state_bytes((31, 128), 4) == 4 * 31 * 128
    assert state_bytes((33, 128), 4) == 33 * (64 + 4)
    assert state_bytes((4097, 1), 4) == state_bytes((4097, 1), 8) == 33 * (128 + 4)
    assert state_bytes((9000,), 4) == 4 * 9000


@pytest.mark.parametrize("overrides, message", [
    ({"engine.name": "deepspeed"}, "train.update=layerwise does not work with engine.name=deepspeed"),
    ({"optim.clip_by": "global"}, "optim.clip_by=global does not work with train.update=layerwise"),
    ({"optim.backend": "bitsandbytes"}, "optim.state_bits=32 and train.update=layerwise; use lowmem"),
    ({"train.update": "accumulate", "optim.clip_by": "block"}, "optim.clip_by is block, which only train.update=layerwise uses"),
    ({"train.update": "accumulate", "train.boundary_dtype": "bf16"}, "train.boundary_dtype is bf16, which only"),
    ({"train.update": "accumulate", "train.weight_dtype": "fp16", "train.precision": "auto"}, "train.weight_dtype=fp16 needs"),
    ({"train.boundary_offload": "cpu"}, "train.boundary_offload=cpu needs a GPU"),
    ({"train.weight_dtype": "fp16"}, "train.weight_dtype=fp16 needs train.precision fp16 or auto, found bf16"),
    ({"optim.state_bits": 5}, "optim.state_bits"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, overrides, message):
    assert pretrain(tmp_path, "refused", **{**NARROW, **overrides}) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err

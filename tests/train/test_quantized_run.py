"""`lowmem pretrain` with weights of int8 and int4: resumed bit for bit, counted right, readable afterwards, refused where not possible."""

import json
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.engine.run_model import load_run_model
from lowmem.nn.quantized import BLOCK
from lowmem.system.tensors import read_tensors
from tests.planning.small import stub_measurements
from tests.train.tiny_run import final_bits, metrics, tiny_arguments, write_text

SETTINGS = {
    "train.update": "layerwise", "train.activation_checkpointing": "block", "optim.state_bits": 8, "optim.schedule": "constant",
    "model.dim": 64, "train.steps": 9, "train.save_every": 3, "train.eval_every": 6, "train.seed": 1,
}  # fmt: skip


def pretrain(folder: Path, name: str, *flags: str, **overrides) -> int:
    text = folder / "text.txt"
    arguments = tiny_arguments(folder / name, text if text.exists() else write_text(text), **{**SETTINGS, **overrides})
    return main(["pretrain", "--quiet", *arguments, *flags])


@pytest.mark.parametrize("weights, update", [("int8", "layerwise"), ("int4", "layerwise"), ("int4", "accumulate")])
def test_a_run_in_two_parts_equals_one_in_one(tmp_path, weights, update):
    settings = {"train.weight_dtype": weights, "train.update": update}
    assert pretrain(tmp_path, "whole", **settings) == 0
    assert pretrain(tmp_path, "parts", **settings, **{"train.steps": 6}) == 0
    assert pretrain(tmp_path, "parts", **settings) == 0
    whole, parts = (final_bits(tmp_path / name) for name in ("whole", "parts"))
    assert whole["model.safetensors"] == parts["model.safetensors"]
    assert whole["optimizer.safetensors"] == parts["optimizer.safetensors"]
    losses = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert losses[-1] < losses[0] - 1.5
    file = dict(read_tensors(sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))[-1] / "model.safetensors"))
    name = "blocks.0.attention.qkv.weight"
    assert name not in file
    assert file[f"{name}.codes"].nbytes == 3 * 64 * 64 * (1 if weights == "int8" else 0.5)
    model = load_run_model(tmp_path / "whole").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    codes, scale = file["embedding.weight.codes"], file["embedding.weight.scale"]
    assert codes.dtype == torch.int8  # whatever the blocks have
    assert torch.equal(model.embedding.weight.flatten(), (codes.view(-1, BLOCK) * scale.unsqueeze(1)).flatten()[: 257 * 64])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_dry_run_counts_weights_and_states_as_the_run_does(tmp_path, capsys, monkeypatch, weights):
    stub_measurements(monkeypatch)
    settings = {"train.weight_dtype": weights, "train.steps": 2, "train.save_every": 0, "train.eval_every": 0}
    assert pretrain(tmp_path, "dry", "--dry_run", "--json", **settings) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]["components"]
    assert pretrain(tmp_path, "run", **settings) == 0
    counted = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["components"]
    assert {name: predicted[name] for name in ("weights", "optimizer_states")} == {
        name: counted[name] for name in ("weights", "optimizer_states")
    }


@pytest.mark.parametrize("overrides, message", [
    ({"engine.name": "deepspeed", "train.update": "accumulate"}, "does not work with engine.name=deepspeed"),
    ({"optim.name": "spectron"}, "does not work with optim.name=spectron"),
    ({"optim.backend": "bitsandbytes", "train.update": "accumulate"}, "does not work with optim.backend=bitsandbytes"),
    ({"train.precision": "fp16", "train.update": "accumulate"}, "does not work with train.precision=fp16 and update=accumulate"),
    ({"model.lorpt.rank": 4, "model.lorpt.schedule": "{2: 8}"}, "does not work with model.lorpt.schedule"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, overrides, message):
    assert pretrain(tmp_path, "refused", **{"train.weight_dtype": "int8", **overrides}) == 2
    captured = capsys.readouterr()
    assert f"train.weight_dtype=int8 {message}" in captured.err
    assert "Traceback" not in captured.err

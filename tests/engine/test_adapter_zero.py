"""Models of transformers and their adapters under ZeRO, on two ranks: the local engine's numbers, exact resume, NF4 below stage 3."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem.engine.local import LocalEngine
from tests.engine.deepspeed_cases import case, compare_checkpoints
from tests.engine.deepspeed_worker import GLOBAL_BATCH, launch, make_batch, make_model, run_config
from tests.reference.tiny_families import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
]
FILES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora"}}, "plus": {"adapter": {"method": "lora_plus"}, "activation_checkpointing": "block"},
    "prefix": {"adapter": {"method": "prefix", "num_virtual_tokens": 4}}, "full": {}, "last": {"adapter": {"method": "last_k"}},
}  # fmt: skip
# as in test_deepspeed_engine, with twice the width and depth; eps keeps AdamW from dividing roundings by roundings, where B begins at 0
OPTIM = {"lr": 1e-3, "eps": 1e-3}
TOLERANCE = 2e-5


def local_losses(of: dict[str, Any]) -> list[tuple[float, float]]:
    config = run_config({**of, "engine": {}})
    engine = LocalEngine(make_model(of), config.optim, device=torch.device("cpu"), precision="fp32", micro_batch_size=GLOBAL_BATCH)
    results = [engine.step(make_batch(step), config.optim.lr * (1 + step) / 20) for step in of["steps"]]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_two_ranks_compute_what_the_local_engine_computes(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path / "model", family)
    steps = list(range(8))
    cases = [
        case(file, f"{kind}", path=str(tmp_path / "model"), steps=steps, optim=OPTIM, **more)
        for kind, more in KINDS.items()
        for file in FILES
    ]
    expected = {
        kind: local_losses({"path": str(tmp_path / "model"), "steps": steps, "optim": OPTIM, **more}) for kind, more in KINDS.items()
    }
    for found in launch(cases, tmp_path / "out", 2, timeout_s=900):
        for one in cases:
            kind, result = one["name"].rpartition("-")[2], found[one["name"]]
            assert [skipped for _, _, skipped in result["steps"]] == [""] * len(steps), one["name"]
            for (loss, norm, _), (local_loss, local_norm) in zip(result["steps"], expected[kind], strict=True):
                assert loss == pytest.approx(local_loss, rel=TOLERANCE), one["name"]
                assert norm == pytest.approx(local_norm, rel=TOLERANCE), one["name"]
            assert math.isfinite(result["val_loss"])


def test_what_is_trained_is_saved_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    model = {"path": str(tmp_path / "model"), "adapter": {"method": "lora"}, "optim": OPTIM}
    files, cases = ["zero0", "zero2", "zero3"], []
    for file in files:
        whole, half, rest = (str(tmp_path / f"{file}-{part}") for part in ("whole", "half", "rest"))
        cases += [
            case(file, "whole", steps=[0, 1, 2, 3], save=whole, **model), case(file, "half", steps=[0, 1], save=half, **model),
            case(file, "rest", steps=[2, 3], load=half, save=rest, **model),
        ]  # fmt: skip
    found = launch(cases, tmp_path / "out", 2)[0]
    for file in files:
        assert found[f"{file}-whole"]["steps"][2:] == found[f"{file}-rest"]["steps"]
        compare_checkpoints(tmp_path / f"{file}-whole", tmp_path / f"{file}-rest")
        names = set(load_file(tmp_path / f"{file}-whole" / "model.safetensors"))
        assert names == set(make_model({**model, "steps": []}).saved_tensors())
        assert found[f"{file}-whole"]["memory"]["optimizer_states"] < 8 * 7424 + 1024


def test_nf4_is_trained_beside_below_stage_3(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_tiny(tmp_path / "model", "llama")
    more = {
        "path": str(tmp_path / "model"),
        "adapter": {"method": "lora"},
        "train": {"weight_dtype": "nf4"},
        "optim": OPTIM,
        "steps": [0, 1, 2],
    }
    cases = [case(file, "nf4", **more) for file in ("zero0", "zero1", "zero2")]
    expected = local_losses(more)
    for found in launch(cases, tmp_path / "out", 2):
        for one in cases:
            for (loss, norm, _), (local_loss, local_norm) in zip(found[one["name"]]["steps"], expected, strict=True):
                assert loss == pytest.approx(local_loss, rel=TOLERANCE), one["name"]
                assert norm == pytest.approx(local_norm, rel=TOLERANCE), one["name"]
